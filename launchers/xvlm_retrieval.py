"""Pictures by their captions, and captions by their pictures (COCO): knowledge moves between X-VLM's vision encoder and
its text encoder while both train, inside one model (MergeNet, Table 2).

Table 2:  deepspeed launchers/xvlm_retrieval.py --compare none noise shuffled --seeds 0 1 2
          --variant v2t and t2v move it one way only; another weight: --method.transfers.v2t.target xvlm:...
Variants: default (X-VLM small, both directions, a tenth of the pictures: --train-fraction), v2t, t2v; base
          (Swin-B); flickr8k, flickr8k_v2t, flickr8k_t2v (Flickr8k, a model for two cores); world (generated pictures).
Data:     coco/ (dataset_coco.json, train2014/, val2014/) and tokenizer/vocab.txt in the data folder; flickr8k/ for
          those variants; nothing for world and --debug.
Start:    --models.xvlm.xvlm.vision timm:vit_base_patch16_clip_quickgelu_224.openai
          --models.xvlm.xvlm.text hf:bert-base-uncased
Hardware: one GPU with 24 GB; about 5 hours a run (an estimate).
Expected: TR@10/IR@10 41.48/37.64 -> 44.72/39.00 (v2t), 44.58/38.93 (t2v), 44.78/39.26 (both).
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from hetero_kt.config import Data, MergeNet, Model, Optim, Recipe, Schedule, Text, Transfer, Transform
from hetero_kt.models import modality_values
from hetero_kt.nn.adapter import AdapterConfig
from hetero_kt.run import main

PICTURES = Transform(scale=(0.5, 1.0), flip=0.5, rand_augment="rand-m7-n2-mstd0.5", squash=True)
CAPTIONS = Data(
    "captions", folder="coco", fraction=0.1, batch=16, image_size=384, text=Text(length=40), transform=PICTURES
)
OPTIM = Optim("adamw", lr=1e-4, weight_decay=1e-2, decay_all=False, clip=1.0)


def transfers(model: str, *directions: str) -> MergeNet:
    """Between the values of the last vision layer and of the last layer that reads text alone."""
    vision, text = (f"xvlm:{weight}" for weight in modality_values(model))
    v2t = Transfer(vision, text, cycle=2, mode="svd", adapter=AdapterConfig(heads=12, layers=2))
    both = {"v2t": v2t, "t2v": replace(v2t, source=text, target=vision)}
    return MergeNet({name: both[name] for name in directions})


def small(*directions: str) -> Recipe:
    return Recipe(
        "_".join(["xvlm_retrieval", *(directions if len(directions) == 1 else ())]),
        {"xvlm": Model("xvlm:small", "captions", optim=OPTIM, schedule=Schedule("cosine", warmup=3540))},
        {"captions": CAPTIONS},
        transfers("xvlm:small", *directions),
        steps=35400,  # ten epochs of a tenth of the pictures
        eval_every=7080,
        save_every=1000,
    )


def base(*directions: str) -> Recipe:
    recipe = small(*directions)
    model = replace(recipe.models["xvlm"], name="xvlm:base", checkpointing=True)
    method = transfers("xvlm:base", *directions)
    return replace(recipe, name="xvlm_retrieval_base", models={"xvlm": model}, method=method)


def flickr8k(*directions: str) -> Recipe:
    recipe = small(*directions)
    optim = replace(OPTIM, lr=1e-3)
    model = Model("xvlm:tiny", "captions", optim=optim, schedule=Schedule("cosine", warmup=60))
    pictures = replace(PICTURES, rand_augment="")
    data = replace(
        CAPTIONS,
        folder="flickr8k",
        fraction=1.0,
        batch=32,
        image_size=64,
        text=Text(length=32),
        workers=0,
        candidates=16,
    )
    return replace(
        recipe,
        name=recipe.name.replace("retrieval", "flickr8k"),
        models={"xvlm": model},
        data={"captions": replace(data, transform=pictures)},
        method=transfers("xvlm:tiny", *directions),
        steps=624,  # four epochs
        eval_every=624,
        save_every=156,
    )


def world(*directions: str) -> Recipe:
    recipe = flickr8k(*directions)
    plain = replace(PICTURES, scale=(1.0, 1.0), flip=0.0, rand_augment="")
    words = Text("generated", length=40)
    data = replace(recipe.data["captions"], folder="", batch=32, image_size=32, text=words, transform=plain)
    return replace(recipe, name="xvlm_world_retrieval", data={"captions": data}, steps=600, eval_every=600)


BOTH = ("v2t", "t2v")
VARIANTS: dict[str, Callable[[], Recipe]] = {
    "default": partial(small, *BOTH),
    "v2t": partial(small, "v2t"),
    "t2v": partial(small, "t2v"),
    "base": partial(base, *BOTH),
    "flickr8k": partial(flickr8k, *BOTH),
    "flickr8k_v2t": partial(flickr8k, "v2t"),
    "flickr8k_t2v": partial(flickr8k, "t2v"),
    "world": partial(world, *BOTH),
}

if __name__ == "__main__":
    main(VARIANTS)
