"""A recipe: everything that decides a run's numbers, as frozen dataclasses.

A launcher's `recipe()` returns one `Recipe`; any field can be overridden on the command line by its path
(`--models.resnet50.optim.lr 0.05`, see `hetero_kt.options`). Names stand for things that a run builds: a model names
its data, a transfer names two weights as `model:weight`. A recipe goes to YAML and back without loss (`to_yaml`,
`from_yaml`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from hetero_kt.documents import MOST_YAML, parse_yaml, read_bytes
from hetero_kt.messages import check_word, printable, shown

Control = Literal["transfer", "none", "noise", "shuffled", "frozen", "standardise", "sharing"]
"""`transfer` is the method itself; the others are the controls that a gain has to beat, and `sharing` the paper's own
baseline: the leading block of the two weights is one."""


@dataclass(frozen=True)
class Optim:
    """One model's (or adapter's) optimizer."""

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    """SGD's momentum (no Nesterov); AdamW ignores it."""
    weight_decay: float = 5e-4
    decay_all: bool = True
    """Decay every parameter but those that a timm model spares itself (class token, position table); False leaves out
    biases and norms too."""
    clip: float = 0.0
    """Largest global gradient norm; 0 does not clip."""


@dataclass(frozen=True)
class Schedule:
    """Learning rate over a run, as a function of the optimizer step."""

    name: Literal["constant", "multistep", "cosine"] = "multistep"
    milestones: tuple[float, ...] = (0.3, 0.6, 0.8)
    """Where `multistep` multiplies the rate by `gamma`, as fractions of the run."""
    gamma: float = 0.2
    warmup: int = 0
    """Optimizer steps of linear warm-up."""
    warmup_lr: float = 0.0
    """Where the warm-up starts."""
    min_lr: float = 0.0


@dataclass(frozen=True)
class Transform:
    """timm's own training transform, picture by picture (`timm.data.create_transform`)."""

    scale: tuple[float, float] = (0.08, 1.0)
    """Area of the random crop, as fractions of the picture."""
    flip: float = 0.5
    color_jitter: float = 0.0
    rand_augment: str = ""
    """RandAugment as timm spells it, `rand-m9-mstd0.5-inc1`; empty leaves it out."""
    erasing: float = 0.0
    """Probability of random erasing."""
    crop_fraction: float = 0.875
    """Of evaluation: the middle of the picture that is kept."""
    squash: bool = False
    """Evaluation sees the whole picture, squeezed into the square."""


@dataclass(frozen=True)
class Mix:
    """timm's mixup and cutmix, within one rank's rows."""

    mixup: float = 0.0
    """Alpha; 0 does not mix."""
    cutmix: float = 0.0
    """Alpha; where both are set, half of the batches take cutmix."""
    probability: float = 1.0
    """Fraction of the batches that are mixed."""


@dataclass(frozen=True)
class Text:
    """How texts become tokens."""

    tokenizer: str = "tokenizer"
    """BERT's vocabulary: a vocab.txt, or a folder with one or with tokenizer.json; as it stands, or below the data
    folder. `generated` stands for generated texts and their own words."""
    length: int = 384
    """Tokens of the longest row; SQuAD's paragraphs go into overlapping windows, reviews are cut off."""
    stride: int = 128
    """Tokens between the beginnings of two windows."""
    question: int = 64
    """Tokens of a question that are kept."""


@dataclass(frozen=True)
class Data:
    """One data set and the batches drawn from it."""

    name: Literal[
        "cifar100", "digits", "generated", "shards", "tars", "squad", "imdb", "pretraining", "vqa", "captions"
    ] = "cifar100"
    """`shards` are webdataset shards that `hetero-kt shards` has written, and `tars` any others; `squad` (version 2),
    `imdb` and `pretraining` (masked language modelling of both sets' training texts) are for BERT and DistilBERT; `vqa`
    (questions about pictures) and `captions` (pictures and their descriptions) for X-VLM."""
    batch: int = 128
    """Global batch: rows per optimizer step over all ranks."""
    folder: str = ""
    """Below the data folder: of `shards`, the one with `train/` and `validation/` in it; of `tars`, the tars to train
    on, as webdataset writes them (`train-{0000..1023}.tar`, several by `::`); of `vqa` and `captions`, that of the set
    (`vqa_v2`, `coco`, `daquar`, `flickr8k`)."""
    test: str = ""
    """Of `tars`: those to evaluate on, written like `folder`."""
    label: str = ""
    """Of `tars`: the entry with a picture's class, `cls`, `txt` or `json:FIELD`; empty takes what the first picture has
    beside it, `json:label` of a JSON file."""
    classes: str = ""
    """Of `tars`: their number; or a file that numbers their names, with one a line, or JSON. Empty takes what the
    training labels show."""
    shuffle: int = 1000
    """Of `tars`: encoded pictures that each worker keeps to draw the next one from."""
    fraction: float = 1.0
    """Of `vqa` and `captions`: share of the training pictures that is kept."""
    answers: int = 3128
    """Of `vqa`: so many of the most frequent training answers can be given, where no answer_list.json says which."""
    blank: bool = False
    """Of `vqa` and `captions`: all pictures are black. What is reached so is what texts tell alone."""
    candidates: int = 0
    """Of `vqa` and `captions`, in evaluation: so many of a list are scored in full, after a first choice; 0 stands for
    X-VLM's 128 answers, or 256 captions and pictures."""
    per_class: int = 0
    """Labelled training samples kept per class; 0 keeps all."""
    pipeline: Literal["fast", "timm"] = "fast"
    """`fast` augments whole batches in memory as `augment` says; `timm` each picture as `transform` says."""
    augment: tuple[Literal["crop", "flip", "rotate"], ...] = ("crop", "flip", "rotate")
    """Of the fast pipeline."""
    transform: Transform = field(default_factory=Transform)
    """Of the timm pipeline."""
    augmentations: int = 0
    """Different augmentations of each sample, which take turns over the epochs; 0 draws another in every epoch."""
    mix: Mix = field(default_factory=Mix)
    workers: int = 4
    """Of the timm pipeline: processes per rank that decode and augment; 0 does it between the steps."""
    corrupt: Literal["skip", "stop"] = "skip"
    """What a damaged shard or sample does: it is left out, counted and named, or it ends the run."""
    validation: float = 0.0
    """Fraction of the training set held out and evaluated on instead of the test set (for choosing settings)."""
    image_size: int = 32
    text: Text = field(default_factory=Text)
    """Of sets of texts."""


TEXTS = ("squad", "imdb", "pretraining")
"""Names of sets of texts."""

PAIRS = ("vqa", "captions")
"""Names of sets of images with texts."""

GENERATED = "generated"
"""As `Text.tokenizer`: generated texts and their own words, for tests and `--debug`."""


def root(data_dir: str) -> str:
    """The folder with the data sets; empty takes the environment's HETERO_KT_DATA, then `data`."""
    return data_dir or os.environ.get("HETERO_KT_DATA") or "data"


@dataclass(frozen=True)
class XVLM:
    """What X-VLM alone needs to be told."""

    vision: str = ""
    """Where its vision encoder starts: a safetensors file, or `timm:NAME` for timm's published weights."""
    text: str = ""
    """Where its text encoder and decoder start: a BERT's folder or safetensors file, `hf:NAME`, or `run:RECIPE`."""
    dropout: float = 0.1
    """Of its text layers."""
    negatives: Literal["rank", "gathered"] = "rank"
    """Of retrieval: hard negatives are drawn from one rank's batch, or from that of all ranks."""


@dataclass(frozen=True)
class Model:
    """One model of a run."""

    name: str
    """What to build: `cifar:mobilenetv2`, `timm:resnet50`, `bert:4x256` (layers x width), `hf:bert-base-uncased`."""
    data: str
    """Which entry of `Recipe.data` it trains on; models that name the same entry see the same batches."""
    init: str = ""
    """Where to start from: a safetensors file (of BERT also a folder with one, of any task), a run's folder, or
    `run:RECIPE` for a run below the output folder; empty starts fresh."""
    pretrained: bool = False
    """Start from timm's published weights (needs the hub or its cache)."""
    optim: Optim = field(default_factory=Optim)
    schedule: Schedule = field(default_factory=Schedule)
    precision: Literal["fp32", "autocast", "bf16"] = "fp32"
    """`autocast` keeps fp32 parameters and computes in bf16; `bf16` stores parameters in bf16 too (no BatchNorm)."""
    zero: str = "ds_configs/zero1.json"
    """File with DeepSpeed's `zero_optimization` block."""
    micro_batch: int = 0
    """Rows per rank in one forward; 0 takes a rank's whole share. Accumulation follows from it."""
    steps: int = 0
    """Optimizer steps after which this model rests, and with it every transfer of its own; 0 trains the whole run."""
    label_smoothing: float = 0.0
    """Of the model's own cross-entropy."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights, which is evaluated and exported too; 0 keeps none."""
    checkpointing: bool = False
    """Compute each stage or layer again in the backward instead of keeping its activations (distillation and X-VLM)."""
    xvlm: XVLM = field(default_factory=XVLM)


FROM_SCRATCH = 0.12
"""Where the gate starts for a target that is trained from scratch."""


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter is made of; the defaults are ours, the published form is `width="published",
    input="raw", output="layernorm"`."""

    kind: Literal["lpka", "mlp", "aligned", "procrustes"] = "lpka"
    """Attention over unfoldings (Eq. 6), two perceptrons (Eq. 2), or, along an axis that both matrices share, a learned
    linear map or the nearest rotation."""
    layers: int = 2
    """Knowledge transfer layers (L)."""
    heads: int = 8
    width: Literal["compact", "published"] = "compact"
    """`compact`: inner width 64 whatever the matrices; `published`: it grows with them (37.6M parameters for
    160x960 <- 100x2048)."""
    unfold: Literal["all", "individual"] = "all"
    """All four row/column unfoldings, or (row, row) alone (Table 7, "Individual Attn")."""
    weights: Literal["learned", "average"] = "learned"
    """omega of Eq. 6: a learned softmax over the unfoldings, or their plain mean (Table 7, "Avg Attn")."""
    joint: bool = False
    """Layers update both streams (Eq. 3); otherwise every layer reads the source as it came."""
    input: Literal["standardise", "raw"] = "standardise"
    """Give source and target zero mean and unit variance first: raw weights (std about 0.02) leave the
    attention uniform and the proposal blind to the source."""
    output: Literal["restore", "mix", "layernorm"] = "restore"
    """`restore`: the target's own row means and scales, mixed in by a learned gate; `mix`: the last stream as it is,
    mixed in by that gate, which draws the target towards the source's own values; `layernorm`: the last stream
    overwrites the target, as published (LPKA's ends in a LayerNorm, other kinds' is raw)."""
    gate: float | Literal["auto"] = "auto"
    """Where the learned mixing weight of `restore` starts: 0 proposes a pretrained target unchanged, 0.12 lets the
    source take part from the start; `auto` is 0 for a recipe's pretrained targets and 0.12 for others."""
    hold: bool = False
    """The gate stays where it starts, whatever else the adapter learns."""
    dropout: float = 0.1
    """On attention probabilities."""
    ff_dropout: float = 0.2

    def first_gate(self) -> float:
        """`gate` as a number."""
        return FROM_SCRATCH if self.gate == "auto" else self.gate


@dataclass(frozen=True)
class Transfer:
    """Knowledge moves from one weight into another every `cycle` steps of the target's model."""

    source: str
    """`model:weight`, for example `resnet50:fc.weight`; `...qkv.weight[v]` takes one third of a fused projection."""
    target: str
    cycle: int = 4
    mode: Literal["factor", "full", "svd"] = "factor"
    """What is exchanged: a trained factor A of W = BA, the matrix itself, or A of a fresh SVD (residual kept)."""
    rank: int = 16
    source_rank: int = 0
    """Rank of the source's factors; 0 means `rank`."""
    reads: Literal["weight", "change"] = "weight"
    """What an adapter sees of the source: its matrix, or how that has changed since the transfer before (the source's
    way through training; zero at the first one, and not of `svd`, whose A is another basis each time)."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    optim: Optim = field(default_factory=lambda: Optim(name="adamw", lr=1e-3, weight_decay=1e-2, clip=50.0))
    schedule: Schedule = field(default_factory=lambda: Schedule(name="constant"))
    """Of the adapter's learning rate, counted in its own updates."""
    update: Literal["lookahead", "exact", "none"] = "lookahead"
    """What the adapter learns from: where the optimizer took the proposal, or the loss gradient at it; or it never
    learns. Either is the target's own training loss, which a target that knows its few samples by heart would rather
    have without the source."""
    moments: Literal["keep", "reset"] = "keep"
    """Optimizer state of a weight that was just written."""

    def sites(self) -> tuple[tuple[str, int], tuple[str, int]]:
        """The source and the target, each with its rank."""
        return (self.source, self.source_rank or self.rank), (self.target, self.rank)


@dataclass(frozen=True)
class MergeNet:
    """Co-trained models and the directed transfers between them."""

    transfers: dict[str, Transfer]
    control: Control = "transfer"

    @property
    def arm(self) -> str:
        """Which arm of the experiment this is: the method itself, or one that a gain has to beat."""
        return self.control

    def with_arm(self, arm: str) -> MergeNet:
        """The same models and transfers, as another arm."""
        return dataclasses.replace(self, control=typing.cast(Control, arm))

    def arms(self) -> tuple[str, ...]:
        """What `arm` may be."""
        return typing.get_args(Control)


Objective = Literal["none", "kd", "rkd", "dkd", "nkd", "tfkd", "uskd", "crd", "ofa", "fitnet", "fcfd", "fbt"]
"""What a student learns besides its labels: nothing, or the loss of this method."""


@dataclass(frozen=True)
class Teacher:
    """A frozen model that teaches."""

    name: str
    """What to build: `timm:swin_tiny_patch4_window7_224`, ..."""
    init: str = ""
    """Its weights: a safetensors file, a run's folder, or `run:RECIPE` for a run below the output folder."""
    pretrained: bool = False
    """timm's published weights instead (needs the hub or its cache)."""
    image_size: int = 0
    """Pixels that it sees; 0: as many as the student."""
    mean: tuple[float, ...] = ()
    """Of its input, per channel; empty: timm's published one where `pretrained`, else the data's."""
    std: tuple[float, ...] = ()
    zero: str = ""
    """Empty keeps a whole copy on every rank; a ZeRO-3 file shards it (for teachers too large for that)."""
    logits: Literal["live", "stored"] = "live"
    """`stored` computes them once for every sample and augmentation, before training, and keeps them on disk below the
    output folder for all runs that see the same pictures. For objectives that ask for logits alone, and data whose
    augmentations repeat."""


@dataclass(frozen=True)
class KD:
    """Knowledge distillation (Hinton et al. 2015)."""

    temperature: float = 4.0
    weight: float = 1.0
    labels: float = 1.0
    """Of the labels' cross-entropy. Published mixtures are 0.1 beside a `weight` of 0.9 and, from teacher to assistant
    to student (TAKD, Mirzadeh et al. 2020, arXiv 1902.03393), 1 - l beside l; TAKD's public code takes a mean over
    classes too, which is l / classes."""


@dataclass(frozen=True)
class RKD:
    """Relational distillation (Park et al. 2019) within one rank's micro-batch."""

    distance: float = 25.0
    """Weight of the distances; with 1 here and 2 for angles as the paper has them for embeddings."""
    angle: float = 50.0
    """Weight of the angles."""
    of: Literal["pooled", "logits"] = "pooled"
    """What rows are compared by: pooled features; MergeNet's authors took logits, with weights of 1 and 2."""


@dataclass(frozen=True)
class DKD:
    """Decoupled distillation (Zhao et al. 2022)."""

    alpha: float = 1.0
    """Of the right class against all others."""
    beta: float = 8.0
    """Of the others among themselves; 8 for ResNet50 -> MobileNetV2, 6 for VGG13 -> MobileNetV2."""
    temperature: float = 4.0
    warmup: float = 1 / 12
    """Share of the run over which both weights rise from 0: 20 of 240 epochs."""


@dataclass(frozen=True)
class NKD:
    """Normalised distillation (Yang et al. 2023)."""

    gamma: float = 3.5
    """Of the classes that are not right; 1.5 at a temperature of 1 on ImageNet."""
    temperature: float = 3.0
    labels: float = 1.0
    """Of the labels' cross-entropy, which MergeNet's authors left out."""


@dataclass(frozen=True)
class TfKD:
    """Teacher-free distillation (Yuan et al. 2020): L = (1 - weight) CE + weight * multiplier * divergence."""

    form: Literal["regularised", "self"] = "regularised"
    """From a made-up teacher, or from the student's own earlier run (the recipe's teacher)."""
    weight: float = 0.95
    temperature: float = 20.0
    """40 where the public code regularises MobileNetV2."""
    correct: float = 0.99
    """Of `regularised`: what the made-up teacher gives the right class."""
    multiplier: float = 1.0
    public: bool = True
    """The public code's divergence, which the weight is meant for: a mean over classes too, and for `regularised`
    without temperature on the student's side. False: as in KD, for a hundred classes a hundred times as large."""


@dataclass(frozen=True)
class USKD:
    """Universal self-distillation (Yang et al. 2023), without a teacher; its authors' weights on CIFAR-100."""

    alpha: float = 0.1
    """Of the right class; 1 on ImageNet."""
    beta: float = 0.1
    """Of the others."""
    mu: float = 0.1
    """Of the weak logits, from the third stage's pooled feature; 0.005 on ImageNet."""
    public: bool = False
    """Others are ranked as the public code does."""


@dataclass(frozen=True)
class CRD:
    """Contrastive representation distillation (Tian et al. 2020)."""

    weight: float = 0.8
    width: int = 128
    """Of the embeddings."""
    negatives: int = 16384
    """Of each row, out of the memory, all of other classes."""
    temperature: float = 0.07
    momentum: float = 0.5
    """Of a sample's embedding in memory."""
    public: bool = True
    """Scores are normalised as the public code does, which the weight is meant for; False is the paper's formula."""


@dataclass(frozen=True)
class OFA:
    """One-for-all (Hao et al. 2023): the student's stages are led into logits by branches, each of which the teacher
    teaches."""

    gamma: float = 1.0
    """1.0 on CIFAR-100, 1.5 on ImageNet."""
    weight: float = 1.0
    """Of the branches' terms; the final logits' term has 1."""
    public: bool = True
    """The public code's loss, beside the labels' cross-entropy. False: the paper's, which has that in every term and
    takes only the right class to the power of gamma."""


@dataclass(frozen=True)
class FitNet:
    """Feature distillation (Romero et al. 2015) in the four forms of FBT's appendix, Table 4."""

    form: Literal["stages", "final", "pooled", "infonce"] = "infonce"
    """Squared error of all stages, of the last, of the last pooled; or InfoNCE of the last pooled."""
    weight: float = 1.0


@dataclass(frozen=True)
class FCFD:
    """Function-consistent feature distillation (Liu et al. 2023), between CNNs."""

    temperature: float = 8.0
    """8 for ResNet50 -> MobileNetV2 and unlike CNNs, 4 for those of one family, 1 on ImageNet."""
    weight: float = 5.0
    """Of the squared errors between features; 0.02 for ResNet56 -> ResNet20 and on ImageNet."""
    paths: int = 2
    """Mixed paths that each step draws, of six."""
    warmup: float = 1 / 12
    """Share of the run over which the weight rises from 0: 20 of 240 epochs."""
    tokens: bool = False
    """Models of tokens too, which FCFD was not made for: their patches count as maps."""


@dataclass(frozen=True)
class FBT:
    """Fuse before transfer (arXiv 2410.12342)."""

    pair: Literal["infonce+ofa", "infonce", "ofa", "kd"] = "infonce+ofa"
    """L(K_i, K_j), between each two of teacher, student and fused model."""
    gamma: float = 1.0
    """Of OFA's loss: 1.0 on CIFAR-100, 1.5 on ImageNet."""
    terms: tuple[Literal["teacher_student", "teacher_fused", "fused_student"], ...] = (
        "teacher_student",
        "teacher_fused",
        "fused_student",
    )
    block: Literal["swin", "vit", "none"] = "swin"
    """L2G's attention; `none` leaves the patch embedding alone."""
    last_stage: bool = True
    """False: the fused model ends behind L2G with the receiving model's classifier alone."""
    detach: bool = True
    """The fused model is not trained by what it teaches the student."""
    fused_labels: bool = False
    """The fused model learns from hard labels too."""
    gather: bool = False
    """InfoNCE's negatives are the pictures of all ranks, not of one."""


@dataclass(frozen=True)
class Distill:
    """One student learns from frozen teachers, each of which adds its own terms to one loss."""

    teachers: dict[str, Teacher]
    objective: Objective = "fbt"
    kd: KD = field(default_factory=KD)
    rkd: RKD = field(default_factory=RKD)
    dkd: DKD = field(default_factory=DKD)
    nkd: NKD = field(default_factory=NKD)
    tfkd: TfKD = field(default_factory=TfKD)
    uskd: USKD = field(default_factory=USKD)
    crd: CRD = field(default_factory=CRD)
    ofa: OFA = field(default_factory=OFA)
    fitnet: FitNet = field(default_factory=FitNet)
    fcfd: FCFD = field(default_factory=FCFD)
    fbt: FBT = field(default_factory=FBT)

    @property
    def arm(self) -> str:
        """Which arm of the experiment this is: the method itself, or one that a gain has to beat."""
        return self.objective

    def with_arm(self, arm: str) -> Distill:
        """The same student and teachers, as another arm."""
        return dataclasses.replace(self, objective=typing.cast(Objective, arm))

    def arms(self) -> tuple[str, ...]:
        """What `arm` may be."""
        return typing.get_args(Objective)

    @property
    def taught(self) -> bool:
        """Whether this arm asks its teachers; the others need none."""
        regularised = self.objective == "tfkd" and self.tfkd.form == "regularised"
        return self.objective not in ("none", "uskd") and not regularised

    @property
    def label_weight(self) -> float:
        """Of the student's own cross-entropy."""
        weights = {
            "kd": self.kd.labels,
            "nkd": self.nkd.labels,
            "tfkd": 1 - self.tfkd.weight,
            "ofa": float(self.ofa.public),  # the paper's form has it within
        }
        return weights.get(self.objective, 1.0)

    def least_rows(self, world: int = 1) -> int:
        """Rows of a rank in one forward below which this arm's loss has nothing to compare, and is a constant that
        teaches nothing: distances and angles are relative, and InfoNCE needs a row that is not the row's own."""
        contrasts = self.objective == "fitnet" and self.fitnet.form == "infonce"
        if self.objective == "fbt" and self.fbt.pair.startswith("infonce"):
            contrasts = world == 1 or not self.fbt.gather
        return 3 if self.objective == "rkd" else 2 if contrasts else 1


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run's numbers."""

    name: str
    models: dict[str, Model]
    data: dict[str, Data]
    method: MergeNet | Distill
    steps: int
    """Optimizer steps of the whole run; schedules are laid out over them."""
    seed: int = 0
    data_dir: str = ""
    """Folder with the data sets; empty takes the environment's HETERO_KT_DATA, then `data`."""
    output_dir: str = "runs"
    """Runs go to `<output_dir>/<name>/...`."""
    eval_every: int = 0
    """Steps between evaluations; 0 evaluates at the end only."""
    save_every: int = 0
    """Steps between checkpoints; 0 saves at the end and on a signal only."""
    log_every: int = 10
    keep: int = 2
    """Checkpoints kept."""
    compile: tuple[str, ...] = ()
    """Models, teachers and transfers (their adapters) that torch.compile turns into fused kernels: half a minute to two
    minutes at the start, then faster where many small operations follow each other. Not under ZeRO-3."""

    def budget(self, model: str) -> int:
        """Optimizer steps that the model called `model` trains for."""
        return self.models[model].steps or self.steps


# --- recipes as text ---

BOOKKEEPING = frozenset({"data_dir", "output_dir", "log_every", "eval_every", "save_every", "keep", "workers", "zero"})
"""Fields that change where a run is kept, how often it is looked at, who reads its data and how ZeRO shares out its
weights, but none of its numbers."""


def to_yaml(recipe: Recipe) -> str:
    """The whole recipe as YAML; `from_yaml` gives back an equal one."""
    # ASCII only: written as it is, U+0085 (a line break to YAML) would come back as a space.
    return yaml.safe_dump(_plain(dataclasses.asdict(recipe)), sort_keys=False, allow_unicode=False, width=110)


def from_yaml(text: str) -> Recipe:
    """The recipe of a `recipe.yaml`.

    Raises:
        ValueError: a field that recipes do not have, a missing one, or a value of the wrong type.
    """
    try:
        content = parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"recipe.yaml cannot be read ({error}): print one with --print.") from error
    return typing.cast(Recipe, _typed(Recipe, content, ""))


def read_recipe(file: Path) -> Recipe:
    """The recipe in a run's `recipe.yaml`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as `from_yaml`, the file cannot be read, or a name in it is no plain word.
    """
    try:
        text = read_bytes(file, MOST_YAML).decode("utf-8")
    except UnicodeError as error:
        raise ValueError(f"{file} cannot be read (it is not UTF-8): restore it, or name another run.") from error
    except ValueError as error:
        raise ValueError(f"{file} cannot be read ({error}): restore it, or name another run.") from error
    recipe = from_yaml(text)
    check_names(recipe, f"{file}: ")
    return recipe


def check_names(recipe: Recipe, where: str = "--") -> None:
    """Refuse names that are no plain words, and models of which one would be exported over another's average.

    Names become folders and files of the run, so that a path in a stranger's recipe would reach outside of it.

    Args:
        where: stands in front of a field's path in the sentence.

    Raises:
        ValueError: one sentence with the name.
    """
    check_word(f"{where}name", recipe.name)
    method = recipe.method
    named: dict[str, Iterable[Any]] = {
        "data": recipe.data,
        "models": recipe.models,
        "method.transfers": method.transfers if isinstance(method, MergeNet) else (),
        "method.teachers": method.teachers if isinstance(method, Distill) else (),
    }
    for kind, names in named.items():
        for name in names:
            check_word(f"{where}{kind}'s name", name)
    for name, model in recipe.models.items():
        if model.ema and f"{name}_ema" in recipe.models:
            raise ValueError(
                f"{where}models.{name}_ema: the average of {name}'s weights is exported under that name: give the "
                "model another name."
            )


def differences(a: Recipe, b: Recipe) -> list[str]:
    """Paths of the fields that differ between two recipes, as on the command line without the dashes.

    Fields that decide no number of a run (folders, and how often it logs, evaluates or saves) do not count.
    """
    ours, theirs = flat(a), flat(b)
    missing = object()
    return [
        path
        for path in dict.fromkeys((*ours, *theirs))
        if path.rpartition(".")[2] not in BOOKKEEPING and ours.get(path, missing) != theirs.get(path, missing)
    ]


def flat(recipe: Recipe) -> dict[str, Any]:
    """Every field by its path, as on the command line without the dashes."""
    return _flat(dataclasses.asdict(recipe))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= _flat(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, tuple | list) else value


def _typed(kind: Any, value: Any, path: str) -> Any:
    """`value`, as YAML reads it, as the annotation `kind` wants it."""
    if dataclasses.is_dataclass(kind):
        return _typed_dataclass(typing.cast(type, kind), value, path)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if isinstance(value, dict):  # one of several dataclasses: the one whose first field is there
            named = [one for one in arguments if dataclasses.is_dataclass(one)]
            arguments = tuple(one for one in named if dataclasses.fields(one)[0].name in value) or arguments
        for one in arguments[:-1]:
            with contextlib.suppress(ValueError):
                return _typed(one, value, path)
        return _typed(arguments[-1], value, path)
    if origin is dict and isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"recipe.yaml: {path.lstrip('.')} names {shown(key)}, which is no text.")
        return {key: _typed(arguments[1], entry, f"{path}.{printable(key[:80])}") for key, entry in value.items()}
    if origin is tuple and isinstance(value, list):
        return tuple(_typed(arguments[0], entry, path) for entry in value)
    if origin is Literal and any(type(value) is type(one) and value == one for one in arguments):
        return value
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        # YAML 1.1 reads 1e-3 as a string.
        with contextlib.suppress(ValueError, OverflowError):
            return float(value)
    if isinstance(kind, type) and type(value) is kind:
        return value
    wanted = f"one of {', '.join(map(str, arguments))}" if origin is Literal else _name(kind)
    raise ValueError(f"recipe.yaml: {path.lstrip('.') or 'the file'} is {shown(value)}, not {wanted}.")


def _typed_dataclass(kind: type, value: Any, path: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(
            f"recipe.yaml: {path.lstrip('.') or 'the file'} is {shown(value)}, not a mapping of {_name(kind)}'s fields."
        )
    hints = typing.get_type_hints(kind)
    for key in value:
        if key not in hints:
            wrong = printable(key[:80]) if isinstance(key, str) else shown(key)
            raise ValueError(f"recipe.yaml: {f'{path}.{wrong}'.lstrip('.')} is no field: use {nearest(wrong, hints)}.")
    fields = dataclasses.fields(kind)
    for one in fields:
        required = one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
        if required and one.name not in value:
            raise ValueError(f"recipe.yaml: {f'{path}.{one.name}'.lstrip('.')} is missing: add it.")
    return kind(**{key: _typed(hints[key], entry, f"{path}.{key}") for key, entry in value.items()})


def _name(kind: Any) -> str:
    return str(kind) if isinstance(kind, types.GenericAlias) else getattr(kind, "__name__", str(kind))


def nearest(name: str, names: Iterable[str]) -> str:
    """Names to choose from, likeliest first: all of a short list, the closest of a long one."""
    close = difflib.get_close_matches(name, names := list(names), n=4, cutoff=0.4)
    shown = close + [other for other in names if other not in close]
    if len(names) > 8:
        shown = close or shown[:4]
    if not shown:
        return "one that exists (there is none yet)"
    return " or ".join([", ".join(shown[:-1]), shown[-1]]) if len(shown) > 1 else shown[0]
