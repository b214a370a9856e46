"""FBT on DeepSpeed engines against the method written down plainly in one process.

The reference owns copies of the same models and runs the paper's terms on them one by one. BatchNorm and InfoNCE see
one rank's rows of one micro-batch, so it takes those in turn and averages the gradients.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from ranks import RankPool
from rounding import Nudge, assert_close, movement, result_of
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from hetero_kt import config
from hetero_kt.config import Model, Optim, Schedule
from hetero_kt.distributed import params
from hetero_kt.distributed.learner import build_learner
from hetero_kt.methods.distill import Distillation
from hetero_kt.methods.fbt import FBT
from hetero_kt.models import build
from hetero_kt.models.teacher import Frozen
from hetero_kt.nn.stages import Stages, expose

CLASSES, SIZE, ROWS, STEPS = 10, 32, 8, 5
SGD = Optim("sgd", lr=0.05)
PUBLISHED = config.FBT()


def cnn(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return build("cifar:resnet_tiny", CLASSES)


def transformer(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = VisionTransformer(
        img_size=SIZE, patch_size=8, embed_dim=32, depth=4, num_heads=2, mlp_ratio=2, num_classes=CLASSES
    )
    # From timm's 1e-6 the first LayerNorm makes a gradient of a million, in which rounding drowns everything.
    nn.init.normal_(model.cls_token, std=0.5)
    return model


def mixer(seed: int) -> nn.Module:
    """No class token and no BatchNorm."""
    torch.manual_seed(seed)
    model: Any = build("cifar:mixer_tiny", CLASSES)
    nn.init.normal_(model.head.weight, std=0.02)  # timm's zeros would have nothing to teach
    return model


def convnext(seed: int) -> nn.Module:
    """Convolutions without BatchNorm."""
    torch.manual_seed(seed)
    return build("cifar:convnext_tiny", CLASSES)


CASES = {
    "cnn learns from transformer": (cnn, transformer),
    "transformer learns from cnn": (transformer, cnn),
    "cnn learns from cnn": (cnn, cnn),
    "transformer learns from transformer": (transformer, transformer),
}
OTHERS = {
    "cnn learns from mixer": (cnn, mixer),
    "mixer learns from cnn": (mixer, cnn),
    "convnext learns from mixer": (convnext, mixer),
    "transformer learns from mixer": (transformer, mixer),
}


@dataclass(frozen=True)
class Setting:
    case: str
    stage: int = 1
    optim: Optim = SGD
    accumulation: int = 1
    checkpointing: bool = False
    teacher_stage: int = 0
    precision: str = "fp32"
    fbt: config.FBT = PUBLISHED
    teachers: int = 1
    soft: bool = False
    """Labels as mixup leaves them."""
    smoothing: float = 0.0


def rows_of(step: int, rank: int, world: int, soft: bool = False) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(ROWS, 3, SIZE, SIZE, generator=generator)
    y = torch.randint(CLASSES, (ROWS,), generator=generator)
    if soft:
        one, other = F.one_hot(y, CLASSES).float(), F.one_hot(y.flip(0), CLASSES).float()
        share = torch.rand(ROWS, 1, generator=generator)
        x, y = share[..., None, None] * x, share * one + (1 - share) * other
    return x[rank::world], y[rank::world]


def zero(stage: int) -> dict[str, Any]:
    return {"stage": stage, "stage3_param_persistence_threshold": 0}


def frozen(module: nn.Module, stage: int = 0, autocast: bool = False) -> Frozen:
    one = (1.0, 1.0, 1.0)
    return Frozen(
        module,
        expose(module, SIZE),
        mean=one,
        std=one,
        own_mean=one,
        own_std=one,
        image_size=SIZE,
        zero=zero(3) if stage == 3 else None,
        autocast=autocast,
    )


def models(setting: Setting) -> tuple[nn.Module, list[nn.Module]]:
    make_student, make_teacher = {**CASES, **OTHERS}[setting.case]
    return make_student(1), [make_teacher(2 + i) for i in range(setting.teachers)]


def run_engines(setting: Setting) -> dict[str, Any]:
    """Five steps on this pool's ranks: losses, weights and buffers of student and fused model."""
    world, rank = dist.get_world_size(), dist.get_rank()
    student, teachers = models(setting)
    stages = expose(student, SIZE)
    stages.checkpointing = setting.checkpointing
    narrow = setting.precision != "fp32"
    known = {f"teacher{i}": frozen(t, setting.teacher_stage, narrow) for i, t in enumerate(teachers)}
    torch.manual_seed(5)
    objective = FBT(setting.fbt, stages, known)
    schedule = Schedule("constant")
    share = ROWS // world
    model = Model(
        "",
        "",
        optim=setting.optim,
        schedule=schedule,
        precision=setting.precision,  # type: ignore[arg-type]
        micro_batch=share // setting.accumulation,
    )
    learners = {
        name: build_learner(module, model, zero(setting.stage), rows=share, steps=STEPS)
        for name, module in (("student", student), ("fused", objective.aside))
        if module is not None
    }
    for teacher in known.values():
        before = copy.deepcopy(teacher.module.state_dict())
        teacher.start()
    method = Distillation(learners, objective, label_smoothing=setting.smoothing)
    losses = []
    for step in range(STEPS):
        log = method.step(step, {"student": rows_of(step, rank, world, setting.soft)})
        values = torch.stack([log[name] for name in sorted(log)])
        dist.all_reduce(values)
        losses.append(dict(zip(sorted(log), (values / world).tolist(), strict=True)))
    found: dict[str, Any] = {"losses": losses}
    for name, learner in learners.items():
        engine = learner.engine
        if setting.stage == 3:
            assert all(p.ds_status == ZeroParamStatus.NOT_AVAILABLE for p in engine.module.parameters())
        found[name] = {
            k: params.read([params.Weight(engine, p)])[0].numpy() for k, p in engine.module.named_parameters()
        }
    found["buffers"] = {k: b.numpy().copy() for k, b in student.named_buffers()}
    found["logits"] = answers(learners["student"].engine)
    if setting.teacher_stage != 3:
        after = teacher.module.state_dict()
        found["teacher moved"] = any(not torch.equal(before[k], after[k]) for k in before)
    found["gradients of the teacher"] = any(p.grad is not None for t in known.values() for p in t.module.parameters())
    for learner in learners.values():
        learner.engine.destroy()
    for one in known.values():
        if one.engine is not None:
            one.engine.destroy()
    return found


def answers(model: Any) -> Any:
    """Logits in eval mode, for pictures that no step has seen."""
    x, _ = rows_of(1000, 0, 1)
    model.eval()
    with torch.no_grad():
        logits = model(x.to(next(model.parameters()).dtype))
    model.train()
    return logits.float().numpy()


def reference(setting: Setting, world: int, nudge: Nudge) -> dict[str, Any]:
    """The same five steps in one process on plain modules."""
    student, teachers = models(setting)
    ours = expose(student, SIZE)
    known = {f"teacher{i}": frozen(t) for i, t in enumerate(teachers)}
    torch.manual_seed(5)
    objective = FBT(setting.fbt, ours, known)
    aside = objective.aside
    nudge.modules([student, *teachers, *([aside] if aside is not None else [])])
    trained = [*student.parameters(), *(aside.parameters() if aside is not None else [])]
    kind: Any = torch.optim.SGD if setting.optim.name == "sgd" else torch.optim.AdamW
    more = {"momentum": setting.optim.momentum} if kind is torch.optim.SGD else {}
    # timm spares class tokens and position tables of these models; temperatures are no weights either.
    named = [*student.named_parameters(), *(aside.named_parameters() if aside is not None else [])]
    spared = [p for name, p in named if name.endswith(("cls_token", "pos_embed", "log_scale"))]
    decayed = [p for p in trained if id(p) not in {id(one) for one in spared}]
    groups: Any = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    optimizer = kind(groups, lr=setting.optim.lr, weight_decay=setting.optim.weight_decay, **more)
    losses, buffers = [], [copy.deepcopy(dict(student.named_buffers())) for _ in range(world)]
    for step in range(STEPS):
        optimizer.zero_grad()
        shown: dict[str, float] = {}
        for rank in range(world):
            for name, buffer in student.named_buffers():
                buffer.copy_(buffers[rank][name])
            x, y = rows_of(step, rank, world, setting.soft)
            share = len(x) // setting.accumulation
            for pictures, labels in zip(nudge(x).split(share), y.split(share), strict=True):
                terms = plain_terms(setting, ours, known, aside, pictures, labels)
                terms["total_loss"] = sum(terms.values())
                part = world * setting.accumulation
                (terms["total_loss"] / part).backward()
                for name, value in terms.items():
                    shown[name] = shown.get(name, 0.0) + float(value.detach()) / part
            buffers[rank] = copy.deepcopy(dict(student.named_buffers()))
        optimizer.step()
        losses.append(shown)
    parts = {"student": student} | ({"fused": aside} if aside is not None else {})
    weights = {name: {k: p.detach().numpy() for k, p in m.named_parameters()} for name, m in parts.items()}
    for name, buffer in student.named_buffers():
        buffer.copy_(buffers[0][name])
    state = {"buffers": {k: b.numpy() for k, b in buffers[0].items()}, "logits": answers(student)}
    return {"losses": losses, **state, **weights}


def plain_terms(
    setting: Setting, ours: Stages, known: dict[str, Frozen], aside: Any, x: Tensor, y: Tensor
) -> dict[str, Any]:
    """Eq. 1 and 2 and the three pairs of models, from the paper, on plain modules."""
    fbt = setting.fbt
    third = ours.stage(3, ours.stage(2, ours.stage(1, x)))
    student = ours.head(ours.stage(4, third))
    smooth = y if y.dim() == 2 else F.one_hot(y, CLASSES)
    smooth = (1 - setting.smoothing) * smooth + setting.smoothing / CLASSES
    terms: dict[str, Any] = {"student/loss": -(smooth * student[1].log_softmax(1)).sum(1).mean()}
    for name, teacher in known.items():
        theirs = teacher.stages
        fused_name = "fused" if len(known) == 1 else f"fused_{name}"
        with torch.no_grad():
            their_third = theirs.stage(3, theirs.stage(2, theirs.stage(1, x)))
            taught = theirs.head(theirs.stage(4, their_third))
        everyone = {"teacher": taught, "student": student}
        names = {"teacher": name, "student": "student", "fused": fused_name}
        if aside is not None and name in aside.connectors:
            if theirs.convolutional and not ours.convolutional:
                front, end = their_third, ours
            else:
                front, end = third, theirs
            tokens = aside.connectors[name](front)
            if fbt.last_stage:
                tokens = end.stage(4, end.with_prefix(tokens))
            everyone["fused"] = end.head(tokens)
        for term in fbt.terms:
            i, j = term.split("_")
            teaching, learner = everyone[i], everyone[j]
            if fbt.detach:
                teaching = (teaching[0].detach(), teaching[1].detach())
            label = f"{names[i]}_to_{names[j]}"
            if "infonce" in fbt.pair:
                terms[f"{label}/infonce_loss"] = aside.contrasts[label](learner[0], teaching[0])
            if "ofa" in fbt.pair:
                p, right = teaching[1].softmax(1), F.one_hot(y.argmax(1) if y.dim() == 2 else y, CLASSES)
                weight = (p + right) ** fbt.gamma - right
                terms[f"{label}/ofa_loss"] = -(weight * learner[1].log_softmax(1)).sum(1).mean()
            if fbt.pair == "kd":
                q, p = (learner[1] / 4).log_softmax(1), (teaching[1] / 4).softmax(1)
                terms[f"{label}/kd_loss"] = 16 * (p * (p.log() - q)).sum(1).mean()
        if fbt.fused_labels:
            terms[f"{fused_name}/loss"] = F.cross_entropy(everyone["fused"][1], y)
    return terms


def plainly(setting: Setting, world: int) -> dict[str, Any]:
    """The reference of `setting`, of which neither ZeRO nor checkpointing changes anything."""
    return result_of(reference, replace(setting, stage=1, checkpointing=False, teacher_stage=0), world)


def assert_equal(ours: dict[str, Any], setting: Setting, world: int) -> None:
    """Equal but for rounding, which moves all settings of a pair of models alike."""
    family = Setting(setting.case, teachers=setting.teachers)
    assert_close(ours, plainly(setting, world), movement(reference, family, 1))


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world", [1, 2])
def test_five_steps_equal_a_plain_single_process(ranks: Any, case: str, stage: int, world: int) -> None:
    setting = Setting(case, stage)
    pool: RankPool = ranks(world)
    found = pool.run(run_engines, setting)
    assert_equal(found[0], setting, world)
    for one in found:
        assert not one["teacher moved"]
        assert not one["gradients of the teacher"]


VARIED = {
    "accumulation": {"accumulation": 2},
    "checkpointing": {"checkpointing": True},
    "teacher in pieces": {"teacher_stage": 3},
    "two teachers": {"teachers": 2},
    "everything at once": {"accumulation": 2, "checkpointing": True, "teacher_stage": 3, "teachers": 2},
}


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("case", list(CASES)[:2])
@pytest.mark.parametrize("varied", VARIED)
def test_variations_equal_a_plain_single_process(ranks: Any, case: str, stage: int, varied: str) -> None:
    setting = replace(Setting(case, stage), **VARIED[varied])  # type: ignore[arg-type]
    found = ranks(2).run(run_engines, setting)
    assert_equal(found[0], setting, 2)


FBTS = {
    "not detached": config.FBT(detach=False),
    "hard labels for the fused model": config.FBT(fused_labels=True),
    "teacher_student": config.FBT(terms=("teacher_student",)),
    "teacher_fused": config.FBT(terms=("teacher_fused",)),
    "fused_student": config.FBT(terms=("fused_student",)),
    "fused_student, not detached": config.FBT(terms=("fused_student",), detach=False),
    "without teacher_fused": config.FBT(terms=("teacher_student", "fused_student")),
    "without teacher_student": config.FBT(terms=("teacher_fused", "fused_student")),
    "infonce": config.FBT(pair="infonce"),
    "ofa": config.FBT(pair="ofa"),
    "ofa, teacher_student": config.FBT(pair="ofa", terms=("teacher_student",)),
    "ofa, hard labels for the fused model": config.FBT(pair="ofa", terms=("fused_student",), fused_labels=True),
    "kd": config.FBT(pair="kd"),
    "gamma 1.5": config.FBT(gamma=1.5),
    "no attention": config.FBT(block="none"),
    "plain attention": config.FBT(block="vit"),
    "no last stage": config.FBT(last_stage=False),
    "no last stage, the other way round": config.FBT(last_stage=False),
    "not detached, the other way round": config.FBT(detach=False),
}


@pytest.mark.parametrize(("number", "switched"), enumerate(FBTS))
def test_every_switch_is_the_reference_s(ranks: Any, number: int, switched: str) -> None:
    case = list(OTHERS)[number % 2]
    setting = Setting(case, fbt=FBTS[switched])
    assert_equal(ranks(1).run(run_engines, setting)[0], setting, 1)
    assert plainly(setting, 1)["losses"] != plainly(Setting(case), 1)["losses"], "the switch does something"


@pytest.mark.parametrize("case", list(CASES)[:2])
def test_a_fused_model_that_nothing_teaches_stays_as_it_starts(ranks: Any, case: str) -> None:
    """Main paper, Table 4 (C)."""
    setting = Setting(case, stage=3, fbt=FBTS["without teacher_fused"])
    found = ranks(2).run(run_engines, setting)[0]
    assert_equal(found, setting, 2)
    student, teachers = models(setting)
    torch.manual_seed(5)
    start = FBT(setting.fbt, expose(student, SIZE), {"teacher0": frozen(teachers[0])}).aside
    assert start is not None
    for name, weight in start.connectors.named_parameters():
        assert (found["fused"][f"connectors.{name}"] == weight.detach().numpy()).all(), name


def test_a_fused_engine_without_anything_to_train_is_refused() -> None:
    student, teachers = models(Setting("cnn learns from cnn"))
    settings = config.FBT(pair="kd", terms=("fused_student",))
    with pytest.raises(ValueError, match=r"--method.fbt.terms fused_student .* add teacher_fused"):
        FBT(settings, expose(student, SIZE), {"teacher": frozen(teachers[0])})


@pytest.mark.parametrize("case", list(CASES)[:2])
@pytest.mark.parametrize("labels", [{"soft": True}, {"smoothing": 0.1}, {"soft": True, "smoothing": 0.1}])
def test_mixed_and_smoothed_labels(ranks: Any, case: str, labels: dict[str, Any]) -> None:
    setting = replace(Setting(case, stage=2, fbt=config.FBT(gamma=1.5, fused_labels=True)), **labels)
    assert_equal(ranks(1).run(run_engines, setting)[0], setting, 1)


@pytest.mark.parametrize("case", ["convnext learns from mixer", "transformer learns from mixer"])
def test_gathered_negatives_make_ranks_equal_one_process_with_all_rows(ranks: Any, case: str) -> None:
    setting = Setting(case, stage=2, fbt=config.FBT(gather=True, detach=False))
    assert_equal(ranks(2).run(run_engines, setting)[0], setting, 1)
    whole, alone = plainly(setting, 1), plainly(replace(setting, fbt=config.FBT(detach=False)), 2)
    assert abs(whole["losses"][0]["total_loss"] - alone["losses"][0]["total_loss"]) > 0.1, "fewer negatives"


@pytest.mark.parametrize("case", list(CASES)[:2])
@pytest.mark.parametrize("world", [1, 2])
def test_adamw_ends_at_the_same_logits(ranks: Any, case: str, world: int) -> None:
    setting = Setting(case, stage=2, optim=Optim("adamw", lr=2e-4, weight_decay=0.05))
    found = without_key_biases(ranks(world).run(run_engines, setting)[0])
    theirs = (with_adamw, setting, world)
    assert_close(found, result_of(*theirs), movement(*theirs))


def with_adamw(setting: Setting, world: int, nudge: Nudge) -> dict[str, Any]:
    return without_key_biases(reference(setting, world, nudge))


def without_key_biases(found: dict[str, Any]) -> dict[str, Any]:
    """A key's bias moves no attention: its gradient is rounding, which AdamW makes as large as any other."""
    for part in ("student", "fused"):
        for name, bias in found[part].items():
            if name.endswith("qkv.bias"):
                found[part][name] = np.delete(bias.reshape(3, -1), 1, axis=0)
    return found


@pytest.mark.parametrize(
    ("case", "precision", "stage"),
    [
        ("cnn learns from transformer", "autocast", 1),
        ("transformer learns from cnn", "autocast", 3),
        ("transformer learns from mixer", "bf16", 3),
        ("convnext learns from mixer", "bf16", 1),
    ],
)
def test_losses_in_bf16_are_those_of_fp32_within_2_percent(ranks: Any, case: str, precision: str, stage: int) -> None:
    setting = Setting(case, stage, precision=precision)
    ours = ranks(2).run(run_engines, setting)[0]["losses"]
    theirs = plainly(setting, 2)["losses"]
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.keys() == b.keys()
        for name in b:
            assert a[name] == pytest.approx(b[name], rel=0.02), (step, name)
    assert ours != theirs
