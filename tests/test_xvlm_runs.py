"""X-VLM in whole runs: sharding, transfers inside one engine, resumes, and what a trained one answers."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn

from hetero_kt import checks, cli, data, options, parts
from hetero_kt.config import Data, MergeNet, Model, Optim, Recipe, Schedule, Text, Transfer, Transform
from hetero_kt.data import world
from hetero_kt.distributed import params
from hetero_kt.distributed.launch import Ranks
from hetero_kt.distributed.learner import build_learner
from hetero_kt.folder import run_folder
from hetero_kt.methods import mergenet
from hetero_kt.methods.mergenet import Exchange, Site
from hetero_kt.models import xvlm
from hetero_kt.nn.adapter import AdapterConfig
from hetero_kt.nn.losses import alignment
from hetero_kt.options import Options
from hetero_kt.tasks import task_of

LAUNCHERS = Path(__file__).parents[1] / "launchers"

VISION = "vision_encoder.blocks.1.attn.qkv.weight[v]"
TEXT = "text_encoder.encoder.layer.1.attention.self.value.weight"
ADAPTER = AdapterConfig(heads=2, dropout=0.0, ff_dropout=0.0)
PLAIN = Transform(scale=(1.0, 1.0), flip=0.0, squash=True)
WORLD = Text("generated", length=24)
SETS = {
    name: Data(name, batch=8, candidates=8, image_size=32, text=WORLD, transform=PLAIN, workers=0)  # type: ignore[arg-type]
    for name in ("vqa", "captions")
}
WORDS = data.tokenizer(SETS["vqa"])
SGD = Optim("sgd", lr=0.05)
STEPS = 5


def recipe(folder: Path, name: str = "vqa", stage: int = 1, **changes: Any) -> Recipe:
    """A tiny X-VLM on generated pictures, whose encoders teach each other every second step."""
    zero = folder / f"zero{stage}.json"
    zero.write_text(json.dumps({"stage": stage, "stage3_param_persistence_threshold": 0}))
    optim = Optim("adamw", lr=1e-3, weight_decay=1e-2, decay_all=False, clip=1.0)
    model = Model("xvlm:tiny", name, optim=optim, schedule=Schedule("cosine", warmup=2), zero=str(zero))
    sites = {"v2t": (VISION, TEXT), "t2v": (TEXT, VISION)}
    transfers = {
        way: Transfer(f"xvlm:{source}", f"xvlm:{target}", cycle=2, rank=4, mode="svd", adapter=AdapterConfig(heads=2))
        for way, (source, target) in sites.items()
    }
    base = Recipe("pictures", {"xvlm": model}, {name: SETS[name]}, MergeNet(transfers), STEPS, log_every=1)
    return replace(base, **{"output_dir": str(folder), **changes})


def model_of(name: str) -> nn.Module:
    """Always with the same start, and with nothing that drops out; negatives may come from any rank."""
    torch.manual_seed(0)
    made = xvlm.build("xvlm:tiny", xvlm.TASKS[name], vocabulary=WORDS, image_size=32, gathered=True)[0]
    return made.eval()


def transfers(owner: Any) -> list[mergenet.Transfer]:
    vision, text = Site(owner, VISION, "full"), Site(owner, TEXT, "full")
    how: dict[str, Any] = {"cycle": 2, "adapter": ADAPTER, "optim": Optim("sgd", lr=1e-2)}
    return [mergenet.Transfer(vision, text, name="v2t", **how), mergenet.Transfer(text, vision, name="t2v", **how)]


def hardest(logits_BM: Tensor, barred_BM: Tensor) -> Tensor:
    """Negatives that do not depend on how rows lie on ranks."""
    return logits_BM.masked_fill(barred_BM, -torch.inf).argmax(1)


def on_engines(name: str, stage: int, micro_batch: int = 0) -> dict[str, Any]:
    rank, size = dist.get_rank(), dist.get_world_size()
    drawn, alignment._drawn = alignment._drawn, hardest
    try:
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
        model = Model("", "", optim=SGD, schedule=Schedule("constant"), micro_batch=micro_batch)
        learner = build_learner(model_of(name), model, zero, rows=8 // size, steps=STEPS)
        learner.engine.eval()
        method = mergenet.MergeNet({"xvlm": learner}, Exchange(transfers(learner.engine)), {"xvlm": task_of(name).loss})
        loader = data.open_loader(SETS[name], train=True, seed=3, rank=rank, world=size)
        losses = []
        for step in range(STEPS):
            loss = method.step(step, {"xvlm": loader.batch(step)})["xvlm/loss"]
            dist.all_reduce(loss)
            losses.append(loss.item() / size)
        if stage == 3:
            assert all(p.ds_status == ZeroParamStatus.NOT_AVAILABLE for p in learner.engine.module.parameters())
        weights = {k: v.numpy() for k, v in params.state_dict(learner.engine).items()}
        learner.engine.destroy()
    finally:
        alignment._drawn = drawn
    return {"losses": losses, "weights": weights}


def plainly(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(alignment, "_drawn", hardest)
    model = model_of(name)
    exchange = Exchange(transfers(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=SGD.lr, momentum=SGD.momentum, weight_decay=SGD.weight_decay)
    loader = data.open_loader(SETS[name], train=True, seed=3)
    losses = []
    for step in range(STEPS):
        exchange.propose()
        optimizer.zero_grad()
        loss = task_of(name).loss(model, loader.batch(step))
        loss.backward()
        optimizer.step()
        exchange.learn()
        losses.append(loss.item())
    return {"losses": losses, "weights": {k: p.detach().numpy() for k, p in model.named_parameters()}}


@pytest.mark.parametrize(("size", "stage"), [(1, 3), (2, 1), (2, 2), (2, 3)])
@pytest.mark.parametrize("name", ["vqa", "captions"])
def test_transfers_inside_one_engine_equal_one_plain_process(
    ranks: Any, monkeypatch: pytest.MonkeyPatch, name: str, size: int, stage: int
) -> None:
    ours, theirs = ranks(size).run(on_engines, name, stage)[0], plainly(name, monkeypatch)
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)
    for key, value in theirs["weights"].items():
        assert abs(ours["weights"][key] - value).max() < 1e-4, key


def test_questions_in_micro_batches_are_as_in_one(ranks: Any) -> None:
    """They have different numbers of answers, which have to stay with them."""
    whole, pieces = (ranks(1).run(on_engines, "vqa", 1, rows)[0] for rows in (0, 2))
    assert pieces["losses"] == pytest.approx(whole["losses"], rel=1e-4)
    for key, value in whole["weights"].items():
        assert abs(pieces["weights"][key] - value).max() < 1e-5, key


@pytest.mark.parametrize(("name", "stage"), [("vqa", 3), ("captions", 1)])
def test_a_resume_is_equal_to_the_bit(ranks: Any, tmp_path: Path, name: str, stage: int) -> None:
    """Dropout and the drawing of negatives go on where they were."""
    whole = recipe(tmp_path, name, stage, output_dir=str(tmp_path / "whole"))
    ends = tiny.train(ranks(2), whole)
    again = replace(whole, output_dir=str(tmp_path / "again"))
    tiny.train(ranks(2), again, Options(max_steps=3))
    resumed = tiny.train(ranks(2), again)
    assert [end["first_step"] for end in resumed] == [3, 3]
    tiny.assert_same_end(resumed, ends)
    trained = [[line for line in tiny.lines(run_folder(one)) if "xvlm/loss" in line] for one in (again, whole)]
    assert trained[0] == trained[1]


def test_activation_checkpointing_changes_nothing(ranks: Any, tmp_path: Path) -> None:
    ends = []
    for on in (False, True):
        base = recipe(tmp_path, "captions", 3, output_dir=str(tmp_path / str(on)))
        model = replace(base.models["xvlm"], checkpointing=on)
        ends.append(tiny.train(ranks(2), replace(base, models={"xvlm": model}))[0]["xvlm"])
    for key, value in ends[0].items():
        assert torch.allclose(ends[1][key], value, atol=1e-6), key


@pytest.mark.parametrize("name", ["vqa", "captions"])
@pytest.mark.parametrize("precision", ["bf16", "autocast"])
def test_lower_precision_trains(ranks: Any, tmp_path: Path, name: str, precision: str) -> None:
    """The loss falls as in fp32, within 5 percent."""
    losses = {}
    for kind in ("fp32", precision):
        base = recipe(tmp_path, name, 1, output_dir=str(tmp_path / kind), steps=12)
        model = replace(base.models["xvlm"], precision=kind, optim=replace(base.models["xvlm"].optim, lr=3e-3))
        base = replace(base, models={"xvlm": model})
        tiny.train(ranks(1), base)
        losses[kind] = [line["xvlm/loss"] for line in tiny.lines(run_folder(base)) if "xvlm/loss" in line]
    assert losses[precision][-1] == pytest.approx(losses["fp32"][-1], rel=0.05)
    if name == "vqa":
        assert losses[precision][-1] < 0.8 * losses[precision][0]


@pytest.mark.slow
@pytest.mark.parametrize("control", ["none", "transfer"])
def test_the_generated_world_is_learned(ranks: Any, tmp_path: Path, control: str) -> None:
    """With transfers and without: nine questions in ten, and most captions among ten of 200 pictures."""
    scores = {}
    for launcher, name in (("xvlm_vqa.py", "vqa"), ("xvlm_retrieval.py", "captions")):
        made = runpy.run_path(str(LAUNCHERS / launcher))["VARIANTS"]["world"]()
        made = replace(made, output_dir=str(tmp_path))
        tiny.train(ranks(1), replace(made, method=made.method.with_arm(control)))
        result = json.loads(next(tmp_path.glob(f"{made.name}/{control}/*/result.json")).read_text())
        scores[name] = result["metrics"]["xvlm"]
    assert scores["vqa"]["overall"] > 90
    assert scores["captions"]["tr1"] > 15, "chance is 0.5"
    assert scores["captions"]["ir10"] > 50, "chance is 5"


# --- what a trained one answers ---


@pytest.fixture(scope="module", params=["vqa", "captions"])
def trained(request: Any, ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A run of five steps."""
    made = recipe(tmp_path_factory.mktemp("trained"), request.param, eval_every=5)
    tiny.train(ranks(1), made)
    return made


def test_a_trained_one_answers_as_in_its_evaluation(
    trained: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`hetero-kt ask` sees the picture and reads the text as the evaluation did, with the exported weights."""
    from hetero_kt.ask import Trained

    name = trained.models["xvlm"].data
    things = next(iter(world.scenes(False).values()))
    file = tmp_path / "scene.png"
    world.picture(things).save(file)
    asked = Trained(run_folder(trained))
    loader = data.open_loader(trained.data[name], train=False, seed=0)
    found = parts.evaluate(trained, "xvlm", asked.model, loader, Ranks(0, 1, 0, torch.device("cpu")))
    measured = json.loads((run_folder(trained) / "result.json").read_text())["metrics"]["xvlm"]
    assert found == pytest.approx(measured, rel=1e-4)
    if name == "vqa":
        shown = asked.ask(file, "how many shapes are there?", top=3)
        assert len(shown) == 3
        assert shown[0][1] >= shown[1][1] >= shown[2][1] > 0
        assert sum(chance for _, chance in asked.ask(file, "how many?", top=1000)) == pytest.approx(1)
        cli.main(["ask", str(run_folder(trained)), str(file), "how many shapes are there?", "--top", "3"])
        printed = capsys.readouterr().out
        assert all(answer in printed for answer, _ in shown)
    else:
        texts = ["a red circle.", "a blue square and a red cross."]
        ranked = asked.rank(file, texts)
        assert {text for text, _ in ranked} == set(texts)
        assert 1 >= ranked[0][1] >= ranked[1][1] >= 0
        cli.main(["ask", str(run_folder(trained)), str(file), "--captions", *texts])
        lines = [line for line in capsys.readouterr().out.splitlines() if "." in line]
        assert [line.strip().startswith(text) for line, (text, _) in zip(lines, ranked, strict=True)] == [True, True]


def test_asking_wrongly_is_answered_in_a_sentence(
    trained: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("no picture")
    (tmp_path / "empty").mkdir()
    run, picture = str(run_folder(trained)), str(tmp_path / "text.txt")
    ours = ["what?"] if trained.models["xvlm"].data == "vqa" else ["--captions", "a cross"]
    other = ["--captions", "a cross"] if ours == ["what?"] else ["what?"]
    trained_for = "answer questions: ask one" if ours == ["what?"] else "match captions: give --captions"
    for arguments, sentence in (
        ([run, picture, *ours], "cannot be decoded (UnidentifiedImageError): name a JPEG, PNG or WebP file."),
        ([run, str(tmp_path / "none.png"), *ours], "cannot be read (No such file or directory): name a picture."),
        ([run, picture, *other], f"was trained to {trained_for}"),
        ([run, picture], "give a QUESTION about the picture, or --captions to be ranked, one of the two."),
        ([run, picture, "what?", "--captions", "a cross"], "one of the two."),
        ([run, picture, *ours[:-1], " "], " is empty" if ours == ["what?"] else "has an empty one"),
        ([run, picture, *ours, "--top", "0"], "--top 0 shows nothing: use 1 or more."),
        ([str(tmp_path / "empty"), picture, *ours], "holds no exported X-VLM: name the folder of a finished run."),
        ([str(tmp_path / "nowhere"), picture, *ours], "does not exist: name a run's folder, or its export."),
    ):
        with pytest.raises(SystemExit) as end:
            cli.main(["ask", *arguments])
        assert end.value.code == 2
        assert sentence in capsys.readouterr().err


def test_an_export_goes_into_the_official_layout_and_back(trained: Recipe, tmp_path: Path) -> None:
    from hetero_kt.ask import Trained

    file = tmp_path / "official.safetensors"
    cli.main(["export", str(run_folder(trained)), "--official", str(file)])
    ours = Trained(run_folder(trained)).model.state_dict()
    task = xvlm.TASKS[trained.models["xvlm"].data]
    back, start = xvlm.build("xvlm:tiny", task, vocabulary=WORDS, image_size=32, init=str(file))
    assert not start.fresh
    for key, value in back.state_dict().items():
        assert torch.equal(value, ours[key]), key


# --- options ---


def test_a_fraction_of_the_training_pictures_is_one_option_away(tmp_path: Path) -> None:
    made, _ = options.resolve(lambda: recipe(tmp_path), ["--train-fraction", "0.1"])
    assert made.data["vqa"].fraction == 0.1
    left, _ = options.resolve(lambda: made, [])
    assert left.data["vqa"].fraction == 0.1, "what a recipe says stays"
    loader = data.open_loader(made.data["vqa"], train=True, seed=0)
    assert loader.samples == 600, "three questions about each of 200 pictures"
    with pytest.raises(ValueError, match=r"^--train-fraction 2.0 is no share of the pictures"):
        options.resolve(lambda: recipe(tmp_path), ["--train-fraction", "2"])
    with pytest.raises(ValueError, match=r"^--train-fraction 0.1 is for sets of pictures with texts"):
        options.resolve(lambda: tiny.recipe(tmp_path), ["--train-fraction", "0.1"])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"name": "xvlm:large"}, r"^--models\.xvlm\.name xvlm:large is no model: use "),
        ({"name": "cifar:resnet_tiny"}, r"does not read about pictures: use xvlm:tiny, "),
        ({"pretrained": True}, r"^--models\.xvlm\.pretrained is for timm's models: use --models\.xvlm\.xvlm\.vision"),
        ({"init": "a", "vision": "b"}, r"^--models\.xvlm\.xvlm\.vision and --models\.xvlm\.init both say where"),
    ],
)
def test_models_that_do_not_suit(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    base = recipe(tmp_path)
    model = base.models["xvlm"]
    nested = replace(model.xvlm, **{k: change.pop(k) for k in list(change) if k in ("vision", "text")})
    with pytest.raises(ValueError, match=sentence):
        checks.check(replace(base, models={"xvlm": replace(model, xvlm=nested, **change)}))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"fraction": 0.0}, r"^--data\.vqa\.fraction 0.0 is no share of the pictures"),
        ({"answers": 0}, r"^--data\.vqa\.answers 0 is too small"),
        ({"candidates": -1}, r"^--data\.vqa\.candidates -1 is too small"),
        ({"text": Text()}, r"^--data\.vqa\.folder is empty: name the set's"),
    ],
)
def test_sets_that_do_not_suit(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    base = recipe(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        checks.check(replace(base, data={"vqa": replace(base.data["vqa"], **change)}))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"label_smoothing": 0.1}, r"^--models\.xvlm\.label-smoothing goes with neither of retrieval's losses"),
        ({"micro_batch": 1}, r"^--models\.xvlm\.micro-batch leaves a rank no second picture"),
    ],
)
def test_retrieval_that_cannot_train(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    base = recipe(tmp_path, "captions")
    with pytest.raises(ValueError, match=sentence):
        checks.check(replace(base, models={"xvlm": replace(base.models["xvlm"], **change)}))
    with pytest.raises(ValueError, match=r"^--data\.NAME\.batch leaves a rank no second picture"):
        checks.check(replace(base, data={"captions": replace(base.data["captions"], batch=2)}), world=2)


def test_the_names_that_are_checked_are_those_that_are_built() -> None:
    assert sorted(checks.XVLMS) == sorted(xvlm.known())
