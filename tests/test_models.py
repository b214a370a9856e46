"""Models by name: the shapes that the experiments rest on, loading, and errors."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from hetero_kt import models

TINY = ["cifar:resnet_tiny", "cifar:mobilenetv2_tiny", "cifar:resnet_small", "cifar:mobilenetv2_small"]


@pytest.mark.parametrize("name", [*TINY, "cifar:resnet18", "cifar:mobilenetv2", "timm:resnet18"])
def test_maps_pictures_to_logits(name):
    model = models.build(name, 10)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    weight = model.get_parameter(models.classifier(model))
    assert weight.shape[0] == 10


def test_resnet50_classifier_is_100x2048_and_its_last_map_4x4():
    model = models.build("cifar:resnet50", 100)
    assert models.classifier(model) == "fc.weight"
    assert model.fc.weight.shape == (100, 2048)
    assert model.forward_features(torch.zeros(1, 3, 32, 32)).shape == (1, 2048, 4, 4)
    assert model.layer4[0].conv1.weight.shape == (512, 1024, 1, 1)


def test_mobilenetv2_has_the_projections_of_table_5():
    model = models.build("cifar:mobilenetv2", 100)
    shapes = {k: tuple(model.get_parameter(models.irb_projection(model, k)).shape) for k in (4, 8, 12, 16)}
    assert shapes == {4: (32, 144, 1, 1), 8: (64, 384, 1, 1), 12: (96, 576, 1, 1), 16: (160, 960, 1, 1)}
    assert models.irb_projection(model, 17).startswith("blocks.6.0.")
    assert model.get_parameter(models.classifier(model)).shape == (100, 1280)
    assert model.eval().forward_features(torch.zeros(1, 3, 32, 32)).shape == (1, 1280, 4, 4)


def test_full_size_parameters_are_timms():
    for name, timm_name, stem in (
        ("cifar:mobilenetv2", "mobilenetv2_100", ""),
        ("cifar:resnet50", "resnet50", "conv1.weight"),
    ):
        ours = models.build(name, 100).state_dict()
        theirs = timm.create_model(timm_name, num_classes=100).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(ours[key].shape == theirs[key].shape for key in ours if key != stem)


@pytest.mark.parametrize("name", TINY)
def test_an_export_loads_strictly_with_the_same_logits(name, tmp_path):
    model = models.build(name, 7)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    torch.manual_seed(99)
    again = models.build(name, 7, init=str(tmp_path / "model.safetensors"))
    x = torch.randn(3, 3, 32, 32)
    assert torch.equal(model.eval()(x), again.eval()(x))


@pytest.mark.parametrize("name", TINY)
def test_the_seed_decides_the_start(name):
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(models.build(name, 10).state_dict())
    first, same, other = states
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


def test_image_size_reaches_models_with_a_fixed_input():
    model = models.build("timm:vit_tiny_patch16_224", 10, image_size=32)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    with pytest.raises(ValueError, match="cannot be built for pictures of 0 pixels"):
        models.build("timm:deit3_small_patch16_224", 10, image_size=0)


def test_known_names_build():
    known = models.known()
    assert {"cifar:resnet50", "timm:resnet50", "timm:mobilenetv2_100"} <= set(known)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("resnet50", "cifar:resnet50, timm:resnet50"),
        ("cifar:mobilnetv2", "cifar:mobilenetv2"),
        ("timm:resnet5O", "timm:resnet50"),
        ("hf:bert", "cifar:resnet18"),
    ],
)
def test_an_unknown_name_lists_the_nearest(name, nearest):
    with pytest.raises(ValueError, match="no model is called") as error:
        models.build(name, 10)
    assert nearest in str(error.value)
    assert "\n" not in str(error.value)


def test_weights_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match=r"cifar:resnet50 has no published weights"):
        models.build("cifar:resnet50", 100, pretrained=True)
    with pytest.raises(ValueError, match="set one of them"):
        models.build("timm:resnet50", 100, pretrained=True, init="x.safetensors")


def test_weights_that_cannot_be_fetched_are_an_error(monkeypatch):
    def offline(*_, **__):
        raise OSError("no route to the hub.")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ValueError, match=r"could not be fetched \(no route to the hub\): put them"):
        models.build("timm:resnet18", 10, pretrained=True)


def test_init_errors_name_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.safetensors, which is not a file"):
        models.build(TINY[0], 10, init=str(tmp_path / "gone.safetensors"))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not at all")
    with pytest.raises(ValueError, match=r"broken\.safetensors, which cannot be read"):
        models.build(TINY[0], 10, init=str(broken))
    other = tmp_path / "other.safetensors"
    save_file(models.build(TINY[0], 20).state_dict(), other)
    with pytest.raises(ValueError, match=r"fc\.weight is 20x96, not 10x96, and 1 more"):
        models.build(TINY[0], 10, init=str(other))


def test_sites_that_do_not_exist():
    model = models.build("cifar:mobilenetv2_tiny", 10)
    with pytest.raises(ValueError, match="blocks are 1 to 5"):
        models.irb_projection(model, 16)
    with pytest.raises(ValueError, match="no inverted residual blocks"):
        models.irb_projection(models.build("cifar:resnet_tiny", 10), 1)
    with pytest.raises(ValueError, match="no single linear classifier"):
        models.classifier(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="at least 1"):
        models.build("cifar:resnet_tiny", 0)
