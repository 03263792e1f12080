"""Files and folders are whole or absent, and drafts do not stay."""

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


@pytest.mark.parametrize("make", [draft_file, draft_folder])
def test_a_block_that_raises_changes_nothing(tmp_path, make):
    path = tmp_path / "set"
    path.mkdir()
    with pytest.raises(OSError, match="full"), make(path):
        raise OSError("full")
    assert list(tmp_path.iterdir()) == [path]
