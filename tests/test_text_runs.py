"""BERT and DistilBERT side by side on different texts: transfers, resumes, exports."""

from __future__ import annotations

import json
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
from transformers import AutoTokenizer, BertForQuestionAnswering, DistilBertForSequenceClassification

from hetero_kt import checks, data, parts
from hetero_kt.config import AdapterConfig, Data, MergeNet, Model, Optim, Recipe, Schedule, Text, Transfer
from hetero_kt.distributed import params
from hetero_kt.distributed.learner import build_learner
from hetero_kt.export import write
from hetero_kt.folder import run_folder
from hetero_kt.methods import mergenet
from hetero_kt.methods.mergenet import Exchange, Site
from hetero_kt.models import bert
from hetero_kt.nn.reencode import factorise
from hetero_kt.options import Options
from hetero_kt.tasks import Task, task_of

VALUE = "bert.encoder.layer.1.attention.self.value.weight"
V_LIN = "distilbert.transformer.layer.0.attention.v_lin.weight"
SHORT = Text("generated", length=64, stride=16, question=16)
ADAPTER = AdapterConfig(heads=2, dropout=0.0, ff_dropout=0.0)
SGD = Optim("sgd", lr=0.05)
STEPS = 5


QUESTIONS = Data("squad", batch=8, text=SHORT)
REVIEWS = Data("imdb", batch=4, text=SHORT)
WORDS = data.tokenizer(QUESTIONS).size


def recipe(folder: Path, stage: int = 1, **changes: Any) -> Recipe:
    """Questions in batches of 8 and reviews in batches of 80, of which there are 200: they start over."""
    zero = folder / f"zero{stage}.json"
    zero.write_text(json.dumps({"stage": stage, "stage3_param_persistence_threshold": 0}))
    optim = Optim("adamw", lr=1e-3, weight_decay=1e-2, clip=1.0)
    made = {
        "bert": Model("bert:2x32", "questions", optim=optim, schedule=Schedule("cosine"), zero=str(zero)),
        "distilbert": Model("distilbert:1x32", "reviews", optim=optim, schedule=Schedule("constant"), zero=str(zero)),
    }
    transfers = {
        "there": Transfer(f"bert:{VALUE}", f"distilbert:{V_LIN}", cycle=1, rank=4, mode="svd", adapter=ADAPTER),
        "back": Transfer(f"distilbert:{V_LIN}", f"bert:{VALUE}", cycle=2, rank=4, mode="svd", adapter=ADAPTER),
    }
    sets = {"questions": QUESTIONS, "reviews": replace(REVIEWS, batch=80)}
    base = Recipe("texts", made, sets, MergeNet(transfers), 6, log_every=1)
    return replace(base, output_dir=str(folder), **changes)


@pytest.mark.parametrize(
    ("name", "change", "option"),
    [
        ("questions", {"augmentations": 2}, "augmentations"),
        ("reviews", {"pipeline": "timm"}, "pipeline"),
        ("questions", {"per_class": 3}, "per-class"),
    ],
)
def test_fields_of_pictures_are_refused_of_texts(tmp_path: Path, name: str, change: Any, option: str) -> None:
    made = recipe(tmp_path)
    kind = made.data[name].name
    with pytest.raises(ValueError, match=rf"^--data\.{name}\.{option} is not for {kind}: leave it out\.$"):
        checks.check(replace(made, data={**made.data, name: replace(made.data[name], **change)}))
    few = replace(made.data["reviews"], per_class=100)  # reviews have classes, and an epoch has to hold a batch
    checks.check(replace(made, data={**made.data, "reviews": few}))


def pair() -> dict[str, Any]:
    """Both models, always with the same start, a factor of each to be exchanged, and nothing that drops out."""
    torch.manual_seed(0)
    made: dict[str, Any] = {
        "bert": bert.build("bert:2x32", "question_answering", vocabulary=WORDS)[0],
        "distilbert": bert.build("distilbert:1x32", "classification", vocabulary=WORDS)[0],
    }
    factorise(made["bert"], VALUE, 4)
    factorise(made["distilbert"], V_LIN, 5)
    return {name: model.eval() for name, model in made.items()}


def transfers(owners: dict[str, Any]) -> list[mergenet.Transfer]:
    there, back = Site(owners["bert"], VALUE), Site(owners["distilbert"], V_LIN)
    how = {"adapter": ADAPTER, "optim": Optim("sgd", lr=1e-2)}
    return [
        mergenet.Transfer(there, back, cycle=1, name="there", **how),  # type: ignore[arg-type]
        mergenet.Transfer(back, there, cycle=2, name="back", **how),  # type: ignore[arg-type]
    ]


def loaders(rank: int, world: int) -> dict[str, Any]:
    sets = {"bert": QUESTIONS, "distilbert": REVIEWS}
    return {name: data.open_loader(d, train=True, seed=3, rank=rank, world=world) for name, d in sets.items()}


TASKS: dict[str, Task] = {"bert": task_of("squad"), "distilbert": task_of("imdb")}


def on_engines(stage: int) -> dict[str, Any]:
    rank, world = dist.get_rank(), dist.get_world_size()
    model = Model("", "", optim=SGD, schedule=Schedule("constant"))
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    rows = {"bert": 8 // world, "distilbert": 4 // world}
    learners = {name: build_learner(m, model, zero, rows=rows[name], steps=STEPS) for name, m in pair().items()}
    for learner in learners.values():
        learner.engine.eval()
    engines = {name: learner.engine for name, learner in learners.items()}
    method = mergenet.MergeNet(learners, Exchange(transfers(engines)), {name: t.loss for name, t in TASKS.items()})
    drawn = loaders(rank, world)
    losses = []
    for step in range(STEPS):
        log = method.step(step, {name: loader.batch(step) for name, loader in drawn.items()})
        pair_of = torch.stack([log["bert/loss"], log["distilbert/loss"]])
        dist.all_reduce(pair_of)
        losses.append((pair_of / world).tolist())
    if stage == 3:
        parameters = [p for engine in engines.values() for p in engine.module.parameters()]
        assert all(p.ds_status == ZeroParamStatus.NOT_AVAILABLE for p in parameters)
    found: dict[str, Any] = {"losses": losses}
    for name, engine in engines.items():
        found[name] = {k: v.numpy() for k, v in params.state_dict(engine).items()}
        engine.destroy()
    return found


def reference(nudge: Nudge) -> dict[str, Any]:
    made = pair()
    exchange = Exchange(transfers(made))
    nudge.modules([*made.values(), *exchange.adapters().values()])
    optimizers = [
        torch.optim.SGD(m.parameters(), lr=SGD.lr, momentum=SGD.momentum, weight_decay=SGD.weight_decay)
        for m in made.values()
    ]
    drawn = loaders(0, 1)
    losses = []
    for step in range(STEPS):
        exchange.propose()
        shown = []
        for (name, model), optimizer in zip(made.items(), optimizers, strict=True):
            optimizer.zero_grad()
            loss = TASKS[name].loss(model, drawn[name].batch(step))
            loss.backward()
            shown.append(loss.item())
        for optimizer in optimizers:
            optimizer.step()
        exchange.learn()
        losses.append(shown)
    return {"losses": losses} | {
        name: {k: p.detach().numpy() for k, p in model.named_parameters()} for name, model in made.items()
    }


@pytest.mark.parametrize("stage", [2, 3])
def test_cross_task_transfer_on_two_ranks_equals_one_plain_process(ranks: Any, stage: int) -> None:
    ours, theirs = ranks(2).run(on_engines, stage)[0], result_of(reference)
    for name in ("bert", "distilbert"):  # the engines' own have buffers too
        ours[name] = {key: ours[name][key] for key in theirs[name]}
    assert_close(ours, theirs, movement(reference))


@pytest.mark.parametrize("stage", [1, 3])
def test_a_resume_goes_on_in_both_loaders(ranks: Any, tmp_path: Path, stage: int) -> None:
    """Dropout is on, the reviews have started over, and DistilBERT has come to its end before."""
    whole = recipe(tmp_path, stage)
    models = {**whole.models, "distilbert": replace(whole.models["distilbert"], steps=5)}
    whole = replace(whole, models=models, output_dir=str(tmp_path / "whole"))
    ends = tiny.train(ranks(2), whole)
    again = replace(whole, output_dir=str(tmp_path / "again"))
    tiny.train(ranks(2), again, Options(max_steps=4))
    resumed = tiny.train(ranks(2), again)
    assert [end["first_step"] for end in resumed] == [4, 4]
    for one, other in zip(resumed, ends, strict=True):
        for key in ("bert", "distilbert", "bert optimizer", "distilbert optimizer", "method", "random", "metrics"):
            tiny.assert_equal(one[key], other[key], key)


def test_a_model_built_in_pieces_trains_as_one_built_whole(ranks: Any, tmp_path: Path) -> None:
    """Under ZeRO-3 no rank ever holds all of it, from the first weights on."""
    ends = {}
    for stage in (1, 3):
        base = replace(recipe(tmp_path, stage), output_dir=str(tmp_path / f"stage{stage}"))
        assert ranks(2).run(in_pieces, base) == [stage == 3] * 2
        ends[stage] = tiny.train(ranks(2), base)[0]
        lines = tiny.lines(run_folder(base))
        ends[stage]["losses"] = [v for line in lines for k, v in sorted(line.items()) if k.endswith("/loss")]
    assert len(ends[1]["losses"]) == 12
    assert ends[3]["losses"] == pytest.approx(ends[1]["losses"], rel=1e-4)


def in_pieces(base: Recipe) -> bool:
    modules = parts.build_models(base)
    return all(hasattr(p, "ds_id") for module in modules.values() for p in module.parameters())


def test_a_body_pre_trained_by_an_earlier_run_is_taken_over(ranks: Any, tmp_path: Path) -> None:
    """As `run:RECIPE`; rows of masked texts may be shorter than a window of questions."""
    one = replace(recipe(tmp_path), name="before", method=MergeNet({}, "none"), steps=2)
    rows = Data("pretraining", batch=8, text=Text("generated", length=32))
    one = replace(one, models={"bert": replace(one.models["bert"], data="texts")}, data={"texts": rows})
    tiny.train(ranks(1), one)
    saved = load_file(run_folder(one) / "export" / "bert" / "model.safetensors")
    later = recipe(tmp_path)
    later = replace(later, models={**later.models, "bert": replace(later.models["bert"], init="run:before")})
    found = parts.build_models(later)["bert"].state_dict()
    body = [name for name in found if name.startswith("bert.") and "pooler" not in name]
    assert len(body) > 20
    assert all(torch.equal(found[name], saved[name]) for name in body)
    nowhere = replace(later, models={**later.models, "bert": replace(later.models["bert"], init="run:nothing")})
    with pytest.raises(ValueError, match=r"^--models\.bert\.init run:nothing names .* which does not exist"):
        parts.build_models(nowhere)


def test_exports_are_transformers_own(ranks: Any, tmp_path: Path) -> None:
    """Folders that `from_pretrained` reads, with the trained weights, unfactorised, and the tokenizer."""
    base = recipe(tmp_path, 3)
    assert isinstance(base.method, MergeNet)
    factors = {name: replace(transfer, mode="factor") for name, transfer in base.method.transfers.items()}
    base = replace(base, method=MergeNet(factors))
    (end, *_) = tiny.train(ranks(2), base)
    export = run_folder(base) / "export"
    asked = BertForQuestionAnswering.from_pretrained(export / "bert")
    judged = DistilBertForSequenceClassification.from_pretrained(export / "distilbert")
    assert set(asked.state_dict()) == set(load_file(export / "bert" / "model.safetensors"))
    loader = data.open_loader(base.data["questions"], train=False, seed=0)
    measured = json.loads((run_folder(base) / "result.json").read_text())["metrics"]
    assert task_of("squad").evaluate(asked, loader, "cpu") == pytest.approx(measured["bert"], rel=1e-5)
    loader = data.open_loader(base.data["reviews"], train=False, seed=0)
    assert task_of("imdb").evaluate(judged, loader, "cpu") == pytest.approx(measured["distilbert"], rel=1e-5)
    words = AutoTokenizer.from_pretrained(export / "bert")
    assert words.tokenize("When was the bridge sold?") == ["when", "was", "the", "bridge", "sold", "?"]
    assert end["done"]
    for file in write(run_folder(base) / "checkpoints" / str(base.steps)):  # without engines
        theirs = export / file.parent.name
        assert {one.name for one in file.parent.iterdir()} == {one.name for one in theirs.iterdir()}
        tiny.assert_equal(load_file(file), load_file(theirs / file.name), file.parent.name)
        assert (file.parent / "config.json").read_text() == (theirs / "config.json").read_text()


def test_a_trained_bert_survives_the_default_adapter_and_not_the_published_one() -> None:
    """The gate starts at 0 in front of trained weights; a LayerNorm writes rows of unit variance over them.

    Behind a value matrix BERT normalises its features, which hides much of that; nothing does behind the last layer.
    """
    train, seen = (data.open_loader(replace(QUESTIONS, batch=32), train=part, seed=0) for part in (True, False))
    answering = task_of("squad")
    torch.manual_seed(0)
    target: Any = bert.build("bert:2x32", "question_answering", vocabulary=WORDS)[0]
    source: Any = bert.build("distilbert:2x32", "question_answering", vocabulary=WORDS)[0]
    fresh = answering.evaluate(target, seen, "cpu")["loss"]
    optimizer = torch.optim.AdamW(target.parameters(), lr=4e-3)
    for step in range(100):
        optimizer.zero_grad()
        answering.loss(target, train.batch(step)).backward()
        optimizer.step()
    target.eval()
    known = answering.evaluate(target, seen, "cpu")
    assert known["loss"] < fresh / 2, "it has learnt something that can be lost"

    def after_transfers(adapter: AdapterConfig) -> list[dict[str, float]]:
        """The scores after each of the first three transfers, a step of training between them."""
        before = {key: value.clone() for key, value in target.state_dict().items()}
        step_of = torch.optim.SGD(target.parameters(), lr=1e-3)
        exchange = Exchange(
            [
                mergenet.Transfer(Site(source, V_LIN), Site(target, VALUE), cycle=1, adapter=adapter),
                mergenet.Transfer(
                    Site(source, "qa_outputs.weight"), Site(target, "qa_outputs.weight"), cycle=1, adapter=adapter
                ),
            ]
        )
        scores = []
        for step in range(3):
            exchange.propose()
            scores.append(answering.evaluate(target, seen, "cpu"))
            step_of.zero_grad()
            answering.loss(target, train.batch(step)).backward()
            step_of.step()
            exchange.learn()
        target.load_state_dict(before)
        return scores

    first, *later = after_transfers(AdapterConfig(heads=2, gate=0.0))
    assert first == known, "to the bit"
    assert all(score["loss"] < 1.05 * known["loss"] for score in later)
    lost = after_transfers(AdapterConfig(heads=2, width="published", input="raw", output="layernorm"))
    assert all(score["loss"] > 1.5 * known["loss"] for score in lost), (known, lost)
