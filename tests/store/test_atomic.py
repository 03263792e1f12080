"""Files and folders are whole or absent, and drafts do not stay."""

import os

import pytest

from fastdeitlt.store.files import draft_file, draft_folder, write_atomically


def test_a_file_is_replaced_at_the_end_of_the_block(tmp_path):
    path = tmp_path / "facts.json"
    write_atomically(path, "old")
    with draft_file(path) as draft:
        draft.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_replaced_at_the_end_of_the_block(tmp_path):
    path, left = tmp_path / "set", tmp_path / "set.abc.tmp"
    left.mkdir()
    for text in ("old", "new"):
        with draft_folder(path) as draft:
            (draft / "pixels").write_text(text)
            assert text == "old" or (path / "pixels").read_text() == "old"
    assert (path / "pixels").read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_behind_a_link_is_replaced_and_keeps_its_permissions(tmp_path):
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    real.write_text("old")
    real.chmod(0o600)
    link.symlink_to(real)
    write_atomically(link, "new")
    assert link.is_symlink() and real.read_text() == "new" and real.stat().st_mode & 0o777 == 0o600


def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_atomically(pipe, "text")
    assert os.read(reader, 9) == b"text" and pipe.is_fifo()
    os.close(reader)


@pytest.mark.parametrize("make", [draft_file, draft_folder])
def test_a_block_that_raises_changes_nothing(tmp_path, make):
    path = tmp_path / "set"
    path.mkdir()
    with pytest.raises(OSError, match="full"), make(path):
        raise OSError("full")
    assert list(tmp_path.iterdir()) == [path]
