"""Put grids' tables and figures into these pages: ``python docs/update_results.py runs/ablation-embedded ...``.

Run ``fastdeitlt ablate GRID --table`` first; both are taken from each grid's folder as they are, and go between the
marks with the folder's name, in whichever page has them.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

DOCS = Path(__file__).parent
END = "<!-- end of grid -->\n"


def where_and_with_what(grid: Path) -> str:
    """A line on the machine and the versions, from the runs' own records."""
    facts = [json.loads(file.read_text()) for file in sorted(grid.glob("*-seed*/env.json"))]
    devices = {fact["gpu"] or f"{fact['cpus']} CPU cores" for fact in facts}
    versions = {f"Python {f['python']}, torch {f['packages']['torch']}" for f in facts}
    commits = {(fact["commit"] or "no commit")[:7] for fact in facts}
    return f"{' / '.join(sorted(devices))}; {' / '.join(sorted(versions))}; commit {', '.join(sorted(commits))}.\n"


def update(grid: Path) -> None:
    """Replace what is between the grid's marks."""
    mark = f"<!-- grid {grid.name} -->\n"
    page = next((page for page in sorted(DOCS.glob("*.md")) if mark in page.read_text(encoding="utf-8")), None)
    if page is None or not (grid / "results.md").is_file():
        sys.exit(f"no page has the marks, or {grid} no results.md; run `fastdeitlt ablate GRID --table` first")
    before, begin, rest = page.read_text(encoding="utf-8").partition(mark)
    _, end, after = rest.partition(END)
    if not end:
        sys.exit(f"{page}: {mark.strip()} has no {END.strip()}")
    shutil.copyfile(grid / "results.svg", DOCS / f"{grid.name}.svg")
    table = (grid / "results.md").read_text(encoding="utf-8")
    figure = f"![Accuracy of each arm: a dot a seed, a bar at their mean]({grid.name}.svg)\n"
    page.write_text(f"{before}{begin}{where_and_with_what(grid)}\n{table}\n{figure}{END}{after}", encoding="utf-8")


def main() -> None:
    """The grids that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("grids", type=Path, nargs="+", help="folders with results.md, results.svg and the runs")
    for grid in parser.parse_args().grids:
        update(grid.resolve())


if __name__ == "__main__":
    main()
