"""A teacher sees the student's pictures in its own way, gives what its plain model gives, and never changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from safetensors.torch import save_file
from small import zero
from torch import Tensor, nn
from torch.nn import functional as F

from hetero_kt import models, parts
from hetero_kt.config import Data, Distill, Model, Recipe, Teacher, to_yaml
from hetero_kt.models.teacher import RANDOM, Frozen, build_teacher
from hetero_kt.nn.stages import expose

CLASSES, SIZE = 10, 32
ONE = (1.0, 1.0, 1.0)
MEAN, STD = (0.5, 0.4, 0.45), (0.2, 0.25, 0.3)
OWN_MEAN, OWN_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPTION = "--method.teachers.known"


def model(name: str = "cifar:resnet_tiny", seed: int = 0, size: int = SIZE) -> nn.Module:
    torch.manual_seed(seed)
    made = models.build(name, CLASSES, image_size=size)
    with torch.no_grad():
        for key, buffer in made.named_buffers():
            if key.endswith("running_mean"):
                buffer.normal_(std=0.1)
    return made


def frozen(module: nn.Module, size: int = SIZE, **changes: Any) -> Frozen:
    settings: dict[str, Any] = {"mean": ONE, "std": ONE, "own_mean": ONE, "own_std": ONE, **changes}
    return Frozen(module, expose(module, size), image_size=size, **settings)


def build(config: Teacher, **changes: Any) -> Frozen:
    """As a run does, for a student that sees 32 pixels."""
    settings: dict[str, Any] = {"classes": CLASSES, "image_size": SIZE, "mean": MEAN, "std": STD, **changes}
    return build_teacher(config, OPTION, **settings)


def normalised(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


# --- what it sees ---


@pytest.mark.parametrize("size", [SIZE, 48, 64])
@pytest.mark.parametrize("own", [(MEAN, STD), (OWN_MEAN, OWN_STD)])
def test_it_sees_pixels_in_its_own_normalisation_and_size(size: int, own: tuple[Any, Any]) -> None:
    plain = model(size=size).eval()
    teacher = frozen(copy.deepcopy(plain), size, mean=MEAN, std=STD, own_mean=own[0], own_std=own[1])
    pixels = torch.rand(4, 3, SIZE, SIZE)
    shown = F.interpolate(pixels, (size, size), mode="bicubic") if size != SIZE else pixels
    expected = normalised(shown, *own)
    given = normalised(pixels, MEAN, STD)
    torch.testing.assert_close(teacher.see(given), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(teacher.logits(given), plain(expected), rtol=1e-4, atol=1e-5)
        answer = teacher(given)
        torch.testing.assert_close(answer["logits"], plain(expected), rtol=1e-4, atol=1e-5)
    assert [len(feature) for feature in answer["stages"]] == [4] * 4
    if own[0] == MEAN and size == SIZE:
        assert teacher.see(given) is given, "nothing is copied where nothing differs"


def test_a_students_bf16_pictures_are_taken() -> None:
    plain = model("cifar:swin_tiny").eval()
    changes = {"mean": MEAN, "std": STD, "own_mean": OWN_MEAN, "own_std": OWN_STD}
    teacher = frozen(copy.deepcopy(plain), autocast=True, **changes)
    pixels = torch.rand(4, 3, SIZE, SIZE)
    with torch.no_grad():
        expected = plain(normalised(pixels, OWN_MEAN, OWN_STD))
    found = teacher.logits(normalised(pixels, MEAN, STD).bfloat16())
    assert (found.float() - expected).abs().max() < 0.03 * expected.abs().max()


@pytest.mark.parametrize(
    ("config", "size", "mean", "std"),
    [
        (Teacher("cifar:resnet_tiny", RANDOM), SIZE, MEAN, STD),
        (Teacher("cifar:resnet_tiny", RANDOM, image_size=64), 64, MEAN, STD),
        (Teacher("cifar:resnet_tiny", RANDOM, mean=OWN_MEAN, std=OWN_STD), SIZE, OWN_MEAN, OWN_STD),
        (Teacher("cifar:resnet_tiny", RANDOM, std=OWN_STD), SIZE, MEAN, OWN_STD),
    ],
)
def test_its_input_is_the_datas_where_nothing_else_is_said(
    config: Teacher, size: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    teacher = build(config)
    pixels = torch.rand(2, 3, SIZE, SIZE)
    shown = F.interpolate(pixels, (size, size), mode="bicubic") if size != SIZE else pixels
    found = teacher.see(normalised(pixels, MEAN, STD))
    torch.testing.assert_close(found, normalised(shown, mean, std), rtol=1e-5, atol=1e-5)


# --- it never changes ---


def learn_from(teacher: Frozen, steps: int = 3) -> Tensor:
    """What steps of a student do to its teacher; the gradient that comes through the teacher's last stage."""
    layout = teacher.stages.layouts[2]
    shape = (2, layout.channels, *layout.grid)
    gradients = []
    for step in range(steps):
        torch.manual_seed(step)
        teacher(torch.randn(2, 3, SIZE, SIZE))
        teacher.logits(torch.randn(2, 3, SIZE, SIZE))
        feature = torch.randn(shape, requires_grad=True)
        end = teacher.finish(feature)
        pooled, logits = end["tail_pooled"], end["tail_logits"]
        (pooled.square().sum() + logits.square().sum()).backward()
        assert feature.grad is not None
        gradients.append(feature.grad)
    return torch.stack(gradients)


def test_it_is_the_same_to_the_bit_after_steps_and_has_no_gradient() -> None:
    module = model()
    assert module.training
    teacher = frozen(module)
    before = copy.deepcopy(module.state_dict())
    assert learn_from(teacher).abs().sum() > 0
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in module.parameters())
    assert not any(part.training for part in module.modules())
    assert not teacher(torch.randn(2, 3, SIZE, SIZE))["logits"].requires_grad


@pytest.mark.parametrize("channels_last", [False, True])
def test_its_convolutions_lie_channels_last_and_say_the_same(channels_last: bool) -> None:
    module = model()
    teacher, plain = frozen(copy.deepcopy(module)), frozen(copy.deepcopy(module))
    teacher.start()
    four = [p for p in teacher.module.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    assert four
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in four)
    form = torch.channels_last if channels_last else torch.contiguous_format
    pixels = torch.randn(4, 3, SIZE, SIZE).contiguous(memory_format=form)
    ours, theirs = teacher(pixels), plain(pixels)
    for one, other in zip([*ours["stages"], ours["logits"]], [*theirs["stages"], theirs["logits"]], strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert teacher.checksum == plain.checksum


def in_pieces() -> dict[str, Any]:
    module = model()
    whole = frozen(copy.deepcopy(module))
    before = copy.deepcopy(module.state_dict())
    teacher = frozen(module, zero=zero(3))
    teacher.start()
    x = torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(dist.get_rank()))
    found: dict[str, Any] = {
        "logits": torch.equal(teacher.logits(x), whole.logits(x)),
        "gradients": torch.equal(learn_from(teacher), learn_from(whole)),
    }
    parameters: list[Any] = list(module.parameters())
    found["partitioned"] = all(p.ds_status == ZeroParamStatus.NOT_AVAILABLE for p in parameters)
    found["training"] = any(part.training for part in module.modules())
    found["with gradient"] = any(p.grad is not None or p.requires_grad for p in parameters)
    found["optimizer"] = any(
        isinstance(value, Tensor) for value in getattr(teacher.engine.optimizer, "state", {}).values()
    )
    buffers = dict(module.named_buffers())
    found["buffers"] = all(torch.equal(buffers[name], before[name]) for name in buffers)
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters):
        found["weights"] = all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    teacher.stop()
    return found


def test_one_in_pieces_is_the_whole_one(ranks: Any) -> None:
    for found in ranks(2).run(in_pieces):
        assert found == {
            **dict.fromkeys(("logits", "gradients", "partitioned", "buffers", "weights"), True),
            **dict.fromkeys(("training", "with gradient", "optimizer"), False),
        }


def gathered_at_once() -> tuple[int, int, int]:
    """Most values of a model in pieces that a rank holds whole within a forward, the largest weight, and all."""
    module = model("cifar:vit_small")
    largest, everything = max(p.numel() for p in module.parameters()), sum(p.numel() for p in module.parameters())
    teacher = frozen(module, zero=zero(3))
    teacher.start()
    held: list[int] = []

    def look(*_: Any) -> None:
        there = (p for p in module.parameters() if p.ds_status != ZeroParamStatus.NOT_AVAILABLE)
        held.append(sum(p.ds_numel for p in there))

    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(look)
    for _ in range(3):  # DeepSpeed learns the order of the layers, and gathers ahead from then on
        teacher.logits(torch.randn(2, 3, SIZE, SIZE))
    teacher.stop()
    return max(held), largest, everything


def test_one_in_pieces_is_never_whole_on_a_rank(ranks: Any) -> None:
    for held, largest, everything in ranks(2).run(gathered_at_once):
        assert held <= 4 * largest < everything / 3


# --- where its weights are ---


def export(folder: Path, *names: str, name: str = "cifar:resnet_tiny") -> dict[str, Tensor]:
    """A finished run's exports, all of the same weights."""
    state = model(name, seed=7).state_dict()
    (folder / "export").mkdir(parents=True, exist_ok=True)
    for file in names:
        save_file(state, folder / "export" / f"{file}.safetensors")
    return state


SOURCES: dict[str, str] = {
    "a file": "{out}/known/none/seed0/export/teacher.safetensors",
    "a run's folder": "{out}/known/none/seed0",
    "a recipe's folder": "{out}/known",
    "a recipe": "run:known",
    "an arm of a recipe": "run:known/none",
}


@pytest.mark.parametrize("source", SOURCES)
def test_its_weights_are_those_of_a_file_or_a_run(tmp_path: Path, source: str) -> None:
    state = export(tmp_path / "known" / "none" / "seed0", "teacher")
    init = SOURCES[source].replace("{out}", str(tmp_path))
    teacher = build(Teacher("cifar:resnet_tiny", init), output_dir=str(tmp_path))
    found = teacher.module.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


@pytest.mark.parametrize("source", SOURCES)
def test_a_student_starts_from_a_file_or_a_run_as_a_teacher_does(tmp_path: Path, source: str) -> None:
    state = export(tmp_path / "known" / "none" / "seed0", "teacher")
    init = SOURCES[source].replace("{out}", str(tmp_path))
    model = parts.build_model(Model("cifar:resnet_tiny", "d", init=init), Data("digits"), "", str(tmp_path))
    found = model.state_dict()
    assert all(torch.equal(found[name], state[name]) for name in state)


def refused(config: Teacher, tmp_path: Path) -> str:
    with pytest.raises(ValueError) as error:
        build(config, output_dir=str(tmp_path))
    message = str(error.value)
    assert message.startswith(OPTION)
    assert message.endswith(".")
    assert "\n" not in message
    assert ". " not in message
    return message


def several(folder: Path) -> None:
    export(folder / "known" / "none" / "seed0", "teacher", "teacher_ema")


def unfinished(folder: Path) -> None:
    (folder / "known" / "none" / "seed0" / "checkpoints").mkdir(parents=True)


def cut_short(folder: Path) -> None:
    """What --max-steps leaves behind: an export and a result of too few steps."""
    run = folder / "known" / "none" / "seed0"
    export(run, "teacher")
    recipe = Recipe("known", {"teacher": Model("cifar:resnet_tiny", "d")}, {"d": Data("generated")}, Distill({}), 10)
    (run / "recipe.yaml").write_text(to_yaml(recipe))
    (run / "result.json").write_text('{"steps": 4}')


def still_running(folder: Path) -> None:
    cut_short(folder)
    (folder / "known" / "none" / "seed0" / "result.json").unlink()


def other_model(folder: Path) -> None:
    export(folder / "known", "teacher", name="cifar:mobilenetv2_tiny")


def other_classes(folder: Path) -> None:
    (folder / "known" / "export").mkdir(parents=True)
    state = models.build("cifar:resnet_tiny", 7).state_dict()
    save_file(state, folder / "known" / "export" / "teacher.safetensors")


def torn(folder: Path) -> None:
    export(folder / "known", "teacher")
    file = folder / "known" / "export" / "teacher.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def nothing(folder: Path) -> None:
    pass


BAD: dict[str, tuple[Callable[[Path], None], str, tuple[str, ...]]] = {
    "no weights": (nothing, "", ("has no weights", f"{OPTION}.init", f"{OPTION}.pretrained")),
    "no file": (nothing, "{out}/none.safetensors", (f"{OPTION}.init", "none.safetensors", "does not exist")),
    "no run": (nothing, "run:known", (f"{OPTION}.init run:known", "does not exist", "train that model first")),
    "unfinished": (unfinished, "run:known", (f"{OPTION}.init run:known", "has finished", "let it end first")),
    "cut short": (cut_short, "run:known", (f"{OPTION}.init run:known", "has finished", "let it end first")),
    "still running": (still_running, "run:known", (f"{OPTION}.init run:known", "has finished", "let it end first")),
    "several": (several, "run:known", (f"{OPTION}.init run:known", "2 models", "teacher.safetensors for example")),
    "another model": (other_model, "run:known", ("init", "another model's", "conv1.weight is missing")),
    "other classes": (other_classes, "run:known", ("init", "fc.weight is 7x96, not 10x96")),
    "torn": (torn, "run:known", ("init", "cannot be read as safetensors")),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_weights_are_one_sentence_that_names_the_option(tmp_path: Path, case: str) -> None:
    make, init, words = BAD[case]
    make(tmp_path)
    message = refused(Teacher("cifar:resnet_tiny", init.replace("{out}", str(tmp_path))), tmp_path)
    for word in words:
        assert word in message, message


def test_a_model_without_stages_is_one_sentence(tmp_path: Path) -> None:
    message = refused(Teacher("timm:vgg11", RANDOM), tmp_path)
    assert message.startswith(f"{OPTION}.name timm:vgg11: VGG cannot be split into stages")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], nn.Module]:
    """timm's published weights of a tiny model, for as many classes as the hub's model has."""

    def publish(classes: int) -> nn.Module:
        made: Any = timm.create_model("resnet18", num_classes=CLASSES)
        made.pretrained_cfg = {**made.pretrained_cfg, "num_classes": classes, "mean": OWN_MEAN, "std": OWN_STD}
        monkeypatch.setattr(timm, "create_model", lambda *_, **__: made)
        return made

    return publish


def test_published_weights_bring_their_own_normalisation(hub: Callable[[int], nn.Module]) -> None:
    published = hub(CLASSES)
    teacher = build(Teacher("timm:resnet18", pretrained=True))
    assert teacher.module is published
    pixels = torch.rand(2, 3, SIZE, SIZE)
    expected = normalised(pixels, OWN_MEAN, OWN_STD)
    torch.testing.assert_close(teacher.see(normalised(pixels, MEAN, STD)), expected, rtol=1e-5, atol=1e-5)
    told = build(Teacher("timm:resnet18", pretrained=True, mean=MEAN, std=STD))
    assert told.same


def test_published_weights_for_other_classes_are_refused(hub: Callable[[int], nn.Module], tmp_path: Path) -> None:
    hub(1000)
    message = refused(Teacher("timm:resnet18", pretrained=True), tmp_path)
    for word in (f"{OPTION}.pretrained", "1000 classes", "the data has 10", f"{OPTION}.init"):
        assert word in message


def test_published_weights_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    assert "has no published weights" in refused(Teacher("cifar:resnet_tiny", pretrained=True), tmp_path)
