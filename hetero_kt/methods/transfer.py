"""One transfer of MergeNet at work: what its adapter makes of two weights, and how the adapter learns from it."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hetero_kt.compiler import as_written
from hetero_kt.config import Control
from hetero_kt.distributed import params
from hetero_kt.evaluate import evaluating
from hetero_kt.methods import Diverged
from hetero_kt.methods.sites import Side, Transfer
from hetero_kt.nn.adapter import Adapter, build_adapter, standardise
from hetero_kt.optimizer import Rates, build_optimizer

SENSITIVITY_EVERY = 10
"""Transfers between two measurements of source sensitivity, which take two more forwards of the adapter."""
BAD_IN_A_ROW = 5
"""Transfers in a row with a non-finite proposal after which a run is given up."""


class TransferDiverged(Diverged):
    """An adapter has proposed NaN or Inf too often in a row."""


class Path:
    """One transfer at work: its adapter, the adapter's optimizer, and the state between `propose` and `learn`."""

    def __init__(self, transfer: Transfer, control: Control, seed: int, steps: int) -> None:
        if transfer.cycle < 1:
            raise ValueError(f"cycle {transfer.cycle}: a transfer happens every 1, 2, ... steps, so use 1 or more.")
        self.transfer = transfer
        self.name = transfer.name
        self.control = control
        self.seed = zlib.crc32(self.name.encode()) ^ (seed * 0x9E3779B1 % 2**31)
        self.source, self.target = Side(transfer.source), Side(transfer.target)
        params.check_writable(self.target.weight, transfer.target.weight)
        self.device = self.target.weight.parameter.device
        self.adapter: Adapter | None = None
        if control not in ("none", "standardise"):
            # The rows of a factor are components, not classes or words: row i of two factors have nothing in common.
            rows_align = self.source.mode == self.target.mode == "full"
            with seeded(self.seed, self.device):
                adapter = build_adapter(transfer.adapter, self.target.shape, self.source.shape, rows_align=rows_align)
            self.adapter = adapter.to(self.device)
        learnable = self.adapter is not None and any(p.requires_grad for p in self.adapter.parameters())
        self.learns = learnable and control != "frozen" and transfer.update != "none"
        if self.learns:
            assert self.adapter is not None
            if transfer.schedule.name != "constant" and not steps:
                raise ValueError(
                    f"transfer {self.name}: a {transfer.schedule.name} schedule needs Exchange(steps=...)."
                )
            self.optimizer = build_optimizer(self.adapter, transfer.optim)
            self.schedule = Rates(self.optimizer, transfer.schedule, -(-steps // transfer.cycle))
        if control == "shuffled" and not (self.adapter and self.adapter.sees_order):
            warnings.warn(
                f"transfer {self.name}: an adapter of kind {transfer.adapter.kind} can learn to undo a fixed order of "
                "the source's rows, so the control shuffled says little here: noise is the sharper one.",
                stacklevel=4,
            )
        if transfer.reads == "change" and self.source.mode == "svd":
            raise ValueError(
                f"transfer {self.name} reads the change of a fresh decomposition, which has another basis each time: "
                "use mode factor or full."
            )
        self.source_before: Tensor | None = None
        """Where `change` counts from."""
        self.noises: dict[int, Tensor] = {}
        self.order: Tensor | None = None
        """Of `shuffled`."""
        self.updates = 0
        self.sensitivity = torch.full((), torch.nan, device=self.device)
        self.bad_in_a_row = torch.zeros((), dtype=torch.long, device=self.device)
        self.bad_seen = _Late(self.device)
        self.at_step = self.warned_at = -1
        self.gradient: Tensor | None = None

    def propose(self, source: Tensor, target: Tensor, step: int) -> None:
        """Adapt: (whole source, whole target) -> the exchanged matrix's next value, with its graph."""
        source = self._controlled(self._read(self.source.view(source.to(self.device)).matrix))
        self.view = self.target.view(target)
        self.before = self.view.matrix
        with seeded(self.seed + step, self.device), torch.enable_grad():
            self.proposal = self._adapt(source)
        with torch.no_grad():
            self.finite = torch.isfinite(self.proposal).all()
            # chosen on the device: a host that looked would wait for everything queued so far
            self.accepted = torch.where(self.finite, self.proposal.detach(), self.before.to(self.proposal.dtype))
            if step // self.transfer.cycle % SENSITIVITY_EVERY == 0:
                self.sensitivity = self._source_sensitivity(source)
        self.at_step = step

    def count_bad(self) -> None:
        """After all ranks have the first one's verdict."""
        self.bad_in_a_row = torch.where(self.finite, 0, self.bad_in_a_row + 1)
        self.bad_seen.send(self.bad_in_a_row)

    def _adapt(self, source: Tensor) -> Tensor:
        if self.adapter is not None:
            return self.adapter(self.before, source)
        rows, config = self.before, self.transfer.adapter
        unit = standardise(rows, dim=1)
        if config.output == "layernorm":
            return unit
        whole = unit * rows.std(correction=0) + rows.mean()
        return rows + config.first_gate() * (whole - rows)

    def _read(self, source: Tensor) -> Tensor:
        """What the transfer reads of the source's matrix."""
        if self.transfer.reads == "weight":
            return source
        now = source.clone()  # of a plain module it is the weight itself
        change = torch.zeros_like(now) if self.source_before is None else now - self.source_before
        self.source_before = now
        return change

    def _controlled(self, source: Tensor) -> Tensor:
        """The source that the control shows to the adapter; fixed by the seed."""
        if self.control == "noise":
            return self._noise(source)
        if self.control == "shuffled":
            # Along the axis that the adapter takes to mean something; rows where it takes none.
            axis = self.adapter.shared_axis if self.adapter is not None else 0
            if self.order is None:
                self.order = _derangement(source.shape[axis], self.seed).to(source.device)
            return source.index_select(axis, self.order)
        return source

    def _noise(self, like: Tensor, stream: int = 0) -> Tensor:
        """Gaussian noise of the source's own scale, the same at every transfer."""
        if stream not in self.noises:
            generator = torch.Generator().manual_seed(self.seed + 7919 * (stream + 1))
            self.noises[stream] = torch.randn(like.shape, generator=generator).to(like)
        return self.noises[stream] * like.std() + like.mean()

    def _source_sensitivity(self, source: Tensor) -> Tensor:
        """How much the proposal changes, relative to its size, when the source is swapped for noise."""
        if self.adapter is None:
            return torch.zeros((), device=self.device)
        with evaluating(self.adapter), as_written():
            real = self.adapter(self.before, source)
            fake = self.adapter(self.before, self._noise(source, stream=1))
        return (real - fake).norm() / real.norm().clamp_min(1e-12)

    def written(self, whole: Tensor) -> Tensor:
        """`whole` with this transfer's part replaced, the rest untouched."""
        return self.view.put(self.accepted, whole)

    def observe(self, gradient: Tensor) -> None:
        self.gradient = self.view.pull(gradient)

    def learn(self, whole_after: Tensor) -> dict[str, Tensor]:
        """One adapter update, phi <- phi - eta (dG/dphi)^T c: where c is the proposal minus where the optimizer took
        it (`lookahead`), or the loss gradient at the proposal (`exact`)."""
        with torch.no_grad():
            after = self.view.see(whole_after).to(self.accepted.dtype)
            moved = self.accepted - after
            change, own = self.accepted - self.before.to(self.accepted.dtype), -moved
            log = {
                "change": change.norm() / self.before.norm().clamp_min(1e-12),
                "cosine": (change * own).sum() / (change.norm() * own.norm()).clamp_min(1e-30),
                "sensitivity": self.sensitivity,
            }
        taught = self.finite
        if self.adapter is not None:
            log["gate"] = self.adapter.gate_value().detach().clone()
            for layer, omega in enumerate(self.adapter.omega()):
                log |= {f"omega{layer}.{i}": weight for i, weight in enumerate(omega.clone())}
        if self.learns:
            if self.transfer.update == "exact" and self.gradient is None:
                raise RuntimeError("update='exact' learns from the gradient: call observe() between backward and step.")
            cotangent = moved if self.gradient is None else self.gradient.to(moved.dtype)
            taught = self._update(cotangent)
        log["skipped"] = 1.0 - taught.float()
        self.gradient = None
        del self.proposal, self.view
        return log

    def _update(self, cotangent: Tensor) -> Tensor:
        """Step the adapter's optimizer, unless the proposal, what it learns from or its gradient is not finite: then
        adapter and moments stay as they are. Returns whether it has learnt, on the device; the host does not look."""
        assert self.adapter is not None
        self.schedule.step_update(self.updates)
        taught = self.finite & torch.isfinite(cotangent).all()
        cotangent = torch.where(taught, cotangent, torch.zeros_like(cotangent))
        learning = [p for p in self.adapter.parameters() if p.requires_grad]
        found = torch.autograd.grad(self.proposal, learning, cotangent, allow_unused=True)
        used = [(p, gradient) for p, gradient in zip(learning, found, strict=True) if gradient is not None]
        # As one vector: a choice and a product each, not one for each of a hundred small tensors.
        flat = torch.cat([gradient.reshape(-1) for _, gradient in used])
        taught = taught & torch.isfinite(flat).all()
        flat = torch.where(taught, flat, 0.0)  # a non-finite proposal has non-finite gradients even at 0
        if self.transfer.optim.clip > 0:
            flat *= (self.transfer.optim.clip / (flat.norm() + 1e-6)).clamp_max(1.0)
        for (p, _), gradient in zip(used, flat.split([p.numel() for p, _ in used]), strict=True):
            p.grad = gradient.view_as(p)
        self._make_momentum()
        self.optimizer.found_inf = 1.0 - taught.float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.updates += 1
        return taught

    def _make_momentum(self) -> None:
        """Zeros for SGD's momentum before its first step: a fused step that is left out would keep what an empty tensor
        happens to hold."""
        for group in self.optimizer.param_groups:
            if group.get("momentum") and not self.optimizer.state:
                for p in group["params"]:
                    if p.grad is not None:
                        self.optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)

    def warn_if_bad(self) -> int:
        """Say once, on the first rank, that the last proposal was not finite; how many in a row were not."""
        bad = self.bad_seen.receive()
        if bad and self.warned_at != self.at_step and not (dist.is_initialized() and dist.get_rank()):
            warnings.warn(
                f"transfer {self.name}: the proposal at step {self.at_step} was not finite, nothing was written.",
                stacklevel=4,
            )
        self.warned_at = self.at_step
        return bad

    def raise_if_diverged(self) -> None:
        """Give up after too many proposals in a row that were not finite; the same verdict on all ranks."""
        bad = self.warn_if_bad()
        if bad >= BAD_IN_A_ROW:
            raise TransferDiverged(
                f"transfer {self.name}: {bad} proposals in a row were not finite: lower its optim.lr or its gate."
            )

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "updates": self.updates,
            "bad_in_a_row": int(self.bad_in_a_row),
            "at_step": self.at_step,
        }
        if bool(self.sensitivity.isfinite()):  # not measured yet, or not to be measured: nothing to save
            state["sensitivity"] = self.sensitivity
        if self.adapter is not None:
            state["adapter"] = self.adapter.state_dict()
        if self.learns:
            state["optimizer"] = self.optimizer.state_dict()
        if self.source_before is not None:
            state["source_before"] = self.source_before
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.updates = state["updates"]
        self.bad_in_a_row = torch.full_like(self.bad_in_a_row, state["bad_in_a_row"])
        self.bad_seen.send(self.bad_in_a_row)
        self.sensitivity = state.get("sensitivity", torch.tensor(torch.nan)).to(self.device)
        self.at_step = self.warned_at = state["at_step"]
        if "source_before" in state:
            self.source_before = state["source_before"].to(self.device)
        if self.adapter is not None:
            self.adapter.load_state_dict(state["adapter"])
        if self.learns:
            self.optimizer.load_state_dict(state["optimizer"])


class _Late:
    """A device's number that the host reads later, without waiting for more than was queued before it was sent."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.number = torch.zeros((), dtype=torch.long, pin_memory=self.on_gpu)
        self.sent = torch.cuda.Event() if self.on_gpu else None

    def send(self, number: Tensor) -> None:
        self.number.copy_(number, non_blocking=True)
        if self.sent is not None:
            self.sent.record()

    def receive(self) -> int:
        if self.sent is not None:
            self.sent.synchronize()
        return int(self.number)


def _derangement(size: int, seed: int) -> Tensor:
    """A random order of `size` things in which none keeps its place: one cycle through all of them."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    moved = torch.empty_like(order)
    moved[order] = order.roll(1)
    return moved


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers that are equal on all ranks, and that leave the models' own stream where it was."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
