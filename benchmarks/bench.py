"""Every benchmark, one after another, and one table of all figures beside floor, peer and aim.

    make bench                                   everything, about six minutes on two cores
    python benchmarks/bench.py --only kd fbt     some of it
    python benchmarks/bench.py --quick           the same path with tiny models: figures mean nothing

A GPU is used where there is one. What is counted between two ranks is counted on the CPU where there are fewer than two
GPUs: the counts are the same. Writes `bench.json`, `bench.txt` and `bench.png` to the folder `out`.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from measure import Figure, about, absent, between, cells, draw, read, show

HERE = Path(__file__).resolve().parent
LIMIT = 1200
"""Seconds after which a part is given up."""


@dataclass(frozen=True)
class Part:
    """One script."""

    script: str
    quick: tuple[str, ...] = ()
    """Options with which it takes seconds."""
    ranks: int = 1


def _options(text: str) -> tuple[str, ...]:
    return tuple(text.split())


TINY = "--source cifar:resnet_tiny --target cifar:mobilenetv2_tiny --rank 4"
PARTS = {
    "exchange": Part(
        "exchange.py",
        _options(
            f"{TINY} --source-weights fc.weight layer4.0.conv1.weight --turns 1 --batch 2"
            " --target-weights blocks.2.1.conv_pwl.weight classifier.weight"
        ),
    ),
    "loop": Part("loop.py", _options("--model cifar:resnet_tiny --batch 4 --segment 4 --turns 2")),
    "fbt": Part("fbt.py", _options("--turns 1 --batch 2 --pairs resnet18:deit_tiny_patch16_224")),
    "kd": Part("kd.py", _options("--turns 1 --batch 2")),
    "sharding": Part(
        "sharding.py",
        _options(f"{TINY} --target-weight blocks.2.1.conv_pwl.weight --teacher timm:deit_tiny_patch16_224"),
        ranks=2,
    ),
    "pipeline": Part("pipeline.py", _options("--turns 1 --small 64 --large 8 --batch 4")),
    "startup": Part("startup.py", _options("--turns 1")),
    "xvlm": Part("xvlm.py", _options("--turns 1 --batch 2")),
}


@dataclass(frozen=True)
class Bench:
    """Options of all benchmarks."""

    only: tuple[str, ...] = tuple(PARTS)
    """Parts to run; of the others, the table has what lies in `out` from before."""
    quick: bool = False
    """Tiny models, one turn: to see that everything runs."""
    out: str = "runs/bench"
    """Folder for the tables and the picture."""


def main(bench: Bench) -> None:
    """Run the parts, print and write the table; ends with status 1 if a part did not end well."""
    unknown = [name for name in bench.only if name not in PARTS]
    if unknown:
        raise SystemExit(f"--only {unknown[0]} is no part: use any of {', '.join(PARTS)}")
    out = Path(bench.out)
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    figures: list[Figure] = []
    parts: dict[str, Any] = {}
    for name, part in PARTS.items():
        file = out / f"{name}.json"
        if name in bench.only:
            found, parts[name] = _run(name, part, bench.quick, file)
        elif file.is_file():
            found, parts[name] = read(file)
        else:
            continue
        figures += found
    where = {**about(), "took": round(time.perf_counter() - started, 1)}
    commits = sorted({part["commit"] for part in parts.values() if "commit" in part})
    title = f"{where['device']}, {where['machine']}, commit {' and '.join(commits)}"
    rows = [dataclasses.asdict(one) | {"value": one.value if one.value == one.value else None} for one in figures]
    (out / "bench.json").write_text(
        json.dumps({**where, "figures": rows, "parts": {k: _behind(v) for k, v in parts.items()}}, indent=1) + "\n"
    )
    with (out / "bench.txt").open("w") as text:
        show(title, figures, file=text)
    draw(figures, out / "bench.png", title)
    print()
    show(title, figures)
    missed = [one for one in figures if one.met is False]
    print(f"\n{sum(one.met is True for one in figures)} aims met, {len(missed)} missed{':' if missed else '.'}")
    for one in missed:
        what, value, *_, aim, _ = cells(one)
        print(f"  {what}: {value}, aim {aim}")
    print(f"written to {out}/bench.json, bench.txt and bench.png")
    failed = [name for name, part in parts.items() if "error" in part]
    if failed:
        raise SystemExit(f"did not end well: {', '.join(failed)}")


def _behind(part: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in part.items() if key not in ("figures", "versions", "machine", "python")}


def _run(name: str, part: Part, quick: bool, file: Path) -> tuple[list[Figure], dict[str, Any]]:
    """One part in processes of its own: its figures, and what else its file says."""
    command, env = between(part.ranks)
    command += [str(HERE / part.script), "--json", str(file), *(part.quick if quick else ())]
    file.unlink(missing_ok=True)
    print(f"{name} ...", flush=True)
    begun = time.perf_counter()
    try:
        ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=LIMIT)
        error = ended.stderr[-3000:] if ended.returncode else ""
    except subprocess.TimeoutExpired:
        error = f"not done after {LIMIT} s"
    if error:
        print(error, flush=True)
        return [absent(f"{name}: did not end well", "", None, error.strip().splitlines()[-1])], {"error": error}
    figures, content = read(file)
    show(content["title"], figures)
    content["took"] = round(time.perf_counter() - begun, 1)
    file.write_text(json.dumps(content, indent=1) + "\n")
    return figures, content


if __name__ == "__main__":
    main(tyro.cli(Bench))
