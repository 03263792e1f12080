"""Match classes by name: the splits of a data set, a list and its categories, a model and the images it scores.

K classes.
"""

import unicodedata
from collections.abc import Iterable, Sequence

from fastdeitlt.errors import UserError

SHOWN = 3


def normalised(name: str) -> str:
    """Return a name in Unicode NFC, the form in which names are compared: file systems differ in theirs."""
    return unicodedata.normalize("NFC", name)


def listed(names: Iterable[str], shown: int = SHOWN) -> str:
    """Return the first few names in quotes, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - shown:,} more" if len(names) > shown else ""
    return ", ".join(map(repr, names[:shown])) + more


def match_names(
    found: Sequence[str], expected: Sequence[str], what_found: str, what_expected: str, subset: bool = False
) -> list[int]:
    """Return the index in ``expected`` of each name in ``found``; for equal classes a permutation of 0..K-1.

    With ``found`` the classes of a data set and ``expected`` those of a model, this is the model's class of each label.

    Args:
        what_found, what_expected: what has these classes, for the error; such as "data folder x" and "model y".
        subset: accept a ``found`` that lacks some of the expected classes.

    Raises:
        UserError: a class of one side that the other lacks, or a name of several classes.
    """
    if list(found) == list(expected):
        return list(range(len(expected)))
    number = numbered(expected, what_expected)
    keys = numbered(found, what_found)
    unknown = [found[index] for key, index in keys.items() if key not in number]
    absent = [expected[index] for key, index in number.items() if key not in keys]
    if unknown or (absent and not subset):
        got = f"got {listed(unknown)}, not in {what_expected}" if unknown else ""
        wanted = f"expected {listed(absent)} of {what_expected}" if absent else ""
        differing = "; ".join(filter(None, (got, wanted)))
        raise UserError(f"{what_found}: classes differ by name, {differing}. Rename the classes to match.")
    return [number[key] for key in keys]


def numbered(names: Sequence[str], what: str) -> dict[str, int]:
    """Return normalised name -> index.

    Raises:
        UserError: a name of several classes.
    """
    number: dict[str, int] = {}
    for index, name in enumerate(names):
        if number.setdefault(normalised(name), index) != index:
            raise UserError(f"{what}: several classes are named {name!r}, expected different names. Rename one.")
    return number
