"""The benchmark harness: no numbers from a red op, ratios the right way round, rows that say where they come from."""

import json
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from benchmarks import harness
from fastdeitlt.core.measure import timer

CPU = torch.device("cpu")


def case():
    return harness.Case("tiny", {"a": lambda: None, "b": lambda: None}, baseline="b", useful_bytes=1000)


def test_every_candidate_is_timed_and_its_spread_contains_the_median():
    timings = harness.measure(case().candidates, CPU, rounds=4)
    assert set(timings) == {"a", "b"}
    assert all(0 < t.p20 <= t.median <= t.p80 and not t.graph for t in timings.values())


def test_a_candidate_twice_as_fast_as_the_baseline_has_speedup_two(monkeypatch):
    monkeypatch.setattr(harness, "bandwidth", lambda device: 1e6)
    timings = {"a": harness.Timing(1.0, 1.0, 1.0, False), "b": harness.Timing(2.0, 2.0, 2.0, False)}
    fast, slow = harness.rows("op", case(), timings, CPU)
    assert (fast["speedup"], slow["speedup"]) == (2.0, 1.0)
    assert fast["floor_ms"] == pytest.approx(1.0) and fast["share_of_floor"] == pytest.approx(1.0)
    assert slow["gb_per_s"] == pytest.approx(1000 / 2e-3 / 1e9)


@pytest.mark.parametrize(
    ("device", "seconds", "calls"),
    [("cuda", 1e-5, 199), ("cuda", 0.07, 5), ("cuda", 0.2, 3), ("cuda", 1.2, 1), ("cpu", 0.07, 1), ("cpu", 1e-9, 1000)],
)
def test_a_sample_has_few_of_long_calls(device, seconds, calls):
    """A pass over a data set five times a sample took the time of the stages after it."""
    assert timer._repeats(seconds, torch.device(device)) == pytest.approx(calls, abs=1)


def test_an_op_whose_tests_fail_gets_no_numbers(monkeypatch, capsys):
    monkeypatch.setattr(harness, "green", lambda op: False)
    monkeypatch.setattr(sys, "argv", ["bench"])
    assert harness.main("op", lambda device: [pytest.fail("measured")]) == 1
    assert "failed: not measured" in capsys.readouterr().err


@pytest.mark.parametrize("link", [None, "gitdir: elsewhere"], ids=["no history", "git fails"])
def test_a_copy_without_history_is_told_its_commit(link, monkeypatch, tmp_path):
    assert harness.machine()["commit"] not in ("", "unknown")
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    if link:
        (tmp_path / ".git").write_text(link)
    assert harness.machine()["commit"] == "unknown"
    monkeypatch.setenv("GIT_COMMIT", "abc123")
    assert harness.machine()["commit"] == "abc123"


def test_a_candidate_is_compiled_for_each_of_many_shapes(monkeypatch, tmp_path):
    graphs = CompileCounter()

    def cases(device):
        add = torch.compile(lambda x: x + 1, backend=graphs, dynamic=False)
        for size in range(2, 14):
            add(torch.ones(size))
        yield case()

    (tmp_path / "benchmarks").mkdir()
    for name, value in (("green", lambda op: True), ("bandwidth", lambda device: 1e6), ("ROOT", tmp_path)):
        monkeypatch.setattr(harness, name, value)
    monkeypatch.setattr(sys, "argv", ["bench", "--rounds", "1"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert harness.main("op", cases) == 0
    assert graphs.frame_count == 12


def test_a_missing_test_file_is_red():
    assert not harness.green("no_such_op")


def test_rows_carry_machine_and_versions_and_are_appended(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(harness, "green", lambda op: True)
    monkeypatch.setattr(harness, "bandwidth", lambda device: 1e6)
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench", "--rounds", "2"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "benchmarks").mkdir()
    assert harness.main("op", lambda device: [case()]) == harness.main("op", lambda device: [case()]) == 0
    (file,) = (tmp_path / "benchmarks" / "results").glob("op_*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["candidate"] for row in rows] == ["a", "b", "a", "b"]
    assert {"cpu", "torch", "triton", "python", "commit", "date", "median_ms", "p20_ms", "p80_ms"} <= set(rows[0])
    assert "no GPU: comparing only the torch implementations" in capsys.readouterr().out
