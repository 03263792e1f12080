"""Insert tables and figures of ablation grids into the pages of docs/.

    fastdeitlt ablate ablation/embedded --table
    python docs/update_results.py runs/ablation-embedded ...

Each grid's results.md and results.svg go between the markers with the name of its folder, in whichever page has them.
"""

import argparse
import json
import shutil
import sys
import textwrap
from pathlib import Path

from fastdeitlt.errors import counted

DOCS = Path(__file__).parent
END = "<!-- end of grid -->\n"
COLUMNS = 120


def machine(grid: Path) -> str:
    """Return a line with devices, versions and commits of a grid's runs."""
    facts = [json.loads(file.read_text()) for file in sorted(grid.glob("*-seed*/env.json"))]
    devices = {fact["gpu"] or counted(fact["cpus"], "CPU core") for fact in facts}
    versions = {f"Python {f['python']}, torch {f['packages']['torch']}" for f in facts}
    commits = {(fact["commit"] or "no commit")[:7] for fact in facts}
    return f"{' or '.join(sorted(devices))}; {' or '.join(sorted(versions))}; commit {', '.join(sorted(commits))}.\n"


def wrapped(text: str) -> str:
    """Wrap the lines of a page that are not rows of a table."""
    lines = [[line] if line.startswith("|") else textwrap.wrap(line, COLUMNS) or [""] for line in text.splitlines()]
    return "".join(f"{part}\n" for parts in lines for part in parts)


def update(grid: Path) -> None:
    """Replace the text between a grid's markers.

    Raises:
        SystemExit: no page has the markers, or the grid has no results.
    """
    mark = f"<!-- grid {grid.name} -->\n"
    page = next((page for page in sorted(DOCS.glob("*.md")) if mark in page.read_text(encoding="utf-8")), None)
    if page is None or not (grid / "results.md").is_file():
        sys.exit(f"{grid}: no page has {mark.strip()}, or no results.md. Run `fastdeitlt ablate GRID --table` first.")
    before, begin, rest = page.read_text(encoding="utf-8").partition(mark)
    _, end, after = rest.partition(END)
    if not end:
        sys.exit(f"{page}: no {END.strip()} after {mark.strip()}. Add it.")
    shutil.copyfile(grid / "results.svg", DOCS / f"{grid.name}.svg")
    table = (grid / "results.md").read_text(encoding="utf-8")
    figure = f"![Accuracy of each arm: dots are seeds, bars are means]({grid.name}.svg)\n"
    generated = wrapped(f"{machine(grid)}\n{table}\n{figure}")
    page.write_text(f"{before}{begin}{generated}{END}{after}", encoding="utf-8")


def main() -> None:
    """Update the pages with the grids given on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("grids", type=Path, nargs="+", help="folders with results.md, results.svg and the runs")
    for grid in parser.parse_args().grids:
        update(grid.resolve())


if __name__ == "__main__":
    main()
