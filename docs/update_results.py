"""Put a grid's table and figure into docs/results.md: ``python docs/update_results.py runs/ablation-embedded``.

Run ``fastdeitlt ablate GRID --table`` first; both are taken from the grid's folder as they are.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

DOCS = Path(__file__).parent
BEGIN, END = "<!-- grid -->\n", "<!-- end of grid -->\n"


def where_and_with_what(grid: Path) -> str:
    """A line on the machine and the versions, from the runs' own records."""
    facts = [json.loads(file.read_text()) for file in sorted(grid.glob("*-seed*/env.json"))]
    devices = {fact["gpu"] or f"{fact['cpus']} CPU cores" for fact in facts}
    versions = {f"Python {f['python']}, torch {f['packages']['torch']}" for f in facts}
    commits = {(fact["commit"] or "no commit")[:7] for fact in facts}
    return f"{' / '.join(sorted(devices))}; {' / '.join(sorted(versions))}; commit {', '.join(sorted(commits))}.\n"


def main() -> None:
    """Replace what is between the marks."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("grid", type=Path, help="folder with results.md, results.svg and the runs")
    grid = parser.parse_args().grid
    page = DOCS / "results.md"
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or not (grid / "results.md").is_file():
        sys.exit(f"{page} has no marks, or {grid} no results.md; run `fastdeitlt ablate GRID --table` first")
    shutil.copyfile(grid / "results.svg", DOCS / "results.svg")
    table = (grid / "results.md").read_text(encoding="utf-8")
    figure = "![Accuracy of each arm: a dot a seed, a bar at their mean](results.svg)\n"
    page.write_text(f"{before}{BEGIN}{where_and_with_what(grid)}\n{table}\n{figure}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
