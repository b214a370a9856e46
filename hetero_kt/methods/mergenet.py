"""MergeNet (Li et al., arXiv 2404.13322): knowledge moves between the parameters of co-trained models.

Read the weights -> adapt -> write -> step the models -> step the adapters. `Exchange` is that loop's three calls, for
anybody's own training loop; `MergeNet` is the loop itself, over DeepSpeed engines. No gradient crosses models: an
adapter learns from a vector-Jacobian product of its own proposal.
"""

from __future__ import annotations

import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from torch import Tensor, nn

from hetero_kt.compiler import as_written
from hetero_kt.config import Control
from hetero_kt.distributed import params
from hetero_kt.distributed.engine import build_optimizer, build_schedule
from hetero_kt.distributed.learner import Learner
from hetero_kt.methods import Diverged
from hetero_kt.methods.sharing import Sharing
from hetero_kt.methods.sites import Side, Site, Transfer, named
from hetero_kt.nn.adapter import Adapter, build_adapter, standardise
from hetero_kt.profile import part

__all__ = ["Exchange", "MergeNet", "Site", "Transfer", "TransferDiverged"]

SENSITIVITY_EVERY = 10
"""Transfers between two measurements of source sensitivity, which take two more forwards of the adapter."""
BAD_IN_A_ROW = 5
"""Transfers in a row with a non-finite proposal after which a run is given up."""


class TransferDiverged(Diverged):
    """An adapter has proposed NaN or Inf too often in a row."""


class Exchange:
    """The transfers of one run: `propose()`, forward and backward, `observe()`, step, `learn()`.

    Args:
        transfers: any number, in any directions; no two into the same weight.
        control: `transfer`, or what stands in for it: `noise` (a fixed random source), `shuffled` (the source's rows
            permuted), `frozen` (adapters never learn), `standardise` (the target's rows standardised, no adapter),
            `none` (nothing is exchanged).
        seed: of the adapters' initial values and dropout, the noise and the permutation. Must be equal on all ranks.
        steps: training steps of the whole run, for the adapters' schedules; not needed by constant ones.

    Raises:
        ValueError: a site that does not exist or cannot take part, two transfers into one weight, `cycle` < 1.

    Every call is collective. Adapters are plain modules, one copy a rank: their inputs are equal on all ranks, and so
    are their gradients, so that nothing has to be reduced. What is written is the first rank's proposal, everywhere.
    """

    def __init__(
        self, transfers: Sequence[Transfer], *, control: Control = "transfer", seed: int = 0, steps: int = 0
    ) -> None:
        if control == "sharing":
            raise ValueError("the control sharing has no adapters: use Sharing of hetero_kt.methods.sharing.")
        self.control = control
        self.traffic = params.Traffic()
        self.step = 0
        self.paths = [_Path(transfer, control, seed, steps) for transfer in named(transfers)]
        _check_targets(self.paths)
        if dist.is_initialized() and dist.get_world_size() > 1:
            for adapter in self.adapters().values():  # equal seeds are equal values only on equal hardware
                _as_on_first_rank([tensor.data for tensor in (*adapter.parameters(), *adapter.buffers())])
        self._due: list[_Path] = []

    def propose(self) -> None:
        """Before the forward: read every site that is due in one gather, adapt, then write (Eq. 3, 6, 7).

        Raises:
            TransferDiverged: five proposals in a row were not finite.
        """
        self._due = [p for p in self.paths if self.control != "none" and p.transfer.is_due(self.step)]
        for path in self._due:
            path.raise_if_diverged()
        self.step += 1
        if not self._due:
            return
        started = time.perf_counter()
        sides = [path.source for path in self._due] + [path.target for path in self._due]
        unique = {id(side.weight.parameter): side.weight for side in sides}
        with part("gather"):
            whole = dict(zip(unique, params.read(list(unique.values()), self.traffic), strict=True))
        with part("adapter"):
            for path in self._due:
                source, target = (whole[id(side.weight.parameter)] for side in (path.source, path.target))
                path.propose(source, target, self.step - 1)
        with part("gather"):
            _follow_first_rank(self._due)
            for parameter, paths in _by_target(self._due).items():
                value = whole[parameter]
                for path in paths:  # the thirds of one fused projection may each be a target
                    value = path.written(value)
                written = [path.finite for path in paths if path.transfer.moments == "reset"]
                resets = torch.stack(written).any() if written else None
                params.write([paths[0].target.weight], [value], "reset" if written else "keep", resets)
        self._spent = time.perf_counter() - started

    def observe(self) -> None:
        """Between backward and step: keep the gradient that `exact` learns from; nothing to do otherwise."""
        due = [path for path in self._due if path.transfer.update == "exact" and path.learns]
        if due:
            with part("gather"):
                gradients = params.gradients([path.target.weight for path in due], self.traffic)
            for path, gradient in zip(due, gradients, strict=True):
                path.observe(gradient)

    def learn(self) -> dict[str, Tensor]:
        """After the steps: see where the optimizers took the proposals, update the adapters, say what happened.

        Returns one scalar tensor per measurement, `<transfer>/<name>`; empty when no transfer was due.
        """
        due, self._due = self._due, []
        if not due:
            return {}
        started = time.perf_counter()
        unique = {id(path.target.weight.parameter): path.target.weight for path in due}
        with part("gather"):
            after = dict(zip(unique, params.read(list(unique.values()), self.traffic), strict=True))
        log = {}
        with part("adapter"):
            for path in due:
                for name, value in path.learn(after[id(path.target.weight.parameter)]).items():
                    log[f"{path.name}/{name}"] = value
        log["transfer_seconds"] = torch.tensor(self._spent + time.perf_counter() - started)
        return log

    def adapters(self) -> dict[str, Adapter]:
        """The adapter of each transfer, by the transfer's name."""
        return {path.name: path.adapter for path in self.paths if path.adapter is not None}

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, in plain tensors and numbers."""
        for path in self.paths:
            path.warn_if_bad()  # a run's last transfer has no next one that would say it
        return {
            "step": self.step,
            "bytes_gathered": self.traffic.bytes,
            "paths": {path.name: path.state_dict() for path in self.paths},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()` of an exchange with the same transfers."""
        self.step = state["step"]
        self.traffic.bytes = state["bytes_gathered"]
        for path in self.paths:
            path.load_state_dict(state["paths"][path.name])


class _Path:
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
            self.schedule = build_schedule(self.optimizer, transfer.schedule, -(-steps // transfer.cycle))
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
            return source.index_select(axis, _derangement(source.shape[axis], self.seed).to(source.device))
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
                "skipped": 1.0 - self.finite.float(),
            }
        if self.adapter is not None:
            log["gate"] = self.adapter.gate_value().detach().clone()
            for layer, omega in enumerate(self.adapter.omega()):
                log |= {f"omega{layer}.{i}": weight for i, weight in enumerate(omega.clone())}
        if self.learns:
            if self.transfer.update == "exact" and self.gradient is None:
                raise RuntimeError("update='exact' learns from the gradient: call observe() between backward and step.")
            cotangent = moved if self.gradient is None else self.gradient.to(moved.dtype)
            self._update(torch.where(self.finite, cotangent, torch.zeros_like(cotangent)))
        self.gradient = None
        del self.proposal, self.view
        return log

    def _update(self, cotangent: Tensor) -> None:
        assert self.adapter is not None
        self.schedule.step_update(self.updates)
        learning = [p for p in self.adapter.parameters() if p.requires_grad]
        found = torch.autograd.grad(self.proposal, learning, cotangent, allow_unused=True)
        used = [(p, gradient) for p, gradient in zip(learning, found, strict=True) if gradient is not None]
        # As one vector: a choice and a product each, not one for each of a hundred small tensors.
        flat = torch.cat([gradient.reshape(-1) for _, gradient in used])
        flat = torch.where(self.finite, flat, 0.0)  # a non-finite proposal has non-finite gradients even at 0
        if self.transfer.optim.clip > 0:
            flat *= (self.transfer.optim.clip / (flat.norm() + 1e-6)).clamp_max(1.0)
        for (p, _), gradient in zip(used, flat.split([p.numel() for p, _ in used]), strict=True):
            p.grad = gradient.view_as(p)
        self.optimizer.step()
        self.updates += 1

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
            "sensitivity": self.sensitivity,
        }
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
        self.sensitivity = state["sensitivity"].to(self.device)
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


def _as_on_first_rank(tensors: Sequence[Tensor]) -> None:
    """In place, in one broadcast."""
    if tensors:
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.broadcast(flat, 0)
        for tensor, values in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(values.view_as(tensor))


def _follow_first_rank(paths: Sequence[_Path]) -> None:
    """Every rank takes the first one's proposals and verdicts: a weight must be equal everywhere, to the bit."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        own = [t for p in paths for t in (p.accepted, p.finite)]
        flat = torch.cat([t.reshape(-1) for t in own])  # of the widest type among them
        dist.broadcast(flat, 0)
        pieces = iter(flat.split([t.numel() for t in own]))
        for path in paths:
            path.accepted = next(pieces).reshape(path.accepted.shape).to(path.accepted.dtype)
            path.finite = next(pieces).reshape(()).bool()
    for path in paths:
        path.count_bad()


def _check_targets(paths: Sequence[_Path]) -> None:
    """One transfer a weight; the thirds of a fused projection are weights of their own."""
    for i, one in enumerate(paths):
        for other in paths[i + 1 :]:
            same = one.target.weight.parameter is other.target.weight.parameter
            if same and (one.target.part == other.target.part or None in (one.target.part, other.target.part)):
                raise ValueError(
                    f"transfers {one.name} and {other.name} write the same weight {other.transfer.target.weight}: "
                    "give one of them another target."
                )


def _by_target(paths: Sequence[_Path]) -> dict[int, list[_Path]]:
    grouped: dict[int, list[_Path]] = {}
    for path in paths:
        grouped.setdefault(id(path.target.weight.parameter), []).append(path)
    return grouped


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers that are equal on all ranks, and that leave the models' own stream where it was."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """`module` in eval mode (no dropout, no power iteration), then as it was."""
    was = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was)


class MergeNet:
    """Co-trained models on DeepSpeed engines, and the exchange between them: the method that the trainer runs.

    Args:
        learners: one a model, by the model's name.
        losses: the model's name -> (engine, batch) -> scalar loss.
        budgets: the model's name -> optimizer steps after which it rests; a model without one never does.
    """

    def __init__(
        self,
        learners: dict[str, Learner],
        exchange: Exchange | Sharing,
        losses: Mapping[str, Callable[[nn.Module, Any], Tensor]],
        budgets: Mapping[str, int] | None = None,
    ) -> None:
        self.learners, self.exchange, self.losses, self.budgets = learners, exchange, losses, budgets or {}
        self.models = tuple(learners)

    def step(self, step: int, batches: Mapping[str, Any]) -> dict[str, Tensor]:
        """One optimizer step of every model that still trains, a transfer first where one is due; `{name: scalar}` on
        the device."""
        training = {n: learner for n, learner in self.learners.items() if step < self.budgets.get(n, step + 1)}
        self.exchange.propose()
        log = {}
        for name, learner in training.items():
            learner.begin(step)
            log[f"{name}/loss"] = self._accumulate(learner.engine, batches[name], self.losses[name])
        self.exchange.observe()
        with part("optimizer"):
            for learner in training.values():
                learner.step()
        return log | self.exchange.learn()

    def _accumulate(self, engine: DeepSpeedEngine, batch: Any, loss_of: Callable[[nn.Module, Any], Tensor]) -> Tensor:
        """Backward over the micro-batches of this rank's share; every one but the last also takes DeepSpeed's
        (empty) step, which only counts. The last one's step is the caller's, after `observe`."""
        rows = engine.train_micro_batch_size_per_gpu()
        if hasattr(batch, "split"):  # not every tensor of it has a row for each sample
            pieces = batch.split(rows)
        else:
            pieces = list(zip(*(tensor.split(rows) for tensor in batch), strict=True))
        total = torch.zeros((), device=engine.device)
        for i, piece in enumerate(pieces):
            with part("forward"):
                loss = loss_of(engine, piece)
            with part("backward"):
                engine.backward(loss)
            total += loss.detach() / len(pieces)
            if i + 1 < len(pieces):
                engine.step()
        return total

    def state_dict(self) -> dict[str, Any]:
        return self.exchange.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.exchange.load_state_dict(state)

    def measured(self) -> dict[str, Any]:
        return {"bytes_gathered": self.exchange.traffic.bytes}
