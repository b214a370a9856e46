"""What transfers inside an X-VLM cost, and how fast it is evaluated.

    python benchmarks/xvlm.py                                            one process, ZeRO-1
    deepspeed --num_accelerators 2 benchmarks/xvlm.py                    two ranks, which share the evaluation

Both sides of the ratio are measured in one run, in turns: `cycle` steps with a transfer each way, then `cycle` steps
without. Evaluated are the generated world's questions, or its captions.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist
import tyro
from measure import Figure, Turns, report

from hetero_kt import data
from hetero_kt.config import AdapterConfig, Data, Model, Optim, Schedule, Text, Transform
from hetero_kt.distributed import launch
from hetero_kt.distributed.learner import build_learner
from hetero_kt.methods.mergenet import Exchange, MergeNet, Site, Transfer
from hetero_kt.models import modality_values, xvlm
from hetero_kt.options import without_local_rank
from hetero_kt.tasks import task_of


@dataclass(frozen=True)
class Bench:
    """Options of this benchmark."""

    model: str = ""
    """Empty takes xvlm:small on a GPU and xvlm:mini on a CPU."""
    task: Literal["vqa", "captions"] = "vqa"
    image_size: int = 64
    batch: int = 16
    """Rows per rank."""
    cycle: int = 2
    turns: int = 10
    stage: int = 1
    json: str = ""
    """Also write the figures to this file."""


def main(bench: Bench) -> None:
    """Measure and print, on the first rank."""
    ranks = launch.start()
    on_gpu = ranks.device.type == "cuda"
    name = bench.model or ("xvlm:small" if on_gpu else "xvlm:mini")
    config = Data(
        bench.task,
        batch=bench.batch * ranks.world,
        image_size=bench.image_size,
        candidates=16,
        transform=Transform(scale=(1.0, 1.0), flip=0.0, squash=True),
        text=Text(data.GENERATED, length=24),
        workers=0,
    )
    task = task_of(bench.task)
    launch.seed_everything(0)
    words = data.tokenizer(config)
    module = xvlm.build(name, xvlm.TASKS[bench.task], vocabulary=words, image_size=bench.image_size)[0]
    model = Model(name, bench.task, optim=Optim("adamw", lr=1e-4), schedule=Schedule("constant"))
    zero = {"stage": bench.stage, "stage3_param_persistence_threshold": 0}
    learner = build_learner(module.to(ranks.device), model, zero, rows=bench.batch, steps=1_000_000)
    engine = learner.engine
    sites = tuple(Site(engine, weight, "svd") for weight in modality_values(name))
    how = AdapterConfig(heads=12, layers=2)
    there, back = Transfer(*sites, bench.cycle, how, name="v2t"), Transfer(*sites[::-1], bench.cycle, how, name="t2v")
    losses = {"xvlm": task.loss}
    with_transfer = MergeNet({"xvlm": learner}, Exchange([there, back]), losses)
    without = MergeNet({"xvlm": learner}, Exchange([]), losses)
    loader = data.open_loader(config, train=True, seed=0, rank=ranks.rank, world=ranks.world, device=ranks.device)
    batches = [loader.batch(step) for step in range(bench.cycle)]

    def steps(method: MergeNet) -> None:
        for step, batch in enumerate(batches):
            method.step(step, {"xvlm": batch})

    seen = data.open_loader(config, train=False, seed=0, rank=ranks.rank, world=ranks.world, device=ranks.device)

    def evaluation() -> None:
        task.evaluate(engine, seen, ranks.device, k=config.candidates)

    where = f"{name}, {bench.task}"
    turns = Turns(ranks.device).take(
        {"with": lambda: steps(with_transfer), "without": lambda: steps(without)}, bench.turns
    )
    beside = f"{bench.cycle} steps without transfer, {bench.batch} rows"
    note = f"a transfer each way every {bench.cycle} steps"
    figures = [turns.ratio(f"X-VLM step with transfers, {where}", "with", "without", beside, note=note)]
    evaluated = Turns(ranks.device).take({"evaluation": evaluation}, 3)
    items = seen.samples if bench.task == "vqa" else seen.captions
    speed = items / statistics.median(evaluated.wall["evaluation"])
    figures.append(Figure(f"X-VLM evaluation, {where}", speed, "items/s", f"{items} items, {ranks.world} rank(s)"))
    seconds = {"steps": turns.raw(), "evaluation": evaluated.raw()}
    report(f"transfers inside X-VLM, ZeRO-{bench.stage}, {ranks.world} rank(s)", figures, bench.json, seconds=seconds)
    dist.destroy_process_group()


if __name__ == "__main__":
    import sys

    main(tyro.cli(Bench, args=without_local_rank(sys.argv[1:])))
