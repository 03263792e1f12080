"""`analyze teacher`: what a student is taught on its own images, how flat the teacher is, its feature rank."""

from collections.abc import Sequence
from pathlib import Path


def main(runs: Sequence[str], overrides: Sequence[str], *, recipe: str | None, images: int, json: Path | None) -> None:
    """Diagnose each teacher, print the tables, and write them."""
