"""Fuse before transfer (FBT) on ImageNet-1K: timm's published model teaches a student of another family.

Data:     hetero-kt shards IMAGENET_FOLDER data/imagenet   (once; class folders in train/ and val/)
Main paper, Table 2, any pair:  deepspeed launchers/imagenet_fbt.py --models.student.name timm:mobilenetv2_100 \
    --method.teachers.teacher.name timm:mixer_b16_224
Variants: default (CNN student: Swin-T -> ResNet18) and tokens (MSA/MLP student: ConvNeXt-T -> DeiT-T), each with its
          published schedule; tiny (our reduced pair, for shards of 30 classes: --first tiny_teacher).
Teachers: timm's weights of the name that you give, as far as they were trained on these 1,000 classes; others by
          --method.teachers.teacher.no-pretrained --method.teachers.teacher.init FILE_OR_RUN.
          --method.teachers.teacher.zero ds_configs/zero3_frozen.json shards one.
Nodes:    srun --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 python launchers/imagenet_fbt.py
Hardware: eight GPUs with 40 GB; about a day for `default`, three for `tokens` (estimates).
Expected: Swin-T -> ResNet18 72.21 (KD 71.14, OFA 71.76); ConvNeXt-T -> DeiT-T 75.26 (OFA 74.41).
"""

from dataclasses import replace

from hetero_kt import main
from hetero_kt.config import FBT, OFA, Data, Distill, Mix, Model, Optim, Recipe, Schedule, Teacher, Transform

EPOCH = 2502  # steps of 512 rows


def default() -> Recipe:
    student = Model(
        "timm:resnet18",
        data="pictures",
        optim=Optim("sgd", lr=0.1, weight_decay=1e-4),
        schedule=Schedule("multistep", (0.3, 0.6, 0.9), gamma=0.1, warmup=3 * EPOCH),
        label_smoothing=0.1,
        precision="autocast",
    )
    teacher = Teacher("timm:swin_tiny_patch4_window7_224", pretrained=True)
    return Recipe(
        "imagenet_fbt",
        {"student": student},
        {"pictures": Data("shards", folder="imagenet", batch=512, pipeline="timm", image_size=224, workers=8)},
        Distill({"teacher": teacher}, ofa=OFA(gamma=1.5), fbt=FBT(gamma=1.5)),
        steps=100 * EPOCH,
        eval_every=EPOCH,
        save_every=EPOCH // 2,
    )


def tokens() -> Recipe:
    epoch = EPOCH // 2  # steps of 1,024 rows
    base = default()
    student = replace(
        base.models["student"],
        name="timm:deit_tiny_patch16_224",
        optim=Optim("adamw", lr=5e-4, weight_decay=5e-2, decay_all=False, clip=5.0),
        schedule=Schedule("cosine", warmup=20 * epoch, warmup_lr=5e-7, min_lr=1e-6),
        ema=0.99996,
    )
    strong = Transform(rand_augment="rand-m9-mstd0.5-inc1", color_jitter=0.4, erasing=0.25)
    data = replace(base.data["pictures"], batch=1024, transform=strong, mix=Mix(mixup=0.8, cutmix=1.0))
    assert isinstance(base.method, Distill)
    method = replace(base.method, teachers={"teacher": Teacher("timm:convnext_tiny.fb_in1k", pretrained=True)})
    steps = 300 * epoch
    return replace(
        base,
        name="imagenet_fbt_tokens",
        models={"student": student},
        data={"pictures": data},
        method=method,
        steps=steps,
    )


def tiny() -> Recipe:
    return _tiny(
        "imagenet_fbt_tiny",
        "student",
        "cifar:mixer_tiny",
        Distill(
            {"teacher": Teacher("cifar:resnet_small", init="run:imagenet_fbt_tiny_teacher")},
            ofa=OFA(gamma=1.5),
            fbt=FBT(gamma=1.5),
        ),
        steps=600,
    )


def tiny_teacher() -> Recipe:
    return _tiny("imagenet_fbt_tiny_teacher", "teacher", "cifar:resnet_small", Distill({}, "none"), steps=1200)


def _tiny(name: str, role: str, model: str, method: Distill, steps: int) -> Recipe:
    optim = Optim("adamw", lr=2e-3, weight_decay=5e-2, decay_all=False, clip=5.0)
    schedule = Schedule("cosine", warmup=steps // 20)
    models = {role: Model(model, "pictures", optim=optim, schedule=schedule, label_smoothing=0.1)}
    softly = Transform(scale=(0.35, 1.0), crop_fraction=1.0)
    data = Data("shards", folder="tiny_imagenet30", batch=64, pipeline="timm", transform=softly, workers=2)
    return Recipe(name, models, {"pictures": data}, method, steps, eval_every=steps // 4, save_every=steps // 4)


VARIANTS = {"default": default, "tokens": tokens, "tiny": tiny, "tiny_teacher": tiny_teacher}

if __name__ == "__main__":
    main(VARIANTS)
