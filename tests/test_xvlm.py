"""X-VLM's parts against plain statements of them, and its training over ranks against one process."""

from __future__ import annotations

import math
from contextlib import contextmanager

import pytest
import torch
import transformers
from rounding import STILL, Nudge, assert_close, movement, result_of
from small import zero
from texts import tokenizer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn import functional as F

from hetero_kt.data.vqa import Asked
from hetero_kt.models import xvlm
from hetero_kt.models.xvlm import _SIZES, _Bounded, _Size, build
from hetero_kt.nn import reencode
from hetero_kt.nn.losses import alignment
from hetero_kt.tasks import retrieval, vqa

VOCABULARY = 40
PIXELS = {"xvlm:tiny": 16, "xvlm:swin": 64}
SWIN = _Size(
    "swin_base_patch4_window7_224",
    1,
    2,
    64,
    {"embed_dim": 12, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 3, 4), "drop_path_rate": 0.0},
)
"""Pictures as wide as 96 and texts as wide as 64."""


@contextmanager
def small_swin():
    _SIZES["xvlm:swin"] = SWIN
    try:
        yield
    finally:
        del _SIZES["xvlm:swin"]


@pytest.fixture(autouse=True)
def _swin_is_known():
    with small_swin():
        yield


def made(task: str, name: str = "xvlm:tiny", seed: int = 0, **options):
    """A model whose biases, norms and heads are not what they start as, so that none can be left out unseen."""
    torch.manual_seed(seed)
    model, _ = build(name, task, vocabulary=VOCABULARY, image_size=PIXELS[name], **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1:
                parameter.add_(torch.randn(parameter.shape), alpha=0.05)
    return model


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def batch(rows: int = 4, length: int = 6, pixels: int = 16, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randn(rows, 3, pixels, pixels, generator=generator)
    ids = torch.randint(5, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 3:] = 0
    mask[-1, 5:] = 0
    return pictures, ids, mask


def answers(count: int = 5, length: int = 4, rows: int = 4, seed: int = 2):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (count, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 2:] = 0
    return ids, mask, torch.randint(rows, (count,), generator=generator)


# --- sizes ---


def count(model: nn.Module, *without: str) -> float:
    """Millions of parameters."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith(without or "-")) / 1e6


def test_small_and_base_have_the_published_numbers_of_parameters():
    with torch.device("meta"):
        small, _ = build("xvlm:small", "retrieval", vocabulary=30522, image_size=224)
        base, _ = build("xvlm:base", "retrieval", vocabulary=30522, image_size=384)
    heads = ("vision_proj", "text_proj", "temp", "itm_head")
    # 116.7M of vision, text and cross layers, 93M without the embeddings of words.
    assert count(small, *heads) == pytest.approx(116.7, rel=0.001)
    assert count(small, *heads, "text_encoder.embeddings.word") == pytest.approx(93, rel=0.005)
    # 216M with two heads of pre-training that are not here (boxes and masked words: 1.8M).
    assert count(base) + 1.8 == pytest.approx(216, rel=0.003)
    assert len(small.vision_encoder.blocks) == 6
    assert small.vision_encoder.blocks[0].attn.num_heads == 12
    assert [len(stage.blocks) for stage in base.vision_encoder.layers] == [2, 2, 18, 2]
    assert base.vision_width == 1024
    assert base.vision_encoder.layers[0].blocks[0].attn.window_size == (12, 12)
    for model, alone, cross in ((small, 3, 3), (base, 6, 6)):
        layers = model.text_encoder.layers
        assert [hasattr(layer, "crossattention") for layer in layers] == [False] * alone + [True] * cross
        assert {layer.attention.self.num_attention_heads for layer in layers} == {12}
        assert layers[-1].crossattention.self.key.in_features == model.vision_width


@pytest.mark.parametrize("name", ["xvlm:small", "xvlm:base"])
def test_the_decoder_has_as_many_layers_as_there_are_cross_layers(name):
    with torch.device("meta"):
        model, _ = build(name, "vqa", vocabulary=30522, image_size=224)
    layers = model.text_decoder.bert.layers
    assert len(layers) == _SIZES[name].cross
    assert all(layer.crossattention.self.key.in_features == 768 for layer in layers)


def test_names_are_the_published_ones():
    vqa, retrieval = (dict(made(task).named_parameters()) for task in ("vqa", "retrieval"))
    for name in (
        "text_encoder.embeddings.word_embeddings.weight",
        "text_encoder.encoder.layer.3.attention.self.value.weight",
        "text_encoder.encoder.layer.2.crossattention.self.query.weight",
        "text_encoder.encoder.layer.2.crossattention.output.LayerNorm.bias",
        "text_encoder.encoder.layer.3.intermediate.dense.weight",
        "vision_encoder.blocks.1.attn.qkv.weight",
    ):
        assert name in vqa
        assert name in retrieval
    assert "text_encoder.encoder.layer.1.crossattention.self.query.weight" not in vqa
    assert "text_decoder.bert.encoder.layer.1.crossattention.self.key.weight" in vqa
    assert "text_decoder.cls.predictions.transform.dense.weight" in vqa
    assert {"vision_proj.weight", "text_proj.bias", "temp", "itm_head.0.weight", "itm_head.3.bias"} < set(retrieval)
    assert not any("pooler" in name for name in {**vqa, **retrieval})


@pytest.mark.parametrize("name", xvlm.known())
def test_dropout_is_berts(name):
    with torch.device("meta"):
        model, _ = build(name, "vqa", vocabulary=VOCABULARY, image_size=64)
    for part in (model.text_encoder, model.text_decoder):
        assert {module.p for module in part.modules() if isinstance(module, nn.Dropout)} == {0.1}
    assert {module.p for module in model.vision_encoder.modules() if isinstance(module, nn.Dropout)} <= {0.0}


@pytest.mark.parametrize("task", ["vqa", "retrieval"])
def test_weights_that_take_part_in_transfers_are_listed(task):
    model = made(task)
    listed = {info.name: info for info in reencode.list_weights(model)}
    assert listed["vision_encoder.blocks.1.attn.qkv.weight[v]"].shape == (64, 64)
    assert listed["text_encoder.encoder.layer.3.crossattention.self.value.weight"].kind == "attention"
    reencode.factorise(model, "text_encoder.encoder.layer.3.crossattention.self.value.weight", 64)
    reencode.factorise(model, "vision_encoder.blocks.1.attn.qkv.weight[v]", 64)
    plain = made(task).eval()
    rows = batch()
    given = {} if task == "vqa" else {"groups": torch.arange(4), "negatives": NEGATIVES}
    ours, theirs = (one(*rows, **given) for one in (model.eval(), plain))
    ours, theirs = (one if task == "vqa" else one["match"] for one in (ours, theirs))
    assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("decay_all", [True, False])
@pytest.mark.parametrize("name", ["xvlm:tiny", "xvlm:swin"])
def test_class_token_position_tables_and_temperature_do_not_decay(name, decay_all):
    from hetero_kt.config import Optim
    from hetero_kt.optimizer import build_optimizer

    model = made("retrieval", name)
    optimizer = build_optimizer(model, Optim("adamw", weight_decay=0.1, decay_all=decay_all))
    spared = {id(p) for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    found = {key for key, p in model.named_parameters() if id(p) in spared}
    tables = {key for key, _ in model.named_parameters() if key.endswith(("cls_token", "pos_embed", "_bias_table"))}
    flat = set() if decay_all else {key for key, p in model.named_parameters() if p.ndim == 1}
    assert found == {"temp"} | tables | flat
    assert tables


def test_what_cannot_be_built_is_refused():
    with pytest.raises(ValueError, match=r"no model is called 'xvlm:large': use xvlm:tiny, "):
        build("xvlm:large", "vqa", vocabulary=9, image_size=16)
    with pytest.raises(ValueError, match=r"task 'captions' is unknown: use any of vqa, retrieval"):
        build("xvlm:tiny", "captions", vocabulary=9, image_size=16)
    with pytest.raises(ValueError, match=r"xvlm:small takes pictures in steps of 16 pixels, not 100: set image_size"):
        build("xvlm:small", "vqa", vocabulary=9, image_size=100)
    with pytest.raises(ValueError, match=r"xvlm:base takes pictures in steps of 32 pixels, not 16: set image_size"):
        build("xvlm:base", "vqa", vocabulary=9, image_size=16)
    with pytest.raises(ValueError, match=r"init and text both say where to start"):
        build("xvlm:tiny", "vqa", vocabulary=9, image_size=16, init="a", text="b")
    _, ids, mask = batch()
    with pytest.raises(ValueError, match=r"was built for pictures of 16 x 16 pixels and is given 24 x 16"):
        made("vqa")(torch.zeros(4, 3, 24, 16), ids, mask)


def test_a_tokenizer_gives_its_size(tmp_path):
    tokens = tokenizer(tmp_path)
    model, _ = build("xvlm:tiny", "vqa", vocabulary=tokens, image_size=16)
    assert model.text_encoder.embeddings.word_embeddings.num_embeddings == tokens.size


# --- against plain statements ---


def linear(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def norm(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-12).sqrt()
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def attended(weights: dict[str, Tensor], name: str, x: Tensor, seen: Tensor, allowed: Tensor, heads: int) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V of each row and head by itself, then the residual and its norm."""
    q, k, v = linear(weights, f"{name}.self.query", x), *(linear(weights, f"{name}.self.{n}", seen) for n in KV)
    mixed = torch.zeros_like(x)
    width = x.shape[-1] // heads
    for row in range(len(x)):
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            scores = q[row, :, part] @ k[row, :, part].T / math.sqrt(width)
            scores = scores.masked_fill(~allowed[row].expand_as(scores), -math.inf)
            mixed[row, :, part] = scores.softmax(-1) @ v[row, :, part]
    return norm(weights, f"{name}.output.LayerNorm", x + linear(weights, f"{name}.output.dense", mixed))


KV = ("key", "value")


def bert_layer(weights, x, allowed, heads, seen=None, seen_allowed=None):
    x = attended(weights, "attention", x, x, allowed, heads)
    if seen is not None:
        x = attended(weights, "crossattention", x, seen, seen_allowed, heads)
    h = linear(weights, "intermediate.dense", x)
    h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
    return norm(weights, "output.LayerNorm", x + linear(weights, "output.dense", h))


def embedded(weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    x = weights["embeddings.word_embeddings.weight"][ids] + weights["embeddings.token_type_embeddings.weight"][0]
    x = x + weights["embeddings.position_embeddings.weight"][: ids.shape[1]]
    return norm(weights, "embeddings.LayerNorm", x)


def below(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): w for key, w in weights.items() if key.startswith(prefix)}


def two_heads(model: nn.Module) -> nn.Module:
    """Tiny texts have one head of 64: with two the order of heads is seen too."""
    for module in model.modules():
        if hasattr(module, "num_attention_heads"):
            module.num_attention_heads, module.attention_head_size = 2, 32
            module.scaling = 32**-0.5
    return model


@pytest.mark.parametrize("name", ["xvlm:tiny", "xvlm:swin"])
def test_every_layer_is_the_plain_one(name):
    model = two_heads(made("vqa", name)).double().eval()
    weights = {key: tensor.detach() for key, tensor in model.state_dict().items()}
    pictures, ids, mask = batch(pixels=PIXELS[name])
    encoder, allowed = below(weights, "text_encoder."), mask.bool()[:, None]
    tokens = model.see(pictures.double())
    assert tokens.shape[-1] == (96 if name == "xvlm:swin" else 64)
    x = embedded(encoder, ids)
    everything = torch.ones(len(ids), 1, tokens.shape[1], dtype=torch.bool)
    for i in range(len(model.text_encoder.layers)):
        layer, fusing = below(encoder, f"encoder.layer.{i}."), i >= model.text_encoder.alone
        x = bert_layer(layer, x, allowed, 2, *((tokens, everything) if fusing else ()))
        if i + 1 == model.text_encoder.alone:
            assert torch.allclose(model.text_encoder.read(ids, mask), x, atol=1e-10)
    states = model(pictures.double(), ids, mask)
    assert torch.allclose(states, x, atol=1e-10)

    answer_ids, answer_mask, owner = answers()
    decoder = below(weights, "text_decoder.bert.")
    causal = torch.ones(4, 4, dtype=torch.bool).tril() & answer_mask.bool()[:, None]
    y = embedded(decoder, answer_ids)
    for i in range(2):
        y = bert_layer(below(decoder, f"encoder.layer.{i}."), y, causal, 2, x[owner], allowed[owner])
    head = below(weights, "text_decoder.cls.predictions.")
    y = linear(head, "transform.dense", y)
    y = norm(head, "transform.LayerNorm", y * 0.5 * (1 + torch.erf(y / math.sqrt(2))))
    expected = y @ decoder["embeddings.word_embeddings.weight"].T + head["bias"]
    given = {"answer_ids": answer_ids, "answer_mask": answer_mask, "owner": owner}
    assert torch.allclose(model(pictures.double(), ids, mask, **given), expected, atol=1e-10)
    assert torch.allclose(model(states=states, mask=mask, **given), expected, atol=1e-10)
    row_by_row = {"answer_ids": answer_ids, "answer_mask": answer_mask}
    assert torch.allclose(model(states=states[owner], mask=mask[owner], **row_by_row), expected, atol=1e-10)


def test_layers_that_read_alone_are_transformers_bert():
    model = made("vqa").eval()
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        intermediate_size=256,
        attn_implementation="eager",
    )
    theirs = transformers.BertModel(config, add_pooling_layer=False).eval()
    state = {key: tensor for key, tensor in model.text_encoder.state_dict().items() if "crossattention" not in key}
    theirs.load_state_dict({k: v for k, v in state.items() if not k.startswith(("encoder.layer.2", "encoder.layer.3"))})
    _, ids, mask = batch()
    expected = theirs(input_ids=ids, attention_mask=mask).last_hidden_state
    assert torch.allclose(model.text_encoder.read(ids, mask), expected, atol=1e-5)


def test_the_vit_gives_its_class_token_and_patches_and_the_swin_their_mean_and_patches():
    vit, swin = made("vqa").eval(), made("vqa", "xvlm:swin").eval()
    pictures = torch.randn(2, 3, 16, 16)
    tokens = vit.see(pictures)
    assert tokens.shape == (2, 1 + 4, 64)
    assert torch.equal(tokens, vit.vision_encoder.forward_features(pictures))
    pictures = torch.randn(2, 3, 64, 64)
    tokens = swin.see(pictures)
    assert tokens.shape == (2, 1 + 4, 96)
    patches = swin.vision_encoder.forward_features(pictures).reshape(2, 4, 96)
    assert torch.equal(tokens[:, 1:], patches)
    assert torch.allclose(tokens[:, 0], patches.mean(1), atol=1e-6)


# --- who attends to whom ---


def test_in_the_encoder_a_late_token_changes_an_early_state():
    model = made("vqa").eval()
    pictures, ids, mask = batch()
    other = ids.clone()
    other[1, 5] = ids[1, 5] - 1
    before, after = model(pictures, ids, mask), model(pictures, other, mask)
    moved = (before[1] - after[1]).abs().amax(-1)
    assert (moved > 1e-4).all()
    # The same where the layers read alone, and where they look at the picture.
    alone = [model.text_encoder.read(x, mask)[1, 0] for x in (ids, other)]
    assert not torch.allclose(*alone, atol=1e-4)
    states = model.text_encoder.read(ids, mask)
    changed = states.clone()
    changed[1, 5] += 1
    looking = [model.text_encoder.look(x, mask, model.see(pictures))[1, 0] for x in (states, changed)]
    assert not torch.allclose(*looking, atol=1e-4)


def test_in_the_decoder_it_changes_later_logits_only():
    model = made("vqa").eval()
    rows = batch()
    ids, mask, owner = answers()
    other = ids.clone()
    other[2, 2] = ids[2, 2] - 1
    one, two = (model(*rows, answer_ids=x, answer_mask=mask, owner=owner) for x in (ids, other))
    moved = (one - two).abs().amax(-1)
    assert (moved[2, 2:] > 1e-4).all()
    assert (moved[2, :2] < 1e-5).all()
    assert (moved[[0, 1, 3, 4]] < 1e-5).all()


@pytest.mark.parametrize("width", [6, 9])
def test_padding_changes_nothing(width):
    model, ranker = made("vqa").eval(), made("retrieval").eval()
    pictures, ids, mask = batch()
    answer_ids, answer_mask, owner = answers()

    def padded(x: Tensor, kept: Tensor, fill: int) -> Tensor:
        return F.pad(torch.where(kept.bool(), x, fill), (0, width - 6), value=fill)

    noisy = padded(ids, mask, 7), F.pad(mask, (0, width - 6))
    longer = F.pad(torch.where(answer_mask.bool(), answer_ids, 9), (0, 2), value=9), F.pad(answer_mask, (0, 2))
    one = model(pictures, ids, mask, answer_ids=answer_ids, answer_mask=answer_mask, owner=owner)
    two = model(pictures, *noisy, answer_ids=longer[0], answer_mask=longer[1], owner=owner)[:, :4]
    real = answer_mask.bool()
    assert torch.allclose(one[real], two[real], atol=1e-5)
    found, again = (ranker(pictures, *text, negatives=NEGATIVES) for text in ((ids, mask), noisy))
    for key in ("text", "match"):
        assert torch.allclose(found[key], again[key], atol=1e-5)


# --- retrieval ---

NEGATIVES = (torch.tensor([2, 3, 1, 0]), torch.tensor([3, 0, 1, 2]))
"""A picture for each text, a text for each picture."""


def test_pairs_stand_in_the_stated_order():
    model = made("retrieval").eval()
    pictures, ids, mask = batch()
    found = model(pictures, ids, mask, groups=torch.arange(4), negatives=NEGATIVES)
    assert found.keys() == {"image", "text", "temperature", "match", "counted"}
    assert found["match"].shape == (12, 2)
    assert found["counted"].tolist() == [True] * 12
    picture_of, text_of = NEGATIVES
    shown = torch.cat([torch.arange(4), torch.arange(4), picture_of])
    told = torch.cat([torch.arange(4), text_of, torch.arange(4)])
    for pair, (picture, text) in enumerate(zip(shown, told, strict=True)):
        tokens, states = model(pictures[picture][None])["tokens"], model(ids=ids[text][None], mask=mask[text][None])
        alone = model(tokens=tokens, states=states["states"], mask=mask[text][None])["match"]
        assert torch.allclose(found["match"][pair], alone[0], atol=1e-5)
        width = states["states"].shape[-1]
        fused = model.text_encoder.look(states["states"], mask[text][None], tokens)[0, 0]
        hidden = F.gelu(F.layer_norm(model.itm_head[0](fused), (2 * width,), *model.itm_head[1].parameters()))
        assert torch.allclose(alone[0], model.itm_head[3](hidden), atol=1e-6)


def test_many_questions_are_about_one_picture():
    model = made("vqa").eval()
    pictures, ids, mask = batch()
    about = torch.tensor([1, 0, 1, 1])
    once = model(pictures[:2], ids, mask, about=about)
    assert torch.allclose(once, model(pictures[about], ids, mask), atol=1e-6)
    assert not torch.allclose(once, model(pictures, ids, mask), atol=1e-4)


def test_many_texts_look_at_one_picture():
    model = made("retrieval").eval()
    pictures, ids, mask = batch()
    tokens, states = model(pictures)["tokens"], model(ids=ids, mask=mask)["states"]
    owner = torch.tensor([2, 0, 2, 2])
    once = model(tokens=tokens, states=states, mask=mask, owner=owner)["match"]
    assert torch.allclose(once, model(tokens=tokens[owner], states=states, mask=mask)["match"], atol=1e-6)
    assert not torch.allclose(once, model(tokens=tokens, states=states, mask=mask)["match"], atol=1e-4)


def test_one_modality_gives_what_both_together_give():
    model = made("retrieval").eval()
    pictures, ids, mask = batch()
    both = model(pictures, ids, mask, negatives=NEGATIVES)
    seen, told = model(pictures), model(ids=ids, mask=mask)
    assert seen.keys() == {"tokens", "image"}
    assert told.keys() == {"states", "text"}
    assert torch.allclose(seen["image"], both["image"], atol=1e-6)
    assert torch.allclose(told["text"], both["text"], atol=1e-6)
    for feature, projected in (
        (both["image"], seen["tokens"][:, 0] @ model.vision_proj.weight.T + model.vision_proj.bias),
        (both["text"], told["states"][:, 0] @ model.text_proj.weight.T + model.text_proj.bias),
    ):
        assert feature.shape == (4, 256)
        assert torch.allclose(feature.norm(dim=-1), torch.ones(4), atol=1e-5)
        assert torch.allclose(feature, projected / projected.norm(dim=-1, keepdim=True), atol=1e-5)


def test_in_one_process_gathered_negatives_are_those_of_the_batch():
    """And all three thirds of the pairs train what they show, as a plain call for each pair does."""
    gradients = []
    for gathered in (False, True, None):
        model = made("retrieval", gathered=bool(gathered)).eval()
        pictures, ids, mask = batch()
        if gathered is None:
            seen, told = model(pictures)["tokens"], model(ids=ids, mask=mask)["states"]
            shown, read = torch.cat([torch.arange(8) % 4, NEGATIVES[0]]), torch.arange(4)
            read = torch.cat([read, NEGATIVES[1], read])
            found = model(tokens=seen[shown], states=told[read], mask=mask[read])["match"]
        else:
            found = model(pictures, ids, mask, negatives=NEGATIVES)["match"]
        alignment.itm(found).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    one, two, three = gradients
    assert one.keys() == two.keys() == three.keys()
    for name, gradient in one.items():
        assert torch.allclose(gradient, two[name], atol=1e-6), name
        assert torch.allclose(gradient, three[name], atol=1e-6), name


def test_drawn_negatives_never_show_the_same_picture():
    model = made("retrieval").eval()
    groups = torch.tensor([0, 0, 1, 2])
    found = []
    draw = model._draw
    model._draw = lambda *given: found.append(draw(*given)) or found[-1]
    for seed in range(20):
        torch.manual_seed(seed)
        model(*batch(), groups=groups)
    for image, text, have in found:
        assert (groups[image] != groups).all()
        assert (groups[text] != groups).all()
        assert have.all()
    assert len({tuple(image.tolist()) for image, _, _ in found}) > 1


def test_pairs_that_fit_are_never_trained_as_such_that_do_not():
    """In a batch of one picture's captions there is no negative, and the matching loss is that of the pairs alone."""
    model = without_dropout(made("retrieval"))
    found = model(*batch(), groups=torch.full((4,), 7))
    assert found["counted"].tolist() == [True] * 4 + [False] * 8
    loss = alignment.itm(found["match"], found["counted"])
    assert torch.allclose(loss, -found["match"][:4].log_softmax(1)[:, 1].mean())


def drawn(gathered: bool):
    """Negatives of a rank whose two rows show one picture."""
    import torch.distributed as dist

    model = made("retrieval", gathered=gathered).eval()
    found = []
    draw = model._draw
    model._draw = lambda *given: found.append(draw(*given)) or found[-1]
    pictures, ids, mask = (x[:2] for x in batch(seed=dist.get_rank()))
    torch.manual_seed(dist.get_rank())
    both = model(pictures, ids, mask, groups=torch.full((2,), dist.get_rank()))
    assert both["match"].shape == (6, 2)
    return [places.tolist() for places in found[0][:2]], both["counted"].tolist()


def test_gathered_negatives_are_drawn_from_all_ranks(ranks):
    for rank, (places, counted) in enumerate(ranks(2).run(drawn, True)):
        others = {2, 3} if rank == 0 else {0, 1}
        assert all(set(of_one) <= others for of_one in places)
        assert counted == [True] * 6
    for places, counted in ranks(2).run(drawn, False):
        assert all(set(of_one) <= {0, 1} for of_one in places)
        assert counted == [True, True, False, False, False, False]


def test_what_is_missing_is_named():
    model, asked = made("retrieval"), made("vqa")
    pictures, ids, mask = batch()
    with pytest.raises(ValueError, match="a text needs its mask"):
        model(ids=ids)
    with pytest.raises(ValueError, match="negatives are drawn among other pictures: give groups"):
        model(pictures, ids, mask)
    with pytest.raises(ValueError, match="nothing to look at"):
        model()
    with pytest.raises(ValueError, match="a question needs its mask"):
        asked(pictures, ids)
    with pytest.raises(ValueError, match="a question needs its picture"):
        asked(ids=ids, mask=mask)


def test_the_temperature_starts_at_its_value_and_comes_back_from_beyond_its_bounds():
    model, _ = build("xvlm:tiny", "retrieval", vocabulary=VOCABULARY, image_size=16)
    found = model(*batch(), negatives=NEGATIVES)["temperature"]
    assert found.shape == ()
    assert found.item() == pytest.approx(0.07)
    for value, bounded in ((0.6, 0.5), (1e-5, 0.001), (0.3, 0.3)):
        with torch.no_grad():
            model.temp.fill_(value)
        assert model(*batch(), negatives=NEGATIVES)["temperature"].item() == pytest.approx(bounded)
    for value, up, down in ((0.6, True, False), (1e-5, False, True), (0.3, True, True)):
        x = torch.tensor([value], requires_grad=True)
        for sign, passes in ((1.0, up), (-1.0, down)):
            (gradient,) = torch.autograd.grad(_Bounded.apply(x, 0.001, 0.5) * sign, x)
            assert gradient.item() == (sign if passes else 0)


# --- training ---


def asked(rows: slice, step: int = 0):
    """Rows of the joint batch, with two answers to each question."""
    pictures, ids, mask = (x[rows] for x in batch(seed=10 + step))
    answer_ids, answer_mask, _ = answers(8, seed=20 + step)
    own = slice(2 * rows.start, 2 * rows.stop)
    return (pictures, ids, mask), (answer_ids[own], answer_mask[own], torch.arange(2 * len(ids)) // 2)


def vqa_loss(model: nn.Module, rows: slice, step: int = 0) -> Tensor:
    question, (ids, mask, owner) = asked(rows, step)
    logits = model(*question, answer_ids=ids, answer_mask=mask, owner=owner)[:, :-1]
    targets = ids.masked_fill(mask == 0, -100)[:, 1:]
    nll = F.cross_entropy(logits.float().transpose(1, 2), targets, ignore_index=-100, reduction="none")
    return nll.sum() / len(question[0])


def retrieval_loss(model: nn.Module, rows: slice, step: int = 0, negatives=None) -> Tensor:
    groups = torch.tensor([4, 8, 4, 6])
    found = model(*(x[rows] for x in batch(seed=10 + step)), groups=groups[rows], negatives=negatives)
    itc = alignment.itc(found["image"], found["text"], groups[rows], found["temperature"])
    return itc + alignment.itm(found["match"], found["counted"])


WITHIN = (torch.tensor([1, 0]), torch.tensor([1, 0]))
"""Negatives within each half of the joint batch."""
JOINT = (torch.tensor([1, 0, 3, 2]), torch.tensor([1, 0, 3, 2]))
CROSSING = (torch.tensor([3, 2, 1, 0]), torch.tensor([1, 3, 0, 0]))
"""Negatives from the other half too, as places in the joint batch."""

KINDS = ("vqa", "rank", "gathered")


def loss_of(kind: str, model: nn.Module, rank: int, world: int, step: int) -> Tensor:
    rows = slice(rank * 4 // world, (rank + 1) * 4 // world)
    if kind == "vqa":
        return vqa_loss(model, rows, step)
    if kind == "rank":
        return retrieval_loss(model, rows, step, WITHIN if world == 2 else JOINT)
    return retrieval_loss(model, rows, step, tuple(x[rows] for x in CROSSING))


def model_of(kind: str, name: str = "xvlm:tiny") -> nn.Module:
    model = made("vqa", name) if kind == "vqa" else made("retrieval", name, gathered=kind == "gathered")
    if kind != "vqa":
        with torch.no_grad():
            model.temp.fill_(0.2)
    return without_dropout(model)


def trained(kind: str, stage: int, checkpointing: bool = False, steps: int = 3):
    import torch.distributed as dist
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    from hetero_kt.config import Optim
    from hetero_kt.distributed import params
    from hetero_kt.distributed.engine import build_engine

    rank, world = dist.get_rank(), dist.get_world_size()
    model = model_of(kind)
    model.checkpointing = checkpointing
    sgd = Optim("sgd", lr=0.05, momentum=0.9, weight_decay=1e-3)
    engine = build_engine(model, optim=sgd, zero=zero(stage), precision="fp32", micro_batch=2, accumulation=1)
    losses = []
    for step in range(steps):
        loss = loss_of(kind, engine, rank, world, step)
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / world)
    if stage == 3:
        assert all(p.ds_status == ZeroParamStatus.NOT_AVAILABLE for p in model.parameters())
    state = params.state_dict(engine)
    engine.destroy()
    return losses, {name: tensor.numpy() for name, tensor in state.items()}


def trained_plainly(kind: str, steps: int = 3, nudge: Nudge = STILL):
    from hetero_kt.config import Optim
    from hetero_kt.optimizer import build_optimizer

    model = model_of(kind)
    nudge.modules([model])
    optimizer = build_optimizer(model, Optim("sgd", lr=0.05, momentum=0.9, weight_decay=1e-3))
    losses = []
    for step in range(steps):
        loss = loss_of(kind, model, 0, 1, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns(kind):
    """The temperature, class token and position table among them."""
    start = {name: p.detach().clone() for name, p in model_of(kind).named_parameters()}
    _, model = trained_plainly(kind)
    assert not [name for name, p in model.named_parameters() if torch.equal(p, start[name])]


@pytest.mark.parametrize(("kind", "stage", "checkpointing"), [("gathered", 3, True), ("rank", 1, False)])
def test_training_over_ranks_and_in_pieces_is_training_in_one_process(ranks, kind, stage, checkpointing):
    """Whole runs of both tasks are compared so, too, at other stages and numbers of ranks."""
    theirs = result_of(reference, kind)
    for losses, state in ranks(2).run(trained, kind, stage, checkpointing):
        weights = {name: state[name] for name in theirs["weights"]}
        assert_close({"losses": losses, "weights": weights}, theirs, movement(reference, kind))


def reference(kind: str, nudge: Nudge):
    losses, model = trained_plainly(kind, nudge=nudge)
    return {"losses": losses, "weights": {name: p.detach() for name, p in model.named_parameters()}}


def in_parts(engine: nn.Module, kind: str) -> list[Tensor]:
    """What evaluation asks for, one after the other."""
    pictures, ids, mask = batch()
    engine.eval()
    with torch.no_grad():
        if kind == "vqa":
            answer_ids, answer_mask, owner = answers()
            states = engine(pictures, ids, mask)
            more = {"answer_ids": answer_ids, "answer_mask": answer_mask, "owner": owner}
            found = [states, engine(states=states, mask=mask, **more)]
        else:
            tokens, states = engine(pictures)["tokens"], engine(ids=ids, mask=mask)["states"]
            found = [tokens, states, engine(tokens=tokens, states=states, mask=mask)["match"]]
    engine.train()
    return found


def evaluated_between_steps(kind: str):
    from hetero_kt.config import Optim
    from hetero_kt.distributed.engine import build_engine

    sgd = Optim("sgd", lr=0.05, momentum=0.0, weight_decay=0.0)
    engine = build_engine(model_of(kind), optim=sgd, zero=zero(3), precision="fp32", micro_batch=4, accumulation=1)
    found = []
    for step in range(2):
        engine.backward(loss_of("vqa" if kind == "vqa" else "rank", engine, 0, 1, step))
        engine.step()
        found += [tensor.numpy() for tensor in in_parts(engine, kind)]
    engine.destroy()
    return found


@pytest.mark.parametrize("kind", ["vqa", "rank"])
def test_in_pieces_each_part_can_be_asked_for_between_steps(ranks, kind):
    model = model_of(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    expected = []
    for step in range(2):
        optimizer.zero_grad()
        loss_of("vqa" if kind == "vqa" else "rank", model, 0, 1, step).backward()
        optimizer.step()
        expected += in_parts(model, kind)
    for found in ranks(1).run(evaluated_between_steps, kind):
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.allclose(torch.from_numpy(ours), theirs, atol=1e-4)


def test_the_languages_head_stays_tied_to_the_words():
    _, model = trained_plainly("vqa", steps=1)
    head = model.text_decoder.cls["predictions"]
    assert head.decoder.weight is model.text_decoder.bert.embeddings.word_embeddings.weight
    assert head.decoder.bias is head.bias
    assert "text_decoder.cls.predictions.decoder.weight" not in dict(model.named_parameters())


@pytest.mark.parametrize(
    ("kind", "name", "checkpointing"),
    [
        *((kind, "xvlm:tiny", checkpointing) for kind in KINDS for checkpointing in (False, True)),
        ("vqa", "xvlm:swin", False),
        ("rank", "xvlm:swin", True),
    ],
)
def test_nothing_in_the_step_waits_for_the_device(kind, name, checkpointing):
    """Fake tensors have no values that the host could look at; in pieces, forward, loss and backward do without."""
    model = model_of(kind, name).train()
    model.checkpointing = checkpointing
    with FakeTensorMode(allow_non_fake_inputs=True):
        pictures = torch.empty(4, 3, PIXELS[name], PIXELS[name])
        ids, mask, groups = (torch.empty(shape, dtype=torch.int64) for shape in ((4, 8), (4, 8), (4,)))
        if kind == "vqa":
            answer_ids, answer_mask, owner = (torch.empty(shape, dtype=torch.int64) for shape in ((9, 5), (9, 5), (9,)))
            asked = Asked(pictures, ids, mask, answer_ids, answer_mask, torch.empty(9), owner, (2, 2, 2, 3))
            losses = [vqa.loss(model, piece) for piece in asked.split(2)]
        else:
            losses = [retrieval.loss(model, (pictures, ids, mask, groups))]
        for loss in losses:
            assert loss.shape == ()
            loss.backward()
        with pytest.raises(DataDependentOutputException):
            losses[0].item()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", ["xvlm:tiny", "xvlm:swin"])
@pytest.mark.parametrize("kind", ["vqa", "rank"])
def test_activation_checkpointing_changes_nothing(kind, name, monkeypatch):
    runs = {}
    calls = []
    from hetero_kt.models import xvlm as module

    checkpoint = torch.utils.checkpoint.checkpoint
    for place in (module, torch.utils.checkpoint):
        monkeypatch.setattr(place, "checkpoint", lambda *given, **more: calls.append(1) or checkpoint(*given, **more))
    for checkpointing in (False, True):
        model = made("vqa" if kind == "vqa" else "retrieval", name).train()  # with dropout
        model.checkpointing = checkpointing
        torch.manual_seed(3)
        pictures, ids, mask = batch(pixels=PIXELS[name])
        if kind == "vqa":
            answer_ids, answer_mask, owner = answers()
            found = model(pictures, ids, mask, answer_ids=answer_ids, answer_mask=answer_mask, owner=owner)
        else:
            found = model(pictures, ids, mask, negatives=NEGATIVES)["match"]
        found.square().mean().backward()
        runs[checkpointing] = found.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        layers = len(model.text_encoder.layers) + (2 if kind == "vqa" else 0)
        layers += sum(SWIN.options["depths"]) if name == "xvlm:swin" else 2
        assert len(calls) == (layers if checkpointing else 0)
        model.eval()
        model(pictures, ids, mask, **({} if kind == "vqa" else {"negatives": NEGATIVES}))
        assert len(calls) == (layers if checkpointing else 0)
    (plain, gradients), (again, others) = runs[False], runs[True]
    assert torch.allclose(plain, again, atol=1e-6)
    assert gradients.keys() == others.keys()
    for key, gradient in gradients.items():
        assert torch.allclose(gradient, others[key], atol=1e-6), key


def low_precision(kind: str, precision: str, steps: int = 4):
    import torch.distributed as dist

    from hetero_kt.config import Optim
    from hetero_kt.distributed import params
    from hetero_kt.distributed.engine import build_engine

    model = model_of(kind)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    adamw = Optim("adamw", lr=1e-3, clip=1.0)
    engine = build_engine(model, optim=adamw, zero=zero(1), precision=precision, micro_batch=2, accumulation=1)
    losses = []
    for _ in range(steps):
        loss = loss_of(kind, engine, dist.get_rank(), dist.get_world_size(), 0)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    state = params.state_dict(engine)
    still = [name for name in before if torch.equal(state[name], before[name])]
    engine.destroy()
    return losses, still


@pytest.mark.parametrize("precision", ["autocast", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_in_bf16(ranks, kind, precision):
    (losses, still), _ = ranks(2).run(low_precision, kind, precision)
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < 0.9 * losses[0]
    assert not still


def test_features_are_compared_in_fp32_under_autocast():
    model = made("retrieval").eval()
    with torch.autocast("cpu", torch.bfloat16):
        found = model(*batch(), negatives=NEGATIVES)
    assert found["image"].dtype == found["text"].dtype == found["temperature"].dtype == torch.float32
    assert torch.allclose(found["image"].norm(dim=-1), torch.ones(4), atol=1e-6)
