"""X-VLM in whole runs: sharding, transfers inside one engine, resumes, and what a trained one answers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from rounding import Nudge, assert_close, movement, result_of
from safetensors.torch import load_file
from torch import Tensor, nn

from hetero_kt import checks, cli, data, options, parts, plan
from hetero_kt.config import (
    XVLM,
    AdapterConfig,
    Data,
    MergeNet,
    Model,
    Optim,
    Recipe,
    Schedule,
    Text,
    Transfer,
    Transform,
)
from hetero_kt.cost import macs_of, sample
from hetero_kt.data import world
from hetero_kt.debug import shrink
from hetero_kt.distributed import params
from hetero_kt.distributed.launch import Ranks
from hetero_kt.distributed.learner import build_learner
from hetero_kt.export import write
from hetero_kt.folder import run_folder
from hetero_kt.methods import mergenet
from hetero_kt.methods.mergenet import Exchange, Site
from hetero_kt.models import xvlm
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
    name: Data(name, batch=8, candidates=8, validation=0.005, image_size=32, text=WORLD, transform=PLAIN, workers=0)  # type: ignore[arg-type]
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


def reference(name: str, nudge: Nudge) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alignment, "_drawn", hardest)
        return in_one_process(name, nudge)


def in_one_process(name: str, nudge: Nudge) -> dict[str, Any]:
    model = model_of(name)
    exchange = Exchange(transfers(model))
    nudge.modules([model, *exchange.adapters().values()])
    spared = ("vision_encoder.cls_token", "vision_encoder.pos_embed", "temp")
    groups = [
        {"params": [p for n, p in model.named_parameters() if n not in spared], "weight_decay": SGD.weight_decay},
        {"params": [p for n, p in model.named_parameters() if n in spared]},
    ]
    optimizer = torch.optim.SGD(groups, lr=SGD.lr, momentum=SGD.momentum)
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
def test_transfers_inside_one_engine_equal_one_plain_process(ranks: Any, name: str, size: int, stage: int) -> None:
    assert_equal(ranks(size).run(on_engines, name, stage)[0], name)


def assert_equal(ours: dict[str, Any], name: str) -> None:
    theirs = result_of(reference, name)
    ours["weights"] = {key: ours["weights"][key] for key in theirs["weights"]}  # an engine's own have buffers too
    assert_close(ours, theirs, movement(reference, name))


def test_questions_in_micro_batches_are_as_in_one(ranks: Any) -> None:
    """They have different numbers of answers, which have to stay with them."""
    assert_equal(ranks(1).run(on_engines, "vqa", 1, 2)[0], "vqa")


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


def test_activation_checkpointing_reaches_the_model(tmp_path: Path) -> None:
    """What it changes there (nothing) is the model's own test."""
    base = recipe(tmp_path)
    for on in (False, True):
        made = parts.build_models(replace(base, models={"xvlm": replace(base.models["xvlm"], checkpointing=on)}))
        assert made["xvlm"].checkpointing is on


@pytest.mark.parametrize("name", ["vqa", "captions"])
@pytest.mark.parametrize("precision", ["bf16", "autocast"])
def test_lower_precision_trains(ranks: Any, name: str, precision: str) -> None:
    """The loss of one batch falls as in fp32."""
    whole, lower = (ranks(1).run(one_batch, name, kind) for kind in ("fp32", precision))
    assert whole[0][-1] < 0.75 * whole[0][0]
    assert lower[0][-1] < 0.75 * lower[0][0]
    assert lower[0][0] == pytest.approx(whole[0][0], rel=0.02)


def one_batch(name: str, precision: Any) -> list[float]:
    """Losses of steps on one batch, with the same negatives for the same features."""
    drawn, alignment._drawn = alignment._drawn, hardest
    try:
        optim = Optim("adamw", lr=2e-3, weight_decay=0.0)
        model = Model("", "", optim=optim, schedule=Schedule("constant"), precision=precision)
        learner = build_learner(model_of(name), model, {"stage": 1}, rows=8, steps=40)
        learner.engine.eval()
        batch = data.open_loader(SETS[name], train=True, seed=3).batch(0)
        losses = []
        for step in range(40):
            learner.begin(step)
            loss = task_of(name).loss(learner.engine, batch)
            learner.engine.backward(loss)
            learner.step()
            losses.append(loss.item())
        learner.engine.destroy()
    finally:
        alignment._drawn = drawn
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("control", ["none", "transfer"])
def test_the_generated_world_is_learned(tmp_path: Path, control: str) -> None:
    """With transfers and without: nine questions in ten, and most captions among ten of 200 pictures."""
    scores = {}
    for launcher, name in (("xvlm_vqa.py", "vqa"), ("xvlm_retrieval.py", "captions")):
        command = [sys.executable, str(LAUNCHERS / launcher), "--variant", "world", "--control", control]
        subprocess.run([*command, "--output-dir", str(tmp_path / name)], check=True, timeout=1200)
        (result,) = (tmp_path / name).rglob("result.json")
        scores[name] = json.loads(result.read_text())["metrics"]["xvlm"]
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
        every = asked.ask(file, "how many?", top=1000)
        assert len(every) == len(asked.answers.texts)
        assert sum(chance for _, chance in every) < 1, "as texts, of which a model could write others"
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
    assert loader.samples == 597, "three questions about a tenth of the 1,990 pictures that are not held out"
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
        ({"micro_batch": 1}, r"^--models\.xvlm\.micro-batch leaves no second picture"),
    ],
)
def test_retrieval_that_cannot_train(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    base = recipe(tmp_path, "captions")
    with pytest.raises(ValueError, match=sentence):
        checks.check(replace(base, models={"xvlm": replace(base.models["xvlm"], **change)}))
    with pytest.raises(ValueError, match=r"^--data\.captions\.batch leaves no second picture"):
        checks.check(replace(base, data={"captions": replace(base.data["captions"], batch=2)}), world=2)
    gathered = replace(base.models["xvlm"], xvlm=XVLM(negatives="gathered"))
    few = replace(base, models={"xvlm": gathered}, data={"captions": replace(base.data["captions"], batch=2)})
    checks.check(few, world=2)
    with pytest.raises(ValueError, match="leaves no second picture"):
        checks.check(replace(few, data={"captions": replace(base.data["captions"], batch=1)}))


@pytest.mark.parametrize("size", [1, 8, 16])
def test_debug_leaves_every_rank_pairs_enough(tmp_path: Path, size: int) -> None:
    base = recipe(tmp_path, "captions")
    pieces = replace(base.models["xvlm"], micro_batch=4)
    checks.check(shrink(replace(base, models={"xvlm": pieces}), size), size)


@pytest.mark.parametrize(
    ("start", "closed"),
    [
        (XVLM(), (False, False)),
        (XVLM(vision="timm:vit"), (False, True)),
        (XVLM(text="hf:bert"), (True, False)),
        (XVLM(vision="timm:vit", text="hf:bert"), (True, True)),
    ],
)
def test_the_gate_is_closed_in_front_of_the_tower_that_is_trained(
    tmp_path: Path, start: XVLM, closed: tuple[bool, bool]
) -> None:
    """v2t writes the text encoder, t2v the vision encoder."""
    base = recipe(tmp_path)
    made = replace(base, models={"xvlm": replace(base.models["xvlm"], xvlm=start)})
    assert isinstance(made.method, MergeNet)
    found = parts.mergenet.build_transfers(made, made.method, {"xvlm": model_of("vqa")})
    assert tuple(found[way].adapter.first_gate() == 0.0 for way in ("v2t", "t2v")) == closed


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"fraction": 0.1}, r"^--data\.all\.fraction is for vqa and captions only"),
        ({"candidates": 3}, r"^--data\.all\.candidates is for vqa and captions only"),
        ({"blank": True}, r"^--data\.all\.blank is for vqa and captions only"),
    ],
)
def test_fields_of_pairs_are_refused_elsewhere(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    base = tiny.recipe(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        checks.check(replace(base, data={"all": replace(base.data["all"], **change)}))
    pairs = recipe(tmp_path)
    with pytest.raises(ValueError, match=r"^--data\.vqa\.per-class is not for vqa"):
        checks.check(replace(pairs, data={"vqa": replace(pairs.data["vqa"], per_class=3)}))
    captions = recipe(tmp_path, "captions")
    ((name, data),) = captions.data.items()
    with pytest.raises(ValueError, match=rf"^--data\.{name}\.answers is for vqa only: leave it out"):
        checks.check(replace(captions, data={name: replace(data, answers=3)}))


@pytest.mark.parametrize("name", ["vqa", "captions"])
def test_a_plan_counts_the_whole_forward(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    made = recipe(tmp_path, name)
    plan.show(made, 2)
    printed = capsys.readouterr().out
    assert "v2t" in printed
    inputs, more = sample(made.data[name])
    assert macs_of(model_of(name), *inputs, **more) > 1e6
    if name == "vqa":
        assert macs_of(model_of(name), *inputs, **more) > macs_of(model_of(name), *inputs), "the decoder counts"


def test_an_average_can_be_exported_and_asked(ranks: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two models in one run: each is named by its folder; and a torch checkpoint is one that torch loads safely."""
    base = recipe(tmp_path, steps=2)
    made = replace(base, models={"xvlm": replace(base.models["xvlm"], ema=0.9)})
    tiny.train(ranks(1), made)
    export = run_folder(made) / "export"
    again = write(run_folder(made) / "checkpoints" / "2")  # without engines
    assert [file.parent.name for file in again] == ["xvlm", "xvlm_ema"]
    for file in again:
        theirs = export / file.parent.name
        tiny.assert_equal(load_file(file), load_file(theirs / file.name), file.parent.name)
        assert (file.parent / "config.json").read_text() == (theirs / "config.json").read_text()
    shutil.rmtree(again[0].parents[1])
    with pytest.raises(SystemExit):
        cli.main(["export", str(run_folder(made)), "--official", str(tmp_path / "x.th")])
    assert "holds 2 models: name one, " in capsys.readouterr().err
    cli.main(["export", str(export / "xvlm_ema"), "--official", str(tmp_path / "x.th")])
    assert "text_encoder.embeddings.word_embeddings.weight" in torch.load(tmp_path / "x.th", weights_only=True)["model"]
    with pytest.raises(SystemExit):
        cli.main(["export", str(export / "xvlm_ema"), "--official", str(tmp_path)])
    assert "cannot be written" in capsys.readouterr().err


def test_the_names_that_are_checked_are_those_that_are_built() -> None:
    assert sorted(checks.XVLMS) == sorted(xvlm.known())
