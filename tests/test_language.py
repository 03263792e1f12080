"""The words of the program: banned phrases, and short first lines of docstrings."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("fastdeitlt", "kernels", "benchmarks", "examples")
CODE = {path: path.read_text(encoding="utf-8") for folder in FOLDERS for path in ROOT.glob(f"{folder}/**/*.py")}
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("[ce]*/**/*.yaml")]
TEXTS = CODE | {path: path.read_text(encoding="utf-8") for path in PAGES}
BANNED = (
    r"lies? (in|at|on|under|beside)",
    r"(go|goes|going) on",
    r"(asks?|asked) for",
    r"(is|are|be) told",
    r"told apart",
    r"tells",
    r"knows",
    r"wants",
    r"says",
    r"(has|have) come",
    r"(comes?|came) out",
    r"stands? for",
    r"what there is",
    r"of (its|their|one's) own",
    r"by heart",
    r"(leave|leaves|left) off",
    r"(give|gives|gave) up",
    r"made again",
    r"(bring|brings|put|puts) (it |them )?back",
    r"cannot be had",
    r"taken for",
    r"looks? (at|into)",
    r"(images|ms|GB) a (second|step|batch|call)",
    r"one a (row|class|rank|head|thread|process|shape)",
)
"""Turns of phrase that personify code, or bend a verb out of its trade meaning."""
PHRASE = re.compile(rf"\b(?:{'|'.join(BANNED)})\b", re.IGNORECASE)
LONGEST = 80


def banned(text: str) -> list[str]:
    """Return the banned phrases of a text; line breaks, also those of comments, count as spaces."""
    flat = re.sub(r"\s*\n\s*(# ?)?", " ", text)
    return [match[0] for match in PHRASE.finditer(flat)]


def long_first_lines(source: str) -> list[str]:
    """Return the first lines of function docstrings that are too long."""
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    lines = [(ast.get_docstring(function) or "").partition("\n")[0] for function in functions]
    return [line for line in lines if len(line) >= LONGEST]


def test_no_text_has_a_banned_phrase():
    phrases = {str(path): banned(text) for path, text in TEXTS.items()}
    assert {path: words for path, words in phrases.items() if words} == {}
    assert banned("# the file lies\n# in a folder, and the run goes on") == ["lies in", "goes on"]  # it can fail


def test_docstrings_open_with_a_short_line():
    lines = {str(path): long_first_lines(source) for path, source in CODE.items()}
    assert {path: long for path, long in lines.items() if long} == {}
    line = "Return " + "x" * LONGEST
    assert long_first_lines(f'def f():\n    """{line}\n\n    More.\n    """') == [line]
