"""What people read of names and messages: one line, no control characters, no formula of a spreadsheet."""

import copy
import errno

import pytest
import torch

from fastdeitlt.errors import UserError, counted, csv_name, is_memory_full, printable

EVIL = "\x1b]0;title\x07\x1b[2J\r\ncat\u202e\x9b1m\udcff"


def test_control_characters_are_escaped_and_letters_of_every_script_stay():
    assert printable(EVIL) == r"\x1b]0;title\x07\x1b[2J\r\ncat\u202e\x9b1m\udcff"
    assert printable("Käfer 甲虫 می‌شود 👩‍🔬 a\\b") == "Käfer 甲虫 می‌شود 👩‍🔬 a\\b"
    assert printable(printable(EVIL)) == printable(EVIL)


def test_an_error_is_one_line_on_every_rank():
    error = UserError(f"class {EVIL}: unknown")
    assert str(error).isprintable() and str(copy.copy(error)) == str(error)


@pytest.mark.parametrize("name", ["=cmd|' /C calc'!A0", "+1", "-1", "@SUM(A1)", "\tx", "\rx"])
def test_a_name_in_a_csv_cell_is_no_formula(name):
    assert csv_name(name) == f"'{printable(name)}"
    assert csv_name(f"a{name}") == f"a{printable(name)}"


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (MemoryError(), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), True),
        (RuntimeError("can't start new thread"), True),
        (torch.OutOfMemoryError("tried to allocate 1 PiB"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (KeyError("out of memory"), False),
    ],
)
def test_memory_that_is_refused_is_told_from_other_errors(error, full):
    assert is_memory_full(error) == full


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [
        (1, "rank", "1 rank"),
        (2, "class", "2 classes"),
        (1, "class", "1 class"),
        (1200, "micro-batch", "1,200 micro-batches"),
        (399, "epoch", "399 epochs"),
    ],
)
def test_one_of_a_thing_is_no_plural(number, noun, text):
    assert counted(number, noun) == text
