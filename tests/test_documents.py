"""Every command that the README, docs/ and the recipes show is one that the program takes."""

import re
import shlex
from pathlib import Path

import pytest

from fastdeitlt import cli, config
from fastdeitlt.data.sets.counts import CUT_SETS

ROOT = Path(__file__).parent.parent
PAGES = sorted(p for p in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("[ce]*/**/*.yaml")))
COMMAND = re.compile(r"(?:^(?:#\s*)?|`|-m )(fastdeitlt(?:\.cli)? [a-z-]+ [^`\n&|]*)", re.MULTILINE)


def commands(page: Path) -> list[str]:
    """The commands of a page, without those that hold a word in capitals for something to fill in."""
    found = [match.strip() for match in COMMAND.findall(page.read_text(encoding="utf-8").replace("\\\n", " "))]
    return [command for command in found if not re.search(r"(^|[\s=])[A-Z]+\b|\.\.\.", command)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_shown_commands_are_taken(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for command in commands(page):
        args = cli.parse(shlex.split(command, comments=True)[1:])
        if args.verb == "data" and args.action == "prepare":
            assert args.config in {source.archive for source in CUT_SETS.values()}
            assert args.root, command
        elif getattr(args, "config", None):
            config.load(args.config, args.overrides)
        elif args.verb == "ablate":
            config.find(args.grid)
        elif args.verb == "analyze" and args.what == "teacher" and "teacher" in str(args.runs[0]):
            assert args.recipe, f"{command}: a teacher needs --recipe"
        if getattr(args, "with_teacher", None):
            config.load(args.with_teacher)


def test_the_pages_show_commands():
    assert sum(len(commands(page)) for page in PAGES) > 50
