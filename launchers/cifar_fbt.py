"""Fuse before transfer (FBT) on CIFAR-100: a frozen teacher and a fused model teach a student of another family.

Main paper, Table 1, any pair:  deepspeed launchers/cifar_fbt.py --models.student.name timm:mobilenetv2_100 \
    --method.teachers.teacher.name timm:vit_small_patch16_224 --method.teachers.teacher.init FILE_OR_RUN
Teachers: --first swin_teacher fine-tunes timm's published Swin-T before, unless that is done; likewise for
          convnext_teacher and resnet34_teacher. Another: --variant swin_teacher --models.teacher.name timm:X --name X
Baselines from the same teacher: --compare none kd ofa fitnet
Ablations (main, Table 4): --method.fbt.block none, --method.fbt.no-last-stage, --method.fbt.terms fused_student ...,
          --method.fbt.pair ofa (or infonce), --method.fbt.no-detach, --method.fbt.fused-labels
Variants: default (CNN student: Swin-T -> ResNet18) and tokens (MSA/MLP student: ConvNeXt-T -> DeiT-T), each with its
          published schedule; paradigm_a to paradigm_e (appendix, Table 3); cpu and digits (our reduced pairs, after
          --first cpu_teacher or digits_teacher); cpu_paradigm_a (after --first cpu_teacher cpu_assistant), _d and _e
          (after cpu_teacher cpu_mixer_teacher).
Hardware: one GPU with 40 GB; about 20 hours a run (an estimate).
Expected: Swin-T -> ResNet18 81.61 (alone 74.01, KD 78.74, OFA 80.54) with a teacher of 89.26, on the test set's 10,000.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from hetero_kt import main
from hetero_kt.config import FBT, Data, Distill, Mix, Model, Optim, Recipe, Schedule, Teacher, Transform

EPOCH, TOKENS_EPOCH = 48, 97  # steps of 1,024 rows, and of 512
SGD = Optim("sgd", lr=0.1, weight_decay=2e-3)
ADAMW = Optim("adamw", lr=5e-4, weight_decay=5e-2, decay_all=False, clip=5.0)
SWIN = Teacher("timm:swin_tiny_patch4_window7_224", init="run:cifar_swin_teacher")
RESNET34 = Teacher("timm:resnet34", init="run:cifar_resnet34_teacher")
STRONG = Transform(rand_augment="rand-m9-mstd0.5-inc1", color_jitter=0.4, erasing=0.25)
PICTURES = Data(batch=1024, pipeline="timm", image_size=224, workers=8)


def recipe(name: str, model: Model, method: Distill, data: Data = PICTURES, epochs: int = 300) -> Recipe:
    kind = "student" if method.teachers else "teacher"
    epoch = 50_000 // data.batch
    return Recipe(
        name,
        {kind: replace(model, data="pictures", label_smoothing=0.1, precision="autocast")},
        {"pictures": data},
        method,
        steps=epochs * epoch,
        eval_every=5 * epoch,
        save_every=5 * epoch,
    )


def cnn(name: str) -> Model:
    return Model(name, "", optim=SGD, schedule=Schedule("cosine", warmup=3 * EPOCH, min_lr=1e-3))


def default() -> Recipe:
    return recipe("cifar_fbt", cnn("timm:resnet18"), Distill({"teacher": SWIN}))


def tokens() -> Recipe:
    schedule = Schedule("cosine", warmup=20 * TOKENS_EPOCH, warmup_lr=5e-7, min_lr=1e-5)
    student = Model("timm:deit_tiny_patch16_224", "", optim=ADAMW, schedule=schedule)
    teacher = Teacher("timm:convnext_tiny", init="run:cifar_convnext_teacher")
    data = replace(PICTURES, batch=512, transform=STRONG, mix=Mix(mixup=0.8, cutmix=1.0))
    return recipe("cifar_fbt_tokens", student, Distill({"teacher": teacher}), data)


def ways(letter: str, swin: Teacher, resnet34: Teacher, assistant: str) -> Distill:
    """Appendix, Table 3: every term is L_KD. (A) is progressive: the assistant learns from Swin-T before."""
    teachers = {"swin": swin, "resnet34": resnet34}
    fbt = FBT(pair="kd")
    return {
        "a": Distill({"assistant": replace(resnet34, init=f"run:{assistant}")}, "kd"),
        "b": Distill({"swin": swin}, fbt=replace(fbt, terms=("teacher_fused", "fused_student"))),
        "c": Distill({"swin": swin}, fbt=fbt),
        "d": Distill(teachers, "kd"),
        "e": Distill(teachers, fbt=fbt),
    }[letter]


def paradigm(letter: str) -> Recipe:
    method = ways(letter, SWIN, RESNET34, "cifar_fbt_assistant")
    return recipe(f"cifar_fbt_paradigm_{letter}", cnn("timm:resnet18"), method)


def assistant() -> Recipe:
    return recipe("cifar_fbt_assistant", cnn("timm:resnet34"), Distill({"swin": SWIN}, "kd"))


def fine_tuned(name: str, model: str) -> Recipe:
    schedule = Schedule("cosine", warmup=TOKENS_EPOCH, min_lr=1e-6)
    teacher = Model(model, "", pretrained=True, optim=replace(ADAMW, lr=1e-4), schedule=schedule)
    return recipe(name, teacher, Distill({}, "none"), replace(PICTURES, batch=512), epochs=20)


def resnet34_teacher() -> Recipe:
    return recipe("cifar_resnet34_teacher", cnn("timm:resnet34"), Distill({}, "none"))


def small(name: str, model: str, method: Distill, data: Data, steps: int) -> Recipe:
    kind = "student" if method.teachers else "teacher"
    optim = Optim("adamw", lr=2e-3, weight_decay=5e-2, decay_all=False, clip=5.0)
    schedule = Schedule("cosine", warmup=steps // 20)
    models = {kind: Model(model, "pictures", optim=optim, schedule=schedule, label_smoothing=0.1)}
    return Recipe(name, models, {"pictures": data}, method, steps, eval_every=steps // 4, save_every=steps // 4)


def cpu() -> Recipe:
    return small("cifar_fbt_cpu", "cifar:mixer_tiny", Distill({"teacher": CPU_TEACHER}), CROPS, 2000)


def cpu_teacher() -> Recipe:
    return small("cifar_fbt_cpu_teacher", "cifar:resnet_small", Distill({}, "none"), CROPS, 4700)


def cpu_paradigm(letter: str) -> Recipe:
    """A small ResNet stands for Swin-T and a small Mixer for ResNet34: the student is of the latter's family."""
    method = ways(letter, CPU_TEACHER, CPU_MIXER, "cifar_fbt_cpu_assistant")
    return small(f"cifar_fbt_cpu_paradigm_{letter}", "cifar:mixer_tiny", method, CROPS, 2000)


def cpu_assistant() -> Recipe:
    method = Distill({"teacher": CPU_TEACHER}, "kd")
    return small("cifar_fbt_cpu_assistant", CPU_MIXER.name, method, CROPS, 2000)


def cpu_mixer_teacher() -> Recipe:
    return small("cifar_fbt_cpu_mixer_teacher", CPU_MIXER.name, Distill({}, "none"), CROPS, 4700)


def digits() -> Recipe:
    teacher = Teacher("cifar:resnet_tiny", init="run:digits_fbt_teacher")
    data = Data("digits", batch=32, per_class=5, augment=())
    return small("digits_fbt", "cifar:mixer_tiny", Distill({"teacher": teacher}), data, 160)


def digits_teacher() -> Recipe:
    data = Data("digits", batch=32, augment=())
    return small("digits_fbt_teacher", "cifar:resnet_tiny", Distill({}, "none"), data, 160)


CROPS = Data(batch=64, augment=("crop", "flip"))
CPU_TEACHER = Teacher("cifar:resnet_small", init="run:cifar_fbt_cpu_teacher")
CPU_MIXER = Teacher("cifar:mixer_small", init="run:cifar_fbt_cpu_mixer_teacher")

VARIANTS: dict[str, Callable[[], Recipe]] = {
    "default": default,
    "tokens": tokens,
    **{f"paradigm_{letter}": partial(paradigm, letter) for letter in "abcde"},
    "assistant": assistant,
    "swin_teacher": partial(fine_tuned, "cifar_swin_teacher", SWIN.name),
    "convnext_teacher": partial(fine_tuned, "cifar_convnext_teacher", "timm:convnext_tiny"),
    "resnet34_teacher": resnet34_teacher,
    "cpu": cpu,
    "cpu_teacher": cpu_teacher,
    **{f"cpu_paradigm_{letter}": partial(cpu_paradigm, letter) for letter in "ade"},
    "cpu_assistant": cpu_assistant,
    "cpu_mixer_teacher": cpu_mixer_teacher,
    "digits": digits,
    "digits_teacher": digits_teacher,
}

if __name__ == "__main__":
    main(VARIANTS)
