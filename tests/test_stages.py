"""Models in four stages: the model's own forward to the bit, for every family, and features where they belong."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import timm
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from hypothesis import given
from hypothesis import strategies as st
from rounding import Nudge, assert_close, movement, result_of
from small import zero
from timm.layers import GatedMlp, GroupNorm1
from timm.models.metaformer import Attention, LayerNorm2dNoBias, LayerNormNoBias, MetaFormer, SepConv
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock, SpatialGatingBlock
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from hetero_kt import models
from hetero_kt.config import Optim
from hetero_kt.distributed.engine import build_engine
from hetero_kt.nn.families import FAMILIES, evenly, family_of
from hetero_kt.nn.stages import Layout, Stages, expose, from_map, split, to_map

DROP: dict[str, Any] = {"drop_rate": 0.3, "drop_path_rate": 0.3}
CONVS: dict[str, Any] = {"layers": (1, 1, 1, 1), **DROP}
DEPTHS: dict[str, Any] = {"depths": (1, 1, 2, 1), "dims": (8, 16, 32, 64), **DROP}
TOKENS: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, **DROP}
HEADS: dict[str, Any] = {"depth": 5, "num_heads": 2, "pos_drop_rate": 0.1, "attn_drop_rate": 0.1, **TOKENS}
WINDOWS: dict[str, Any] = {
    "img_size": 64,
    "depths": (1, 2, 2, 1),
    "embed_dim": 16,
    "num_heads": (1, 2, 2, 4),
    "window_size": 4,
    **DROP,
}
# family: (timm's name or class, or a cifar: form, what makes it small, picture, stage 3 is convolutional)
SMALL: dict[str, tuple[Any, dict[str, Any], int, bool]] = {
    "ResNet": ("resnet18", {"channels": (8, 16, 24, 32), **CONVS}, 32, True),
    "ResNeXt": (
        "resnext50_32x4d",
        {"channels": (16, 16, 32, 32), "cardinality": 4, "base_width": 16, **CONVS},
        32,
        True,
    ),
    "wide ResNet": ("wide_resnet50_2", {"channels": (8, 8, 8, 8), **CONVS}, 32, True),
    "ResNetV2": ("resnetv2_50", {"channels": (16, 32, 64, 64), "stem_chs": 32, **CONVS}, 32, True),
    "CIFAR ResNet": ("cifar:resnet_tiny", {}, 32, True),
    "MobileNetV2": ("mobilenetv2_035", DROP, 64, True),
    "CIFAR MobileNetV2, three resolutions": ("cifar:mobilenetv2_small", {}, 32, True),
    "CIFAR MobileNetV2, five blocks": ("cifar:mobilenetv2_tiny", {}, 32, True),
    "MobileNetV3": ("mobilenetv3_small_050", DROP, 64, True),
    "MobileNetV4": ("mobilenetv4_conv_small_035", DROP, 64, True),
    "EfficientNet": ("tinynet_e", DROP, 64, True),
    "RegNet X": ("regnetx_002", DROP, 32, True),
    "RegNet Y": ("regnety_002", DROP, 32, True),
    "ConvNeXt": ("convnext_atto", DEPTHS, 64, True),
    "ConvNeXt V2": ("convnextv2_atto", DEPTHS, 64, True),
    "RepVGG": ("repvgg_a0", DROP, 32, True),
    "CSPNet": ("cs3darknet_s", DROP, 32, True),
    "HGNet": ("hgnetv2_b0", DROP, 32, True),
    "FastViT": ("fastvit_t8", DROP, 64, True),
    "FastViT, attention last": ("fastvit_sa12", CONVS, 64, True),
    "Swin": ("swin_tiny_patch4_window7_224", WINDOWS, 64, False),
    "Swin V2": ("swinv2_tiny_window8_256", WINDOWS, 64, False),
    "ViT": ("vit_tiny_patch16_224", HEADS, 32, False),
    "ViT without class token": ("vit_base_patch16_gap_224", HEADS, 32, False),
    "ViT with registers": ("vit_small_patch14_reg4_dinov2", HEADS, 32, False),
    "ViT pooled by attention": ("vit_base_patch16_siglip_224", HEADS, 32, False),
    "DeiT distilled": ("deit_tiny_distilled_patch16_224", HEADS, 32, False),
    "DeiT III": ("deit3_small_patch16_224", HEADS, 32, False),
    "BEiT": ("beit_base_patch16_224", HEADS, 32, False),
    "BEiT, one bias": (
        "beit_base_patch16_224",
        {**HEADS, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True},
        32,
        False,
    ),
    "Mixer": (MlpMixer, {"num_blocks": 6, **TOKENS}, 32, False),
    "ResMLP": (
        MlpMixer,
        {"num_blocks": 6, "mlp_ratio": 2, "block_layer": ResBlock, "norm_layer": Affine, **TOKENS},
        32,
        False,
    ),
    "gMLP": (
        MlpMixer,
        {"num_blocks": 6, "mlp_ratio": 2, "block_layer": SpatialGatingBlock, "mlp_layer": GatedMlp, **TOKENS},
        32,
        False,
    ),
    "PoolFormer": (MetaFormer, {"norm_layers": GroupNorm1, "use_mlp_head": False, **DEPTHS}, 64, True),
    "ConvFormer": (MetaFormer, {"token_mixers": SepConv, **DEPTHS}, 64, True),
    "CAFormer": (
        MetaFormer,
        {
            "token_mixers": [SepConv, SepConv, Attention, Attention],
            "norm_layers": [LayerNorm2dNoBias] * 2 + [LayerNormNoBias] * 2,
            **DEPTHS,
        },
        64,
        False,
    ),
    "MaxViT": ("maxvit_rmlp_pico_rw_256", {"img_size": 64, **DROP}, 64, False),
    "CoAtNet": ("coatnet_pico_rw_224", {"img_size": 64, **DROP}, 64, False),
}


def build(name: Any, options: dict[str, Any]) -> nn.Module:
    """With every parameter away from zero and one, so that nothing hides behind an initialisation."""
    torch.manual_seed(0)
    if not isinstance(name, str):
        model = name(num_classes=10, **options)
    elif name.startswith("cifar:"):
        model = models.build(name, 10)
        model.drop_rate = 0.3  # type: ignore[assignment]
    else:
        model = timm.create_model(name, num_classes=10, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model


@cache
def _built(family: str) -> tuple[nn.Module, int, bool]:
    name, options, size, convolutional = SMALL[family]
    return build(name, options), size, convolutional


@pytest.fixture(params=SMALL)
def case(request: pytest.FixtureRequest) -> Iterator[tuple[nn.Module, nn.Module, Stages, Tensor]]:
    """A model as timm has it, a copy of it exposed, that one's stages, and pictures."""
    plain, size, convolutional = _built(request.param)
    plain, model = copy.deepcopy(plain), copy.deepcopy(plain)
    stages = expose(model, size)
    assert stages.convolutional == convolutional
    return plain, model, stages, torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))


def by_hand(stages: Stages, x: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """Copies of the features, so that a stage that writes into its input is seen."""
    features = []
    for k in (1, 2, 3, 4):
        x = stages.stage(k, x)
        features.append(x.clone())
    return features, *stages.head(x)


def same(first: Any, second: Any) -> bool:
    """Equal to the bit; pairs of lists too."""
    return len(first) == len(second) and all(
        (a is None) == (b is None) and (a is None or torch.equal(a, b)) for a, b in zip(first, second, strict=True)
    )


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [parameter.grad for parameter in model.parameters()]


def test_stages_and_head_are_the_models_own_forward(case: Any) -> None:
    plain, model, stages, x = case
    for net in (plain, model):
        net.eval()
    with torch.no_grad():
        features, pooled, logits = by_hand(stages, x)
        assert torch.equal(logits, plain(x))
        assert torch.equal(logits, model(x))
        assert torch.equal(pooled, plain.forward_head(plain.forward_features(x), pre_logits=True))
        answer = model(x, features=True)
    assert same(answer["stages"], features)
    assert torch.equal(answer["pooled"], pooled)
    assert torch.equal(answer["logits"], logits)
    assert pooled.shape == (3, stages.width)
    for feature, layout in zip(features, stages.layouts, strict=True):
        assert to_map(feature, layout).shape == (3, layout.channels, *layout.grid)
        assert from_map(to_map(feature, layout), layout).shape[1:] == feature[:, layout.prefix :].shape[1:]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_is_the_models_own_with_and_without_checkpointing(case: Any, checkpointing: bool) -> None:
    plain, model, stages, x = case
    stages.checkpointing = checkpointing
    results: list[list[Any]] = []
    shared: list[list[Any]] = []
    for net in (plain, model):
        net.train()
        torch.manual_seed(3)
        logits = net(x)
        logits.square().mean().backward()
        after = torch.get_rng_state()
        # BEiT's shared bias is computed once per stage, so that its gradient is added up in another order.
        once = [p.grad for name, p in net.named_parameters() if not name.startswith("rel_pos_bias")]
        shared.append([p.grad for name, p in net.named_parameters() if name.startswith("rel_pos_bias")])
        results.append([logits, *once, *net.buffers(), after])
        assert not torch.equal(net(x), logits)  # the dropouts are at work
    assert same(*results)
    torch.testing.assert_close(*shared)


def test_a_tail_is_stage_4_and_head_by_hand(case: Any) -> None:
    _, model, stages, x = case
    model.eval()
    layout = stages.layouts[2]
    with torch.no_grad():
        features, pooled, logits = by_hand(stages, x)
        foreign = from_map(torch.randn(3, layout.channels, *layout.grid), layout)
        expected = stages.head(stages.stage(4, stages.with_prefix(foreign)))
        both = model(x, features=True, tail=foreign)
        alone = model(tail=foreign)
        last = model(tail=features[3], after=4)
    assert same([both["tail_pooled"], both["tail_logits"]], expected)
    assert same([both["pooled"], both["logits"]], [pooled, logits])
    assert set(alone) == {"tail_stages", "tail_pooled", "tail_logits"}
    assert same([alone["tail_pooled"], alone["tail_logits"]], expected)
    assert same([last["tail_pooled"], last["tail_logits"]], [pooled, logits])


def test_a_tail_may_begin_behind_any_stage(case: Any) -> None:
    _, model, stages, _ = case
    model.eval()
    with torch.no_grad():
        tails, expected = [], []
        for k in (1, 2, 3):
            layout = stages.layouts[k - 1]
            feature = from_map(torch.randn(3, layout.channels, *layout.grid), layout)
            tails.append(feature)
            feature, maps = stages.with_prefix(feature), []
            for later in range(k + 1, 5):
                feature = stages.stage(later, feature)
                maps.append(feature)
            expected.append([*maps, *stages.head(feature)])
        found = model(tail=tails, after=[1, 2, 3])
    for i, one in enumerate(expected):
        assert same([*found["tail_stages"][i], found["tail_pooled"][i], found["tail_logits"][i]], one)


def test_another_models_tail_leaves_no_trace_in_training(case: Any) -> None:
    """Statistics that the model is evaluated with are of its own features; several tails are as each alone."""
    _, model, stages, x = case
    plain, layout = copy.deepcopy(model), stages.layouts[2]
    tails = [from_map(torch.randn(3, layout.channels, *layout.grid), layout) for _ in range(2)]
    with torch.no_grad():
        for one, more in ((plain.train(), {}), (model.train(), {"tail": tails})):
            torch.manual_seed(1)
            one(x, features=True, **more)
        assert same(dict(plain.named_buffers()).values(), dict(model.named_buffers()).values())
        model.eval()
        ends = model(tail=tails)
        alone = [model(tail=tail) for tail in tails]
    assert same(ends["tail_logits"], [end["tail_logits"] for end in alone])
    assert same(ends["tail_pooled"], [end["tail_pooled"] for end in alone])


def test_splitting_leaves_no_trace(case: Any) -> None:
    plain, _, _, x = case
    model = plain.train()
    next(model.children()).eval()  # a mode that is not everyone's
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    names = [name for name, _ in model.named_modules()]
    random = torch.get_rng_state()
    expose(model, x.shape[-1])
    assert torch.equal(random, torch.get_rng_state())
    assert [module.training for module in model.modules()] == modes
    assert list(model.state_dict()) == list(state)
    assert same(list(model.state_dict().values()), list(state.values()))
    assert [name for name, _ in model.named_modules()] == names
    assert gradients(model) == [None] * len(gradients(model))


def test_every_family_is_tested() -> None:
    tested = [family_of(_built(name)[0]) for name in SMALL]
    assert [kind.__name__ for kind, rule in FAMILIES.items() if not any(rule is other for other in tested)] == []


def swin(width: int) -> nn.Module:
    """Swin-N (64) and Swin-P (48)."""
    return SwinTransformer(depths=(2, 2, 2, 2), embed_dim=width, num_heads=(2, 4, 8, 16), num_classes=10)


# The models of the pairs in full size: channels of the four stages, rows of their grids, width, class tokens
PAIRS: dict[str, tuple[tuple[int, ...], tuple[int, ...], int, int]] = {
    "resnet18": ((64, 128, 256, 512), (56, 28, 14, 7), 512, 0),
    "resnet50": ((256, 512, 1024, 2048), (56, 28, 14, 7), 2048, 0),
    "mobilenetv2_100": ((24, 32, 96, 320), (56, 28, 14, 7), 1280, 0),
    "convnext_tiny": ((96, 192, 384, 768), (56, 28, 14, 7), 768, 0),
    "swin_tiny_patch4_window7_224": ((96, 192, 384, 768), (56, 28, 14, 7), 768, 0),
    "Swin-N": ((64, 128, 256, 512), (56, 28, 14, 7), 512, 0),
    "Swin-P": ((48, 96, 192, 384), (56, 28, 14, 7), 384, 0),
    "deit_tiny_patch16_224": ((192,) * 4, (14,) * 4, 192, 1),
    "vit_small_patch16_224": ((384,) * 4, (14,) * 4, 384, 1),
    "mixer_b16_224": ((768,) * 4, (14,) * 4, 768, 0),
    "resmlp_12_224": ((384,) * 4, (14,) * 4, 384, 0),
}


@pytest.mark.parametrize("name", PAIRS)
def test_models_of_the_published_pairs_in_full_size(name: str) -> None:
    channels, rows, width, prefix = PAIRS[name]
    special = {"Swin-N": 64, "Swin-P": 48}
    with torch.device("cpu"):
        model = swin(special[name]) if name in special else timm.create_model(name, num_classes=10)
    stages = split(model, 224)
    assert tuple(layout.channels for layout in stages.layouts) == channels
    assert tuple(layout.grid for layout in stages.layouts) == tuple((side, side) for side in rows)
    assert {layout.prefix for layout in stages.layouts} == {prefix}
    assert stages.width == width


CIFAR = {
    "cifar:resnet18": (32, 16, 8, 4),
    "cifar:resnet50": (32, 16, 8, 4),
    "cifar:mobilenetv2": (32, 16, 8, 4),
    "cifar:resnet_small": (16, 8, 4, 2),
    "cifar:resnet_tiny": (16, 8, 4, 2),
    "cifar:mobilenetv2_small": (16, 8, 4, 4),
    "cifar:mobilenetv2_tiny": (16, 8, 4, 4),
}


@pytest.mark.parametrize("name", CIFAR)
def test_forms_for_small_pictures_split_at_their_own_resolutions(name: str) -> None:
    stages = split(models.build(name, 10), 32)
    assert tuple(layout.grid[0] for layout in stages.layouts) == CIFAR[name]


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("gernet_s", (16, 8, 4, 2)),  # five containers, the last two of one resolution
        ("cspdarknet53", (16, 8, 4, 2)),  # five, of strides 2 to 32
        ("fastvit_mci3", (8, 4, 2, 1)),  # five, of strides 4 to 64
    ],
)
def test_more_than_four_containers_are_grouped_by_resolution(name: str, rows: tuple[int, ...]) -> None:
    stages = split(timm.create_model(name, num_classes=2), 64)
    assert tuple(layout.grid[0] for layout in stages.layouts) == rows


def test_a_split_does_not_depend_on_the_picture() -> None:
    model = timm.create_model("mobilenetv2_035", num_classes=10)  # at 16 pixels the last four maps are 1x1
    channels = [[layout.channels for layout in split(model, size).layouts] for size in (16, 64)]
    assert channels[0] == channels[1]


@pytest.mark.parametrize("blocks", [4, 5, 6, 7, 8, 12, 18, 30])
def test_blocks_are_split_evenly_and_the_longer_parts_come_first(blocks: int) -> None:
    modules: list[nn.Module] = [nn.Identity() for _ in range(blocks)]
    parts = evenly(modules, 4)
    lengths = [len(part) for part in parts]
    assert [module for part in parts for module in part] == modules
    assert lengths == sorted(lengths, reverse=True)
    assert max(lengths) - min(lengths) <= 1


def test_twelve_blocks_are_3_3_3_3() -> None:
    model = build("vit_tiny_patch16_224", {**HEADS, "depth": 12}).eval()
    stages = split(model, 32)
    x = torch.randn(2, 3, 32, 32)
    _, after_blocks = model.forward_intermediates(x, indices=[2, 5, 8, 11])
    for feature, expected in zip(by_hand(stages, x)[0], after_blocks, strict=True):
        assert torch.equal(to_map(feature, Layout("NLC", 32, (4, 4), prefix=1)), expected)


def test_patch_merging_belongs_to_the_stage_that_it_feeds() -> None:
    model = swin(48)
    third, fourth = split(model, 224).layouts[2:]
    assert third == Layout("NHWC", 192, (14, 14))
    assert fourth == Layout("NHWC", 384, (7, 7))
    swin_tiny = split(timm.create_model("swin_tiny_patch4_window7_224", num_classes=2), 224)
    assert swin_tiny.layouts[2] == Layout("NHWC", 384, (14, 14))
    assert swin_tiny.stage(4, torch.zeros(1, 14, 14, 384)).shape == (1, 7, 7, 768)


@pytest.mark.parametrize("family", ["CIFAR ResNet", "ConvNeXt", "MobileNetV2", "Swin", "MaxViT"])
def test_stages_are_timms_own_maps(family: str) -> None:
    model, size, _ = _built(family)
    model = copy.deepcopy(model).eval()
    x = torch.randn(2, 3, size, size)
    stages = split(model, size)
    expected = model.forward_intermediates(x, intermediates_only=True)[-4:]
    for feature, layout, map_BCHW in zip(by_hand(stages, x)[0], stages.layouts, expected, strict=True):
        assert torch.equal(to_map(feature, layout), map_BCHW)


def test_prefix_tokens_are_the_learned_ones_in_the_models_order() -> None:
    for family, names in {
        "ViT": ["cls_token"],
        "ViT with registers": ["cls_token", "reg_token"],
        "DeiT distilled": ["cls_token", "dist_token"],
        "BEiT": ["cls_token"],
        "ViT without class token": [],
        "Mixer": [],
    }.items():
        model, size, _ = _built(family)
        stages = split(model, size)
        patches = torch.randn(2, 16, 32)
        with_tokens = stages.with_prefix(patches)
        prefix = stages.layouts[2].prefix
        tokens = [getattr(model, name)[0] for name in names]
        assert prefix == sum(len(token) for token in tokens)
        assert torch.equal(with_tokens[:, prefix:], patches)
        for row in with_tokens:
            assert torch.equal(row[:prefix], torch.cat([*tokens, patches[0, :0]]))


@given(
    st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(1, 5), st.sampled_from(["NCHW", "NHWC", "NLC"])
)
def test_to_map_and_from_map_undo_each_other(batch: int, channels: int, rows: int, columns: int, form: Any) -> None:
    layout = Layout(form, channels, (rows, columns))
    map_BCHW = torch.randn(batch, channels, rows, columns)
    feature = from_map(map_BCHW, layout)
    assert torch.equal(to_map(feature, layout), map_BCHW)
    assert torch.equal(from_map(to_map(feature, layout), layout), feature)


def test_a_deep_copy_runs_in_its_own_stages() -> None:
    model = copy.deepcopy(_built("ViT")[0])
    expose(model, 32)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    x = torch.randn(1, 3, 32, 32)
    assert copied(x).abs().max() == 0
    assert model.eval()(x).abs().max() > 0


def test_checkpointing_keeps_less() -> None:
    model, size, _ = _built("ConvNeXt")
    model = copy.deepcopy(model).train()
    stages = expose(model, size)
    x = torch.randn(2, 3, size, size)

    def kept() -> int:
        saved = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal saved
            saved += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(x)
        return saved

    plain = kept()
    stages.checkpointing = True
    assert kept() < 0.2 * plain


def test_a_stage_used_twice_under_checkpointing_counts_the_models_own_pass_once() -> None:
    results = []
    for checkpointing in (False, True):
        model = copy.deepcopy(_built("CIFAR MobileNetV2, five blocks")[0]).train()
        stages = expose(model, 32)
        stages.checkpointing = checkpointing
        torch.manual_seed(0)
        x, foreign = torch.randn(4, 3, 32, 32), torch.randn(4, *stages.layouts[2].grid, stages.layouts[2].channels)
        answer = model(x, features=True, tail=foreign.permute(0, 3, 1, 2).requires_grad_())
        loss = answer["logits"].square().mean() + answer["tail_logits"].square().mean()
        loss.backward()
        results.append([loss, *gradients(model), *model.buffers()])
        assert model.bn1.num_batches_tracked == 1
        assert model.blocks[2][1].bn1.num_batches_tracked == 1, "the tail is another model's"
    assert same(*results)


@pytest.mark.parametrize(
    ("build_it", "words"),
    [
        (
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(3, 3)),
            "Sequential cannot .* none of timm's ResNet, EfficientNet",
        ),
        (lambda: timm.create_model("vgg11", num_classes=2), "VGG cannot be split .* none of timm's"),
        (lambda: timm.create_model("resnet18", num_classes=0), "no classifier"),
        (lambda: timm.create_model("vit_tiny_patch16_224", num_classes=2, depth=3), "3 blocks are too few"),
        (lambda: build("swin_tiny_patch4_window7_224", WINDOWS | {"depths": (1, 1, 1)}), "3 stages are too few"),
        (lambda: build("vit_tiny_patch16_224", {**HEADS, "img_size": 64}), "pictures of 32 pixels: Input height"),
        (lambda: build("vit_tiny_patch16_224", {**HEADS, "patch_drop_rate": 0.5}), "patch_drop_rate"),
        (lambda: build("vit_tiny_patch16_224", {**HEADS, "global_pool": ""}), "does not pool"),
    ],
)
def test_what_cannot_be_split_says_why_in_one_sentence(build_it: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        split(build_it(), 32)
    assert "\n" not in str(caught.value)


def test_a_class_that_changes_its_familys_forward_is_refused() -> None:
    class Doubled(timm.models.resnet.ResNet):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = Doubled(timm.models.resnet.BasicBlock, (1, 1, 1, 1), num_classes=3)
    nn.init.ones_(model.fc.bias)
    with pytest.raises(ValueError, match="its own forward does more than its family's"):
        split(model, 32)


STEPS = 3


def transformer() -> tuple[nn.Module, Stages]:
    model = build(
        "vit_tiny_patch16_224",
        {**HEADS, "drop_rate": 0.0, "drop_path_rate": 0.0, "pos_drop_rate": 0.0} | {"attn_drop_rate": 0.0},
    )
    return model, expose(model, 32)


def step_loss(model: Any, step: int, rank: int, world: int) -> Tensor:
    """Pictures through all stages, then a foreign feature through the last one, in two calls."""
    generator = torch.Generator().manual_seed(step)
    x, foreign = torch.randn(4, 3, 32, 32, generator=generator), torch.randn(4, 16, 32, generator=generator)
    labels = torch.randint(10, (4,), generator=generator)
    rows = slice(rank, None, world)
    own = model(x[rows], features=True, tail=foreign[rows])
    again = model(tail=own["stages"][2][:, 1:])
    logits = (own["logits"], own["tail_logits"], again["tail_logits"])
    return sum((F.cross_entropy(one, labels[rows]) for one in logits), torch.zeros(()))


def sharded_losses(stage: int, checkpointing: bool) -> list[float]:
    import torch.distributed as dist

    model, stages = transformer()
    stages.checkpointing = checkpointing
    sgd = Optim("sgd", lr=0.1, weight_decay=0.0)
    engine = build_engine(model, optim=sgd, zero=zero(stage), micro_batch=4 // dist.get_world_size())
    losses = []
    for step in range(STEPS):
        if stage == 3:
            assert engine.module.cls_token.ds_status == ZeroParamStatus.NOT_AVAILABLE
        loss = step_loss(engine, step, dist.get_rank(), dist.get_world_size())
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean, op=dist.ReduceOp.AVG)
        losses.append(mean.item())
    engine.destroy()
    return losses


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", [2, 3])
def test_an_engine_trains_an_exposed_model_as_one_process_does(ranks: Any, stage: int, checkpointing: bool) -> None:
    for losses in ranks(2).run(sharded_losses, stage, checkpointing):
        assert_close({"losses": losses}, result_of(plain_losses), movement(plain_losses))


def plain_losses(nudge: Nudge) -> dict[str, Any]:
    model, _ = transformer()
    nudge.modules([model])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for step in range(STEPS):
        loss = step_loss(model.train(), step, 0, 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {"losses": losses}
