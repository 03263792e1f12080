"""Insert tables and figures of ablation grids into the pages of docs/.

    fastdeitlt ablate ablation/embedded --table
    python docs/update_results.py runs/ablation-embedded ... [--curve runs/ablation-embedded/deit-lt-seed0]

Each grid's results.md and results.svg go between the markers with the name of its folder, in whichever page has them.
The validation accuracies of a run over its epochs go to the figure ``<grid>-curve.svg``.
"""

import argparse
import json
import shutil
import sys
import textwrap
from pathlib import Path

from fastdeitlt import config
from fastdeitlt.errors import counted
from fastdeitlt.reporting import figures

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


def curve(run: Path) -> None:
    """Draw validation accuracies of a student's average weights, and its teacher's, over the epochs of a run."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    scored = [r for r in records if (r["kind"], r.get("set"), r.get("weights")) == ("eval", "val", "ema")]
    epochs = [record["epoch"] + 1 for record in scored]
    lines = {head: (epochs, [record[f"{head.lower()}_all"] for record in scored]) for head in ("AVG", "CLS", "DIST")}
    cfg = config.load(str(run / "config.yaml"))
    if cfg.teacher.path:
        teacher = json.loads((Path(cfg.teacher.path) / "manifest.json").read_text(encoding="utf-8"))
        lines["TEACHER"] = ([0, epochs[-1]], [teacher["balanced_accuracy"]["val"]] * 2)
    svg = figures.curves(lines, "validation accuracy in %", figures.COLOURS, cfg.loss.drw_epoch)
    (DOCS / f"{run.parent.name}-curve.svg").write_text(str(svg), encoding="utf-8")


def main() -> None:
    """Update the pages with the grids given on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("grids", type=Path, nargs="*", help="folders with results.md, results.svg and the runs")
    parser.add_argument("--curve", type=Path, metavar="RUN", help="also draw this run's accuracy over epochs")
    options = parser.parse_args()
    for grid in options.grids:
        update(grid.resolve())
    if options.curve:
        curve(options.curve.resolve())


if __name__ == "__main__":
    main()
