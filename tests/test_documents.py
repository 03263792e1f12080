"""Documents agree with the program: commands, links, versions, length of lines."""

import importlib
import re
import shlex
import tomllib
from pathlib import Path

import pytest

import fastdeitlt
from fastdeitlt import __version__, cli, config
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


DOCUMENTS = [page for page in PAGES if page.suffix == ".md"]


def broken_links(page: Path, text: str) -> list[str]:
    """Return the relative links of a page whose file does not exist."""
    links = re.findall(r"\]\(([^)\s#]+)[^)]*\)", text)
    return [link for link in links if "://" not in link and not (page.parent / link).exists()]


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    text = page.read_text(encoding="utf-8")
    assert broken_links(page, text) == []
    assert broken_links(page, f"{text} [gone](no/such/file.md#part)") == ["no/such/file.md"]


def test_the_newest_release_has_one_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    releases = re.findall(r"^## (\S+) - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert {project["version"], releases[0]} == {__version__}


def false_entries(text: str) -> list[str]:
    """Return the names of a "file | name | change" table that their file lacks, and files that do not exist."""
    missing = []
    for files, names in re.findall(r"^\| (`\S+/\S+`[^|]*|`\w+\.md`) \| ([^|]+) \|", text, re.MULTILINE):
        for file in re.findall(r"`([^`]+)`", files):
            held = (ROOT / file).read_text(encoding="utf-8") if (ROOT / file).is_file() else ""
            missing += [f"{file}: {name}" for name in re.findall(r"`([^`]+)`", names) if name not in held]
    return missing


def test_recipes_for_contributors_name_what_is_there():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert false_entries(text) == []
    for name, file in (("VERBS", "cli.py"), ("DEFAULT_LISTS", "splits.py")):
        assert any(entry.endswith(f"{file}: NO_{name}") for entry in false_entries(text.replace(name, f"NO_{name}")))


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_named_in_documents_exist(page):
    named = re.findall(
        r"`((?:fastdeitlt|kernels|benchmarks|configs|tests|docs|examples)/[\w./-]+\.\w+)`", page.read_text()
    )
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_api_page_is_complete_and_names_what_is_there():
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert [name for name in fastdeitlt.__all__ if not re.search(rf"^\|.*`{name}\b", text, re.MULTILINE)] == []
    parts = re.findall(r"^\| `(fastdeitlt\.\w[\w.]*)`[^|]*\| (`.+) \|$", text, re.MULTILINE)
    assert len(parts) == 8
    for module, names in parts:
        loaded = importlib.import_module(module)
        assert [name for name in re.findall(r"`(\w+)", names) if not hasattr(loaded, name)] == []


def test_tests_named_in_documents_exist():
    defined = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py"))
    for page in DOCUMENTS:
        named = re.findall(r"::(test_\w+)", page.read_text(encoding="utf-8"))
        assert [name for name in named if f"def {name}(" not in defined] == [], page


def long_lines(text: str) -> list[str]:
    """Return the lines of over 120 columns outside tables."""
    return [line for line in text.splitlines() if len(line) > 120 and not line.startswith("|")]


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_fit_into_120_columns(page):
    assert long_lines(page.read_text(encoding="utf-8")) == []
    assert long_lines(f"{'x' * 121}\n| {'x' * 121} |") == ["x" * 121]


def test_the_readme_is_short_and_every_page_is_in_the_index():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages == set(re.findall(r"\]\((\w+\.md)\)", index))
