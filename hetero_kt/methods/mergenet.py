"""MergeNet (Li et al., arXiv 2404.13322): knowledge moves between the parameters of co-trained models.

Read the weights -> adapt -> write -> step the models -> step the adapters. `Exchange` is that loop's three calls, for
anybody's own training loop; `MergeNet` is the loop itself, over DeepSpeed engines. No gradient crosses models: an
adapter learns from a vector-Jacobian product of its own proposal.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hetero_kt.config import Control, nearest
from hetero_kt.distributed import params
from hetero_kt.evaluate import world
from hetero_kt.methods.sharing import Sharing
from hetero_kt.methods.sites import Site, Transfer, named
from hetero_kt.methods.transfer import Path, TransferDiverged
from hetero_kt.nn.adapter import Adapter
from hetero_kt.profile import part

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from hetero_kt.distributed.learner import Learner

__all__ = ["Exchange", "MergeNet", "Site", "Transfer", "TransferDiverged"]


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
        ValueError: a site that does not exist or cannot take part, two transfers into one weight, `cycle` < 1, a
            control, update or the like that there is not.

    Every call is collective. Adapters are plain modules, one copy a rank: their inputs are equal on all ranks, and so
    are their gradients, so that nothing has to be reduced. What is written is the first rank's proposal, everywhere.
    """

    def __init__(
        self, transfers: Sequence[Transfer], *, control: Control = "transfer", seed: int = 0, steps: int = 0
    ) -> None:
        if control not in get_args(Control):  # or a misspelt control would be the transfer itself
            raise ValueError(f"the control {control} is unknown: use {nearest(control, get_args(Control))}.")
        if control == "sharing":
            raise ValueError("the control sharing has no adapters: use Sharing of hetero_kt.methods.sharing.")
        self.control = control
        self.traffic = params.Traffic()
        self.step = 0
        self.paths = [Path(transfer, control, seed, steps) for transfer in named(transfers)]
        _check_targets(self.paths)
        for adapter in self.adapters().values():  # equal seeds are equal values only on equal hardware
            own = [tensor.data for tensor in (*adapter.parameters(), *adapter.buffers())]
            for tensor, value in zip(own, _on_first_rank(own), strict=True):
                tensor.copy_(value)
        self._due: list[Path] = []

    def propose(self) -> None:
        """Before the forward: read every site that is due in one gather, adapt, then write (Eq. 3, 6, 7).

        Raises:
            TransferDiverged: five proposals in a row were not finite.
        """
        if any(path.learns for path in self._due):
            warnings.warn(
                "the adapters have not learnt from the transfer before: call learn() after the steps.", stacklevel=2
            )
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
        """Continue from `state_dict()` of an exchange with the same transfers.

        Raises:
            ValueError: it had others.
        """
        ours, theirs = [path.name for path in self.paths], list(state["paths"])
        if set(ours) != set(theirs):
            raise ValueError(
                f"the saved exchange has the transfers {', '.join(theirs)}, and this one {', '.join(ours)}: make it "
                "with those that were saved."
            )
        self.step = state["step"]
        self.traffic.bytes = state["bytes_gathered"]
        for path in self.paths:
            path.load_state_dict(state["paths"][path.name])


def _on_first_rank(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What the tensors are on the first rank, in one broadcast."""
    if not tensors or world() == 1:
        return list(tensors)
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])  # of the widest type among them
    dist.broadcast(flat, 0)
    values = flat.split([tensor.numel() for tensor in tensors])
    return [value.view(tensor.shape).to(tensor.dtype) for value, tensor in zip(values, tensors, strict=True)]


def _follow_first_rank(paths: Sequence[Path]) -> None:
    """Every rank takes the first one's proposals and verdicts: a weight must be equal everywhere, to the bit."""
    first = iter(_on_first_rank([tensor for path in paths for tensor in (path.accepted, path.finite)]))
    for path in paths:
        path.accepted, path.finite = next(first), next(first)
        path.count_bad()


def _check_targets(paths: Sequence[Path]) -> None:
    """One transfer a weight; the thirds of a fused projection are weights of their own."""
    for i, one in enumerate(paths):
        for other in paths[i + 1 :]:
            same = one.target.weight.parameter is other.target.weight.parameter
            if same and (one.target.part == other.target.part or None in (one.target.part, other.target.part)):
                raise ValueError(
                    f"transfers {one.name} and {other.name} write the same weight {other.transfer.target.weight}: "
                    "give one of them another target."
                )


def _by_target(paths: Sequence[Path]) -> dict[int, list[Path]]:
    grouped: dict[int, list[Path]] = {}
    for path in paths:
        grouped.setdefault(id(path.target.weight.parameter), []).append(path)
    return grouped


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
