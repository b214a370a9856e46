"""What benchmarks count and compare is right; all of them run, from the one entry to the table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import bench  # noqa: E402
from measure import Collectives, Figure, Turns, absent, cells, draw, peak_memory, read, report  # noqa: E402

CPU = torch.device("cpu")


def test_sides_take_turns_and_their_ratio_is_the_median_of_the_turns() -> None:
    order: list[str] = []
    turns = Turns(CPU).take({"slow": lambda: order.append("slow"), "fast": lambda: order.append("fast")}, 3, warm=1)
    assert order[2:] == ["slow", "fast", "fast", "slow", "slow", "fast"]
    assert [len(times) for times in turns.seconds.values()] == [3, 3]
    turns.processor |= {"slow": [2.0, 4.0, 3.0], "fast": [1.0, 1.0, 1.0]}
    turns.wall |= {"slow": [4.0, 80.0, 6.0], "fast": [1.0, 10.0, 1.0]}  # other work on the machine
    figure = turns.ratio("what", "slow", "fast", "the fast one", aim=3.5)
    assert (figure.value, figure.low, figure.high, figure.wall) == (3.0, 2.5, 3.5, 6.0)
    assert figure.beside == "the fast one, 1.00 s"
    elsewhere = Turns(CPU, elsewhere=True)
    elsewhere.wall |= turns.wall
    figure = elsewhere.ratio("what", "slow", "fast", "the fast one")
    assert (figure.value, figure.wall) == (6.0, None)


def test_a_turn_is_timed_with_all_that_it_does() -> None:
    turns = Turns(CPU).take({"sleeps": lambda: time.sleep(0.05)}, 2, warm=0)
    assert min(turns.wall["sleeps"]) >= 0.05
    assert max(turns.seconds["sleeps"]) < 0.05


@pytest.mark.parametrize(
    ("value", "aim", "exact", "met"),
    [
        (1.04, 1.05, False, True),
        (1.06, 1.05, False, False),
        (8.0, 8.0, True, True),
        (7.0, 8.0, True, False),
        (1.0, None, False, None),
        (float("nan"), 1.0, False, None),
    ],
)
def test_an_aim_is_met_missed_or_not_there(value: float, aim: float | None, exact: bool, met: bool | None) -> None:
    figure = Figure("what", value, "x", "", aim, exact=exact)
    assert figure.met is met
    assert cells(figure)[-1] == {True: "met", False: "missed", None: ""}[met]


def sends() -> tuple[dict[str, int], dict[str, int], int]:
    ones = torch.ones(6)
    with Collectives() as counted:
        dist.all_reduce(ones)
        dist.all_gather_into_tensor(torch.empty(12), ones)
        dist.broadcast(torch.ones(2, dtype=torch.float64), 0)
        dist.barrier()
    dist.all_reduce(ones)
    return dict(counted.calls), dict(counted.bytes), counted.volume()


def test_collectives_are_counted_with_what_every_rank_holds_afterwards(ranks: Any) -> None:
    for calls, size, volume in ranks(2).run(sends):
        assert calls == {"allreduce": 1, "allgather": 1, "broadcast": 1}
        assert size == {"allreduce": 24, "allgather": 48, "broadcast": 16}
        assert volume == 2 * 24 + 48 + 16


def test_peak_memory_is_what_was_held_at_once() -> None:
    held = torch.ones(1 << 20)
    with peak_memory(CPU) as peak:
        for _ in range(3):
            torch.empty(1 << 20)
        kept = torch.empty(1 << 18), torch.empty(1 << 20)
    assert len(kept) + held.numel() > 2  # both are alive until here
    assert peak.bytes == 4 * ((1 << 18) + (1 << 20))


def test_a_table_goes_to_a_file_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = [
        Figure("step, ours", 1.25, "x", "theirs, 3.0 ms", 1.2, low=1.2, high=1.3, wall=1.1, note="four rows"),
        Figure("gathered", 466_944, "B", "fewest", 466_944, exact=True),
        absent("beside a peer", "peer", 1.0, "not installed"),
    ]
    report("title", figures, str(tmp_path / "figures.json"), rows=4)
    shown = capsys.readouterr().out
    for text in ("1.250 x", "1.20 to 1.30", "missed", "466,944 B", "met", "not measured", "four rows", "not installed"):
        assert text in shown
    again, content = read(tmp_path / "figures.json")
    assert again[:2] == figures[:2]
    assert again[2].value != again[2].value
    assert (content["rows"], content["device"]) == (4, "cpu")
    json.loads((tmp_path / "figures.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    draw(figures, tmp_path / "figures.png", "title")
    assert (tmp_path / "figures.png").read_bytes().startswith(b"\x89PNG")


def test_a_part_that_fails_is_a_row_and_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "PARTS", {"odd": bench.Part("no_such_file.py")})
    with pytest.raises(SystemExit, match="did not end well: odd"):
        bench.main(bench.Bench(only=("odd",), out=str(tmp_path)))
    (row,) = json.loads((tmp_path / "bench.json").read_text())["figures"]
    assert (row["what"], row["value"]) == ("odd: did not end well", None)
    assert "no_such_file.py" in row["note"]


def test_parts_that_are_not_run_again_keep_their_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report("before", [Figure("step", 1.5, "x", "theirs")], str(tmp_path / "kept.json"))
    monkeypatch.setattr(bench, "PARTS", {"kept": bench.Part("kept.py"), "odd": bench.Part("no_such_file.py")})
    with pytest.raises(SystemExit):
        bench.main(bench.Bench(only=("odd",), out=str(tmp_path)))
    rows = json.loads((tmp_path / "bench.json").read_text())["figures"]
    assert [row["what"] for row in rows] == ["step", "odd: did not end well"]


def test_an_unknown_part_is_one_sentence_that_names_the_others(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--only exchanges is no part: use any of exchange, loop"):
        bench.main(bench.Bench(only=("exchanges",), out=str(tmp_path)))


def run_all(folder: Path, env: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "benchmarks" / "bench.py"), "--quick", "--out", str(folder)]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1500)
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-2000:]
    content: dict[str, Any] = json.loads((folder / "bench.json").read_text())
    return content


@pytest.mark.slow
def test_every_benchmark_runs_and_fills_one_table(tmp_path: Path) -> None:
    content = run_all(tmp_path, dict(os.environ))
    rows = {row["what"].partition(",")[0]: row for row in content["figures"]}
    assert set(content["parts"]) == {"exchange", "loop", "fbt", "kd", "sharding", "pipeline", "startup", "xvlm"}
    for what in ("gathered per transfer", "ours per step between transfers", "KD step at ZeRO-0 beside timm's"):
        assert rows[what]["value"] is not None
    exact = [row for row in content["figures"] if row["exact"]]
    assert len(exact) == 9
    assert all(row["value"] == row["aim"] for row in exact)
    assert (tmp_path / "bench.png").stat().st_size > 10_000
    assert "met" in (tmp_path / "bench.txt").read_text()


@pytest.mark.gpu
def test_the_benchmarks_measure_on_the_gpu(tmp_path: Path) -> None:
    here = {k: v for k, v in os.environ.items() if k not in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES")}
    parts = run_all(tmp_path, here)["parts"]
    assert all(parts[name]["device"] != "cpu" for name in ("exchange", "loop", "fbt", "kd", "xvlm"))
