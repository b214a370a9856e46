"""A recipe: everything that decides a run's numbers, as frozen dataclasses.

A launcher's `recipe()` returns one `Recipe`; any field can be overridden on the command line by its path
(`--models.resnet50.optim.lr 0.05`, see `hetero_kt.run`). Names stand for things that a run builds: a model names
its data, a transfer names two weights as `model:weight`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from hetero_kt.nn.adapter import AdapterConfig

Control = Literal["transfer", "none", "noise", "shuffled", "frozen", "standardise"]
"""`transfer` is the method itself; the others are the controls that a gain has to beat."""


@dataclass(frozen=True)
class Optim:
    """One model's (or adapter's) optimizer."""

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    """SGD's momentum (no Nesterov); AdamW ignores it."""
    weight_decay: float = 5e-4
    decay_all: bool = True
    """Decay every parameter; False leaves out biases and norms."""
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
    min_lr: float = 0.0


@dataclass(frozen=True)
class Data:
    """One data set and the batches drawn from it."""

    name: Literal["cifar100", "digits", "generated"] = "cifar100"
    batch: int = 128
    """Global batch: rows per optimizer step over all ranks."""
    per_class: int = 0
    """Labelled training samples kept per class; 0 keeps all."""
    augment: tuple[Literal["crop", "flip", "rotate"], ...] = ("crop", "flip", "rotate")
    validation: float = 0.0
    """Fraction of the training set held out and evaluated on instead of the test set (for choosing settings)."""
    image_size: int = 32


@dataclass(frozen=True)
class Model:
    """One model of a run."""

    name: str
    """What to build: `cifar:mobilenetv2`, `timm:resnet50`, ..."""
    data: str
    """Which entry of `Recipe.data` it trains on; models that name the same entry see the same batches."""
    init: str = ""
    """A safetensors file to start from; empty starts fresh."""
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
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    optim: Optim = field(default_factory=lambda: Optim(name="adamw", lr=1e-3, weight_decay=1e-2, clip=50.0))
    schedule: Schedule = field(default_factory=lambda: Schedule(name="constant"))
    """Of the adapter's learning rate, counted in its own updates."""
    update: Literal["lookahead", "exact"] = "lookahead"
    """What the adapter learns from: where the optimizer took the proposal, or the loss gradient at it."""
    moments: Literal["keep", "reset"] = "keep"
    """Optimizer state of a weight that was just written."""


@dataclass(frozen=True)
class MergeNet:
    """Co-trained models and the directed transfers between them."""

    transfers: dict[str, Transfer]
    control: Control = "transfer"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run's numbers."""

    name: str
    models: dict[str, Model]
    data: dict[str, Data]
    method: MergeNet
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
