"""BERT answers questions (SQuAD v2) while DistilBERT judges films (IMDb): value matrices of their last layers exchange
knowledge (MergeNet, Tables 3 and 6).

Table 3:  deepspeed launchers/bert_cross_task.py --compare none noise shuffled --seeds 0 1 2
          one direction: --variant to_distilbert or to_bert; another weight: --method.transfers.to-bert.target ...
Table 6:  --variant layers_6_3 (BERT's layer 6 -> DistilBERT's layer 3), layers_12_3, layers_6_6, layers_12_6, both on
          SQuAD; the row without transfer, which the paper lacks, is --control none
Variants: default, to_distilbert, to_bert, layers_X_Y; small (BERT 4x256 and DistilBERT 2x256 after
          --first pretrain_bert pretrain_distilbert: masked language modelling of both sets' training texts), and in one
          direction small_to_distilbert or small_to_bert.
Data:     squad_v2/, imdb/ (or aclImdb/) and tokenizer/vocab.txt in the data folder.
Hardware: one GPU with 24 GB; about 3 hours a run (an estimate).
Expected: SQuAD v2 EM/F1 70.17/73.06 -> 71.89/75.43, IMDb's error 8.02 -> 7.5 (both directions).
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from hetero_kt import main
from hetero_kt.config import AdapterConfig, Data, MergeNet, Model, Optim, Recipe, Schedule, Text, Transfer

ADAPTER = AdapterConfig(heads=12)
ANSWERING = Optim("adamw", lr=5e-5, weight_decay=1e-5, clip=1.0)
JUDGING = replace(ANSWERING, weight_decay=1e-2)
QUESTIONS = Data("squad", batch=32)
REVIEWS = Data("imdb", batch=6, text=Text(length=512))
SCHEDULE = Schedule("cosine", warmup=800)


def bert_value(layer: int) -> str:
    return f"bert:bert.encoder.layer.{layer - 1}.attention.self.value.weight"


def distilbert_value(layer: int) -> str:
    return f"distilbert:distilbert.transformer.layer.{layer - 1}.attention.v_lin.weight"


def transfer(source: str, target: str, cycle: int) -> Transfer:
    # Of a trained weight only a part moves: A of its decomposition, the rest stays.
    return Transfer(source, target, cycle=cycle, mode="svd", adapter=ADAPTER)


def default() -> Recipe:
    models = {
        "bert": Model("hf:bert-base-uncased", "questions", optim=ANSWERING, schedule=SCHEDULE, steps=8240),
        "distilbert": Model("hf:distilbert-base-uncased", "reviews", optim=JUDGING, schedule=SCHEDULE),
    }
    transfers = {
        "to_distilbert": transfer(bert_value(12), distilbert_value(6), cycle=1),
        "to_bert": transfer(distilbert_value(6), bert_value(12), cycle=2),
    }
    data = {"questions": QUESTIONS, "reviews": REVIEWS}
    return Recipe("bert_cross_task", models, data, MergeNet(transfers), 8332, eval_every=2000, save_every=1000)


def one_way(base: Recipe, name: str) -> Recipe:
    assert isinstance(base.method, MergeNet)
    method = MergeNet({name: base.method.transfers[name]})
    return replace(base, name=f"{base.name}_{name}", method=method)


def layers(source: int, target: int) -> Recipe:
    base = default()
    distilbert = replace(base.models["distilbert"], data="questions", optim=ANSWERING, steps=0)
    models = {"bert": replace(base.models["bert"], steps=0), "distilbert": distilbert}
    method = MergeNet({"to_distilbert": transfer(bert_value(source), distilbert_value(target), cycle=1)})
    name = f"bert_layers_{source}_{target}"
    return replace(base, name=name, models=models, data={"questions": QUESTIONS}, method=method, steps=8240)


def small() -> Recipe:
    base = default()
    models = {
        "bert": small_model("bert", "bert:4x256", "questions"),
        "distilbert": small_model("distilbert", "distilbert:2x256", "reviews"),
    }
    transfers = {
        "to_distilbert": transfer(bert_value(4), distilbert_value(2), cycle=1),
        "to_bert": transfer(distilbert_value(2), bert_value(4), cycle=2),
    }
    data = {
        "questions": replace(QUESTIONS, batch=8, text=Text(length=128, stride=64, question=24)),
        "reviews": replace(REVIEWS, batch=16, text=Text(length=96)),
    }
    return replace(
        base,
        name="bert_cross_task_small",
        models=models,
        data=data,
        method=MergeNet(transfers),
        steps=300,
        eval_every=300,
        save_every=150,
    )


def small_model(kind: str, name: str, data: str) -> Model:
    optim = Optim("adamw", lr=3e-4, weight_decay=1e-2, clip=1.0)
    init = f"run:{kind}_pretraining"
    return Model(name, data, init=init, optim=optim, schedule=Schedule("cosine", warmup=40))


def pretraining(kind: str, name: str, steps: int) -> Recipe:
    optim = Optim("adamw", lr=1e-3, weight_decay=1e-2, clip=1.0)
    models = {kind: Model(name, "texts", optim=optim, schedule=Schedule("cosine", warmup=200))}
    # 4,000 steps are 8 million tokens, about once over the texts.
    data = {"texts": Data("pretraining", batch=16, text=Text(length=128))}
    return Recipe(f"{kind}_pretraining", models, data, MergeNet({}, "none"), steps, eval_every=1000, save_every=500)


VARIANTS: dict[str, Callable[[], Recipe]] = {
    "default": default,
    "to_distilbert": lambda: one_way(default(), "to_distilbert"),
    "to_bert": lambda: one_way(default(), "to_bert"),
    **{f"layers_{x}_{y}": partial(layers, x, y) for x, y in ((6, 3), (12, 3), (6, 6), (12, 6))},
    "small": small,
    "small_to_distilbert": lambda: one_way(small(), "to_distilbert"),
    "small_to_bert": lambda: one_way(small(), "to_bert"),
    "pretrain_bert": partial(pretraining, "bert", "bert:4x256", 4000),
    "pretrain_distilbert": partial(pretraining, "distilbert", "distilbert:2x256", 2000),
}

if __name__ == "__main__":
    main(VARIANTS)
