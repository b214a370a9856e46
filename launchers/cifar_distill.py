"""Every baseline of distillation on CIFAR-100: ResNet50 teaches MobileNetV2 (MergeNet, Tables 1 and 5).

Table 1:  deepspeed launchers/cifar_distill.py --first teacher --method kd; or rkd, dkd, nkd, crd, ofa, ...
          --method is --control by another name; --compare none rkd dkd runs more of them.
Table 5:  --method tfkd, --method uskd: nobody teaches
Settings: --method.dkd.beta 6, --method.kd.weight 0.9 --method.kd.labels 0.1, ...
Teachers: --teacher run:cifar_distill_teacher (the default, which --first teacher trains), a run's folder, a safetensors
          file (its model by --method.teachers.teacher.name) or the name of a model with published weights; several, too
Itself:   --first itself --teacher run:cifar_distill_itself --method tfkd --method.tfkd.form self
Several:  --teacher run:cifar_distill_teacher run:cifar_distill_assistant --first teacher assistant
TAKD:     --variant takd --first teacher assistant: each learns from the one before
FCFD:     --method fcfd, between CNNs; published with Nesterov, 240 epochs, a batch of 64 and a rate of 0.01
On disk:  --method.teachers.teacher.logits stored --data.pictures.augmentations 8: the teacher answers once
Variants: default; teacher, assistant, itself, takd; cpu and digits (after --first cpu_teacher, digits_teacher);
          digits_takd (after --first digits_teacher digits_assistant)
Hardware: one GPU with 24 GB; about 6 hours a run (an estimate).
Expected: MobileNetV2 63.87 alone, 64.32 (KD), 65.48 (RKD), 65.23 (DKD), 65.09 (NKD) with AdamW and a teacher of 68.11;
          of this SGD recipe nothing is published, so read a gain against `--method none`.
"""

from dataclasses import replace
from functools import partial

from hetero_kt import main
from hetero_kt.config import Data, Distill, Model, Optim, Recipe, Schedule, Teacher

EPOCH = 390  # steps of 128 rows


def recipe(name: str, model: str, teacher: str = "", made_by: str = "cifar_distill_teacher") -> Recipe:
    teachers = {"teacher": Teacher(teacher, init=f"run:{made_by}")} if teacher else {}
    method = Distill(teachers, "kd" if teacher else "none")
    models = {"student" if teacher else "teacher": Model(model, "pictures")}
    return Recipe(name, models, {"pictures": Data()}, method, 200 * EPOCH, eval_every=EPOCH, save_every=5 * EPOCH)


def small(data: Data, steps: int, *arguments: str) -> Recipe:
    base = recipe(*arguments)
    optim = Optim("adamw", lr=2e-3, weight_decay=5e-2, decay_all=False, clip=5.0)
    schedule = Schedule("cosine", warmup=steps // 20)
    models = {name: replace(model, optim=optim, schedule=schedule) for name, model in base.models.items()}
    return replace(base, models=models, data={"pictures": data}, steps=steps, eval_every=steps // 4, save_every=0)


CROPS = Data(batch=64, augment=("crop", "flip"))
DIGITS = Data("digits", batch=32, augment=())
FEW = replace(DIGITS, per_class=5)
MOBILE, TINY = "cifar:mobilenetv2_small", "cifar:mobilenetv2_tiny"

VARIANTS = {
    "default": partial(recipe, "cifar_distill", "cifar:mobilenetv2", "cifar:resnet50"),
    "teacher": partial(recipe, "cifar_distill_teacher", "cifar:resnet50"),
    "assistant": partial(recipe, "cifar_distill_assistant", "cifar:resnet18", "cifar:resnet50"),
    "takd": partial(recipe, "cifar_distill_takd", "cifar:mobilenetv2", "cifar:resnet18", "cifar_distill_assistant"),
    "itself": partial(recipe, "cifar_distill_itself", "cifar:mobilenetv2"),
    "cpu": partial(small, CROPS, 2000, "cifar_distill_cpu", MOBILE, "cifar:resnet_small", "cifar_distill_cpu_teacher"),
    "cpu_teacher": partial(small, CROPS, 4700, "cifar_distill_cpu_teacher", "cifar:resnet_small"),
    "digits": partial(small, FEW, 160, "digits_distill", TINY, "cifar:resnet_tiny", "digits_distill_teacher"),
    "digits_takd": partial(small, FEW, 160, "digits_distill_takd", TINY, MOBILE, "digits_distill_assistant"),
    "digits_assistant": partial(
        small, DIGITS, 160, "digits_distill_assistant", MOBILE, "cifar:resnet_tiny", "digits_distill_teacher"
    ),
    "digits_teacher": partial(small, DIGITS, 160, "digits_distill_teacher", "cifar:resnet_tiny"),
}

if __name__ == "__main__":
    main(VARIANTS)
