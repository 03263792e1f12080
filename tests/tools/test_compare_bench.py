"""The guard against slower code fails past the noise, and only then."""

import json
from pathlib import Path

import pytest

from benchmarks import compare


def row(candidate="ours", median=10.0, spread=0.1, **more):
    times = {"median_ms": median, "p20_ms": median - spread, "p80_ms": median + spread}
    return {"op": "step", "case": "tiny", "candidate": candidate, **times, **more}


def write(path, *rows):
    if path.suffix == ".json":
        path.write_text(json.dumps({"rows": rows}))
    else:
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


@pytest.mark.parametrize(("after", "code"), [(10.4, 0), (10.6, 1), (20.0, 1), (5.0, 0)])
@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_slower_than_the_noise_fails(tmp_path, capsys, kind, after, code):
    old, new = write(tmp_path / f"a.{kind}", row()), write(tmp_path / f"b.{kind}", row(median=after))
    assert compare.main([old, new]) == code
    assert ("SLOWER" in capsys.readouterr().out) == bool(code)


def test_the_rows_own_spread_widens_the_bound(tmp_path):
    old, new = write(tmp_path / "a.jsonl", row(spread=1.0)), write(tmp_path / "b.jsonl", row(median=11.5, spread=1.0))
    assert compare.main([old, new]) == 0
    assert compare.main([old, write(tmp_path / "c.jsonl", row(median=13.0, spread=1.0))]) == 1


def test_the_ratio_to_the_common_baseline_counts_when_the_machine_is_slower(tmp_path):
    def both(ours, timm):
        named = {"baseline": "timm"}
        return row("timm", timm, speedup=1.0, **named), row("ours", ours, speedup=timm / ours, **named)

    old = write(tmp_path / "a.jsonl", *both(10.0, 15.0))
    lines, bad = compare.compare(
        compare.read(Path(old)), compare.read(Path(write(tmp_path / "b.jsonl", *both(20.0, 30.0))))
    )
    assert [line.split()[0] for line in lines] == ["SLOWER", "same"] and bad == 1
    _, bad = compare.compare(
        compare.read(Path(old)), compare.read(Path(write(tmp_path / "c.jsonl", *both(14.0, 15.0))))
    )
    assert bad == 1


def test_the_last_of_several_rows_counts_and_a_vanished_one_fails(tmp_path):
    old = write(tmp_path / "a.jsonl", row(median=1.0), row())
    assert compare.main([old, write(tmp_path / "b.jsonl", row())]) == 0
    assert compare.main([old, write(tmp_path / "c.jsonl", row("other"))]) == 1


@pytest.mark.parametrize("text", ["", "not json", '{"op": 1}\n', "[]"])
def test_what_is_no_benchmark_file_is_code_2_in_one_line(tmp_path, capsys, text):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(text)
    assert compare.main([str(bad), write(tmp_path / "good.jsonl", row())]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "bad.jsonl" in said
