"""The pieces of weights and of optimizer state that ZeRO has given this rank: where they lie, and how to fill them.

A trained weight has an fp32 master, and the optimizer keeps its moments beside that, element by element. At stage 0 all
of it is on every rank; at stages 1 and 2 each rank has a run of one long vector of all weights, at stage 3 an equal
share of each weight. A frozen weight has no master: it is whole on every rank, or in pieces at stage 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


@dataclass(frozen=True, eq=False)
class Piece:
    """The part of one weight that this rank holds; its owner may be another rank altogether."""

    name: str
    parameter: Any
    """An nn.Parameter, with what DeepSpeed hangs on it."""
    optimizer: Any
    """DeepSpeed's."""
    shape: torch.Size
    """Of the whole weight."""
    start: int
    """Of the part, in the flattened weight."""
    numel: int
    group: Any
    """Ranks that hold the other parts; None where every rank has all of it."""

    @property
    def stop(self) -> int:
        return self.start + self.numel

    def master(self) -> Tensor:
        """(numel,), the master itself, not a copy; of a frozen weight what forward uses. Looked up each time, since
        DeepSpeed may move it."""
        if self.parameter.requires_grad:
            home, offset = self._home()
            return home.detach().view(-1).narrow(0, offset, self.numel)
        kept = self.parameter.ds_tensor if hasattr(self.parameter, "ds_id") else self.parameter
        return kept.detach().view(-1).narrow(0, 0, self.numel)

    def moments(self) -> dict[str, Tensor]:
        """What the optimizer keeps for each element, by its own names: (numel,) each, themselves and not copies;
        nothing before its first step."""
        if not self.parameter.requires_grad:
            return {}
        home, offset = self._home()
        return {
            key: value.view(-1).narrow(0, offset, self.numel)
            for key, value in _state(self.optimizer, home).items()
            if _per_element(key, value, home)
        }

    def numbers(self) -> dict[str, float]:
        """What the optimizer keeps for the weight as a whole: its count of steps."""
        if not self.parameter.requires_grad or not self.numel:
            return {}
        home, _ = self._home()
        state = _state(self.optimizer, home)
        return {k: float(v) for k, v in state.items() if v is not None and not _per_element(k, v, home)}

    def _home(self) -> tuple[Tensor, int]:
        """The tensor that the optimizer steps, and where in it the piece begins."""
        if hasattr(self.parameter, "ds_id"):
            # Not `safe_get_local_fp32_param`, which waits for the device at every weight.
            index, offset, _ = self.optimizer.grad_position[self.optimizer.get_param_id(self.parameter)]
            return self.optimizer.fp32_partitioned_groups_flat[index], offset
        if hasattr(self.parameter, "_hp_mapping"):
            mapping = self.parameter._hp_mapping
            if mapping is None:
                return torch.empty(0), 0
            home = self.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
            return home, mapping.hp_fragment_address.start
        return self.parameter, 0


def pieces(engine: DeepSpeedEngine) -> list[Piece]:
    """This rank's piece of every weight, in the model's order; of tied weights one, under the first name."""
    return [_piece(engine, name, parameter) for name, parameter in engine.module.named_parameters()]


def _piece(engine: DeepSpeedEngine, name: str, parameter: Any) -> Piece:
    shape, start, group = parameter.shape, 0, None
    numel = shape.numel()
    if hasattr(parameter, "ds_id"):
        shape, group = torch.Size(parameter.ds_shape), parameter.ds_process_group
        size = parameter.ds_tensor.ds_numel
        start = min(dist.get_rank(group) * size, shape.numel())
        numel = min(size, shape.numel() - start)  # the last pieces are padded
    elif hasattr(parameter, "_hp_mapping"):
        group, mapping = parameter._dp_group, parameter._hp_mapping
        address = mapping.lp_fragment_address if mapping is not None else None
        start, numel = (address.start, address.numel) if address is not None else (0, 0)
    return Piece(name, parameter, engine.optimizer, shape, start, numel, group)


def _base(optimizer: Any) -> torch.optim.Optimizer:
    """torch's, within DeepSpeed's."""
    return getattr(optimizer, "optimizer", optimizer)


def _state(optimizer: Any, home: Tensor) -> Mapping[str, Any]:
    return _base(optimizer).state.get(home, {})


def _per_element(key: str, value: Any, home: Tensor) -> bool:
    # A weight of no dimension has a count of its own shape.
    return isinstance(value, Tensor) and value.shape == home.shape and key != "step"


# --- filling ---


class Source(Protocol):
    """Where whole weights and moments are read from, in parts."""

    def kinds(self, name: str) -> Sequence[str]:
        """Names of the moments that there are of the weight `name`."""
        ...

    def numbers(self, name: str) -> Mapping[str, float]:
        """What there is of the weight `name` as a whole."""
        ...

    def read(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a weight (kind `weight`) or of one of its moments."""
        ...


@torch.no_grad()
def fill(engine: DeepSpeedEngine, own: Sequence[Piece], source: Source) -> None:
    """Take this rank's pieces of masters, moments and frozen weights from `source`; `refresh` has to follow.

    The optimizer's state is made where no step has made it yet. What only pads a vector keeps moments of zero.
    """
    names = {id(piece.parameter): piece.name for piece in own}
    fused = _base(engine.optimizer).defaults.get("fused")
    for home, parameters in _homes(engine):
        held = [names[id(parameter)] for parameter in parameters]
        state = _base(engine.optimizer).state
        kinds = dict.fromkeys(kind for name in held for kind in source.kinds(name))
        numbers = [source.numbers(name) for name in held]
        counts = dict.fromkeys(key for one in numbers for key in one)
        if kinds or counts:
            state[home] = {
                # A weight that never had a gradient has counted no step, where it does not share a vector.
                # Fused steps keep the count where the weight is, others on the host.
                **{
                    key: torch.tensor(
                        max(one[key] for one in numbers if key in one), device=home.device if fused else "cpu"
                    )
                    for key in counts
                },
                **{kind: torch.zeros_like(home) for kind in kinds},
            }
    for piece in own:
        if not piece.numel:
            continue
        piece.master().copy_(source.read("weight", piece.name, piece.start, piece.stop))
        moments, kinds_here = piece.moments(), source.kinds(piece.name)
        for kind in kinds_here:
            moments[kind].copy_(source.read(kind, piece.name, piece.start, piece.stop))


def _homes(engine: DeepSpeedEngine) -> list[tuple[Tensor, list[Any]]]:
    """The tensors that the optimizer steps, in its order, and the parameters of which each holds something."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        return list(zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True))
    if stage:
        return list(zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True))
    return [(p, [p]) for group in optimizer.param_groups for p in group["params"]]


@torch.no_grad()
def refresh(engine: DeepSpeedEngine, own: Sequence[Piece]) -> None:
    """Make what forward uses from the masters, as the optimizer does after a step. Collective."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage == 3:
        optimizer.checkpoint_event_prologue()  # nothing stays gathered
        for piece in own:
            if piece.parameter.requires_grad:
                piece.parameter.ds_tensor.data.view(-1)[: piece.numel].copy_(piece.master())
        optimizer.checkpoint_event_epilogue()  # but for small weights, which are whole on every rank
        if engine.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # ZeRO-3 gathers on a stream of its own
    elif stage:
        optimizer.update_lp_params()
        if all(home in optimizer.optimizer.state for home, _ in _homes(engine)):
            optimizer._lazy_init_hp_params_optimizer_state()  # moments of a weight are asked for before the next step


def rates(engine: DeepSpeedEngine) -> list[float]:
    """The learning rate of each of the optimizer's groups."""
    return [float(group["lr"]) for group in _base(engine.optimizer).param_groups]


def set_rates(engine: DeepSpeedEngine, values: Sequence[float]) -> None:
    for group, value in zip(_base(engine.optimizer).param_groups, values, strict=True):
        group["lr"] = value
