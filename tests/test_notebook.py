"""The example notebook runs from its first cell to its last."""

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "api.ipynb"


@pytest.fixture(scope="module")
def cells():
    book = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (book["nbformat"], book["metadata"]["kernelspec"]["name"]) == (4, "python3")
    return ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]


def test_every_cell_runs_and_the_last_one_starts_from_the_first_student(cells, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    names = {}
    for number, source in enumerate(cells):
        exec(compile(source, f"{NOTEBOOK.name} cell {number}", "exec"), names)  # noqa: S102 - cells of this repository
    assert {path.name for path in Path(names["folder"]).iterdir()} >= {"teacher", "student", "larger"}
    assert len(names["answers"]) == 3 and set(names["experts"]) == {"CLS", "DIST"}
    assert (names["model"].img_size, names["larger"].model.img_size) == (32, 48)
    assert tuple(names["logits"].shape) == (1, 10)
