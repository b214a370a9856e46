"""The gathered-parameter hook: read and write whole weights of models that ZeRO keeps in pieces.

DeepSpeed keeps two copies of a trained weight: the one that forward uses, and an fp32 master inside the optimizer,
which overwrites the first at every step. A write that misses either is lost silently, so `write` sets both, on every
rank, without communication: each rank owns a known slice of a value that all ranks hold. `read` costs one gather for
all the weights asked for. This is the only file that knows about the two copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hetero_kt.distributed import is_engine, load_deepspeed

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


@dataclass
class Traffic:
    """What `read` moved between ranks, counted where it is sent."""

    gathers: int = 0
    bytes: int = 0
    """Size of the gathered result: what every rank holds afterwards."""


@dataclass(frozen=True, eq=False)
class Weight:
    """One trained parameter, with the engine (or the plain module and its optimizer) that owns it."""

    owner: DeepSpeedEngine | nn.Module
    parameter: Any
    """An nn.Parameter, with what DeepSpeed hangs on it."""
    optimizer: torch.optim.Optimizer | None = None
    """Of a plain module; only needed to reset moments."""

    @property
    def shape(self) -> torch.Size:
        return torch.Size(getattr(self.parameter, "ds_shape", self.parameter.shape))


def check_writable(weight: Weight, name: str) -> None:
    """Raise ValueError, in one sentence, if `weight` cannot be written so that the write lasts."""
    parameter, owner = weight.parameter, weight.owner
    if not parameter.requires_grad:
        raise ValueError(f"target {name} is frozen: transfer into a weight that is trained.")
    if not is_engine(owner):
        return
    if owner.zero_optimization_stage() == 0 and parameter.dtype != torch.float32:
        raise ValueError(
            f"target {name}: ZeRO stage 0 with {str(parameter.dtype).removeprefix('torch.')} parameters has no "
            "master copy to write to: use ZeRO stage 1, or autocast."
        )
    if owner.zero_optimization_stage() < 3:
        return
    offload = owner.zero_offload_param()
    if offload is not None and offload.device == "nvme":
        raise ValueError(f"target {name}: parameters offloaded to NVMe cannot be written, offload them to cpu.")
    if owner.zero_hpz_partition_size() > 1:
        raise ValueError(
            f"target {name}: zero_hpz_partition_size keeps a third copy of every weight that a write would miss, "
            "leave it at 1."
        )


@torch.no_grad()
def read(weights: Sequence[Weight], traffic: Traffic | None = None) -> list[Tensor]:
    """Whole fp32 copies of `weights`, equal on every rank, detached. Collective; one gather for all of them.

    A weight stored in bf16 is read from its fp32 master, so that writing it back loses nothing.
    """
    values: list[Tensor | None] = [None] * len(weights)
    sharded, mastered = [], []
    for i, weight in enumerate(weights):
        parameter = weight.parameter
        low_precision = parameter.dtype in (torch.bfloat16, torch.float16) and parameter.requires_grad
        if _partitioned(parameter):
            if _gathered(parameter) and not low_precision:
                values[i] = parameter.detach().float().clone()  # small ones stay whole on every rank
            else:
                sharded.append(i)
        elif low_precision and hasattr(parameter, "_hp_mapping"):
            mastered.append(i)
        elif parameter.dtype == torch.float64:
            values[i] = parameter.detach().clone()
        else:
            values[i] = parameter.detach().float().clone()
    if sharded:
        parameters = [weights[i].parameter for i in sharded]
        for i, value in zip(sharded, _gather(parameters, list(map(_own, parameters)), traffic), strict=True):
            values[i] = value
    if mastered:
        parameters = [weights[i].parameter for i in mastered]
        fragments = [p._hp_mapping and p._hp_mapping.get_hp_fragment() for p in parameters]
        for i, value in zip(mastered, _reduce(parameters, fragments, traffic), strict=True):
            values[i] = value
    return values  # type: ignore[return-value]


@torch.no_grad()
def write(
    weights: Sequence[Weight], values: Sequence[Tensor], moments: str = "keep", where: Tensor | None = None
) -> None:
    """Set `weights` to `values` (whole, equal on every rank) in both copies; no communication.

    Give fp32 values also for bf16 weights: the master keeps them as they are, the copy for forward rounds them.

    Args:
        moments: `keep` leaves the optimizer's state of a written weight as it is; `reset` zeroes it.
        where: a boolean scalar on the device: false keeps what `reset` would zero, without the host's looking.
    """
    for weight, value in zip(weights, values, strict=True):
        parameter = weight.parameter
        if value.shape != weight.shape:
            raise ValueError(f"a value of shape {tuple(value.shape)} does not fit {tuple(weight.shape)}.")
        if _partitioned(parameter):
            piece = _own_piece(parameter, value)
            parameter.ds_tensor.data.copy_(piece)
            if _gathered(parameter):
                parameter.data.copy_(value)
            _accessors().safe_set_local_fp32_param(parameter, piece.float())
            if piece.is_cuda:
                # ZeRO-3 gathers on a stream of its own, which does not wait for this one.
                torch.cuda.current_stream().synchronize()
        else:
            parameter.data.copy_(value)
            if hasattr(parameter, "_hp_mapping"):
                _accessors().safe_set_full_fp32_param(parameter, value.float())
        if moments == "reset":
            _reset_moments(weight, where)


@torch.no_grad()
def gradients(weights: Sequence[Weight], traffic: Traffic | None = None) -> list[Tensor]:
    """Whole gradients of `weights`, averaged over ranks; between the last backward and the step. Collective; one gather
    for all of them.

    Raises:
        RuntimeError: there is no gradient; under ZeRO-1/2 on the ranks that own a piece of the weight, and after the
            gather, so that none waits for another. ZeRO-3 cannot tell: it hands out what its buffer holds.
    """
    found: list[Tensor | None] = [None] * len(weights)
    sharded, mastered = [], []
    missing = False
    for i, weight in enumerate(weights):
        parameter = weight.parameter
        # DeepSpeed hands out a partial gradient where .grad is still there, so the reduced one is asked for by name.
        if _partitioned(parameter):
            sharded.append(i)
        elif hasattr(parameter, "_hp_mapping"):
            mastered.append(i)
        else:
            own = _accessors().safe_get_full_grad(parameter) if is_engine(weight.owner) else parameter.grad
            missing |= own is None
            found[i] = own.to(torch.promote_types(own.dtype, torch.float32), copy=True) if own is not None else None
    if sharded:
        parameters = [weights[i].parameter for i in sharded]
        for i, value in zip(
            sharded, _gather(parameters, list(map(_accessors().safe_get_local_grad, parameters)), traffic), strict=True
        ):
            found[i] = value
    if mastered:
        parameters = [weights[i].parameter for i in mastered]
        fragments = []
        for parameter in parameters:
            try:
                fragments.append(_own_gradient(parameter))
            except ValueError:  # DeepSpeed's, of the rank that would own it
                fragments.append(None)
                missing = True
        for i, value in zip(mastered, _reduce(parameters, fragments, traffic), strict=True):
            found[i] = value
    if missing:
        raise RuntimeError("no gradient to observe: call observe() after backward and before step.")
    return found  # type: ignore[return-value]


def _partitioned(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id")


def _gathered(parameter: Any) -> bool:
    """Whether a partitioned parameter is whole on every rank at this moment."""
    return parameter.ds_status.name == "AVAILABLE"


def _accessors() -> Any:
    """DeepSpeed's functions on one parameter's partitions; only asked for where DeepSpeed has made them."""
    return load_deepspeed().utils


def _own(parameter: Any) -> Tensor:
    """This rank's piece of a ZeRO-3 weight, of its fp32 master where it has one."""
    master = parameter.dtype != torch.float32 and parameter.requires_grad
    return _accessors().safe_get_local_fp32_param(parameter) if master else parameter.ds_tensor


def _own_gradient(parameter: Any) -> Tensor | None:
    """This rank's fragment of a ZeRO-1/2 gradient; None where it has none."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    fragment = mapping.get_lp_grad_fragment(parameter._index_in_param_group).reshape(-1)
    if fragment.numel() == parameter.numel():  # bf16 accumulates all of it on every rank
        address = mapping.lp_fragment_address
        fragment = fragment.narrow(0, address.start, address.numel)
    return fragment


def _gather(parameters: list[Any], own: list[Tensor], traffic: Traffic | None) -> list[Tensor]:
    """ZeRO-3 pieces -> whole fp32 tensors, in one all-gather."""
    pieces = [piece.detach().reshape(-1).float() for piece in own]
    group = parameters[0].ds_process_group
    mine = torch.cat([piece.to(torch.device(_device_of(parameters[0]))) for piece in pieces])
    everything = mine.new_empty((dist.get_world_size(group), mine.numel()))
    dist.all_gather_into_tensor(everything.view(-1), mine, group=group)
    if traffic is not None:
        traffic.gathers += 1
        traffic.bytes += everything.numel() * everything.element_size()
    whole, start = [], 0
    for parameter, piece in zip(parameters, pieces, strict=True):
        columns = everything[:, start : start + piece.numel()].clone(memory_format=torch.contiguous_format)
        whole.append(columns.view(-1)[: parameter.ds_numel].view(parameter.ds_shape))
        start += piece.numel()
    return whole


def _reduce(parameters: list[Any], own: list[Tensor | None], traffic: Traffic | None) -> list[Tensor]:
    """What ZeRO-1/2 keeps in fp32, of which each rank owns a fragment -> whole tensors, in one all-reduce."""
    flat = torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device)
    start = 0
    for parameter, fragment in zip(parameters, own, strict=True):
        if fragment is not None:
            address = parameter._hp_mapping.lp_fragment_address
            flat.narrow(0, start + address.start, address.numel).copy_(fragment.reshape(-1))
        start += parameter.numel()
    dist.all_reduce(flat, group=parameters[0]._dp_group)
    if traffic is not None:
        traffic.gathers += 1
        traffic.bytes += flat.numel() * flat.element_size()
    return [v.reshape(p.shape) for v, p in zip(flat.split([p.numel() for p in parameters]), parameters, strict=True)]


def _own_piece(parameter: Any, value: Tensor) -> Tensor:
    """This rank's slice of `value`, zero-padded as ZeRO-3 pads when the size does not divide."""
    size = parameter.ds_tensor.ds_numel
    rank = dist.get_rank(parameter.ds_process_group)
    flat = value.reshape(-1)
    piece = flat[rank * size : (rank + 1) * size]
    return nn.functional.pad(piece, (0, size - piece.numel()))


def _device_of(parameter: Any) -> torch.device:
    device = parameter.device
    return torch.device("cpu") if device.type == "meta" else device


def _reset_moments(weight: Weight, where: Tensor | None) -> None:
    parameter = weight.parameter

    def zeroed(state: Tensor) -> Tensor:
        return torch.zeros_like(state) if where is None else torch.where(where.to(state.device), 0.0, state)

    if _partitioned(parameter):
        optimizer = parameter._z3_optimizer
        group, *_ = optimizer.grad_position[optimizer.get_param_id(parameter)]
        state = optimizer.optimizer.state.get(optimizer.fp32_partitioned_groups_flat[group], {})
        for key in _moments(state):
            now = _accessors().safe_get_local_optimizer_state(parameter, key)
            _accessors().safe_set_local_optimizer_state(parameter, zeroed(now), key)
    elif hasattr(parameter, "_hp_mapping"):
        mapping = parameter._hp_mapping
        for key in mapping.get_optim_state_keys() if mapping is not None else []:
            fragment = mapping.get_hp_fragment(key)
            fragment.copy_(zeroed(fragment))
    else:
        owner = weight.owner
        optimizer = owner.optimizer if is_engine(owner) else weight.optimizer
        if optimizer is None:
            raise ValueError("moments='reset' on a plain module needs its optimizer: Site(..., optimizer=...).")
        state = optimizer.state.get(parameter, {})
        for key in _moments(state):
            state[key].copy_(zeroed(state[key]))


def _moments(state: dict[str, Any]) -> list[str]:
    """Names of the per-element state; a step counter is not one."""
    return [key for key, value in state.items() if isinstance(value, Tensor) and value.dim() > 0 and value.numel() > 1]


def state_dict(engine: DeepSpeedEngine | nn.Module) -> dict[str, Tensor]:
    """The whole model as a plain state dict on the CPU, fp32 where it trains in bf16. Collective.

    Gathers one parameter after another, so that no rank ever holds more than one of them besides its own pieces.
    """
    module = engine.module if is_engine(engine) else engine
    state = {name: read([Weight(engine, p)])[0].cpu() for name, p in module.named_parameters()}
    kept = set(module.state_dict().keys())  # leaves out buffers that a state dict does not hold
    return state | {name: b.detach().cpu().clone() for name, b in module.named_buffers() if name in kept}
