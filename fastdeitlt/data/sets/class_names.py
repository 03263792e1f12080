"""Matching of classes by name, across splits, lists and models.

K classes.
"""

import unicodedata
from collections.abc import Iterable, Sequence

from fastdeitlt.errors import UserError

SHOWN = 3


def normalised(name: str) -> str:
    """Return a name in Unicode NFC: file systems differ in their form."""
    return unicodedata.normalize("NFC", name)


def is_utf8(name: str) -> bool:
    """Return whether a name from a file system, an archive or JSON is valid UTF-8."""
    return name.isascii() or not any("\ud800" <= character <= "\udfff" for character in name)


def listed(names: Iterable[str], shown: int = SHOWN) -> str:
    """Format the first few names in quotes and the number of the others."""
    names = list(names)
    more = f" and {len(names) - shown:,} more" if len(names) > shown else ""
    return ", ".join(map(repr, names[:shown])) + more


def match_names(
    names: Sequence[str], expected: Sequence[str], what: str, what_expected: str, subset: bool = False
) -> list[int]:
    """Return the index in ``expected`` of each name in ``names``.

    For equal classes a permutation of 0..K-1. With ``names`` the classes of a data set and ``expected`` those of a
    model, this is the model's class of each label.

    Args:
        what, what_expected: owners of the classes for the error message, such as "data folder x" and "model y".
        subset: allow ``names`` to lack some of the expected classes.

    Raises:
        UserError: a class without a match, or a name of several classes.
    """
    if list(names) == list(expected):
        return list(range(len(expected)))
    number = numbered(expected, what_expected)
    keys = numbered(names, what)
    unknown = [names[index] for key, index in keys.items() if key not in number]
    absent = [expected[index] for key, index in number.items() if key not in keys]
    if unknown or (absent and not subset):
        got = f"got {listed(unknown)}, not in {what_expected}" if unknown else ""
        expectation = f"expected {listed(absent)} of {what_expected}" if absent else ""
        differing = "; ".join(filter(None, (got, expectation)))
        raise UserError(f"{what}: classes differ by name, {differing}. Rename the classes to match.")
    return [number[key] for key in keys]


def numbered(names: Sequence[str], what: str) -> dict[str, int]:
    """Map each normalised name to its index.

    Raises:
        UserError: two classes have the same name.
    """
    number: dict[str, int] = {}
    for index, name in enumerate(names):
        if number.setdefault(normalised(name), index) != index:
            raise UserError(f"{what}: several classes are named {name!r}, expected different names. Rename one.")
    return number
