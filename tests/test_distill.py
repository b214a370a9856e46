"""Whole distillation runs: what they train, save, go on from and leave behind; and what they refuse to start."""

from __future__ import annotations

import copy
import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import refusal
import test_fbt as plain
import timm
import tiny
import torch
import torch.distributed as dist
from refusal import Ended, assert_refused
from rounding import Nudge, assert_close, movement, result_of
from safetensors.torch import load_file, save_file
from test_fbt import CLASSES, ROWS, SIZE, frozen, rows_of, zero
from test_launchers import LAUNCHERS, load
from timm.models.resnet import Bottleneck, ResNet
from timm.models.vision_transformer import VisionTransformer
from tiny import Plan
from torch import Tensor, nn
from torch.nn import functional as F

from hetero_kt import config, data, models, options
from hetero_kt import run as running
from hetero_kt.config import Data, Distill, Mix, Model, Optim, Schedule, Teacher, Transform
from hetero_kt.data import Loader
from hetero_kt.distributed import params
from hetero_kt.distributed.launch import Ranks, StopSignal
from hetero_kt.distributed.learner import build_learner
from hetero_kt.distributed.saved import Saved, SavedModel
from hetero_kt.folder import run_folder
from hetero_kt.methods import distill, objectives
from hetero_kt.methods.fbt import FBT
from hetero_kt.models.teacher import Frozen
from hetero_kt.nn.losses.memory import Memory, Negatives
from hetero_kt.nn.stages import Stages, _statistics_kept, expose
from hetero_kt.options import Options
from hetero_kt.tasks.classification import evaluate

STRONG = Transform(rand_augment="rand-m9-mstd0.5-inc1", erasing=0.25)
EMA = 0.9

# --- going on ---


def everything(folder: Path, stage: int, workers: int) -> config.Recipe:
    """FBT with an average, accumulation, timm's pipeline and mixed labels."""
    pictures = Data("generated", batch=8, pipeline="timm", transform=STRONG, mix=Mix(0.8, 1.0), workers=workers)
    base = tiny.distillation(folder, stage, data={"all": pictures}, steps=4)
    return tiny.with_student(base, ema=EMA, micro_batch=2, label_smoothing=0.1)


@pytest.mark.parametrize(("stage", "workers"), [(1, 2), (3, 0)])
def test_resumed_and_stopped_runs_end_like_uninterrupted_ones(
    ranks: Any, tmp_path: Path, stage: int, workers: int
) -> None:
    whole = everything(tmp_path / "whole", stage, workers)
    uninterrupted = tiny.train(ranks(2), whole)
    parts = everything(tmp_path / "parts", stage, workers)
    folder = run_folder(parts)
    number = signal.SIGTERM if workers else signal.SIGUSR1
    stopped = tiny.train(ranks(2), parts, Options(), Plan(signals=((1, 1, number),)))
    assert [end["done"] for end in stopped] == [False, False]
    assert not (folder / "result.json").exists()
    resumed = tiny.train(ranks(2), parts)
    assert [(end["first_step"], end["done"]) for end in resumed] == [(2, True)] * 2
    tiny.assert_same_end(resumed, uninterrupted)
    assert [(end["moved"], end["teachers moved"]) for end in resumed] == [(True, False)] * 2
    assert tiny.lines(folder) == tiny.lines(run_folder(whole))
    exports = [load_file(run_folder(recipe) / "export" / "student_ema.safetensors") for recipe in (whole, parts)]
    tiny.assert_equal(*exports)


def test_a_mergenet_run_keeps_averages_too(ranks: Any, tmp_path: Path) -> None:
    def averaged(folder: Path) -> config.Recipe:
        base = tiny.recipe(folder, stage=2, steps=4)
        return replace(base, models={name: replace(model, ema=EMA) for name, model in base.models.items()})

    whole, parts = averaged(tmp_path / "whole"), averaged(tmp_path / "parts")
    uninterrupted = tiny.train(ranks(2), whole)
    tiny.train(ranks(2), parts, Options(max_steps=2))
    tiny.assert_same_end(tiny.train(ranks(2), parts), uninterrupted)
    views = {"resnet", "resnet_ema", "mobilenetv2", "mobilenetv2_ema"}
    assert {file.stem for file in (run_folder(parts) / "export").iterdir()} == views
    result = json.loads((run_folder(parts) / "result.json").read_text())
    assert result["metrics"].keys() == views
    assert result["metrics"]["resnet"] != result["metrics"]["resnet_ema"]
    for name in whole.models:
        check_average(run_folder(parts) / "export", name, uninterrupted)


# --- what is left behind ---


def check_average(folder: Path, name: str, ends: list[Any]) -> None:
    """The exported average is the learner's, of which each rank has its pieces, to the bit where there is nothing to
    multiply out."""
    pieces = [end["averages"][name][1] for end in ends]
    exported = load_file(folder / f"{name}_ema.safetensors")
    own = load_file(folder / f"{name}.safetensors")
    shared = [key for key in pieces[0] if key in exported]
    assert shared
    for key in shared:  # of ZeRO 1 and 3 on ranks in their order
        assert torch.equal(torch.cat([piece[key] for piece in pieces]), exported[key].flatten())
    assert any(not torch.equal(exported[key], own[key]) for key in shared)


@pytest.mark.parametrize("stage", [1, 3])
def test_student_and_connector_are_saved_and_the_student_alone_is_exported(
    ranks: Any, tmp_path: Path, stage: int
) -> None:
    recipe = tiny.with_student(tiny.distillation(tmp_path, stage, steps=2), ema=EMA)
    ends = tiny.train(ranks(2), recipe, Options(), Plan(logits=True))
    folder = run_folder(recipe)

    saved = folder / "checkpoints" / "2"
    assert {path.name for path in saved.iterdir()} == {
        "DONE",
        *(f"rank{r}.{e}" for r in (0, 1) for e in ("json", "safetensors")),
    }
    with Saved(saved) as found:
        assert {model for model, _, _ in found.wholes} == {"student", "fused"}
        kinds = {"weight", "momentum_buffer", "average"}
        assert {kind for model, kind, _ in found.wholes if model == "student"} == kinds, "one moment for each weight"
        for model in ("student", "fused"):
            weights = SavedModel(found, model)
            assert all(torch.equal(weights.whole("weight", key), w) for key, w in ends[0][model].items())
            assert weights.shapes.keys() == ends[0][model].keys()
    tensors = [t.flatten().float() for rank in (0, 1) for t in load_file(saved / f"rank{rank}.safetensors").values()]
    numbers = torch.cat(tensors)
    teacher = load_file(tmp_path / "teacher.safetensors")
    theirs = torch.cat([w.flatten() for w in teacher.values() if w.is_floating_point() and w.ndim > 1])
    assert torch.isin(theirs, numbers).float().mean() < 0.1, "some of 16 million numbers agree by chance"

    exported = folder / "export"
    assert {file.name for file in exported.iterdir()} == {"student.safetensors", "student_ema.safetensors"}
    check_average(exported, "student", ends)
    measured = json.loads((folder / "result.json").read_text())
    assert measured["metrics"].keys() == {"student", "student_ema"}
    assert measured["teachers"].keys() == {"teacher"}
    assert measured["added_parameters"]["fused"] == sum(w.numel() for w in ends[0]["fused"].values())
    for view, metrics in measured["metrics"].items():
        fresh = models.build("cifar:resnet_tiny", 100)
        fresh.load_state_dict(load_file(exported / f"{view}.safetensors"), strict=True)
        fresh.eval()
        if view == "student":
            with torch.no_grad():
                torch.testing.assert_close(fresh(tiny.pictures()), ends[0]["logits"]["student"], rtol=1e-5, atol=1e-6)
        test = Loader(data.load(recipe.data["all"], train=False), 8, 0, (), 0, 1, torch.device("cpu"))
        assert evaluate(fresh, test, "cpu") == pytest.approx(metrics, rel=1e-5)
    known = models.build("cifar:swin_tiny", 100, init=str(tmp_path / "teacher.safetensors")).eval()
    assert evaluate(known, test, "cpu") == pytest.approx(measured["teachers"]["teacher"], rel=1e-5)
    assert not any(end["teachers moved"] for end in ends)


# --- baselines against one plain process ---

Terms = Callable[[Stages, Stages, Any, Tensor, Tensor], dict[str, Tensor]]


def kd_terms(student: Stages, teacher: Stages, aside: Any, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    answer, known = run_stages(student, x), known_of(teacher, x)
    q, p = (answer["logits"] / 3).log_softmax(1), (known["logits"] / 3).softmax(1)
    taught = 3**2 * (p * (p.log() - q)).sum(1).mean()
    return {"student/loss": F.cross_entropy(answer["logits"], y), "teacher_to_student/kd_loss": 2 * taught}


def ofa_terms(student: Stages, teacher: Stages, aside: Any, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    answer, p = run_stages(student, x), known_of(teacher, x)["logits"].softmax(1)
    right = F.one_hot(y, CLASSES)
    weight = (p + right) ** 1.5 - right
    early = [-(weight * logits.log_softmax(1)).sum(1).mean() for logits in aside(answer["stages"])]
    return {
        "student/loss": F.cross_entropy(answer["logits"], y),
        "teacher_to_student/ofa_loss": -(weight * answer["logits"].log_softmax(1)).sum(1).mean(),
        "teacher_to_branches/ofa_loss": 0.5 * sum(early),  # type: ignore[dict-item]
    }


def fitnet_terms(student: Stages, teacher: Stages, aside: Any, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    answer = run_stages(student, x)
    compared = aside["teacher"](answer, known_of(teacher, x))
    return {"student/loss": F.cross_entropy(answer["logits"], y), "teacher_to_student/fitnet_loss": 0.5 * compared}


def rkd_terms(student: Stages, teacher: Stages, aside: Any, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    answer, known = run_stages(student, x), known_of(teacher, x)
    found = {"student/loss": F.cross_entropy(answer["logits"], y)}
    for kind, weight in (("distance", 25), ("angle", 50)):
        relations = [relation(kind, one["pooled"]) for one in (answer, known)]
        found[f"teacher_to_student/{kind}_loss"] = weight * F.smooth_l1_loss(*relations)
    return found


def relation(kind: str, f: Tensor) -> Tensor:
    rows = range(len(f))
    if kind == "distance":
        d = torch.stack([(f[i] - f[j] + 1e-30).norm() for i in rows for j in rows if i != j])
        return torch.cat([d / d.mean(), d.new_zeros(len(f))])
    unit = {(i, j): (f[j] - f[i]) / (f[j] - f[i]).norm() for i in rows for j in rows if i != j}
    zero = f.new_zeros(f.shape[1])
    return torch.stack([unit.get((i, j), zero) @ unit.get((i, k), zero) for i in rows for j in rows for k in rows])


class DKDTerms:
    """Its warm-up is half of the run: it counts the calls."""

    calls = 0

    def __call__(self, student: Stages, teacher: Stages, aside: Any, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        risen = min((self.calls // 4 + 1) / (STEPS / 2), 1)
        self.calls += 1
        answer, known = run_stages(student, x), known_of(teacher, x)
        right = F.one_hot(y, CLASSES).bool()
        (b_s, q_s), (b_t, q_t) = (parted(one["logits"] / 4, right) for one in (answer, known))
        taught = 16 * ((b_t * (b_t / b_s).log()).sum() + 8 * (q_t * (q_t / q_s).log()).sum()) / len(y)
        return {
            "student/loss": F.cross_entropy(answer["logits"], y),
            "teacher_to_student/dkd_loss": risen * taught,
        }


def parted(logits: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities of right and wrong, and of the wrong ones among themselves."""
    p = logits.softmax(1)
    own = p[right].unsqueeze(1)
    return torch.cat([own, 1 - own], 1), p[~right].view(len(p), -1) / (1 - own)


def nkd_terms(student: Stages, teacher: Stages, aside: Any, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    answer, known = run_stages(student, x), known_of(teacher, x)
    right = F.one_hot(y, CLASSES).bool()
    p_s, p_t = answer["logits"].softmax(1)[right], known["logits"].softmax(1)[right]
    q_s, q_t = (parted(one["logits"] / 3, right)[1] for one in (answer, known))
    taught = -(p_t * p_s.log()).mean() - 3.5 * 9 * (q_t * q_s.log()).sum(1).mean()
    return {"student/loss": F.cross_entropy(answer["logits"], y), "teacher_to_student/nkd_loss": taught}


def tfkd_terms(student: Stages, teacher: Stages, aside: Any, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    answer = run_stages(student, x)
    u = (F.one_hot(y, CLASSES) * (0.99 - 0.01 / 9) + 0.01 / 9).div(20).softmax(1)
    taught = 400 * (u * (u.log() - (answer["logits"] / 20).log_softmax(1))).sum(1).mean()
    return {"student/loss": 0.05 * F.cross_entropy(answer["logits"], y), "student/tf_loss": 0.95 * taught}


def self_terms(student: Stages, teacher: Stages, aside: Any, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    answer, known = run_stages(student, x), known_of(teacher, x)
    p = (known["logits"] / 20).softmax(1)
    taught = 400 * (p * (p.log() - (answer["logits"] / 20).log_softmax(1))).mean()
    own = F.cross_entropy(answer["logits"], y)
    return {"student/loss": 0.05 * own, "teacher_to_student/kd_loss": 0.95 * taught}


def uskd_terms(student: Stages, teacher: Stages, aside: Any, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    answer = run_stages(student, x)
    feature = answer["stages"][2]
    pooled = feature.mean((2, 3)) if feature.ndim == 4 else feature[:, 1:].mean(1)
    weak = pooled @ aside.classifier.weight.T + aside.classifier.bias
    right = F.one_hot(y, CLASSES).bool()
    p = answer["logits"].softmax(1)
    square = p[right].detach().square()
    q, w = parted(answer["logits"], right)[1], parted(weak, right)[1]
    places = torch.arange(1, CLASSES).float()
    order = (q + w).argsort(1, descending=True)
    zipf = torch.empty_like(q).scatter_(1, order, (1 / places / (1 / places).sum()).expand_as(q))
    smooth = 0.9 * right + 0.1 / CLASSES
    return {
        "student/loss": F.cross_entropy(answer["logits"], y),
        "student/target_loss": -0.1 * ((square + 1 - square.mean()) * p[right].log()).mean(),
        "student/others_loss": -0.1 * (zipf * q.log()).sum(1).mean(),
        "head/weak_loss": -0.1 * (smooth * weak.log_softmax(1)).sum(1).mean(),
    }


SAMPLES, NEGATIVES = 20, 5
FCFD = config.FCFD(temperature=2, weight=0.3, paths=3, warmup=0.5)


class Rows:
    """An order of 20 samples, of which the second step's last rows are the first step's first."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world

    def rows(self, step: int) -> tuple[Any, Any]:
        samples = (step * ROWS + torch.arange(self.rank, ROWS, self.world)) % SAMPLES
        return samples.numpy() * 0, samples.numpy()


def drawn(rank: int, world: int) -> objectives.Drawn:
    return objectives.Drawn(Rows(rank, world), torch.arange(SAMPLES) % 3, 7)  # type: ignore[arg-type]


class CRDTerms:
    """With the paper's formula; called for two pieces of two ranks' rows, step by step."""

    def __init__(self) -> None:
        self.calls = 0
        self.memory = [side.clone() for side in Memory(SAMPLES, 6, 0.5, 7).sides]
        self.new: list[tuple[int, Tensor, Tensor]] = []

    def __call__(self, student: Stages, teacher: Stages, aside: Any, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        step, rank, piece = self.calls // 4, self.calls // 2 % 2, self.calls % 2
        self.calls += 1
        if piece == 0:
            self.generator = torch.Generator().manual_seed((7 * 1_000_003 + step) * 2 + rank)
        rows = torch.from_numpy(Rows(rank, 2).rows(step)[1]).chunk(2)[piece]
        wrong = Negatives(drawn(rank, 2).labels).draw(rows, NEGATIVES, self.generator)
        answer, known = run_stages(student, x), known_of(teacher, x)
        loss = torch.zeros(())
        for i, row in enumerate(rows.tolist()):
            ours = aside.student["teacher"](answer["pooled"][i])
            theirs = aside.teacher["teacher"](known["pooled"][i])
            both = [ours / ours.norm(), theirs / theirs.norm()]
            for own, other in zip(both, self.memory[::-1], strict=True):
                right, *others = ((own @ other[j] / 0.07).exp() for j in [row, *wrong[i].tolist()])
                share = NEGATIVES / SAMPLES
                loss = loss - (right / (right + share)).log() - sum((share / (s + share)).log() for s in others)
            self.new.append((row, both[0].detach(), both[1].detach()))
        if self.calls % 4 == 0:
            self.memory = [memory.clone() for memory in self.memory]  # the backward needs the old one
            for row, *both in self.new:
                for memory, new in zip(self.memory, both, strict=True):
                    mean = (memory[row] + new) / 2
                    memory[row] = mean / mean.norm()
            self.new = []
        own_loss = F.cross_entropy(answer["logits"], y)
        return {"student/loss": own_loss, "teacher_to_student/crd_loss": 0.05 * loss / len(rows)}


class FCFDTerms:
    """Each path written out stage by stage, with both ranks' and pieces' calls counted."""

    def __init__(self) -> None:
        self.calls = 0
        self.drawn = objectives.FCFD.__new__(objectives.FCFD)
        self.drawn.settings, self.drawn.teachers, self.drawn.seed, self.drawn.warmup = FCFD, {"teacher": None}, 3, 2

    def __call__(self, student: Stages, teacher: Stages, aside: Any, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        step = self.calls // 4
        self.calls += 1
        self.drawn.begin(step)
        answer, known = run_stages(student, x), known_of(teacher, x)
        targets = known["stages"]

        def kd(logits: Tensor) -> Tensor:
            q, p = (logits / 2).log_softmax(1), (known["logits"] / 2).softmax(1)
            return 4 * (p * (p.log() - q)).sum(1).mean()

        def errors(k: int, feature: Tensor) -> Tensor:
            found = (feature - targets[k]).square().mean()
            if k == 3:
                pooled = [one.clamp(min=0).mean((2, 3)) for one in (feature, targets[k])]
                found = found + (pooled[0] - pooled[1]).square().mean()
            return found

        bridged = [aside.to_teacher["teacher"][k](answer["stages"][k]) for k in range(4)]
        looks = [errors(k, feature) for k, feature in enumerate(bridged)]
        reads, ends = [torch.zeros(())], [torch.zeros(())]
        for way, stage in self.drawn.drawn["teacher"]:
            model = {"to_teacher": teacher, "to_student": student}[way]
            if way == "to_teacher":
                feature = bridged[stage - 1]
            else:
                feature = aside.to_student["teacher"][stage - 1](targets[stage - 1])
            with _statistics_kept([student.model]):
                for k in range(stage, 4):
                    feature = model.stage(k + 1, feature)
                    if way == "to_teacher":
                        reads.append(errors(k, feature))
                ends.append(kd(model.head(feature)[1]))
        for bridge in aside.to_student["teacher"]:
            for parameter in bridge.parameters():  # so that it decays also in a step that does not use it
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        risen = 0.3 * min((step + 1) / 2, 1)
        return {
            "student/loss": F.cross_entropy(answer["logits"], y),
            "teacher_to_student/kd_loss": kd(answer["logits"]),
            "teacher_to_student/feature_loss": risen * sum(looks),  # type: ignore[dict-item]
            "teacher_to_paths/kd_loss": sum(ends),  # type: ignore[dict-item]
            "teacher_to_paths/feature_loss": risen * sum(reads),  # type: ignore[dict-item]
        }


def none_terms(student: Stages, teacher: Stages, aside: Any, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    return {"student/loss": F.cross_entropy(run_stages(student, x)["logits"], y)}


def run_stages(model: Stages, x: Tensor) -> dict[str, Any]:
    features = []
    for k in (1, 2, 3, 4):
        x = model.stage(k, x)
        features.append(x)
    pooled, logits = model.head(x)
    return {"stages": features, "pooled": pooled, "logits": logits}


def known_of(teacher: Stages, x: Tensor) -> dict[str, Any]:
    with torch.no_grad():
        return run_stages(teacher, x)


def objective(kind: str, student: Stages, teachers: dict[str, Frozen]) -> Any:
    torch.manual_seed(5)
    if kind == "kd":
        return objectives.KD(config.KD(temperature=3, weight=2), teachers)
    if kind == "ofa":
        return objectives.OFA(config.OFA(gamma=1.5, weight=0.5), student, teachers, CLASSES)
    if kind == "none":
        return objectives.Alone()
    if kind == "rkd":
        return objectives.RKD(config.RKD(), teachers)
    if kind == "dkd":
        return objectives.DKD(config.DKD(warmup=0.5), teachers, STEPS)
    if kind == "nkd":
        return objectives.NKD(config.NKD(), teachers)
    if kind in ("tfkd", "tfkd self"):
        form: Any = "self" if kind == "tfkd self" else "regularised"
        return objectives.TfKD(config.TfKD(form, public=form == "self"), teachers)
    if kind == "uskd":
        return objectives.USKD(config.USKD(), student, CLASSES)
    if kind == "fcfd":
        return objectives.FCFD(FCFD, student, teachers, STEPS, seed=3)
    if kind == "crd":
        settings = config.CRD(weight=0.05, width=6, negatives=NEGATIVES, public=False)
        place = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        return objectives.CRD(settings, student, teachers, drawn(*place))
    return objectives.FitNet(config.FitNet(kind, weight=0.5), student, teachers)  # type: ignore[arg-type]


BASELINES: dict[str, Callable[[], Terms]] = {
    "none": lambda: none_terms,
    "kd": lambda: kd_terms,
    "rkd": lambda: rkd_terms,
    "dkd": DKDTerms,
    "nkd": lambda: nkd_terms,
    "tfkd": lambda: tfkd_terms,
    "tfkd self": lambda: self_terms,
    "uskd": lambda: uskd_terms,
    "crd": CRDTerms,
    "fcfd": FCFDTerms,
    "ofa": lambda: ofa_terms,
    **dict.fromkeys(("stages", "final", "pooled", "infonce"), lambda: fitnet_terms),
}
SGD = Optim("sgd", lr=0.05)
STEPS = 4


def pair(case: str) -> tuple[nn.Module, Stages, dict[str, Frozen]]:
    make_student, make_teacher = plain.CASES[case]
    student = make_student(1)
    return student, expose(student, SIZE), {"teacher": frozen(make_teacher(2))}


def train_baseline(kind: str, case: str, stage: int) -> dict[str, Any]:
    world, rank = dist.get_world_size(), dist.get_rank()
    student, stages, teachers = pair(case)
    chosen = objective(kind, stages, teachers)
    share = ROWS // world
    model = Model("", "", optim=SGD, schedule=Schedule("constant"), micro_batch=share // 2)
    modules = {"student": student} | ({chosen.name: chosen.aside} if chosen.aside is not None else {})
    learners = {
        name: build_learner(module, model, zero(stage), rows=share, steps=STEPS) for name, module in modules.items()
    }
    weight = 0.05 if kind.startswith("tfkd") else 1.0
    method = distill.Distillation(learners, chosen, label_weight=weight)
    losses = []
    for step in range(STEPS):
        log = method.step(step, {"student": rows_of(step, rank, world)})
        values = torch.stack([log[name] for name in sorted(log)])
        dist.all_reduce(values)
        losses.append(dict(zip(sorted(log), (values / world).tolist(), strict=True)))
    found: dict[str, Any] = {"losses": losses}
    for name, learner in learners.items():
        engine = learner.engine
        named = engine.module.named_parameters()
        weights = {k: params.read([params.Weight(engine, p)])[0].numpy() for k, p in named}
        found["student" if name == "student" else "fused"] = weights
    found["buffers"] = {k: b.numpy().copy() for k, b in student.named_buffers()}
    for learner in learners.values():
        learner.engine.destroy()
    return found


def plain_baseline(kind: str, case: str, world: int, nudge: Nudge) -> dict[str, Any]:
    student, stages, teachers = pair(case)
    aside = objective(kind, stages, teachers).aside
    modules = {"student": student} | ({"fused": aside} if aside is not None else {})
    nudge.modules([*modules.values(), *(teacher.module for teacher in teachers.values())])
    named = [(name, p) for module in modules.values() for name, p in module.named_parameters()]
    spared = [p for name, p in named if name.endswith(("cls_token", "pos_embed", "log_scale"))]
    decayed = [p for name, p in named if not name.endswith(("cls_token", "pos_embed", "log_scale"))]
    groups: Any = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=SGD.lr, momentum=SGD.momentum, weight_decay=SGD.weight_decay)
    owned = [buffer for module in modules.values() for buffer in module.buffers()]
    kept = [copy.deepcopy(owned) for _ in range(world)]
    losses = []
    terms_of = BASELINES[kind]()
    for step in range(STEPS):
        optimizer.zero_grad()
        shown: dict[str, float] = {}
        for rank in range(world):
            for buffer, value in zip(owned, kept[rank], strict=True):
                buffer.copy_(value)
            x, y = rows_of(step, rank, world)
            for pictures, labels in zip(nudge(x).chunk(2), y.chunk(2), strict=True):
                terms = terms_of(stages, teachers["teacher"].stages, aside, pictures, labels)
                terms["total_loss"] = sum(terms.values())  # type: ignore[assignment]
                (terms["total_loss"] / world / 2).backward()
                for name, value in terms.items():
                    shown[name] = shown.get(name, 0.0) + float(value.detach()) / world / 2
            kept[rank] = copy.deepcopy(owned)
        optimizer.step()
        losses.append(shown)
    for buffer, value in zip(owned, kept[0], strict=True):
        buffer.copy_(value)
    found = {name: {k: p.detach().numpy() for k, p in m.named_parameters()} for name, m in modules.items()}
    return {"losses": losses, "buffers": {k: b.numpy() for k, b in student.named_buffers()}, **found}


@pytest.mark.parametrize(
    ("kind", "case", "stage"),
    [
        *((kind, "cnn learns from transformer", 2) for kind in ("none", "kd", "ofa", "stages", "pooled")),
        *((kind, "transformer learns from cnn", 2) for kind in ("ofa", "stages", "final", "infonce")),
        *((kind, "cnn learns from transformer", 1) for kind in ("rkd", "nkd", "tfkd self", "crd")),
        *((kind, "transformer learns from cnn", 3) for kind in ("dkd", "tfkd", "uskd", "crd")),
        *(("fcfd", "cnn learns from cnn", stage) for stage in (1, 3)),
        pytest.param("fcfd", "cnn learns from cnn", 2, marks=pytest.mark.slow),
    ],
)
def test_baselines_equal_a_plain_single_process(ranks: Any, kind: str, case: str, stage: int) -> None:
    found = ranks(2).run(train_baseline, kind, case, stage)
    plainly = (plain_baseline, kind, case, 2)
    assert_close(found[0], result_of(*plainly), movement(*plainly))


@pytest.mark.parametrize("tokens", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_fcfd_of_teachers_in_pieces_is_that_of_whole_ones(ranks: Any, tmp_path: Path, tokens: bool) -> None:
    """Two teachers, accumulation and checkpointing, with as many paths as there are."""
    names = ("cifar:vit_tiny", "cifar:swin_tiny") if tokens else ("cifar:resnet_tiny", "cifar:mobilenetv2_tiny")
    found = []
    for zero_file in ("", str(tmp_path / "zero3.json")):
        folder = tmp_path / ("pieces" if zero_file else "whole")
        base = tiny.distillation(folder, 3, "fcfd", steps=2)
        (tmp_path / "zero3.json").write_text((folder / "zero3.json").read_text())
        teachers = {f"teacher{i}": Teacher(name, init="random", zero=zero_file) for i, name in enumerate(names)}
        settings = config.FCFD(paths=6, weight=0.1, tokens=tokens)
        base = replace(base, method=replace(base.method, teachers=teachers, fcfd=settings))
        recipe = tiny.with_student(base, micro_batch=2, checkpointing=True)
        found.append(tiny.train(ranks(2), recipe)[0])
    whole, pieces = found
    for part in ("student", "bridges"):
        for name, weight in whole[part].items():
            torch.testing.assert_close(pieces[part][name], weight, atol=1e-5, rtol=1e-4, msg=f"{part} {name}")


def begin(recipes: list[config.Recipe]) -> list[tuple[dict[str, Tensor], list[Tensor]]]:
    """Of each run, the student's first weights and the first batches."""
    seen: list[Any] = []

    class Watched(running.Trainer):
        def fit(self) -> bool:
            state = copy.deepcopy(self.engines["student"].module.state_dict())
            shown = [copy.deepcopy(t) for step in range(2) for t in self.batches(step)["student"]]
            seen.append((state, shown))
            return super().fit()

    ranks = Ranks(dist.get_rank(), dist.get_world_size(), 0, torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch, tiny.handlers_kept():
        patch.setattr(running, "Trainer", Watched)
        for recipe in recipes:
            running.run(recipe, Options(), ranks, StopSignal())
    return seen


def test_every_objective_starts_from_the_same_student_and_batches(ranks: Any, tmp_path: Path) -> None:
    base = tiny.distillation(tmp_path, steps=2)
    mixed = {"all": replace(base.data["all"], mix=Mix(mixup=0.8))}
    method = replace(base.method, fcfd=config.FCFD(tokens=True))
    recipes = [replace(base, data=mixed, method=method.with_arm(arm)) for arm in method.arms()]
    assert len(recipes) == 12
    (first, shown), *others = ranks(1).run(begin, recipes)[0]
    for state, pictures in others:
        tiny.assert_equal(state, first)
        tiny.assert_equal(pictures, shown)
    finals = [load_file(run_folder(recipe) / "export" / "student.safetensors") for recipe in recipes]
    assert len({final["conv1.weight"].numpy().tobytes() for final in finals}) == 12, "and then each goes its way"
    assert all(json.loads((run_folder(r) / "result.json").read_text())["control"] == r.method.arm for r in recipes)


# --- pairs ---


def made(family: str) -> nn.Module:
    """A shallow model of timm's class."""
    small = {"img_size": SIZE, "num_classes": CLASSES}
    if family == "ResNet50":
        block: Any = Bottleneck
        return ResNet(block, (1, 1, 1, 1), num_classes=CLASSES, channels=(16, 16, 16, 16))
    if family in ("ViT-S", "DeiT-T"):
        heads, width = {"ViT-S": (6, 96), "DeiT-T": (3, 48)}[family]
        return VisionTransformer(patch_size=4, embed_dim=width, depth=4, num_heads=heads, **small)  # type: ignore[arg-type]
    if family in ("Swin-N", "Swin-P"):
        name = {"Swin-N": "swin_nano_patch4_window7_224", "Swin-P": "swin_pico_patch4_window7_224"}[family]
        return timm.create_model(name, patch_size=2, window_size=4, **small)
    tiny_form = {
        "ResNet18": "resnet",
        "MobileNetV2": "mobilenetv2",
        "ConvNeXt-T": "convnext",
        "Swin-T": "swin",
        "Mixer-B/16": "mixer",
        "ResMLP-S12": "resmlp",
    }
    return models.build(f"cifar:{tiny_form[family]}_tiny", CLASSES)


def pairs(teachers: str, students: str) -> list[tuple[str, str]]:
    return [(teacher, student) for teacher in teachers.split() for student in students.split()]


CIFAR = [
    *pairs("Swin-T ViT-S Mixer-B/16", "ResNet18 MobileNetV2"),
    *pairs("ConvNeXt-T Mixer-B/16", "DeiT-T Swin-P"),
    *pairs("ConvNeXt-T Swin-T", "ResMLP-S12"),
]
IMAGENET = [
    *pairs("DeiT-T Swin-T Mixer-B/16", "ResNet18 MobileNetV2"),
    *pairs("ResNet50 ConvNeXt-T Mixer-B/16", "DeiT-T Swin-N"),
    *pairs("ConvNeXt-T Swin-T", "ResMLP-S12"),
]
LOCAL = ("ResNet18", "ResNet50", "MobileNetV2", "ConvNeXt-T")


def step_of(teacher: str, student: str) -> dict[str, Any]:
    torch.manual_seed(0)
    module = made(student)
    known = {"teacher": frozen(made(teacher))}
    fbt = FBT(config.FBT(), expose(module, SIZE), known)
    assert fbt.aside is not None
    model = Model("", "", optim=SGD, schedule=Schedule("constant"))
    learners = {
        name: build_learner(part, model, zero(1), rows=4, steps=1)
        for name, part in (("student", module), ("fused", fbt.aside))
    }
    before = {name: copy.deepcopy(dict(part.engine.module.named_parameters())) for name, part in learners.items()}
    x, y = rows_of(0, 0, 2)
    log = distill.Distillation(learners, fbt).step(0, {"student": (x, y)})
    learned = {
        name: [k for k, p in part.engine.module.named_parameters() if not torch.equal(p, before[name][k])]
        for name, part in learners.items()
    }
    for part in learners.values():
        part.engine.destroy()
    return {"log": {k: float(v) for k, v in log.items()}, "way": fbt.routes["teacher"], "learned": learned}


@pytest.mark.parametrize(("teacher", "student"), dict.fromkeys([*CIFAR, *IMAGENET]))
def test_every_published_pair_does_a_step(ranks: Any, teacher: str, student: str) -> None:
    found = ranks(1).run(step_of, teacher, student)[0]
    ways = [f"{a}_to_{b}" for a, b in (("teacher", "student"), ("teacher", "fused"), ("fused", "student"))]
    terms = {f"{way}/{loss}" for way in ways for loss in ("infonce_loss", "ofa_loss")}
    assert found["log"].keys() == {"student/loss", "total_loss", *terms}
    assert all(torch.isfinite(torch.tensor(value)) for value in found["log"].values())
    turned = teacher in LOCAL and student not in LOCAL
    assert found["way"].front == ("teacher" if turned else "student")
    assert found["way"].tail == ("student" if turned else "teacher")
    assert len(found["learned"]["fused"]) > 5, "the connector and the temperatures"
    assert found["learned"]["student"]


def test_the_pairs_are_twelve_and_fourteen() -> None:
    assert (len(CIFAR), len(IMAGENET)) == (12, 14)


# --- progressive, and from several teachers ---


def test_a_student_learns_from_an_earlier_run_and_from_two_teachers_at_once(ranks: Any, tmp_path: Path) -> None:
    first = tiny.distillation(tmp_path, objective="kd", name="assistant", steps=2)
    first = tiny.with_student(first, name="cifar:mobilenetv2_tiny")
    tiny.train(ranks(2), first)
    assistant = Teacher("cifar:mobilenetv2_tiny", init="run:assistant")
    both = {**first.method.teachers, "assistant": assistant}
    second = tiny.distillation(tmp_path, stage=2, method=Distill(both), steps=2)
    ends = tiny.train(ranks(2), second)
    assert not any(end["teachers moved"] for end in ends)
    result, earlier = (json.loads((run_folder(r) / "result.json").read_text()) for r in (second, first))
    assert result["teachers"].keys() == {"teacher", "assistant"}
    assert result["teachers"]["assistant"] == pytest.approx(earlier["metrics"]["student"], rel=1e-5)
    logged = {name for line in tiny.lines(run_folder(second)) for name in line if name.endswith("loss")}
    for name in both:
        for way in (f"{name}_to_student", f"{name}_to_fused_{name}", f"fused_{name}_to_student"):
            assert {f"{way}/infonce_loss", f"{way}/ofa_loss"} <= logged


# --- bad input ---

LAUNCHER = next(path for path in LAUNCHERS if path.stem == "cifar_fbt")
TEACHER = "--method.teachers.teacher"
FRESH = (f"{TEACHER}.init", "random")
STUDENT = "--models.student"
BAD: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "student without stages": (
        (*FRESH, f"{STUDENT}.name", "timm:edgenext_xx_small"),
        (f"{STUDENT}.name timm:edgenext_xx_small", "EdgeNeXt cannot be split"),
    ),
    "teacher without stages": (
        (*FRESH, f"{TEACHER}.name", "timm:edgenext_xx_small"),
        (f"{TEACHER}.name timm:edgenext_xx_small", "EdgeNeXt cannot be split"),
    ),
    "ZeRO-0": ((*FRESH, "--zero-config", "ds_configs/zero0.json"), (f"{STUDENT}.zero", "stage 0", "zero1.json")),
    "micro-batch": ((*FRESH, f"{STUDENT}.micro-batch", "3"), (f"{STUDENT}.micro-batch 3", "16 rows", "use 2")),
    "nothing to contrast": (
        (*FRESH, f"{STUDENT}.micro-batch", "1"),
        (f"{STUDENT}.micro-batch leaves 1 rows", "fbt has nothing to compare", "use 2"),
    ),
    "nothing to relate": (
        (*FRESH, "--control", "rkd", "--data.pictures.batch", "4"),
        ("--data.pictures.batch leaves 2 rows", "rkd has nothing to compare", "use 3"),
    ),
    "odd rows to mix": (
        (*FRESH, "--data.pictures.batch", "6", "--data.pictures.mix.mixup", "0.8"),
        ("--data.pictures.mix", "3 here", "even"),
    ),
    "bf16": (
        (*FRESH, f"{STUDENT}.name", "cifar:mobilenetv2_tiny", f"{STUDENT}.precision", "bf16"),
        (f"{STUDENT}.precision bf16", "BatchNorm", "autocast"),
    ),
    "bf16 branches": (
        (*FRESH, "--control", "ofa", f"{STUDENT}.name", "cifar:convnext_tiny", f"{STUDENT}.precision", "bf16"),
        (f"{STUDENT}.precision bf16", "BatchNorm in ofa's branches", "autocast"),
    ),
    "control of MergeNet": ((*FRESH, "--control", "noise"), ("--control noise", "none")),
    "unknown teacher": ((f"{TEACHER[:-1]}.init", "random"), (f"{TEACHER[:-1]}.init", "teacher", "digits_fbt")),
    "teacher, unknown model": ((*FRESH, f"{TEACHER}.name", "cifar:resnet_tin"), (f"{TEACHER}.name", "resnet_tiny")),
    "gamma": ((*FRESH, "--method.fbt.gamma", "0"), ("--method.fbt.gamma 0", "not positive")),
    "temperature": ((*FRESH, "--method.kd.temperature", "-1"), ("--method.kd.temperature -1", "not positive")),
    "teacher not trained": ((), (f"{TEACHER}.init run:digits_fbt_teacher", "train that model first")),
    "no weights": ((f"{TEACHER}.init", ""), (f"{TEACHER} has no weights", f"{TEACHER}.pretrained")),
    "both weights": ((*FRESH, f"{TEACHER}.pretrained"), (f"{TEACHER}.pretrained", f"{TEACHER}.init", "one of them")),
    "missing file": ((f"{TEACHER}.init", "{folder}/none.safetensors"), (f"{TEACHER}.init {{folder}}/none", "exist")),
    "other classes": (
        (f"{TEACHER}.init", "{folder}/seven.safetensors"),
        (TEACHER, "fc.weight is 7x96, not 10x96"),
    ),
    "other model": (
        (f"{TEACHER}.name", "cifar:swin_tiny", f"{TEACHER}.init", "{folder}/seven.safetensors"),
        (TEACHER, "another model's"),
    ),
    "teacher in pieces": (
        (*FRESH, f"{TEACHER}.zero", "ds_configs/zero2.json"),
        (f"{TEACHER}.zero ds_configs/zero2.json", "not stage 3"),
    ),
    "class token": (
        (*FRESH, f"{STUDENT}.name", "cifar:vit_tiny", "--method.fbt.no-last-stage"),
        ("--method.fbt.no-last-stage", "class token"),
    ),
    "nothing to train": (
        (*FRESH, "--method.fbt.terms", "fused_student", "--method.fbt.pair", "kd"),
        ("--method.fbt.terms fused_student", "add teacher_fused"),
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("bad")
    save_file(models.build("cifar:resnet_tiny", 7).state_dict(), path / "seven.safetensors")
    return path


def start(arguments: list[str]) -> Ended:
    """The launcher up to its first engine."""
    return refusal.start(LAUNCHER, ["--variant", "digits", *arguments])


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_before_an_engine_starts(ranks: Any, folder: Path, case: str) -> None:
    arguments, words = (tuple(text.replace("{folder}", str(folder)) for text in texts) for texts in BAD[case])
    found = ranks(2).run(start, ["--output-dir", str(folder / "runs"), *arguments])
    assert_refused(found, words)
    assert not (folder / "runs").exists(), "and no run folder is made"


def test_each_rank_alone_refuses_an_unknown_recipe_to_train_first(ranks: Any, tmp_path: Path) -> None:
    found = ranks(2).run(start, ["--output-dir", str(tmp_path), *FRESH, "--first", "digits_teachr"])
    for (status, out, said), who in zip(found, ("", "rank 1: "), strict=True):
        assert (status, out) == (2, "")
        assert said.startswith(f"error: {who}--first digits_teachr is unknown: use digits_teacher")


def test_a_teacher_trained_before_sees_the_students_pictures() -> None:
    """Which there are, how large and which are held out; how many of them, in which batches, is its own matter."""
    variants = load(LAUNCHER).VARIANTS
    chosen = ["--variant", "digits", "--first", "digits_teacher", "--data.pictures.validation", "0.2"]
    chosen += ["--data.pictures.image-size", "16", "--method.teachers.teacher.name", "cifar:convnext_tiny"]
    recipe, how = options.resolve(variants, chosen)
    (before,) = options.runs_before(recipe, how, variants)
    assert before.models["teacher"].name == "cifar:convnext_tiny"
    pictures = before.data["pictures"]
    assert (pictures.validation, pictures.image_size, pictures.per_class) == (0.2, 16, 0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--first", "digits_teacher", "--models.student.name", "timm:vgg11"], ("--models.student.name timm:vgg11",)),
        (["--control", "none", "--compare", "fbt"], ("--method.teachers.teacher.init", "train that model first")),
    ],
    ids=["a student without stages", "no teacher for a later arm"],
)
def test_nothing_trains_before_all_of_it_can(
    ranks: Any, tmp_path: Path, arguments: list[str], words: tuple[str, ...]
) -> None:
    ((status, _, said),) = ranks(1).run(start, ["--output-dir", str(tmp_path / "runs"), *arguments])
    assert status == 2
    for word in words:
        assert word in said
    assert not (tmp_path / "runs").exists()


def test_a_run_whose_losses_are_lost_ends_without_another_checkpoint(ranks: Any, tmp_path: Path) -> None:
    base = tiny.distillation(tmp_path, 1, steps=8, save_every=1, keep=9)
    base = tiny.with_student(base, optim=Optim("sgd", lr=1e30))
    (end,) = tiny.train(ranks(1), base)
    assert "not finite in 3 intervals of the log in a row" in end["diverged"]
    folder = run_folder(base)
    assert not (folder / "result.json").exists()
    assert not (folder / "export").exists()
    bad = [line["step"] for line in tiny.lines(folder) if line.get("total_loss", 0.0) is None]
    assert len(bad) == 3
    assert not (folder / "checkpoints" / str(bad[-1])).exists()


def test_debug_trains_at_full_rate_from_the_first_step() -> None:
    for variant, rate in (("default", 0.1), ("tokens", 5e-4)):
        recipe, _ = options.resolve(load(LAUNCHER).VARIANTS, ["--variant", variant, "--debug"])
        assert recipe.models["student"].schedule.warmup == 0
        assert recipe.models["student"].optim.lr == rate


def test_the_same_input_without_a_mistake_reaches_the_first_engine(ranks: Any, tmp_path: Path) -> None:
    found = ranks(2).run(start, ["--output-dir", str(tmp_path), *FRESH])
    assert [status for status, _, _ in found] == ["an engine was started"] * 2
