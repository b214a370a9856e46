"""A recipe's transfers between its models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from torch import nn

from hetero_kt.checks import split_site
from hetero_kt.compiler import compile_chosen
from hetero_kt.config import MergeNet, Model, Recipe
from hetero_kt.distributed.launch import Ranks
from hetero_kt.methods import Method, mergenet
from hetero_kt.methods.sharing import Sharing
from hetero_kt.nn.adapter import AdapterConfig
from hetero_kt.parts.models import learner_of, parameters, task
from hetero_kt.parts.prepared import Prepared


def prepare_mergenet(recipe: Recipe, method: MergeNet, modules: Mapping[str, nn.Module], ranks: Ranks) -> Prepared:
    """Every transfer is tried alone, so that a complaint has its option, and then all of them together."""
    transfers = build_transfers(recipe, method, modules)
    for name, transfer in transfers.items():
        try:
            build_exchange(recipe, [transfer])
        except ValueError as error:
            raise ValueError(f"--method.transfers.{name}: {error}") from error
    try:
        adapters = build_exchange(recipe, list(transfers.values())).adapters()
    except ValueError as error:
        raise ValueError(f"--method.transfers: {error}") from error

    def start() -> Method:
        learners = {name: learner_of(recipe, name, module, ranks) for name, module in modules.items()}
        engines = {name: learner.engine for name, learner in learners.items()}
        losses = {
            name: partial(task(recipe, name).loss, label_smoothing=model.label_smoothing)
            for name, model in recipe.models.items()
        }
        exchange = build_exchange(recipe, list(build_transfers(recipe, method, engines).values()))
        compile_chosen(modules, recipe.compile)
        compile_chosen(exchange.adapters(), recipe.compile)
        return mergenet.MergeNet(learners, exchange, losses, {name: recipe.budget(name) for name in learners})

    return Prepared({f"adapter {name}": parameters(adapter) for name, adapter in adapters.items()}, {}, start)


def build_exchange(recipe: Recipe, transfers: Sequence[mergenet.Transfer]) -> mergenet.Exchange | Sharing:
    """What moves knowledge along `transfers`, or stands in for it. Collective."""
    assert isinstance(recipe.method, MergeNet)
    if recipe.method.control == "sharing":
        return Sharing(transfers)
    return mergenet.Exchange(transfers, control=recipe.method.control, seed=recipe.seed, steps=recipe.steps)


def build_transfers(recipe: Recipe, method: MergeNet, owners: Mapping[str, Any]) -> dict[str, mergenet.Transfer]:
    """The recipe's transfers between `owners`, which are engines or plain modules."""
    transfers = {}
    for name, t in method.transfers.items():
        mode: Literal["svd", "full"] = "svd" if t.mode == "svd" else "full"
        source, target = (
            mergenet.Site(owners[model], weight, mode, rank)
            for (model, weight), rank in ((split_site(site), rank) for site, rank in t.sites())
        )
        transfers[name] = mergenet.Transfer(
            source,
            target,
            cycle=t.cycle,
            reads=t.reads,
            adapter=_with_gate(t.adapter, recipe.models[split_site(t.target)[0]], split_site(t.target)[1]),
            optim=t.optim,
            schedule=t.schedule,
            update=t.update,
            moments=t.moments,
            name=name,
            until=min(recipe.budget(split_site(site)[0]) for site in (t.source, t.target)),
        )
    return transfers


def _with_gate(adapter: AdapterConfig, target: Model, weight: str) -> AdapterConfig:
    """A pretrained target starts from a closed gate, so that the first proposals do not destroy it."""
    part = target.xvlm.vision if weight.startswith("vision_encoder.") else target.xvlm.text
    trained = target.pretrained or target.init or target.name.startswith("hf:") or part
    return replace(adapter, gate=0.0) if adapter.gate == "auto" and trained else adapter
