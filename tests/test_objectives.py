"""Objectives of distillation in whole runs, what a memory of samples draws and keeps, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from test_launchers import LAUNCHERS, load
from test_options import one_sentence
from tiny import Plan
from torch import Tensor
from torch.nn import functional as F

from hetero_kt import checks, config, data, options, parts
from hetero_kt import run as running
from hetero_kt.config import Mix, TfKD
from hetero_kt.distributed.launch import Ranks, StopSignal
from hetero_kt.folder import run_folder
from hetero_kt.methods import objectives
from hetero_kt.nn import losses
from hetero_kt.nn.losses import crd
from hetero_kt.nn.losses.memory import Memory, Negatives, Sides
from hetero_kt.options import Options

# --- contrast with a memory ---


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 4), negatives=st.integers(1, 6), seed=st.integers(0, 1000), z=st.floats(-3, 3))
def test_crd_is_its_formula(rows: int, negatives: int, seed: int, z: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = 5 * torch.randn(rows, 1 + negatives, generator=generator, dtype=torch.float64)
    expected = 0.0
    for right, *wrong in scores.tolist():
        share = negatives / 50

        def h(s: float, share: float = share) -> float:
            return math.exp(s) / math.exp(z) / (math.exp(s) / math.exp(z) + share)

        expected -= math.log(h(right)) + sum(math.log(1 - h(s)) for s in wrong)
    torch.testing.assert_close(crd(scores, 50, z), torch.tensor(expected / rows, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda s: crd(s, 50, z), scores.requires_grad_())


def test_crd_of_extreme_bf16_scores_is_finite() -> None:
    scores = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]], dtype=torch.bfloat16, requires_grad=True)
    loss = crd(scores, 50, 3.0)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()


def test_negatives_are_of_every_other_class_and_all_alike() -> None:
    labels = torch.tensor([2, 0, 1, 2, 0, 4, 4, 4])  # no sample of class 3
    rows = torch.tensor([0, 1, 7])
    drawn = Negatives(labels).draw(rows, 30_000, torch.Generator().manual_seed(0))
    for row, found in zip(rows, drawn, strict=True):
        others = (labels != labels[row]).nonzero().squeeze(1)
        counts = found.bincount(minlength=8)
        assert set(found.unique().tolist()) == set(others.tolist())
        torch.testing.assert_close(
            counts[others] / 30_000, torch.full((len(others),), 1 / len(others)), atol=0.01, rtol=0
        )


def test_one_class_has_no_negatives() -> None:
    with pytest.raises(ValueError, match="--control crd") as error:
        Negatives(torch.zeros(4, dtype=torch.long))
    assert one_sentence(str(error.value))


def test_labels_are_those_of_the_samples_that_an_order_names() -> None:
    for pipeline in ("fast", "timm"):
        settings = config.Data("digits", batch=32, pipeline=pipeline, augment=(), workers=0)  # type: ignore[arg-type]
        loader = data.open_loader(settings, train=True, seed=3)
        _, shown = loader.batch(5)
        assert torch.equal(loader.labels[torch.from_numpy(loader.order.rows(5)[1])], shown)


def embeddings() -> Sides:
    generator = torch.Generator().manual_seed(1)
    return Sides(*F.normalize(torch.randn(2, 4, 5, generator=generator), dim=-1))


def written() -> dict[str, Tensor]:
    """A memory that has met four rows in equal shares, and its Z."""
    rank, world = dist.get_rank(), dist.get_world_size()
    memory = Memory(6, 5, 0.5, seed=3)
    mine = Sides(*(side.chunk(world)[rank] for side in embeddings()))
    rows = torch.tensor([4, 0, 3, 1]).chunk(world)[rank]
    memory.scale(memory.scores(mine, rows.unsqueeze(1), 0.5), 6)
    memory.write(rows, mine)
    return memory.state_dict()


def test_a_memory_takes_in_every_rank_s_rows_and_one_z(ranks: Any) -> None:
    first, seen = Memory(6, 5, 0.5, seed=3), embeddings()
    rows = [4, 0, 3, 1]
    expected = {"student": first.sides.student.clone(), "teacher": first.sides.teacher.clone()}
    z = []
    for own, other in ((seen.student, expected["teacher"]), (seen.teacher, expected["student"])):
        z.append(math.log(6 * sum(math.exp(float(own[i] @ other[row]) / 0.5) for i, row in enumerate(rows)) / 4))
    for name, new in (("student", seen.student), ("teacher", seen.teacher)):
        for i, row in enumerate(rows):
            mean = 0.5 * expected[name][row] + 0.5 * new[i]
            expected[name][row] = mean / mean.norm()
    for state in (*ranks(2).run(written), *ranks(1).run(written)):
        for name, memory in expected.items():
            torch.testing.assert_close(state[name], memory)
        torch.testing.assert_close(state["log_z"], torch.tensor(z))
        assert bool(state["scaled"])


def test_z_stays_what_it_was_first() -> None:
    memory, rows = Memory(6, 5, 0.5, seed=3), torch.tensor([[0], [1], [2], [3]])
    for temperature in (0.5, 0.1):
        memory.scale(memory.scores(embeddings(), rows, temperature), 6)
        if temperature == 0.5:
            first = memory.log_z
    assert memory.log_z is first


def contrasted(folder: Path, stage: int) -> config.Recipe:
    """CRD with mixed labels and accumulation."""
    base = tiny.distillation(folder, stage, "crd", steps=4)
    small = config.CRD(width=16, negatives=20)
    mixed = {"all": replace(base.data["all"], mix=Mix(mixup=0.8))}
    return tiny.with_student(replace(base, data=mixed, method=replace(base.method, crd=small)), micro_batch=2)


def test_a_resumed_run_of_crd_ends_like_an_uninterrupted_one(ranks: Any, tmp_path: Path) -> None:
    whole, broken = contrasted(tmp_path / "whole", 2), contrasted(tmp_path / "parts", 2)
    uninterrupted = tiny.train(ranks(2), whole)
    tiny.train(ranks(2), broken, Options(max_steps=2))
    resumed = tiny.train(ranks(2), broken)
    assert [end["first_step"] for end in resumed] == [2, 2]
    tiny.assert_same_end(resumed, uninterrupted)
    memory = uninterrupted[0]["method"]["teacher"]
    assert bool(memory["scaled"])
    assert not torch.equal(memory["student"], Memory(len(memory["student"]), 16, 0.5, 0).sides.student)


def test_dkd_s_warm_up_goes_on_where_a_run_was_stopped(ranks: Any, tmp_path: Path) -> None:
    def warming(folder: Path) -> config.Recipe:
        base = tiny.distillation(folder, 1, "dkd", steps=4)
        return replace(base, method=replace(base.method, dkd=config.DKD(warmup=1.0)))

    whole, broken = warming(tmp_path / "whole"), warming(tmp_path / "parts")
    uninterrupted = tiny.train(ranks(1), whole)
    tiny.train(ranks(1), broken, Options(max_steps=2), Plan())
    tiny.assert_same_end(tiny.train(ranks(1), broken), uninterrupted)


ARMS = ("rkd", "dkd", "nkd", "tfkd", "uskd", "crd")


def losses_of(base: config.Recipe) -> list[dict[str, float]]:
    """Of each of the new objectives, what its run of two steps logs last."""
    pool_ranks = Ranks(dist.get_rank(), dist.get_world_size(), 0, torch.device("cpu"))
    found = []
    with tiny.handlers_kept():
        for arm in ARMS:
            recipe = replace(base, method=base.method.with_arm(arm))
            running.run(recipe, Options(), pool_ranks, StopSignal())
            logged = [line for line in tiny.lines(run_folder(recipe)) if "total_loss" in line]
            found.append({name: value for name, value in logged[-1].items() if name.endswith("loss")})
    return found


@pytest.mark.parametrize(("precision", "stage"), [("autocast", 3), ("bf16", 2)])
def test_every_objective_runs_in_half_precision(ranks: Any, tmp_path: Path, precision: Any, stage: int) -> None:
    base = tiny.distillation(tmp_path, stage, steps=2)
    base = tiny.with_student(base, name="cifar:vit_tiny", precision=precision)
    base = replace(base, method=replace(base.method, crd=config.CRD(width=16, negatives=20)))
    for arm, logged in zip(ARMS, ranks(1).run(losses_of, base)[0], strict=True):
        assert len(logged) > 2, arm
        assert all(math.isfinite(value) for value in logged.values()), arm


# --- what needs a teacher, and which ---


@pytest.mark.parametrize("arm", ["none", "tfkd", "uskd"])
def test_objectives_without_a_teacher_need_none_and_ask_none(tmp_path: Path, arm: Any) -> None:
    base = tiny.distillation(tmp_path, objective=arm)
    gone = {"teacher": replace(base.method.teachers["teacher"], init=str(tmp_path / "none.safetensors"))}
    for teachers in ({}, gone):
        recipe = replace(base, method=replace(base.method, teachers=teachers))
        checks.check(recipe)
        parts.check_pairs(recipe, set())


@pytest.mark.parametrize("arm", ["kd", "rkd", "dkd", "nkd", "crd", "ofa", "fitnet", "fbt"])
def test_the_others_need_one(tmp_path: Path, arm: Any) -> None:
    base = tiny.distillation(tmp_path, objective=arm)
    with pytest.raises(ValueError, match=f"--method.teachers is empty: objective {arm}"):
        checks.check(replace(base, method=replace(base.method, teachers={})))


def refused(base: config.Recipe, **changes: Any) -> str:
    with pytest.raises(ValueError) as error:
        checks.check(replace(base, method=replace(base.method, **changes)))
    assert one_sentence(str(error.value))
    return str(error.value)


def test_a_student_teaches_itself_only(tmp_path: Path) -> None:
    base = tiny.distillation(tmp_path, objective="tfkd")
    assert refused(base, tfkd=TfKD("self")).startswith("--method.teachers.teacher.name cifar:swin_tiny is not the")
    own = {"teacher": replace(base.method.teachers["teacher"], name="cifar:resnet_tiny")}
    checks.check(replace(base, method=replace(base.method, tfkd=TfKD("self"), teachers=own)))


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
@pytest.mark.parametrize(
    ("part", "field", "settings"),
    [
        ("dkd", "warmup", config.DKD),
        ("tfkd", "weight", config.TfKD),
        ("tfkd", "correct", config.TfKD),
        ("crd", "momentum", config.CRD),
    ],
)
def test_shares_lie_between_0_and_1(tmp_path: Path, part: str, field: str, settings: Any, value: float) -> None:
    said = refused(tiny.distillation(tmp_path), **{part: settings(**{field: value})})
    assert said == f"--method.{part}.{field} {value} is no share: use 0 to 1."


def test_settings_that_leave_nothing_are_refused(tmp_path: Path) -> None:
    base = tiny.distillation(tmp_path, objective="rkd")
    assert "--control none" in refused(base, rkd=config.RKD(0.0, 0.0))
    assert refused(base, crd=config.CRD(negatives=0)).startswith("--method.crd.negatives 0")
    assert refused(base, crd=config.CRD(width=0)).startswith("--method.crd.width 0")


# --- who teaches, on the command line ---

VARIANTS = load(next(path for path in LAUNCHERS if path.stem == "cifar_distill")).VARIANTS


def taught(*arguments: str) -> config.Distill:
    recipe, _ = options.resolve(VARIANTS, arguments)
    assert isinstance(recipe.method, config.Distill)
    return recipe.method


def test_method_is_another_name_of_control() -> None:
    assert taught("--method", "dkd").objective == taught("--control=dkd").objective == "dkd"
    with pytest.raises(ValueError, match="--control dk is unknown: use dkd"):
        taught("--method", "dk")


def test_a_teacher_is_a_run_a_file_or_a_model_with_published_weights(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "earlier" / "none" / "seed0"
    (run / "export").mkdir(parents=True)
    recipe = replace(VARIANTS["digits_teacher"](), name="earlier")
    (run / "recipe.yaml").write_text(config.to_yaml(recipe))
    (run / "result.json").write_text(f'{{"steps": {recipe.steps}}}')
    (run / "export" / "teacher_ema.safetensors").touch()
    out = ("--output-dir", str(tmp_path / "runs"))
    file = tmp_path / "weights.safetensors"
    file.touch()
    own = taught().teachers["teacher"].name
    for init, name, published in (
        ("run:earlier", "cifar:resnet_tiny", False),
        (str(run), "cifar:resnet_tiny", False),
        (str(run / "export" / "teacher_ema.safetensors"), "cifar:resnet_tiny", False),
        ("run:cifar_distill_itself", "cifar:mobilenetv2", False),  # not there yet, but one of the variants
        (str(file), own, False),
        ("timm:resnet18", "timm:resnet18", True),
    ):
        (teacher,) = taught(*out, "--teacher", init).teachers.values()
        assert (teacher.name, teacher.pretrained) == (name, published), init
        assert teacher.init == ("" if published else init)
    with pytest.raises(ValueError, match=r"^--teacher timm:resnet9x is no model: use timm:"):
        taught(*out, "--teacher", "timm:resnet9x")
    both = taught(*out, "--teacher", "run:earlier", "run:cifar_distill_itself").teachers
    assert {key: one.name for key, one in both.items()} == {
        "teacher": "cifar:resnet_tiny",
        "teacher2": "cifar:mobilenetv2",
    }


def test_only_a_student_has_teachers() -> None:
    mergenet = load(next(path for path in LAUNCHERS if path.stem == "cifar_mergenet")).VARIANTS
    with pytest.raises(ValueError, match="--teacher run:x is for distillation") as error:
        options.resolve(mergenet, ["--teacher", "run:x"])
    assert one_sentence(str(error.value))


def test_label_weights_are_those_of_the_formulas(tmp_path: Path) -> None:
    method = tiny.distillation(tmp_path).method
    weights = {arm: method.with_arm(arm).label_weight for arm in method.arms()}
    assert weights.pop("tfkd") == pytest.approx(0.05)
    assert set(weights.values()) == {1.0}
    assert replace(method, objective="kd", kd=config.KD(labels=0.1)).label_weight == 0.1
    assert replace(method, objective="nkd", nkd=config.NKD(labels=0.0)).label_weight == 0.0
    assert replace(method, objective="ofa", ofa=config.OFA(public=False)).label_weight == 0.0, "it is in every term"


@pytest.mark.parametrize("of", ["pooled", "logits"])
def test_rkd_compares_rows_by_what_it_is_told(of: Any) -> None:
    torch.manual_seed(2)
    ours, theirs = ({"pooled": torch.randn(5, width), "logits": torch.randn(5, 3)} for width in (4, 6))
    chosen = objectives.RKD(config.RKD(of=of, distance=1.0, angle=2.0), {"teacher": lambda _: theirs})
    logits, terms = chosen(lambda *_, **__: ours, None, torch.zeros(5), torch.zeros(5))
    assert torch.equal(logits, ours["logits"])
    expected = losses.rkd_distance(ours[of], theirs[of]) + 2 * losses.rkd_angle(ours[of], theirs[of])
    torch.testing.assert_close(sum(terms.values()), expected)
