"""The parameter adapter: reads a source matrix and proposes new values for a target matrix.

MergeNet, arXiv 2404.13322, section 3.2. The order of this file is the order of the paper: the MLP adapter
(Eq. 2), attention between unfolded matrices (LPKA, Eq. 6), knowledge transfer layers (Eq. 3), then what
surrounds them all: the scale of what goes in and comes out. Matrices are whatever is exchanged, whole weights
or factors A (Eq. 4, 5).

Shape suffixes: n, m rows and columns of the target; N, M of the source; within one attention T query tokens
of width C, S source tokens of width E, H heads of width D.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from hetero_kt.config import AdapterConfig
from hetero_kt.nn.attention import attention

COMPACT_WIDTH = 64
PUBLISHED_MLP_WIDTH = 1024
GATE_SLOPE = 0.1
"""How far the gate moves per unit of its parameter. Adam moves that by its whole rate in every update whatever the
gradient; at slope 1 the gate had closed, in 600 updates at 1e-3, before the adapter had anything to say."""
TINY = 1e-8
"""Floor of a standard deviation, far below that of any weight: a constant row stays finite."""


class MLP(nn.Module):
    """The MLP adapter, W_s = xi2(xi1(W_l)^T) (Eq. 2): widths M -> m, transpose, lengths N -> n, transpose.

    It never looks at the target's values.
    """

    def __init__(self, config: AdapterConfig, target_shape: tuple[int, int], source_shape: tuple[int, int]):
        super().__init__()
        (n, m), (N, M) = target_shape, source_shape
        hidden = COMPACT_WIDTH if config.width == "compact" else PUBLISHED_MLP_WIDTH
        self.xi1 = nn.Sequential(nn.Linear(M, hidden), nn.LeakyReLU(0.1), nn.Linear(hidden, m))
        self.xi2 = nn.Sequential(nn.Linear(N, hidden), nn.LeakyReLU(0.1), nn.Linear(hidden, n))

    def forward(self, target_nm: Tensor, source_NM: Tensor) -> Tensor:
        stream_Nm = self.xi1(source_NM)
        return self.xi2(stream_Nm.T).T


class Aligned(nn.Module):
    """Our own: token i of the target reads token i of the source through one learned matrix.

    Meant for matrices whose rows (else columns) stand for the same things: classes, a vocabulary, a width.
    """

    def __init__(self, target_shape: tuple[int, int], source_shape: tuple[int, int], by_row: bool):
        super().__init__()
        (n, m), (N, M), self.by_row = target_shape, source_shape, by_row
        self.map = nn.Linear(M, m, bias=False) if self.by_row else nn.Linear(N, n, bias=False)
        if self.map.in_features == self.map.out_features:  # the other axis may well mean the same, too
            nn.init.eye_(self.map.weight)
        else:
            nn.init.orthogonal_(self.map.weight)

    def forward(self, target_nm: Tensor, source_NM: Tensor) -> Tensor:
        return self.map(source_NM) if self.by_row else self.map(source_NM.T).T


class Procrustes(nn.Module):
    """Our own: the source turned to where the target lies, by the rotation that brings it nearest (Schoenemann 1966).

    Token i of the source stands for what token i of the target stands for, in a space of other axes, and often of
    another width. A rotation (a partial isometry where widths differ) leaves what lies between tokens as it is, and
    that is what reaches the target: which classes are near each other, say. Nothing is learnt.
    """

    def __init__(self, by_row: bool):
        super().__init__()
        self.by_row = by_row

    @torch.no_grad()
    def forward(self, target_nm: Tensor, source_NM: Tensor) -> Tensor:
        if not self.by_row:
            return self.turned(target_nm.T, source_NM.T).T
        return self.turned(target_nm, source_NM)

    def turned(self, target_TC: Tensor, source_TE: Tensor) -> Tensor:
        """The centred source in the target's axes, (T, C). NaN or Inf on either side gives NaN."""
        source_TE = source_TE - source_TE.mean(0)
        product_EC = source_TE.T @ (target_TC - target_TC.mean(0))
        finite = product_EC.isfinite().all()  # where not, LAPACK would raise in the middle of a run
        U, _, V = torch.linalg.svd(product_EC.where(finite, 0), full_matrices=False)
        return (source_TE @ (U @ V)).where(finite, torch.nan)


def goes_by_row(kind: str, target_shape: tuple[int, int], source_shape: tuple[int, int], rows_align: bool) -> bool:
    """Whether token i is row i, as where a classifier's rows are classes, or column i.

    Raises:
        ValueError: neither axis is of one length on both sides.
    """
    (n, m), (N, M) = target_shape, source_shape
    if rows_align and n == N:
        return True
    if m != M:
        needs = "equal rows or equal columns" if rows_align else "equal columns (the rows are those of factors)"
        whole = "" if rows_align else " mode 'full',"
        raise ValueError(
            f"adapter.kind '{kind}' needs {needs}, and {n}x{m} <- {N}x{M} share neither: "
            f"choose other weights,{whole} or adapter.kind 'lpka'."
        )
    return False


class CrossAttention(nn.Module):
    """Attn of Eq. 6: tokens of the target query tokens of the source; then residual and LayerNorm.

    Token counts and widths of the two sides are free. The head width follows from them:
    max((C + E) // 2, 128) // H as published, 64 // H when compact.
    """

    def __init__(self, config: AdapterConfig, query_width: int, source_width: int):
        super().__init__()
        inner = COMPACT_WIDTH if config.width == "compact" else max((query_width + source_width) // 2, 128)
        if config.heads > inner:
            raise ValueError(
                f"adapter.heads {config.heads} is above the inner width {inner}: choose 1 to {inner} heads."
            )
        self.heads = config.heads
        self.head_width = inner // config.heads
        inner = self.heads * self.head_width
        self.query = nn.Linear(query_width, inner)
        self.key = nn.Linear(source_width, inner)
        self.value = nn.Linear(source_width, inner)
        self.out = nn.Linear(inner, query_width)
        self.dropout = config.dropout
        self.norm = nn.LayerNorm(query_width, eps=1e-12)

    def forward(self, query_TC: Tensor, source_SE: Tensor) -> Tensor:
        q_HTD = self.split(self.query(query_TC))
        k_HSD = self.split(self.key(source_SE))
        v_HSD = self.split(self.value(source_SE))
        mixed_HTD = attention(q_HTD, k_HSD, v_HSD, self.dropout if self.training else 0.0)
        return self.norm(query_TC + self.out(mixed_HTD.transpose(0, 1).flatten(1)))

    def split(self, x_TI: Tensor) -> Tensor:
        """(T, H*D) -> (H, T, D)."""
        return x_TI.unflatten(-1, (self.heads, self.head_width)).transpose(0, 1)


UNFOLDINGS = (("row", "row"), ("row", "column"), ("column", "row"), ("column", "column"))
"""(target, source): tokens are the rows (phi_R) or the columns (phi_L) of a matrix; the order of omega."""


class LPKA(nn.Module):
    """Low-rank parametric knowledge adapter: sum_i omega_i Attn(phi(A_s), phi(A_l), phi(A_l)) (Eq. 6)."""

    omega_logits: Tensor

    def __init__(self, config: AdapterConfig, target_shape: tuple[int, int], source_shape: tuple[int, int]):
        super().__init__()
        (n, m), (N, M) = target_shape, source_shape
        self.unfoldings = UNFOLDINGS if config.unfold == "all" else UNFOLDINGS[:1]
        self.attentions = nn.ModuleList(
            CrossAttention(config, m if target == "row" else n, M if source == "row" else N)
            for target, source in self.unfoldings
        )
        logits = torch.zeros(len(self.unfoldings))
        if config.weights == "learned" and len(logits) > 1:
            self.omega_logits = nn.Parameter(logits)
        else:
            self.register_buffer("omega_logits", logits, persistent=False)

    def omega(self) -> Tensor:
        """The weights of the unfoldings in use, in the order of `UNFOLDINGS`; they sum to 1."""
        return self.omega_logits.softmax(0)

    def forward(self, target_nm: Tensor, source_NM: Tensor) -> Tensor:
        parts = []
        for (target, source), attend in zip(self.unfoldings, self.attentions, strict=True):
            tokens_SE = source_NM if source == "row" else source_NM.T
            parts.append(attend(target_nm, tokens_SE) if target == "row" else attend(target_nm.T, tokens_SE).T)
        return torch.einsum("i,inm->nm", self.omega(), torch.stack(parts))


class TransferStep(nn.Module):
    """A knowledge transfer layer's update of one stream: LPKA, then a feed-forward over the rows."""

    def __init__(self, config: AdapterConfig, target_shape: tuple[int, int], source_shape: tuple[int, int]):
        super().__init__()
        m = target_shape[1]
        self.lpka = LPKA(config, target_shape, source_shape)
        inner = COMPACT_WIDTH if config.width == "compact" else 2 * m
        linears: list[nn.Module] = [nn.Linear(m, inner), nn.Linear(inner, m)]
        if config.width == "published":
            linears = [spectral_norm(linear) for linear in linears]
        widen, narrow = linears
        self.feed_forward = nn.Sequential(widen, nn.GELU("tanh"), narrow, nn.Dropout(config.ff_dropout))
        self.norm = nn.LayerNorm(m, eps=1e-12)

    def forward(self, target_nm: Tensor, source_NM: Tensor) -> Tensor:
        mixed_nm = self.lpka(target_nm, source_NM)
        return self.norm(mixed_nm + self.feed_forward(mixed_nm))


class TransferLayers(nn.Module):
    """L knowledge transfer layers (Eq. 3).

    With `joint`, a layer computes both new streams from both old ones; the last one leaves the source's out,
    which nothing would read.
    """

    def __init__(self, config: AdapterConfig, target_shape: tuple[int, int], source_shape: tuple[int, int]):
        super().__init__()
        updates = config.layers - 1 if config.joint else 0
        self.to_target = nn.ModuleList(TransferStep(config, target_shape, source_shape) for _ in range(config.layers))
        self.to_source = nn.ModuleList(TransferStep(config, source_shape, target_shape) for _ in range(updates))

    def forward(self, target_nm: Tensor, source_NM: Tensor) -> Tensor:
        for i, to_target in enumerate(self.to_target):
            new_nm = to_target(target_nm, source_NM)
            if i < len(self.to_source):
                source_NM = self.to_source[i](source_NM, target_nm)
            target_nm = new_nm
        return target_nm


class Adapter(nn.Module):
    """proposal_nm = adapter(target_nm, source_NM).

    Takes any floating-point type, computes in that of its parameters (fp32 unless converted) whatever
    autocast says, and returns it. In train mode dropout draws from torch's global generator, and the
    published width's spectral norms advance by one power iteration.

    With `restore`, the last stream is brought to the target's own row means and standard deviations (G), and
    proposal = target + g (G - target), g = tanh(GATE_SLOPE x a learned number): at g = 0 the proposal is the target
    to the bit, and g itself still receives a gradient. With `mix`, G is the last stream as it is.
    """

    ungated: Tensor
    """The mixing weight without a gate."""

    def __init__(self, config: AdapterConfig, body: nn.Module):
        super().__init__()
        self.config = config
        self.body = body
        self.register_buffer("ungated", torch.ones(()), persistent=False)  # and what type and device to compute in
        gated = config.output != "layernorm"
        start = torch.tensor(math.atanh(config.first_gate()) / GATE_SLOPE)
        self.gate = nn.Parameter(start, requires_grad=not config.hold) if gated else None

    def forward(self, target_nm: Tensor, source_NM: Tensor) -> Tensor:
        dtype = self.ungated.dtype
        target_nm, source_NM = target_nm.to(dtype), source_NM.to(dtype)
        with torch.autocast(target_nm.device.type, enabled=False):
            if self.config.input == "raw":
                stream_nm = self.body(target_nm, source_NM)
            else:
                stream_nm = self.body(standardise(target_nm), standardise(source_NM))
            if self.gate is None:
                return stream_nm
            if self.config.output == "restore":
                std_n1, mean_n1 = torch.std_mean(target_nm.detach(), 1, correction=0, keepdim=True)
                stream_nm = standardise(stream_nm, dim=1) * std_n1 + mean_n1
            return target_nm + (GATE_SLOPE * self.gate).tanh() * (stream_nm - target_nm)

    def omega(self) -> list[Tensor]:
        """omega of every layer's update of the target, detached, each (4,) in the order of `UNFOLDINGS`.

        0 stands where an unfolding is not used; the list is empty for kinds without attention.
        """
        if not isinstance(self.body, TransferLayers):
            return []
        used = [lpka.omega().detach() for lpka in self.body.to_target.modules() if isinstance(lpka, LPKA)]
        return [F.pad(omega, (0, len(UNFOLDINGS) - len(omega))) for omega in used]

    @property
    def shared_axis(self) -> int:
        """The axis of the source along which order means something: 1 where `aligned` goes by column, else 0."""
        return 1 if isinstance(self.body, Aligned | Procrustes) and not self.body.by_row else 0

    @property
    def sees_order(self) -> bool:
        """True where a fixed other order along `shared_axis` cannot be learnt away."""
        return isinstance(self.body, Aligned | Procrustes)

    def gate_value(self) -> Tensor:
        """The mixing weight g, a detached scalar; 1 where the output overwrites the target."""
        if self.gate is None:
            return self.ungated.clone()
        return (GATE_SLOPE * self.gate.detach()).tanh()

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())


def standardise(x: Tensor, dim: int | None = None) -> Tensor:
    """Zero mean and unit (population) variance, over all of `x` or along `dim`."""
    std, mean = torch.std_mean(x, dim, correction=0, keepdim=True)
    return (x - mean) / std.clamp_min(TINY)


def build_adapter(
    config: AdapterConfig, target_shape: tuple[int, int], source_shape: tuple[int, int], *, rows_align: bool = True
) -> Adapter:
    """An adapter for a target of (n, m) and a source of (N, M), initialised from torch's global generator.

    `rows_align` is False where rows are components of a factorisation: `aligned` and `procrustes` then go by column.

    Raises ValueError where the configuration cannot be built: layers or heads below 1, more heads than inner
    width, a gate outside (-1, 1), a dropout outside [0, 1), kind `aligned` or `procrustes` without equal rows or
    columns, output `mix` of standardised matrices.
    """
    if config.output == "mix" and config.input != "raw":
        raise ValueError("adapter.output mix keeps the source's own scale, which adapter.input raw has: choose both.")
    for option, count in (("layers", config.layers), ("heads", config.heads)):
        if count < 1:
            raise ValueError(f"adapter.{option} is {count}: choose 1 or more.")
    if not -1 < config.first_gate() < 1:
        raise ValueError(f"adapter.gate {config.gate} is a tanh: choose a value above -1 and below 1.")
    for option, p in (("dropout", config.dropout), ("ff_dropout", config.ff_dropout)):
        if not 0 <= p < 1:
            raise ValueError(f"adapter.{option} {p} is no probability to drop: choose 0 or more, below 1.")
    if config.kind == "mlp":
        return Adapter(config, MLP(config, target_shape, source_shape))
    if config.kind in ("aligned", "procrustes"):
        by_row = goes_by_row(config.kind, target_shape, source_shape, rows_align)
        body = Procrustes(by_row) if config.kind == "procrustes" else Aligned(target_shape, source_shape, by_row)
        return Adapter(config, body)
    return Adapter(config, TransferLayers(config, target_shape, source_shape))
