"""Questions about pictures (VQA v2): knowledge moves between X-VLM's vision encoder and its text encoder while both
train, inside one model (MergeNet, Table 2).

Table 2:  deepspeed launchers/xvlm_vqa.py --compare none noise shuffled --seeds 0 1 2
          --variant v2t and t2v move it one way only; another weight: --method.transfers.v2t.target xvlm:...
Variants: default (X-VLM small, both ways, a tenth of the pictures: --train-fraction), base (Swin-B), daquar (DAQUAR, a
          model for two cores), world (generated pictures); v2t, t2v, base_v2t and so on for one way.
Data:     vqa_v2/ (questions, annotations and COCO's train2014/ and val2014/) and tokenizer/vocab.txt in the data
          folder; daquar/ for those variants; nothing for world and --debug.
Start:    fresh; --models.xvlm.xvlm.vision timm:vit_base_patch16_clip_quickgelu_224.openai (of base a Swin-B's) and
          --models.xvlm.xvlm.text hf:bert-base-uncased begin from trained towers.
Hardware: one GPU with 24 GB; hours a run (not measured).
Expected: the paper has overall/other/number 45.78/31.33/28.71 -> 46.33/33.29/31.33 (v2t), 45.96/31.99/31.15 (t2v),
          46.51/33.84/31.54 (both).
"""

from dataclasses import replace
from functools import partial
from typing import Any

from hetero_kt import main
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
from hetero_kt.models import modality_values

PICTURES = Transform(scale=(0.5, 1.0), flip=0.0, rand_augment="rand-m7-n2-mstd0.5", squash=True)
VQA = Data("vqa", folder="vqa_v2", fraction=0.1, batch=16, image_size=384, text=Text(length=40), transform=PICTURES)
DAQUAR = replace(VQA, folder="daquar", fraction=1.0, batch=32, image_size=64, workers=0, candidates=16)
DAQUAR = replace(DAQUAR, transform=replace(PICTURES, rand_augment=""))
WORLD = replace(DAQUAR, folder="", batch=64, image_size=32, text=Text("generated", length=40))
WORLD = replace(WORLD, transform=replace(PICTURES, scale=(1.0, 1.0), flip=0.0, rand_augment=""))


def recipe(name: str, model: str, data: Data, lr: float, steps: int, ways: tuple[str, ...], **more: Any) -> Recipe:
    """Transfers between the values of the last vision layer and of the last layer that reads text alone."""
    vision, text = (f"xvlm:{weight}" for weight in modality_values(model))
    v2t = Transfer(vision, text, cycle=2, mode="svd", adapter=AdapterConfig(heads=12, layers=2))
    both = {"v2t": v2t, "t2v": replace(v2t, source=text, target=vision)}
    optim = Optim("adamw", lr=lr, weight_decay=1e-2, decay_all=False, clip=1.0)
    trained = Model(model, "vqa", optim=optim, schedule=Schedule("cosine", warmup=steps // 10), **more)
    method = MergeNet({way: both[way] for way in ways})
    save = min(1000, steps // 3)
    return Recipe(name, {"xvlm": trained}, {"vqa": data}, method, steps, save_every=save)


TENTH = 27740  # steps: ten epochs of a tenth of the pictures
NO_DROPOUT = XVLM(dropout=0.0)  # the models for two cores see too little to forget any of it
SIZES: dict[str, dict[str, Any]] = {
    "": {"model": "xvlm:small", "data": VQA, "lr": 5e-4, "steps": TENTH},
    "base": {"model": "xvlm:base", "data": VQA, "lr": 5e-4, "steps": TENTH, "checkpointing": True},
    "daquar": {"model": "xvlm:tiny", "data": DAQUAR, "lr": 1e-3, "steps": 636, "xvlm": NO_DROPOUT},
    "world": {"model": "xvlm:tiny", "data": WORLD, "lr": 1e-3, "steps": 1200, "xvlm": NO_DROPOUT},
}
WAYS = {"": ("v2t", "t2v"), "v2t": ("v2t",), "t2v": ("t2v",)}
VARIANTS = {
    "_".join(filter(None, (size, way))) or "default": partial(
        recipe, "_".join(filter(None, ("xvlm_vqa", size, way))), ways=ways, **settings
    )
    for size, settings in SIZES.items()
    for way, ways in WAYS.items()
}

if __name__ == "__main__":
    main(VARIANTS)
