"""Readers of files that others may have written end in a value or in one clear line, whatever the bytes are."""

import hashlib
import json

import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fastdeitlt import config
from fastdeitlt.data.sets.lists import read_list
from fastdeitlt.errors import UserError
from fastdeitlt.models.saved import open_saved
from fastdeitlt.run.checkpoints import Checkpoints
from fastdeitlt.run.run_files import read_run
from fastdeitlt.store.checkpoint import load_tensors, read_manifest

fuzz = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
TREES = st.recursive(
    LEAVES, lambda t: st.lists(t, max_size=3) | st.dictionaries(st.text(max_size=8), t, max_size=3), max_leaves=8
)


def _read(read, *arguments):
    """What ``read`` returns, or None after an error of one line."""
    try:
        return read(*arguments)
    except UserError as error:
        assert str(error).strip() and "\n" not in str(error).strip()
        return None


def _json(tree):
    return json.dumps(tree).encode()


def _yaml(tree):
    return yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "replace")


def _record(epoch):
    return _json({"kind": "step", "step": 1, "epoch": epoch}) + b"\n"


@fuzz
@given(st.binary(max_size=60) | TREES.map(_json))
@example(b"[" * 100_000)
@example(b"\xff\xfe")
def test_any_manifest(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(content)
    assert _read(read_manifest, tmp_path) is None  # none of them is one


KNOWN = ("kind", "model", "step", "best", "class_map", "class_names", "class_counts", "preprocess", "files", "dataset")


@fuzz
@given(st.dictionaries(st.sampled_from(KNOWN), TREES, min_size=1, max_size=3), st.integers(0, 3))
@example({"model": {"name": "deit_tiny_distilled_patch16_32", "num_classes": -1, "img_size": 32}}, 0)
@example({"model": {"name": "../x", "num_classes": 10**12, "img_size": 32, "depth": 10**9}}, 1)
@example({"preprocess": {"mean": [], "std": [0, 0, 0], "img_size": 0, "crop_pct": 0}}, 2)
@example({"kind": "teacher"}, 0)
def test_a_manifest_with_true_hashes_and_false_facts(tmp_path, facts, which):
    folder = tmp_path / "step-00000003"
    folder.mkdir(exist_ok=True)
    weights = folder / "model.safetensors"
    weights.write_bytes(b"\x02\0\0\0\0\0\0\0{}")  # safetensors without a tensor
    files = {weights.name: {"sha256": hashlib.sha256(weights.read_bytes()).hexdigest(), "bytes": 10}}
    (folder / "manifest.json").write_text(json.dumps({"format": "fastdeitlt", "files": files, **facts}))
    if which < 2:
        _read(open_saved, folder)
    else:
        found = _read(Checkpoints(tmp_path).newest)
        assert found is None or (isinstance(found[1]["step"], int) and "best" in found[1])
        for aside in tmp_path.glob("*.damaged-*"):
            aside.rename(folder)


@fuzz
@given(st.binary(max_size=80))
@example(b"\xff" * 8 + b"{}")
def test_any_tensor_file(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    _read(load_tensors, tmp_path)


LINES = st.lists(
    st.tuples(
        st.text(max_size=12) | st.just("a.png"), st.sampled_from([" ", ",", "\t"]), st.text(max_size=5) | st.just("1")
    ),
    max_size=5,
).map(lambda rows: "\n".join("".join(row) for row in rows).encode("utf-8", "replace"))


@fuzz
@given(st.binary(max_size=60) | LINES | TREES.map(_json), st.sampled_from(["txt", "csv", "json"]))
@example(b"../../etc/passwd 0\n", "txt")
@example(b"a.png 99999999999999999999\n", "txt")
@example(b"a.png -1\n", "txt")
@example(b"[" * 100_000, "json")
@example(
    _json({"images": [{"id": [], "file_name": 3}], "annotations": [{"image_id": {}, "category_id": 1e99}]}), "json"
)
def test_any_list(tmp_path, content, kind):
    path = tmp_path / f"list.{kind}"
    path.write_bytes(content)
    found = _read(read_list, str(path), str(tmp_path))
    assert found is None or len(found.labels) == len(found.paths)


@fuzz
@given(st.binary(max_size=60) | TREES.map(_yaml))
@example(b"[" * 100_000)
@example(b"a: &a [*a]")
@example(b"train: {epochs: 1.0e400}")
@example(b"{1: 2, [3]: 4}")
def test_any_config(tmp_path, content):
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    found = _read(config.load, str(path))
    assert found is None or config.load(str(path)) == found


@fuzz
@given(st.sampled_from(config.FIELDS), LEAVES | TREES | st.text(max_size=20))
@example("train.epochs", "[" * 5000)
def test_any_override(name, value):
    _read(config.load, "quickstart", [f"{name}={value}"])


@fuzz
@given(
    st.sampled_from(["metrics.jsonl", "results.json", "env.json", "config.yaml"]),
    st.binary(max_size=60) | TREES.map(_json) | TREES.map(_record),
)
@example("metrics.jsonl", b'{"kind": "step"}\n')
@example("metrics.jsonl", b"[" * 100_000 + b"\n")
def test_any_run_folder(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    try:
        _read(read_run, tmp_path)
    finally:
        (tmp_path / name).unlink()
