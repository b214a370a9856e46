"""Where X-VLM's tensors come from: its own files, published layouts, separate vision and text weights."""

from __future__ import annotations

import pickle
from pathlib import Path
from unittest import mock

import huggingface_hub
import pytest
import timm
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_xvlm import NEGATIVES, VOCABULARY, batch, made, small_swin, without_dropout
from timm.layers import resample_abs_pos_embed
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table_simple
from timm.models import swin_transformer
from torch import Tensor, nn

from hetero_kt.models import bert, xvlm, xvlm_weights
from hetero_kt.models.xvlm_weights import Start, from_official, to_official

NAMES = ("xvlm:tiny", "xvlm:swin")
SIZES = {"xvlm:tiny": 16, "xvlm:swin": 64}


@pytest.fixture(autouse=True)
def _swin_is_known():
    with small_swin():
        yield


def begun(task: str, name: str = "xvlm:tiny", *, pixels: int = 0, seed: int = 5, **options):
    torch.manual_seed(seed)
    shape = {"vocabulary": VOCABULARY, "image_size": pixels or SIZES[name], **options}
    return xvlm.build(name, task, **shape)


def kept(model: nn.Module) -> dict[str, Tensor]:
    """As a run exports it: nothing twice."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def exported(model: nn.Module, file: Path) -> str:
    save_file(kept(model), file)
    return str(file)


def pretraining(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The published layout of pre-training: text names with `bert.`, a head for masked words, one for boxes."""
    state = to_official(model.state_dict(), name)
    state = {k.replace("text_encoder.", "text_encoder.bert."): v for k, v in state.items() if "text_decoder" not in k}
    torch.manual_seed(9)
    words = state["text_encoder.bert.embeddings.word_embeddings.weight"]
    state |= {
        "text_encoder.cls.predictions.bias": torch.randn(VOCABULARY),
        "text_encoder.cls.predictions.transform.dense.weight": torch.randn(64, 64),
        "text_encoder.cls.predictions.transform.dense.bias": torch.randn(64),
        "text_encoder.cls.predictions.transform.LayerNorm.weight": torch.randn(64),
        "text_encoder.cls.predictions.transform.LayerNorm.bias": torch.randn(64),
        "text_encoder.cls.predictions.decoder.weight": words,
        "bbox_head.0.weight": torch.randn(128, 64),
        "text_encoder.bert.embeddings.position_ids": torch.arange(512)[None],
    }
    state["text_encoder.cls.predictions.decoder.bias"] = state["text_encoder.cls.predictions.bias"]
    if name == "xvlm:swin":
        state["vision_encoder.layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(4, 4)
        state["vision_encoder.layers.1.blocks.1.attn_mask"] = torch.zeros(4, 4)
    return state


def published(state: dict[str, Tensor], file: Path, bare: bool = False) -> str:
    torch.save(state if bare else {"model": state, "config": {"image_res": 384, "schedular": {"lr": 1e-4}}}, file)
    return str(file)


def answer(model: nn.Module, name: str = "xvlm:tiny") -> Tensor:
    rows = batch(pixels=SIZES[name])
    with torch.no_grad():
        return model.eval()(*rows) if model.task == "vqa" else model.eval()(*rows, negatives=NEGATIVES)["match"]


# --- the published layout ---


@pytest.mark.parametrize("task", ["vqa", "retrieval"])
@pytest.mark.parametrize("name", NAMES)
def test_to_the_published_layout_and_back_is_equal_to_the_bit(task, name):
    state = made(task, name).state_dict()
    official = to_official(state, name)
    back = from_official(official)
    assert back.keys() == state.keys()
    for key, tensor in state.items():
        assert torch.equal(back[key], tensor), key
    again = from_official(state)  # ours stay as they are
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in state.items())


def test_clips_names_are_the_published_ones():
    state = made("retrieval").state_dict()
    official = to_official(state, "xvlm:tiny")
    vision = {key.removeprefix("vision_encoder.") for key in official if key.startswith("vision_encoder.")}
    layers = {
        f"encoder.layers.{i}.{part}.{kind}"
        for i in range(2)
        for part in (*(f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")), "layer_norm1", "layer_norm2")
        for kind in ("weight", "bias")
    }
    layers |= {f"encoder.layers.{i}.mlp.fc{n}.{kind}" for i in range(2) for n in (1, 2) for kind in ("weight", "bias")}
    ends = {f"{part}.{kind}" for part in ("pre_layrnorm", "post_layernorm") for kind in ("weight", "bias")}
    inputs = {"class_embedding", "patch_embed.weight", "pos_embed.weight", "position_ids"}
    assert vision == layers | ends | inputs
    assert official["vision_encoder.class_embedding"].shape == (64,)
    assert official["vision_encoder.pos_embed.weight"].shape == (5, 64)
    assert official["temp"].shape == ()
    assert {"vision_proj.weight", "itm_head.3.bias", "text_encoder.encoder.layer.3.crossattention.self.key.bias"} < set(
        official
    )


def test_an_export_without_second_names_gets_them_in_the_published_layout():
    model = made("vqa")
    official = to_official(kept(model), "xvlm:tiny")
    assert official.keys() == to_official(model.state_dict(), "xvlm:tiny").keys()
    words = official["text_decoder.bert.embeddings.word_embeddings.weight"]
    assert torch.equal(official["text_decoder.cls.predictions.decoder.weight"], words)
    with pytest.raises(ValueError, match="xvlm:tiny: the tensors are not those of an X-VLM"):
        to_official({"fc.weight": torch.zeros(2)}, "xvlm:tiny")


def test_a_published_swin_is_what_timm_reads_in_it():
    model = made("retrieval", "xvlm:swin")
    official = to_official(model.state_dict(), "xvlm:swin")
    vision = {k.removeprefix("vision_encoder."): v for k, v in official.items() if k.startswith("vision_encoder.")}
    assert "layers.0.downsample.reduction.weight" in vision
    assert "layers.3.downsample.reduction.weight" not in vision
    other, _ = begun("retrieval", "xvlm:swin")
    theirs = swin_transformer.checkpoint_filter_fn(vision, other.vision_encoder)
    other.vision_encoder.load_state_dict(theirs)
    pictures = batch(pixels=64)[0]
    assert torch.equal(other.eval().see(pictures), model.eval().see(pictures))


@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize("suffix", ["th", "pth", "bin"])
def test_a_published_fine_tuned_file_is_taken_whole(tmp_path, bare, suffix):
    for task in ("vqa", "retrieval"):
        source = made(task)
        file = published(to_official(source.state_dict(), "xvlm:tiny"), tmp_path / f"{task}.{suffix}", bare)
        model, start = begun(task, init=file)
        assert not start.fresh
        assert not start.left
        assert not start.interpolated
        assert torch.equal(answer(model), answer(source))
        assert str(start) == f"{len(kept(model))} tensors are from {file}"


@pytest.mark.parametrize("task", ["vqa", "retrieval"])
def test_a_run_starts_from_another_runs_export(tmp_path, task):
    source = made(task)
    model, start = begun(task, init=exported(source, tmp_path / "export.safetensors"))
    assert not start.fresh
    assert not start.left
    for key, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key


@pytest.mark.parametrize("name", NAMES)
def test_a_pretrained_file_starts_retrieval(tmp_path, name):
    source = made("retrieval", name)
    model, start = begun("retrieval", name, init=published(pretraining(source, name), tmp_path / "4m.th"))
    assert not start.fresh
    assert {key.split(".")[0] for key in start.left} == {"bbox_head", "text_encoder"}
    assert {key for key in start.left if "cls.predictions" not in key} == {"bbox_head.0.weight"}
    assert torch.equal(answer(model, name), answer(source, name))
    assert "are left out (" in str(start)
    assert "position" not in str(start)


@pytest.mark.parametrize("name", NAMES)
def test_a_pretrained_file_starts_a_vqa_model_with_its_decoder(tmp_path, name):
    source = made("retrieval", name)
    state = pretraining(source, name)
    model, start = begun("vqa", name, init=published(state, tmp_path / "4m.th"))
    own, theirs = model.state_dict(), source.state_dict()
    for key, tensor in own.items():
        if key.startswith(("vision_encoder.", "text_encoder.")):
            assert torch.equal(tensor, theirs[key]), key
            assert key in start.taken
    fresh = set()
    for i in range(2):
        for key in (k for k in own if k.startswith(f"text_decoder.bert.encoder.layer.{i}.")):
            if name == "xvlm:swin" and "crossattention.self" in key and "query" not in key:
                fresh.add(key)  # a picture's tokens are wider than a question's
                assert tensor_is_fresh(own[key])
                continue
            first = model.text_encoder.alone
            origin = theirs[
                key.replace(f"text_decoder.bert.encoder.layer.{i}", f"text_encoder.encoder.layer.{i + first}")
            ]
            assert torch.equal(own[key], origin), key
    for part in ("bias", "transform.dense.weight", "transform.LayerNorm.bias"):
        assert torch.equal(own[f"text_decoder.cls.predictions.{part}"], state[f"text_encoder.cls.predictions.{part}"])
    words = theirs["text_encoder.embeddings.word_embeddings.weight"]
    assert torch.equal(own["text_decoder.cls.predictions.decoder.weight"], words)
    assert set(start.fresh) == fresh
    assert {key.split(".")[0] for key in start.left} == {"vision_proj", "text_proj", "temp", "itm_head", "bbox_head"}


def tensor_is_fresh(tensor: Tensor) -> bool:
    """As X-VLM begins it at a width of 64: BERT's 0.02 at 768, wider as the square root where it is narrower."""
    spread = 0.02 * (768 / 64) ** 0.5
    return tensor.std().item() == pytest.approx(spread, rel=0.1) if tensor.dim() > 1 else not tensor.any()


def test_retrieval_starts_vqa_and_vqa_starts_retrieval(tmp_path):
    ranker, asked = made("retrieval"), made("vqa", seed=1)
    model, start = begun("vqa", init=exported(ranker, tmp_path / "ranker.safetensors"))
    assert set(start.fresh) == {k for k in kept(model) if k.startswith("text_decoder.cls.predictions.")}
    own = model.state_dict()
    assert torch.equal(
        own["text_decoder.bert.encoder.layer.1.crossattention.self.key.weight"],
        ranker.state_dict()["text_encoder.encoder.layer.3.crossattention.self.key.weight"],
    )
    model, start = begun("retrieval", init=exported(asked, tmp_path / "asked.safetensors"))
    assert {key.split(".")[0] for key in start.fresh} == {"vision_proj", "text_proj", "temp", "itm_head"}
    assert all(key.startswith("text_decoder.") for key in start.left)
    pictures, ids, mask = batch()
    states = model.eval().text_encoder.look(model.text_encoder.read(ids, mask), mask, model.see(pictures))
    assert torch.equal(states, asked.eval()(pictures, ids, mask))


def test_a_fresh_decoder_starts_as_the_fresh_cross_layers():
    model, start = begun("vqa")
    own = model.state_dict()
    for key in ("attention.self.query.weight", "crossattention.self.value.weight", "output.dense.weight"):
        theirs = own[f"text_encoder.encoder.layer.2.{key}"]
        assert torch.equal(own[f"text_decoder.bert.encoder.layer.0.{key}"], theirs)
        assert own[f"text_decoder.bert.encoder.layer.0.{key}"].data_ptr() != theirs.data_ptr()
    assert not start.taken
    assert str(start) == f"{len(kept(model))} tensors are fresh"
    assert not own["text_encoder.embeddings.word_embeddings.weight"][0].any()  # of padding


# --- another image size ---


def test_a_vits_position_table_is_interpolated(tmp_path):
    source = made("retrieval")
    for file in (
        exported(source, tmp_path / "ours.safetensors"),
        published(to_official(source.state_dict(), "xvlm:tiny"), tmp_path / "theirs.th"),
    ):
        model, start = begun("retrieval", pixels=40, init=file)
        assert start.interpolated == ("vision_encoder.pos_embed",)
        expected = resample_abs_pos_embed(source.vision_encoder.pos_embed.detach(), [5, 5], antialias=False)
        assert torch.allclose(model.vision_encoder.pos_embed, expected, atol=1e-6)
        assert torch.equal(model.vision_encoder.pos_embed[:, 0], source.vision_encoder.pos_embed[:, 0])
        assert "1 of them interpolated (vision_encoder.pos_embed)" in str(start)
        assert model(*batch(pixels=40), negatives=NEGATIVES)["match"].isfinite().all()


def test_a_swins_relative_position_tables_are_interpolated(tmp_path):
    source = made("retrieval", "xvlm:swin")
    file = published(to_official(source.state_dict(), "xvlm:swin"), tmp_path / "theirs.th")
    model, start = begun("retrieval", "xvlm:swin", pixels=96, init=file)
    tables = [name for name, _ in model.named_parameters() if name.endswith("relative_position_bias_table")]
    assert list(start.interpolated) == tables
    assert len(tables) == 5
    for name in tables:
        theirs, ours = source.state_dict()[name], model.state_dict()[name]
        assert (theirs.shape[0], ours.shape[0]) == (9, 25)
        assert torch.allclose(ours, resize_rel_pos_bias_table_simple(theirs, (3, 3), ours.shape), atol=1e-6)
    assert model(*batch(pixels=96), negatives=NEGATIVES)["match"].isfinite().all()


def test_a_table_of_no_square_picture_is_refused(tmp_path):
    state = kept(made("retrieval"))
    state["vision_encoder.pos_embed"] = torch.zeros(1, 7, 64)
    save_file(state, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=r"vision_encoder.pos_embed is 1x7x64, not 1x5x64"):
        begun("retrieval", init=str(tmp_path / "odd.safetensors"))


# --- files that do not fit or are not what they seem ---


class Trap:
    """Unpickling this leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("where", ["init", "vision", "text"])
def test_nothing_in_a_file_is_executed(tmp_path, where):
    mark, file = tmp_path / "mark", tmp_path / "trap.th"
    torch.save({"model": {"temp": torch.ones(()), "trap": Trap(mark)}}, file)
    with pytest.raises(
        ValueError, match="holds more than tensors, or is damaged: nothing of it was executed"
    ) as caught:
        begun("retrieval", **{where: str(file)})
    assert not mark.exists()
    assert f"xvlm:tiny: {where} names {file}" in str(caught.value)
    assert "\n" not in str(caught.value)
    file.write_bytes(pickle.dumps(Trap(mark), 2))  # as older files of torch are: without an archive around it
    with pytest.raises(ValueError, match="nothing of it was executed"):
        begun("retrieval", **{where: str(file)})
    assert not mark.exists()
    pickle.loads(file.read_bytes())
    assert mark.exists()  # so the trap works


@pytest.mark.parametrize("suffix", ["th", "safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_damaged_file_is_refused_in_one_sentence(tmp_path, suffix, share):
    whole, file = tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}"
    source = made("retrieval")
    if suffix == "th":
        published(to_official(source.state_dict(), "xvlm:tiny"), whole)
    else:
        exported(source, whole)
    content = whole.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"xvlm:tiny: init names .*cut") as caught:
        begun("retrieval", init=str(file))
    assert "\n" not in str(caught.value)


def test_a_file_without_weights_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in ("none.th", "empty"):
        with pytest.raises(ValueError, match="which holds no weights: give a file of them or its folder"):
            begun("vqa", init=str(tmp_path / path))
    torch.save([1, 2], tmp_path / "list.th")
    torch.save({"model": {"lr": 1.0}}, tmp_path / "numbers.th")
    for path in ("list.th", "numbers.th"):
        with pytest.raises(ValueError, match="which holds no tensors"):
            begun("vqa", init=str(tmp_path / path))


def test_another_models_file_is_refused_in_one_sentence(tmp_path):
    source = exported(made("retrieval"), tmp_path / "tiny.safetensors")
    state = kept(made("retrieval"))

    def changed(name: str, **changes) -> str:
        save_file({**state, **changes}, tmp_path / f"{name}.safetensors")
        return str(tmp_path / f"{name}.safetensors")

    deeper = {k.replace("blocks.1", "blocks.2"): v.clone() for k, v in state.items() if "blocks.1" in k}
    longer = {k.replace("layer.3", "layer.4"): v.clone() for k, v in state.items() if "layer.3" in k}
    robust = {k.replace("text_encoder.", "text_encoder.roberta."): v for k, v in state.items()}
    save_file(robust, tmp_path / "roberta.safetensors")
    for what, says in (
        ({"name": "xvlm:swin", "init": source}, r"vision_encoder.\S+ is missing, and \d+ more"),
        ({"name": "xvlm:mini", "init": source, "pixels": 32}, r"vision_encoder.blocks.2.\S+ is missing"),
        ({"init": changed("wide", **{"text_encoder.encoder.layer.0.output.dense.bias": torch.zeros(9)})}, "9, not 64"),
        ({"init": changed("deeper", **deeper)}, r"vision_encoder.blocks.2.\S+ is unknown"),
        ({"init": changed("longer", **longer)}, r"text_encoder.encoder.layer.4.\S+ is unknown"),
        ({"init": str(tmp_path / "roberta.safetensors")}, r"text_encoder.\S+ is missing"),
    ):
        with pytest.raises(ValueError, match=f"which is another model's \\(.*{says}") as caught:
            begun("retrieval", **what)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"which knows 40 tokens and the tokenizer has 50: name the model's own"):
        begun("retrieval", vocabulary=50, init=source)


SPOILT = (
    lambda tensor: tensor.flatten(),
    lambda tensor: tensor[None],
    lambda tensor: tensor.flatten()[:0],
    lambda tensor: tensor.flatten()[0],
    lambda tensor: tensor[:-1] if tensor.dim() else tensor,
    lambda tensor: None,
)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_whatever_is_wrong_with_a_tensor_is_one_sentence(data):
    """Or it was a head's or a table's, and the model is whole without it."""
    name, layout, where = (data.draw(st.sampled_from(x)) for x in (NAMES, ("ours", "theirs"), ("init", "vision")))
    source = SOURCES.setdefault(name, made("retrieval", name).state_dict())
    state = to_official(source, name) if layout == "theirs" else dict(source)
    if where == "vision":
        state = {key: tensor for key, tensor in state.items() if key.startswith("vision_encoder.")}
    key = data.draw(st.sampled_from(sorted(state)))
    spoilt = data.draw(st.sampled_from(SPOILT))(state.pop(key))
    if spoilt is not None:
        state[key] = spoilt
    said = ""
    with mock.patch.object(xvlm_weights, "read", return_value=state):
        try:
            model, start = begun("retrieval", name, **{where: "file.th"})
        except ValueError as error:
            said = str(error)
    if said:
        assert said.startswith(f"{name}: {where} names file.th, which ")
        assert "\n" not in said
    else:
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        assert sorted([*start.taken, *start.fresh]) == sorted(kept(model))


SOURCES: dict[str, dict[str, Tensor]] = {}


def test_a_head_is_taken_whole_or_not_at_all(tmp_path):
    source = made("retrieval")
    state = kept(source)
    del state["itm_head.3.bias"]
    state["text_proj.weight"] = torch.zeros(128, 64)
    save_file(state, tmp_path / "part.safetensors")
    model, start = begun("retrieval", init=str(tmp_path / "part.safetensors"))
    assert {key.split(".")[0] for key in start.fresh} == {"itm_head", "text_proj"}
    assert torch.equal(model.vision_proj.weight, source.vision_proj.weight)
    assert {"itm_head.0.weight", "text_proj.weight"} < set(start.left)


# --- separate vision and text weights ---


def tower(layers: int, **options):
    torch.manual_seed(7)
    shape = {"patch_size": 8, "embed_dim": 64, "num_heads": 2, "depth": layers, "img_size": 16, **options}
    return timm.create_model("vit_base_patch16_clip_quickgelu_224", num_classes=5, **shape)


def clip(layers: int, pixels: int = 16):
    torch.manual_seed(7)
    config = transformers.CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=2,
        image_size=pixels,
        patch_size=8,
    )
    model = transformers.CLIPVisionModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.05)
    return model


def test_a_timm_vit_of_the_same_depth_is_taken_whole(tmp_path):
    source = tower(2)
    save_file(source.state_dict(), tmp_path / "vit.safetensors")
    model, start = begun("vqa", vision=str(tmp_path / "vit.safetensors"))
    pictures = batch()[0]
    assert torch.equal(model.eval().see(pictures), source.eval().forward_features(pictures))
    assert set(start.left) == {"head.weight", "head.bias"}
    assert all(key.startswith("vision_encoder.") for key in start.taken)
    assert all(not key.startswith("vision_encoder.") for key in start.fresh)


@pytest.mark.parametrize("names", ["timm", "clip"])
def test_of_a_tower_twice_as_deep_every_second_layer_is_taken(tmp_path, names):
    source = tower(4) if names == "timm" else clip(4)
    save_file(source.state_dict(), tmp_path / "vit.safetensors")
    model, start = begun("vqa", vision=str(tmp_path / "vit.safetensors"))
    pictures = batch()[0]
    if names == "timm":
        source.blocks = nn.Sequential(source.blocks[1], source.blocks[3])
        expected = source.eval().forward_features(pictures)
        assert any(key.startswith("blocks.2.") for key in start.left)
    else:
        source.encoder.layers = nn.ModuleList([source.encoder.layers[1], source.encoder.layers[3]])
        expected = source.post_layernorm(source(pictures).last_hidden_state)
    assert torch.allclose(model.eval().see(pictures), expected, atol=1e-5)
    assert len(start.taken) == len([key for key in kept(model) if key.startswith("vision_encoder.")])


@pytest.mark.parametrize("form", ["tower", "prefixed", "whole"])
def test_transformers_clip_sees_the_same(tmp_path, form):
    source = clip(2)
    state = dict(source.state_dict())
    if form != "tower":
        state = {f"vision_model.{key}": tensor for key, tensor in state.items()}
        state["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    if form == "whole":
        state |= {"text_model.final_layer_norm.weight": torch.ones(4), "logit_scale": torch.ones(())}
    save_file(state, tmp_path / "clip.safetensors")
    model, start = begun("retrieval", vision=str(tmp_path / "clip.safetensors"))
    pictures = batch()[0]
    expected = source.post_layernorm(source(pictures).last_hidden_state)
    assert torch.allclose(model.eval().see(pictures), expected, atol=1e-5)
    assert set(start.left) == ({"text_model.final_layer_norm.weight", "logit_scale"} if form == "whole" else set())


def test_a_towers_position_table_is_interpolated_too(tmp_path):
    source = clip(2, pixels=24)
    save_file(source.state_dict(), tmp_path / "clip.safetensors")
    model, start = begun("retrieval", vision=str(tmp_path / "clip.safetensors"))
    assert start.interpolated == ("vision_encoder.pos_embed",)
    table = source.embeddings.position_embedding.weight.detach()[None]
    expected = resample_abs_pos_embed(table, [2, 2], antialias=False)
    assert torch.allclose(model.vision_encoder.pos_embed, expected, atol=1e-6)


def test_a_swin_file_starts_a_swin(tmp_path):
    source, _ = begun("retrieval", "xvlm:swin", seed=8)
    published_swin = to_official(source.state_dict(), "xvlm:swin")
    vision = {
        k.removeprefix("vision_encoder."): v for k, v in published_swin.items() if k.startswith("vision_encoder.")
    }
    save_file(vision, tmp_path / "microsoft.safetensors")
    save_file(source.vision_encoder.state_dict(), tmp_path / "timm.safetensors")
    for file in ("microsoft", "timm"):
        model, start = begun("retrieval", "xvlm:swin", vision=str(tmp_path / f"{file}.safetensors"))
        for key, tensor in source.vision_encoder.state_dict().items():
            assert torch.equal(model.vision_encoder.state_dict()[key], tensor), key
        assert not start.left


def test_a_plain_vit_leaves_the_norm_that_only_clip_has_fresh(tmp_path):
    source = tower(2, pre_norm=False)
    save_file(source.state_dict(), tmp_path / "vit.safetensors")
    _, start = begun("retrieval", vision=str(tmp_path / "vit.safetensors"))
    vision = {key for key in start.fresh if key.startswith("vision_encoder.")}
    assert vision == {"vision_encoder.norm_pre.weight", "vision_encoder.norm_pre.bias"}
    assert "patch_embed.proj.bias" in start.left


def test_a_tower_that_does_not_fit_is_refused_in_one_sentence(tmp_path):
    save_file(tower(3).state_dict(), tmp_path / "three.safetensors")
    save_file(tower(2, embed_dim=32).state_dict(), tmp_path / "narrow.safetensors")
    save_file(tower(2, patch_size=4).state_dict(), tmp_path / "patches.safetensors")
    swin, _ = begun("retrieval", "xvlm:swin")
    save_file(swin.vision_encoder.state_dict(), tmp_path / "swin.safetensors")
    for file, name, says in (
        ("three", "xvlm:tiny", "which has 3 layers: give weights of 2 or 4"),
        ("narrow", "xvlm:tiny", r"another model's \(vision_encoder.cls_token is 1x1x32, not 1x1x64"),
        ("patches", "xvlm:tiny", r"patch_embed.proj.weight is 64x3x4x4, not 64x3x8x8"),
        ("swin", "xvlm:tiny", r"another model's \(vision_encoder.cls_token is missing"),
        ("three", "xvlm:swin", r"another model's \(vision_encoder.\S+ is missing"),
    ):
        with pytest.raises(ValueError, match=says) as caught:
            begun("retrieval", name, vision=str(tmp_path / f"{file}.safetensors"))
        assert f"{name}: vision names" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_published_weights_of_timm_are_asked_for_by_name(monkeypatch):
    asked = []
    source = tower(4)

    def create(name, **options):
        if options.get("pretrained"):
            asked.append((name, options))
            return source
        return build(name, **options)

    build = timm.create_model
    monkeypatch.setattr(timm, "create_model", create)
    name = "vit_base_patch16_clip_quickgelu_224.openai"
    model, start = begun("vqa", vision=f"timm:{name}")
    assert asked[0][0] == name
    assert torch.equal(model.vision_encoder.blocks[1].attn.qkv.weight, source.blocks[3].attn.qkv.weight)
    assert start.sources == (f"timm:{name}",)
    with pytest.raises(ValueError, match="for which timm has no published weights"):
        begun("vqa", vision="timm:vit_none")

    def unreachable(name, **options):
        if options.get("pretrained"):
            raise OSError("Name or service not known\nRetry")
        return build(name, **options)

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(ValueError, match=r"could not be fetched \(Name or service not known\)"):
        begun("vqa", vision=f"timm:{name}")


def words(folder: Path, layers: int, task: bert.Task = "masked_lm") -> tuple[str, nn.Module]:
    torch.manual_seed(4)
    model, _ = bert.build(f"bert:{layers}x64", task, vocabulary=VOCABULARY)
    bert.save(model, model.state_dict(), folder)
    return str(folder), without_dropout(model).eval()


@pytest.mark.parametrize("task", ["vqa", "retrieval"])
@pytest.mark.parametrize("layers", [4, 8])
def test_a_berts_layers_become_text_and_cross_layers(tmp_path, task, layers):
    folder, source = words(tmp_path / "bert", layers)
    model, start = begun(task, text=folder)
    theirs = list(source.bert.encoder.layer)[1::2] if layers == 8 else list(source.bert.encoder.layer)
    for ours, layer in zip(model.text_encoder.layers, theirs, strict=True):
        for key, tensor in layer.state_dict().items():
            assert torch.equal(ours.state_dict()[key], tensor), key
    source.bert.encoder.layer = nn.ModuleList(theirs[:2])
    _, ids, mask = batch()
    expected = source.bert(input_ids=ids, attention_mask=mask).last_hidden_state
    assert torch.allclose(model.eval().text_encoder.read(ids, mask), expected, atol=1e-5)
    crossing = {key for key in kept(model) if key.startswith("text_encoder.") and "crossattention" in key}
    assert crossing < set(start.fresh)
    if task == "vqa":
        own, head = model.text_decoder.state_dict(), source.cls.predictions
        assert torch.equal(own["bert.encoder.layer.1.output.dense.weight"], theirs[3].output.dense.weight)
        assert torch.equal(own["cls.predictions.transform.dense.weight"], head.transform.dense.weight)
        assert torch.equal(own["cls.predictions.decoder.weight"], head.decoder.weight)
        decoding = {key for key in start.fresh if key.startswith("text_decoder.")}
        assert all("crossattention" in key for key in decoding)
    else:
        assert "cls.predictions.transform.dense.weight" in start.left
    assert any(key.startswith("encoder.layer.0.") for key in start.left) == (layers == 8)


def test_a_bert_for_another_task_and_old_names_are_read(tmp_path):
    folder, source = words(tmp_path / "bert", 4, "classification")
    old = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for key, tensor in source.state_dict().items()
    }
    old["bert.embeddings.position_ids"] = torch.arange(512)[None]
    torch.save(old, tmp_path / "pytorch_model.bin")
    for path in (folder, f"{folder}/model.safetensors", str(tmp_path / "pytorch_model.bin"), str(tmp_path)):
        model, start = begun("vqa", text=path)
        assert torch.equal(
            model.text_encoder.embeddings.word_embeddings.weight, source.bert.embeddings.word_embeddings.weight
        )
        assert {key.split(".")[0] for key in start.left} == {"pooler", "classifier"}
        assert "text_decoder.cls.predictions.bias" in start.fresh


def test_second_names_of_a_berts_head_are_not_left_over(tmp_path):
    _, source = words(tmp_path / "bert", 4)
    torch.save(source.state_dict(), tmp_path / "whole.bin")
    _, start = begun("vqa", text=str(tmp_path / "whole.bin"))
    assert "cls.predictions.decoder.weight" in source.state_dict()
    assert not start.left


def test_a_bert_that_does_not_fit_is_refused(tmp_path):
    folder, _ = words(tmp_path / "bert", 3)
    with pytest.raises(ValueError, match=r"text names .*bert, which has 3 layers: give weights of 4 or 8"):
        begun("vqa", text=folder)
    model, _ = bert.build("bert:4x32", "masked_lm", vocabulary=VOCABULARY)
    bert.save(model, model.state_dict(), tmp_path / "narrow")
    with pytest.raises(ValueError, match=r"embeddings.word_embeddings.weight is 40x32, not 40x64"):
        begun("vqa", text=str(tmp_path / "narrow"))
    folder, _ = words(tmp_path / "four", 4)
    with pytest.raises(ValueError, match=r"which knows 40 tokens and the tokenizer has 41"):
        begun("vqa", text=folder, vocabulary=41)
    model, _ = bert.build("distilbert:4x64", "masked_lm", vocabulary=VOCABULARY)
    bert.save(model, model.state_dict(), tmp_path / "distilled")
    with pytest.raises(ValueError, match=r"another model's \(text_encoder.embeddings.\S+ is missing"):
        begun("vqa", text=str(tmp_path / "distilled"))


def test_a_bert_on_the_hub_is_fetched_or_said_to_be_out_of_reach(tmp_path, monkeypatch):
    folder, source = words(tmp_path / "bert", 4)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **_: folder if name == "tiny-bert" else 1 / 0
    )
    model, _ = begun("vqa", text="hf:tiny-bert")
    assert torch.equal(
        model.text_encoder.layers[0].output.dense.weight, source.bert.encoder.layer[0].output.dense.weight
    )
    with pytest.raises(ValueError, match=r"could not be fetched from the hub \(division by zero\)"):
        begun("vqa", text="hf:other")


def test_mini_starts_from_the_small_bert_of_its_width(tmp_path):
    model, _ = bert.build("bert:4x256", "masked_lm", vocabulary=VOCABULARY)
    bert.save(model, model.state_dict(), tmp_path / "small")
    _, start = xvlm.build("xvlm:mini", "vqa", vocabulary=VOCABULARY, image_size=32, text=str(tmp_path / "small"))
    assert not start.left or all(key.startswith("pooler") for key in start.left)
    assert all("vision_encoder" in key or "crossattention" in key for key in start.fresh)


def test_vision_and_text_come_from_two_places(tmp_path):
    folder, _ = words(tmp_path / "bert", 4)
    save_file(tower(4).state_dict(), tmp_path / "vit.safetensors")
    model, start = begun("vqa", vision=str(tmp_path / "vit.safetensors"), text=folder)
    assert start.sources == (str(tmp_path / "vit.safetensors"), folder)
    assert f"are from {tmp_path / 'vit.safetensors'} and {folder}, " in str(start)
    assert all("crossattention" in key for key in start.fresh)
    assert sorted([*start.taken, *start.fresh]) == sorted(kept(model))


def test_a_report_says_what_became_of_every_tensor():
    start = Start(("a.th",), ("x", "y"), ("y",), ("z",), tuple("abcdef"))
    assert str(start) == (
        "2 tensors are from a.th, 1 of them interpolated (y), 1 are fresh (z), 6 of it are left out (a, b, c, d, ...)"
    )
