"""Classes are matched by name, and what differs is named."""

import pytest

from fastdeitlt.data.sets.class_names import listed, match_names
from fastdeitlt.errors import UserError

NFC, NFD = "caf\u00e9", "cafe\u0301"


def test_another_order_is_a_permutation():
    assert match_names(["boot", "bag", "trouser"], ["trouser", "boot", "bag"], "a", "b") == [1, 2, 0]


def test_unicode_forms_of_a_name_are_equal():
    assert match_names([NFD, "tea"], ["tea", NFC], "a", "b") == [1, 0]


def test_classes_that_differ_are_named_on_both_sides():
    with pytest.raises(UserError) as error:
        match_names(["bag", "coat"], ["bag", "trouser"], "data folder /x/test", "model m")
    assert str(error.value) == (
        "data folder /x/test: classes differ by name, got 'coat', not in model m; expected 'trouser' of model m. "
        "Rename the classes to match."
    )


def test_a_subset_is_accepted_only_when_allowed():
    assert match_names(["c", "a"], ["a", "b", "c"], "x", "y", subset=True) == [2, 0]
    with pytest.raises(UserError, match="expected 'b' of y"):
        match_names(["c", "a"], ["a", "b", "c"], "x", "y")
    with pytest.raises(UserError, match="got 'd', not in y; expected 'b' of y"):
        match_names(["a", "d"], ["a", "b"], "x", "y", subset=True)


def test_a_name_of_several_classes_is_refused():
    with pytest.raises(UserError, match=r"y: several classes are named 'cafe\u0301'"):
        match_names(["a"], [NFC, NFD], "x", "y", subset=True)


def test_long_lists_are_cut():
    assert listed("abcde") == "'a', 'b', 'c' and 2 more"
    assert listed("abc") == "'a', 'b', 'c'"
