"""Parameter re-encoding: a layer's weight as a matrix, and that matrix as W = BA.

MergeNet, arXiv 2404.13322, section 3.2, Eq. 4 and 5.

A weight is named by its key in the plain model's `state_dict`, with `[q]`, `[k]` or `[v]` behind it for one
third of a fused attention projection. Its matrix is (N, M) = (out, in * k * k): one row per output, class or
vocabulary entry. A factorised weight keeps its name, shape and place in the model; its parameters change.

Shape suffixes: N, M rows and columns of a matrix, r its rank.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

THIRDS = ("q", "k", "v")
FUSED = ("qkv", "Wqkv", "to_qkv")
"""Names of linear layers whose rows are all of q, then all of k, then all of v."""
SEPARATE = ("q", "k", "v", "query", "key", "value", "q_proj", "k_proj", "v_proj", "q_lin", "k_lin", "v_lin")


@dataclass(frozen=True)
class WeightInfo:
    """A weight that can take part in a transfer, as a list of sites shows it."""

    name: str
    kind: str
    """linear, conv, grouped conv, embedding or attention."""
    shape: tuple[int, int]
    """(N, M) of its matrix."""
    parameters: int
    note: str = ""


@dataclass(frozen=True)
class WeightRef:
    """Where a weight lives: `getattr(module, parameter)`, and which third of it if `part` is set."""

    name: str
    module: nn.Module
    parameter: str
    part: str | None
    kind: str
    tensor_shape: torch.Size
    """Of the whole tensor, also where ZeRO-3 leaves this rank a slice of it."""

    @property
    def shape(self) -> tuple[int, int]:
        """(N, M) of the matrix."""
        return self.tensor_shape[0] // (3 if self.part else 1), self.tensor_shape[1:].numel()


def list_weights(model: nn.Module) -> list[WeightInfo]:
    """Every weight that can take part, in the order of the model's modules.

    A fused attention projection is listed whole and as its thirds, a tied weight under each of its names.
    """
    listed = []
    first_names: dict[int, str] = {}
    for ref in _weights(model):
        notes = []
        low_rank = _low_rank(ref)
        if low_rank is not None:
            notes.append("factorised at rank " + "/".join(map(str, low_rank.rank_of_part)))
        else:
            weight = getattr(ref.module, ref.parameter)
            whole = _without_part(ref.name)
            first = first_names.setdefault(id(weight), whole)
            notes += [f"tied to {first}"] if first != whole else []
            notes += [] if weight.requires_grad else ["frozen"]
        N, M = ref.shape
        listed.append(WeightInfo(ref.name, ref.kind, (N, M), N * M, ", ".join(notes)))
    return listed


def find_weight(model: nn.Module, name: str) -> WeightRef:
    """The weight called `name`, which is the same before and after it was factorised.

    Raises ValueError for a name that the model does not have (with the nearest ones and their matrix shapes),
    for a parameter that is no matrix (a bias, a norm), and for a part of what is no fused projection.
    """
    weights = {ref.name: ref for ref in _weights(model)}
    if name in weights:
        return weights[name]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    whole = _without_part(name)
    if whole in weights:
        problem = f"'{name}' asks for a part, which only a fused q, k, v projection has"
    elif whole in parameters:
        problem = f"'{whole}' has shape {tuple(_full_shape(parameters[whole]))} and is no weight matrix"
    else:
        problem = f"'{name}' is no weight of this {type(model).__name__}"
    close = difflib.get_close_matches(name, weights, n=3, cutoff=0.0)
    nearest = ", ".join(f"'{near}' ({weights[near].shape[0]}x{weights[near].shape[1]})" for near in close)
    raise ValueError(f"{problem}: choose one that `hetero-kt sites` lists; the nearest: {nearest or 'none'}.")


def to_matrix(weight: Tensor, part: str | None = None) -> Tensor:
    """(N, M) of a weight (out, in, ...) or of its third `part`: a view where the memory order allows one."""
    matrix_NM = weight.reshape(len(weight), -1)
    return matrix_NM if part is None else matrix_NM.chunk(3)[_third(part)]


def from_matrix(matrix: Tensor, weight: Tensor, part: str | None = None) -> Tensor:
    """A new tensor like `weight` with `matrix` (N, M) in place of the whole, or of the third `part` alone.

    Raises ValueError where the matrix does not fit.
    """
    expected = to_matrix(weight, part).shape
    if matrix.shape != expected:
        raise ValueError(f"a matrix of {tuple(matrix.shape)} does not fit here: give one of {tuple(expected)}.")
    thirds = list(to_matrix(weight).chunk(3 if part else 1))
    thirds[_third(part)] = matrix.to(weight.dtype)
    return torch.cat(thirds).reshape(weight.shape)


def check_rank(name: str, shape: tuple[int, int], rank: int) -> None:
    """Raises ValueError where `rank` is not one of 1 .. min(N, M)."""
    if not 1 <= rank <= min(shape):
        raise ValueError(
            f"rank {rank} does not fit {name} ({shape[0]}x{shape[1]}): choose a rank from 1 to {min(shape)}."
        )


def split_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """W = BA + R (Eq. 4): B (N, r) and A (r, M) hold the `rank` largest singular values, R (N, M) the rest.

    Balanced, B = U sqrt(S) and A = sqrt(S) V. A matrix that holds NaN or Inf gives NaN throughout, for the
    caller to find. Raises ValueError for a rank outside 1 .. min(N, M).
    """
    matrix_NM = matrix.detach()
    check_rank("the matrix", (matrix.shape[0], matrix.shape[1]), rank)
    U_Nr, sigma_r, V_rM = _largest_singular(matrix_NM, rank)
    B_Nr = (U_Nr * sigma_r.sqrt()).to(matrix.dtype)
    A_rM = (sigma_r.sqrt()[:, None] * V_rM).to(matrix.dtype)
    return B_Nr, A_rM, matrix_NM - B_Nr @ A_rM


def _largest_singular(matrix_NM: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (N, r), S (r,) and V (r, M) in fp32 at least.

    The largest entry of each row of V is positive: a slowly changing matrix gives slowly changing factors.
    """
    matrix_NM = matrix_NM.to(torch.promote_types(matrix_NM.dtype, torch.float32))
    finite = matrix_NM.isfinite().all()  # where not, LAPACK would raise in the middle of a run
    U, sigma, V = torch.linalg.svd(matrix_NM.where(finite, 0), full_matrices=False)
    U_Nr, sigma_r, V_rM = U[:, :rank], sigma[:rank].where(finite, torch.nan), V[:rank]
    sign_r1 = V_rM.gather(1, V_rM.abs().argmax(1, keepdim=True)).sign()
    return U_Nr * sign_r1.T, sigma_r, V_rM * sign_r1


class LowRank(nn.Module):
    """The parametrisation W = BA (Eq. 4, 5) behind a factorised weight.

    Its parameters are B (N, r) and A (r, M); for a fused projection those of each factorised third in turn,
    then the rows of the other thirds in one piece. `rank_of_part` is (r,) or a rank for each of q, k, v, 0
    where that third is not factorised. Two buffers repeat it in the state dict, to fold that without a model.
    """

    def __init__(self, shape: torch.Size, rank_of_part: Sequence[int], device: torch.device):
        super().__init__()
        self.shape = shape
        self.rank_of_part = tuple(rank_of_part)
        self.register_buffer("tensor_shape", torch.tensor(shape, device=device))
        self.register_buffer("ranks", torch.tensor(rank_of_part, device=device))

    def forward(self, *parameters: Tensor) -> Tensor:
        # Under autocast only the layer's own product is rounded: the weight stays what a plain one would be.
        with torch.autocast(parameters[0].device.type, enabled=False):
            return multiply(parameters, self.shape, self.rank_of_part)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        parameters, others = [], []
        matrices = to_matrix(weight).chunk(len(self.rank_of_part))
        for matrix_NM, rank in zip(matrices, self.rank_of_part, strict=True):
            if not rank:
                others.append(matrix_NM)
                continue
            U_Nr, sigma_r, V_rM = _largest_singular(matrix_NM, rank)
            # Directions that the weight does not use (a head that starts at zero) keep a full-sized A beside
            # a zero B: with both at zero neither would ever get a gradient.
            used_r = sigma_r > sigma_r[0] * 1e-6
            root_r = torch.where(used_r, sigma_r, sigma_r[0] if sigma_r[0] > 0 else 1).sqrt()
            parameters += [U_Nr * (sigma_r / root_r), root_r[:, None] * V_rM]
        if others:
            parameters.append(torch.cat(others))
        return tuple(dense(parameter.to(weight.dtype)) for parameter in parameters)


def dense(tensor: Tensor) -> Tensor:
    """The tensor with the strides of a new one. `contiguous` leaves those of dimensions of one element as they are,
    (1, 10) for a column out of ten, and DeepSpeed, which broadcasts parameters as bytes, refuses them."""
    if tensor.stride() == torch.empty(tensor.shape, device="meta").stride():
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def multiply(parameters: Sequence[Tensor], shape: Sequence[int], rank_of_part: Sequence[int]) -> Tensor:
    """The weight of `shape` that a `LowRank` with these parameters stands for."""
    factors = iter(parameters)
    others = iter(parameters[-1].chunk(rank_of_part.count(0) or 1))
    thirds = [next(factors) @ next(factors) if rank else next(others) for rank in rank_of_part]
    matrix_NM = torch.cat(thirds) if len(thirds) > 1 else thirds[0]
    return matrix_NM.reshape(tuple(shape))


def factorise(model: nn.Module, name: str, rank: int) -> None:
    """Replace a weight's parameter by trainable factors B (N, r) and A (r, M), in place.

    They start as the truncated SVD of the present values: the best approximation of that rank, the same
    function at full rank. Thirds of a fused projection are factorised one by one. The layer's parameters are
    new ones: do this before optimizers and engines are made.

    Raises ValueError where `find_weight` does, for a rank outside 1 .. min(N, M), and for a weight that is
    frozen, tied to another layer, factorised already or partitioned by ZeRO-3.
    """
    ref = find_weight(model, name)
    check_rank(f"'{name}'", ref.shape, rank)
    rank_of_part = [0] * (3 if ref.part else 1)
    present = _low_rank(ref)
    if present is not None:
        if len(present.rank_of_part) != len(rank_of_part) or present.rank_of_part[_third(ref.part)]:
            raise ValueError(f"'{name}' is factorised already: factorise a weight once, whole or by parts.")
        rank_of_part = list(present.rank_of_part)
        with torch.enable_grad():
            parametrize.remove_parametrizations(ref.module, ref.parameter)
    weight = getattr(ref.module, ref.parameter)
    if hasattr(weight, "ds_shape"):
        raise ValueError(f"'{name}' is partitioned by ZeRO-3: factorise it before deepspeed.initialize.")
    if not weight.requires_grad:
        raise ValueError(f"'{name}' is frozen, and factors have to train: unfreeze it, or use mode 'svd'.")
    if sum(any(p is weight for p in module._parameters.values()) for module in model.modules()) > 1:
        raise ValueError(f"'{name}' is tied to another layer and factors would part them: use mode 'svd'.")
    rank_of_part[_third(ref.part)] = rank
    low_rank = LowRank(ref.tensor_shape, rank_of_part, weight.device)
    parametrize.register_parametrization(ref.module, ref.parameter, low_rank)


def factor_parameter(model: nn.Module, name: str) -> nn.Parameter | None:
    """The trainable factor A (r, M) of a weight; None where that weight, or that third, is not factorised."""
    ref = find_weight(model, name)
    low_rank = _low_rank(ref)
    if low_rank is None or len(low_rank.rank_of_part) != (3 if ref.part else 1):
        return None
    third = _third(ref.part)
    if not low_rank.rank_of_part[third]:
        return None
    pairs_before = sum(rank > 0 for rank in low_rank.rank_of_part[:third])
    return getattr(_parametrizations(ref.module)[ref.parameter], f"original{2 * pairs_before + 1}")


def plain_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a model with factorised weights, folded: keys and shapes of the plain model.

    W is the product that the layer itself computes; all other entries pass through.
    """
    layouts = [match for key in state if (match := LAYOUT_KEY.fullmatch(key))]
    prefixes = tuple(match["prefix"] for match in layouts)
    plain = {key: value for key, value in state.items() if not key.startswith(prefixes)}
    for match in layouts:
        prefix = match["prefix"]
        own = {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}
        shape, rank_of_part = own.pop("0.tensor_shape").tolist(), own.pop("0.ranks").tolist()
        parameters = [own[f"original{i}"].detach() for i in range(len(own))]
        plain[match["owner"] + match["parameter"]] = multiply(parameters, shape, rank_of_part)
    return plain


LAYOUT_KEY = re.compile(r"(?P<prefix>(?P<owner>.*)parametrizations\.(?P<parameter>[^.]+)\.)0\.tensor_shape")


def _weights(model: nn.Module) -> Iterator[WeightRef]:
    for path, module in model.named_modules(remove_duplicate=False):
        # The originals of a parametrised weight are not weights of their own, and a recurrent layer keeps a
        # second list of its weights, which a change would miss.
        if isinstance(module, (parametrize.ParametrizationList, nn.RNNBase)):
            continue
        parent, _, child = path.rpartition(".")
        shapes = {key: _full_shape(p) for key, p in module._parameters.items() if p is not None}
        for key, parametrizations in _parametrizations(module).items():
            if isinstance(parametrizations[0], LowRank):
                shapes[key] = parametrizations[0].shape
        for key, shape in shapes.items():
            kind = _kind(module, child, shape)
            if kind is None:
                continue
            name = f"{path}.{key}" if path else key
            yield WeightRef(name, module, key, None, kind, shape)
            if _is_fused(model.get_submodule(parent), module, child, key, shape):
                for part in THIRDS:
                    yield WeightRef(f"{name}[{part}]", module, key, part, kind, shape)


def _kind(module: nn.Module, child: str, shape: torch.Size) -> str | None:
    if isinstance(module, nn.modules.conv._ConvNd) and len(shape) > 2:
        return "conv" if module.groups == 1 else "grouped conv"
    if len(shape) != 2:
        return None
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding"
    if isinstance(module, nn.MultiheadAttention) or child in FUSED + SEPARATE:
        return "attention"
    return "linear"


def _is_fused(parent: nn.Module, module: nn.Module, child: str, key: str, shape: torch.Size) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return key == "in_proj_weight"
    # MaxViT (head_first) and TinyViT (val_dim) use the same name and size but interleave q, k, v by heads.
    interleaved = getattr(parent, "head_first", False) or hasattr(parent, "val_dim")
    return child in FUSED and isinstance(module, nn.Linear) and shape[0] == 3 * shape[1] and not interleaved


def _low_rank(ref: WeightRef) -> LowRank | None:
    found = _parametrizations(ref.module).get(ref.parameter, [None])[0]
    assert found is None or isinstance(found, LowRank)
    return found


def _parametrizations(module: nn.Module) -> dict[str, Any]:
    """The `ParametrizationList` of each parametrised tensor of a module."""
    return dict(module.parametrizations.items()) if parametrize.is_parametrized(module) else {}  # type: ignore


def _third(part: str | None) -> int:
    return 0 if part is None else THIRDS.index(part)


def _without_part(name: str) -> str:
    return re.sub(r"\[[^\]]*\]$", "", name)


def _full_shape(parameter: Tensor) -> torch.Size:
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))
