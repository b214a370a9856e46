"""X-VLM for answering questions about pictures and for finding pictures by text and texts by picture.

Zeng et al. 2022, arXiv 2111.08276. A vision encoder of timm; BERT's layers of transformers, of which the first ones
read the text alone and the others also look at the picture (cross-attention); for answers, a decoder that looks at the
question. Names in the state dict are those of the published fine-tuned models, and timm's inside `vision_encoder`.

    xvlm:tiny   ViT of 2 layers x 64,    2 + 2 BERT layers of 64: for trying things out
    xvlm:mini   ViT of 4 layers x 256,   2 + 2 BERT layers of 256
    xvlm:small  ViT-B/16 of 6 layers,    3 + 3 BERT layers of 768
    xvlm:base   Swin-B,                  6 + 6 BERT layers of 768

The ViTs are built as CLIP's vision tower. Each model's forward does all that trains, so that ZeRO-3 finds what it has
to gather.

Shape suffixes: B pictures or questions of this rank, N picture tokens (the pooled one first), L tokens of a text,
A answers, T tokens of an answer, P pairs, C channels, V tokens of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig
from transformers.models.bert.modeling_bert import (
    BertCrossAttention,
    BertEmbeddings,
    BertLayer,
    BertLMPredictionHead,
)

from hetero_kt.data.text import Tokenizer
from hetero_kt.models import xvlm_weights
from hetero_kt.models.bert import deviation
from hetero_kt.models.xvlm_weights import Start
from hetero_kt.nn.losses import alignment, contrast
from hetero_kt.nn.losses.precision import Projection, wide

__all__ = ["TASKS", "VQA", "Retrieval", "Start", "build", "known"]

Task = Literal["vqa", "retrieval"]

FORMS: tuple[Task, ...] = get_args(Task)

TASKS: dict[str, Task] = {"vqa": "vqa", "captions": "retrieval"}
"""What a model is built for, by the data that it trains on."""

COMMON_WIDTH = 256
"""Of the space in which pictures and texts are compared."""
COLDEST, START, HOTTEST = 0.001, 0.07, 0.5
"""Bounds of the learned temperature, and where it begins."""


@dataclass(frozen=True)
class _Size:
    vision: str
    """timm's name of the vision encoder."""
    text: int
    """Layers that read the text alone."""
    cross: int
    """Layers that also look at the picture, and layers of the decoder."""
    width: int
    """Of the text layers."""
    options: dict[str, Any] = field(default_factory=dict)
    """In which the vision encoder differs from timm's."""


_CLIP = "vit_base_patch16_clip_quickgelu_224"
_SIZES = {
    "xvlm:tiny": _Size(_CLIP, 2, 2, 64, {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}),
    "xvlm:mini": _Size(_CLIP, 2, 2, 256, {"embed_dim": 256, "depth": 4, "num_heads": 4}),
    "xvlm:small": _Size(_CLIP, 3, 3, 768, {"depth": 6}),
    "xvlm:base": _Size("swin_base_patch4_window7_224", 6, 6, 768),
}


def known() -> list[str]:
    """Every name that `build` takes."""
    return list(_SIZES)


def build(
    name: str,
    task: Task,
    *,
    vocabulary: int | Tokenizer,
    image_size: int,
    init: str = "",
    vision: str = "",
    text: str = "",
    dropout: float = 0.1,
    gathered: bool = False,
) -> tuple[VQA | Retrieval, Start]:
    """A model for a task, and where its tensors began. What is fresh is drawn from torch's global generator.

    Args:
        vocabulary: the data's tokenizer, or how many tokens it has.
        image_size: pixels of a side of the pictures, which are square.
        init: a file of the whole model, for either task: one of ours, or a published one (see `xvlm_weights`).
        vision: a file of the vision encoder alone, timm's or a CLIP vision tower of transformers; or `timm:NAME`.
        text: a BERT's file or folder, or `hf:NAME`.
        dropout: of the text layers.
        gathered: of retrieval: hard negatives come from the batches of all ranks, not from one rank's.

    Raises:
        ValueError: an unknown name or task, a size of pictures that the model cannot take, weights that are missing,
            damaged or another model's, a hub that cannot be reached.
    """
    if name not in _SIZES:
        raise ValueError(f"no model is called {name!r}: use {', '.join(known())}")
    if task not in FORMS:
        raise ValueError(f"task {task!r} is unknown: use any of {', '.join(FORMS)}")
    if init and (vision or text):
        raise ValueError(f"{name}: init and {'vision' if vision else 'text'} both say where to start: set one of them")
    tokens = vocabulary if isinstance(vocabulary, int) else vocabulary.size
    model: VQA | Retrieval
    if task == "vqa":
        model = VQA(name, tokens, image_size, dropout)
    else:
        model = Retrieval(name, tokens, image_size, dropout, gathered=gathered)
    return model, xvlm_weights.fill(model, init=init, vision=vision, text=text)


class _XVLM(nn.Module):
    """The vision encoder and the text encoder that both tasks have."""

    task: Task

    def __init__(self, name: str, vocabulary: int, image_size: int, dropout: float = 0.1) -> None:
        super().__init__()
        size = _SIZES[name]
        self.name, self.image_size = name, image_size
        self.checkpointing = False
        """While training, keep only what goes into each layer, and compute the rest again backward."""
        self.vision_encoder = _vision_encoder(name, size, image_size)
        self.vision_width = int(self.vision_encoder.num_features)  # type: ignore[arg-type]
        self.text_encoder = _Bert(_bert_config(size, vocabulary, dropout), size.text, size.cross, self.vision_width)
        _initialise(self.text_encoder, size.width)

    def see(self, pictures_BCHW: Tensor) -> Tensor:
        """Tokens (B, N, C) of pictures: pooled, then of each patch."""
        if tuple(pictures_BCHW.shape[2:]) != (self.image_size, self.image_size):
            height, width = pictures_BCHW.shape[2:]
            raise ValueError(
                f"{self.name} was built for pictures of {self.image_size} x {self.image_size} pixels and is given"
                f" {height} x {width}: resize them, or set image_size"
            )
        encoder: Any = self.vision_encoder
        encoder.set_grad_checkpointing(self.again)
        tokens = encoder(pictures_BCHW.to(encoder.patch_embed.proj.weight.dtype))
        if tokens.dim() == 3:
            return tokens  # a ViT's own class token is the first
        patches_BNC = tokens.flatten(1, 2)
        return torch.cat([patches_BNC.mean(1, keepdim=True), patches_BNC], 1)

    def no_weight_decay(self) -> set[str]:
        """timm asks for it: the vision encoder's class token and position tables, and the temperature."""
        encoder: Any = self.vision_encoder
        return {f"vision_encoder.{name}" for name in encoder.no_weight_decay()} | {"temp"}

    @property
    def again(self) -> bool:
        """Whether layers are computed again in the backward now."""
        return self.checkpointing and self.training and torch.is_grad_enabled()


class VQA(_XVLM):
    """Questions about pictures. Their states go to a decoder, which writes the answer or says how likely one is."""

    task = "vqa"

    def __init__(self, name: str, vocabulary: int, image_size: int, dropout: float = 0.1) -> None:
        super().__init__(name, vocabulary, image_size, dropout)
        size = _SIZES[name]
        self.text_decoder = _Decoder(_bert_config(size, vocabulary, dropout), size.cross)
        _initialise(self.text_decoder, size.width)

    def forward(
        self,
        pictures: Tensor | None = None,
        ids: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        states: Tensor | None = None,
        answer_ids: Tensor | None = None,
        answer_mask: Tensor | None = None,
        owner: Tensor | None = None,
        about: Tensor | None = None,
    ) -> Tensor:
        """States (B, L, C) of questions that have seen their pictures or, with answers, logits (A, T, V).

        logits[:, t] predict token t + 1 from the tokens up to t.

        Args:
            pictures: (B, 3, H, W), or with `about` any number of them.
            ids, mask: questions (B, L); the mask is not 0 where there is a token.
            states: what an earlier call gave for the questions, in place of `pictures` and `ids`; `mask` as then.
            answer_ids, answer_mask: (A, T), with special tokens.
            owner: (A,), int64: the row of `states` that each answer belongs to; None where they belong row by row.
            about: (B,), int64: the row of `pictures` that each question is about, so that a picture is encoded once for
                all of its questions; None where they belong row by row.
        """
        if mask is None:
            raise ValueError("a question needs its mask: give mask of shape (B, L)")
        if states is None:
            if pictures is None or ids is None:
                raise ValueError("a question needs its picture: give pictures and ids, or states")
            read_BLC = self.text_encoder.read(ids, mask, again=self.again)
            states = self.text_encoder.look(read_BLC, mask, self.see(pictures), about, again=self.again)
        if answer_ids is None:
            return states
        return self.text_decoder(answer_ids, answer_mask, states, mask, owner, again=self.again)


class Retrieval(_XVLM):
    """Pictures and texts in one space (ITC), and whether a picture and a text fit (ITM)."""

    task = "retrieval"

    def __init__(
        self, name: str, vocabulary: int, image_size: int, dropout: float = 0.1, *, gathered: bool = False
    ) -> None:
        super().__init__(name, vocabulary, image_size, dropout)
        width = _SIZES[name].width
        self.gathered = gathered
        """Hard negatives come from the batches of all ranks. These have equally many rows, of texts of one width."""
        self.vision_proj = Projection(self.vision_width, COMMON_WIDTH)
        self.text_proj = Projection(width, COMMON_WIDTH)
        # Of one element, not of none: DeepSpeed cannot broadcast a scalar.
        self.temp = nn.Parameter(torch.tensor([START]))
        self.itm_head = nn.Sequential(
            nn.Linear(width, 2 * width), nn.LayerNorm(2 * width), nn.GELU(), nn.Linear(2 * width, 2)
        )

    def forward(
        self,
        pictures: Tensor | None = None,
        ids: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        groups: Tensor | None = None,
        negatives: tuple[Tensor, Tensor] | None = None,
        tokens: Tensor | None = None,
        states: Tensor | None = None,
        owner: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """What is asked for by what is given:

            pictures (B, 3, H, W)           "tokens" (B, N, C), "image" (B, 256)
            ids and mask (B, L)             "states" (B, L, C), "text" (B, 256)
            tokens, states and mask         "match" (P, 2) of pairs, one for each row of states; class 1 is "fits"
            pictures, ids, mask and groups  "image", "text", "temperature" (), and "match" (3B, 2): the B pairs, then
                                            each picture with a text that does not fit, then each text with a picture
                                            that does not; "counted" (3B,), bool: all of them, but for rows to which
                                            everything in reach fits

        "image" and "text" are of unit length, in float32 at least.

        Args:
            groups: (B,), int64: which picture each row shows; rows of one picture are never each other's negatives.
            negatives: (picture of each text, text of each picture), int64 places in the batch, or in that of all
                ranks where negatives are `gathered`; None draws them (`alignment.hard_negatives`).
            owner: (P,), int64: the row of `tokens` that each row of `states` looks at, so that what is computed of a
                picture alone is computed once; None where they belong row by row.
        """
        if tokens is not None and states is not None and mask is not None:
            return {"match": self._match(tokens, states, mask, owner)}
        found: dict[str, Tensor] = {}
        if pictures is not None:
            tokens = self.see(pictures)
            found |= {"tokens": tokens, "image": F.normalize(self.vision_proj(tokens[:, 0]), dim=-1)}
        if ids is not None:
            if mask is None:
                raise ValueError("a text needs its mask: give mask of shape (B, L)")
            states = self.text_encoder.read(ids, mask, again=self.again)
            found |= {"states": states, "text": F.normalize(self.text_proj(states[:, 0]), dim=-1)}
        if not found:
            raise ValueError("nothing to look at: give pictures, ids and mask, or tokens, states and mask")
        if pictures is None or ids is None:
            return found
        image_BD, text_BD = found["image"], found["text"]
        temperature = _Bounded.apply(wide(self.temp), COLDEST, HOTTEST).squeeze(0)
        counted = torch.ones(3 * len(image_BD), dtype=torch.bool, device=image_BD.device)
        if negatives is None:
            image_B, text_B, have_B = self._draw(image_BD, text_BD, groups, temperature)
            negatives, counted = (image_B, text_B), torch.cat([torch.ones_like(have_B), have_B, have_B])
        match = self._match_batch(found["tokens"], found["states"], mask, negatives)
        return {"image": image_BD, "text": text_BD, "temperature": temperature, "match": match, "counted": counted}

    def _draw(
        self, image_BD: Tensor, text_BD: Tensor, groups_B: Tensor | None, temperature: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        if groups_B is None:
            raise ValueError("negatives are drawn among other pictures: give groups of shape (B,)")
        image_BD, text_BD, temperature = image_BD.detach(), text_BD.detach(), temperature.detach()
        candidates = None
        if self.gathered:
            candidates = (contrast.gathered(image_BD), contrast.gathered(text_BD), contrast.gathered(groups_B))
        return alignment.hard_negatives(image_BD, text_BD, groups_B, temperature, candidates)

    def _match_batch(
        self, tokens_BNC: Tensor, states_BLC: Tensor, mask_BL: Any, negatives: tuple[Tensor, Tensor]
    ) -> Tensor:
        image_B, text_B = negatives
        own_B = torch.arange(len(tokens_BNC), device=tokens_BNC.device)
        # Keys and values of a picture are computed once for all the texts that look at it.
        if self.gathered:
            others = (contrast.gathered(states_BLC)[text_B], contrast.gathered(mask_BL)[text_B])
            seen = torch.cat([tokens_BNC, contrast.gathered(tokens_BNC)[image_B]])
            owner = torch.cat([own_B, own_B, own_B + len(own_B)])
        else:
            others = (states_BLC[text_B], mask_BL[text_B])
            seen = tokens_BNC
            owner = torch.cat([own_B, own_B, image_B])
        states = torch.cat([states_BLC, others[0], states_BLC])
        mask = torch.cat([mask_BL, others[1], mask_BL])
        return self._match(seen, states, mask, owner)

    def _match(self, tokens: Tensor, states_PLC: Tensor, mask_PL: Tensor, owner_P: Tensor | None = None) -> Tensor:
        fused_PLC = self.text_encoder.look(states_PLC, mask_PL, tokens, owner_P, again=self.again)
        return self.itm_head(fused_PLC[:, 0])


class _Bert(nn.Module):
    """BERT's embeddings and layers without a pooler; the last `cross` layers also look at something else.

    All tokens attend to all: transformers takes a layer with cross-attention for a decoder's, whose tokens see no
    later ones, unless it is given a mask over both dimensions as here.
    """

    def __init__(self, config: BertConfig, alone: int, cross: int, seen_width: int) -> None:
        super().__init__()
        self.alone = alone
        """Layers that look at nothing else."""
        self.embeddings = BertEmbeddings(config)
        layers = [BertLayer(config) for _ in range(alone)] + [_cross_layer(config, seen_width) for _ in range(cross)]
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})

    @property
    def layers(self) -> nn.ModuleList:
        layers = self.encoder["layer"]
        assert isinstance(layers, nn.ModuleList)
        return layers

    def read(self, ids_BL: Tensor, mask_BL: Tensor, *, again: bool = False) -> Tensor:
        """States (B, L, C) of a text alone."""
        x_BLC, mask = self.embeddings(input_ids=ids_BL), _over_keys(mask_BL)
        for layer in list(self.layers)[: self.alone]:
            x_BLC = _run(again, layer, x_BLC, mask)
        return x_BLC

    def look(
        self,
        states_BLC: Tensor,
        mask_BL: Tensor,
        seen: Tensor,
        owner_B: Tensor | None = None,
        *,
        again: bool = False,
    ) -> Tensor:
        """States (B, L, C) that have looked at `seen` (S, N, C), row by row or at the row `owner_B` (B,)."""
        mask = _over_keys(mask_BL)
        for layer in list(self.layers)[self.alone :]:
            states_BLC = _run(again, layer, states_BLC, mask, seen, None, owner=owner_B)
        return states_BLC


class _Decoder(nn.Module):
    """BERT's layers as a decoder of answers, with a language model's head whose weight is that of the words."""

    def __init__(self, config: BertConfig, layers: int) -> None:
        super().__init__()
        self.bert = _Bert(config, 0, layers, config.hidden_size)
        head = BertLMPredictionHead(config)
        head.decoder.weight = self.bert.embeddings.word_embeddings.weight
        head.decoder.bias = head.bias
        self.cls = nn.ModuleDict({"predictions": head})

    def forward(
        self,
        ids_AT: Tensor,
        mask_AT: Tensor | None,
        states_BLC: Tensor,
        mask_BL: Tensor,
        owner_A: Tensor | None,
        *,
        again: bool = False,
    ) -> Tensor:
        """Logits (A, T, V)."""
        length = ids_AT.shape[1]
        earlier_TT = torch.ones(length, length, dtype=torch.bool, device=ids_AT.device).tril()
        mask = earlier_TT[None, None] if mask_AT is None else earlier_TT & _over_keys(mask_AT)
        seen_mask = _over_keys(mask_BL if owner_A is None else mask_BL[owner_A])
        x_ATC = self.bert.embeddings(input_ids=ids_AT)
        for layer in self.bert.layers:
            x_ATC = _run(again, layer, x_ATC, mask, states_BLC, seen_mask, owner=owner_A)
        return self.cls["predictions"](x_ATC)


class _CrossAttention(BertCrossAttention):
    """transformers' cross-attention with keys and values from any width, computed once per row that is looked at."""

    def __init__(self, config: BertConfig, seen_width: int) -> None:
        super().__init__(config)
        self.key = nn.Linear(seen_width, self.all_head_size)
        self.value = nn.Linear(seen_width, self.all_head_size)

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        owner: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """`owner` (A,) names the row of `encoder_hidden_states` that each row of `hidden_states` (A, T, C) looks at;
        `attention_mask`, of bool, has A rows too."""
        query, key, value = (
            self.query(hidden_states),
            self.key(encoder_hidden_states),
            self.value(encoder_hidden_states),
        )
        if owner is not None:
            key, value = key.index_select(0, owner), value.index_select(0, owner)
        heads = (self.num_attention_heads, self.attention_head_size)
        q, k, v = (x.unflatten(-1, heads).transpose(1, 2) for x in (query, key, value))
        dropout = self.dropout.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attention_mask, dropout_p=dropout, scale=self.scaling)
        return mixed.transpose(1, 2).flatten(2), None


class _Bounded(torch.autograd.Function):
    """x within bounds; beyond them only gradients that lead back pass. With a plain clamp x would stay there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lowest: float, highest: float) -> Tensor:
        ctx.save_for_backward(x < lowest, x > highest)
        return x.clamp(lowest, highest)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        below, above = ctx.saved_tensors
        gradient = torch.where(below, gradient.clamp(max=0), gradient)
        return torch.where(above, gradient.clamp(min=0), gradient), None, None


def _vision_encoder(name: str, size: _Size, image_size: int) -> nn.Module:
    swin = size.vision.startswith("swin")
    patch = 32 if swin else size.options.get("patch_size", 16)
    if image_size < patch or image_size % patch:
        raise ValueError(f"{name} takes pictures in steps of {patch} pixels, not {image_size}: set image_size to some")
    options = dict(size.options)
    if swin:
        options["window_size"] = image_size // patch  # the published 7 at 224, 12 at 384, 15 at 480
    encoder = timm.create_model(size.vision, img_size=image_size, num_classes=0, global_pool="", **options)
    if not swin:
        _initialise_vit(encoder)
    return encoder


def _bert_config(size: _Size, vocabulary: int, dropout: float) -> BertConfig:
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=size.width,
        num_attention_heads=size.width // 64,
        intermediate_size=4 * size.width,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    config._attn_implementation = "sdpa"
    return config


def _cross_layer(config: BertConfig, seen_width: int) -> BertLayer:
    options = {**config.to_dict(), "is_decoder": True, "add_cross_attention": True}
    decoding = BertConfig(**options)
    decoding._attn_implementation = config._attn_implementation
    layer = BertLayer(decoding)
    layer.crossattention.self = _CrossAttention(decoding, seen_width)
    return layer


@torch.no_grad()
def _initialise_vit(vit: Any) -> None:
    """As `_initialise`, and CLIP's width^-0.5 for the class token and the position table."""
    for part in vit.blocks.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=deviation(vit.embed_dim))
    for table in (vit.cls_token, vit.pos_embed):
        nn.init.normal_(table, std=vit.embed_dim**-0.5)


def _initialise(module: nn.Module, width: int) -> None:
    """BERT's, at any width: normal with `bert.deviation`, biases 0, and 0 for the padding token."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Embedding)):
            nn.init.normal_(part.weight, std=deviation(width))
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)
    for part in module.modules():  # after the head that shares the words' weight
        if isinstance(part, nn.Embedding) and part.padding_idx is not None:
            with torch.no_grad():
                part.weight[part.padding_idx].zero_()


def _over_keys(mask_BL: Tensor) -> Tensor:
    """(B, 1, 1, L): which tokens may be attended to."""
    return mask_BL.bool()[:, None, None]


def _run(again: bool, layer: nn.Module, *given: Any, **more: Any) -> Tensor:
    if again:
        return checkpoint(layer, *given, use_reentrant=False, **more)  # type: ignore[return-value]
    return layer(*given, **more)
