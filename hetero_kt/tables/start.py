"""The runs that a table lacks: as processes, one after another, or as arrays of Slurm's jobs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hetero_kt.report.runs import find
from hetero_kt.shipped import deepspeed_words, folder, launcher_words
from hetero_kt.tables import Budget, Command, Table, resolved
from hetero_kt.tables.runs import Line, counting


@dataclass(frozen=True)
class Start:
    """One process that has to run."""

    command: Command
    seeds: tuple[int, ...]
    """Empty: the recipe's own."""
    needs: tuple[str, ...]
    """Commands that have to succeed before."""

    def words(self, output_dir: str, ranks: int) -> list[str]:
        """As an argument list."""
        launcher = launcher_words(self.command.launcher)
        start = [sys.executable, *launcher]
        if ranks > 1:
            start = ["deepspeed", "--num_accelerators", str(ranks), *deepspeed_words(launcher)]
        seeds = ["--seeds", *map(str, self.seeds)] if self.seeds else []
        return [*start, *self.command.options, "--output-dir", output_dir, *seeds]


def starts(table: Table, budget: Budget, lines: Sequence[Line], seeds: Sequence[int], output_dir: str) -> list[Start]:
    """What has to run for `seeds` of every row, teachers before their students; rows that share a run ask for it
    once."""
    found = find([output_dir])
    wanted: dict[str, Start] = {}
    claimed: set[Path] = set()
    for line in lines:
        command = line.row.commands.get(budget)
        if command is None:
            continue
        if table.plans:
            wanted.setdefault(str(command), Start(command, (), ()))
            continue
        one = resolved(command, "--output-dir", output_dir)
        missing = tuple(seed for seed in line.missing(seeds) if one.folder(seed) not in claimed)
        claimed |= {one.folder(seed) for seed in missing}
        if not missing:
            continue
        needed = table.needed(command)
        for earlier in needed:
            recipe = resolved(earlier, "--output-dir", output_dir).recipe
            if not counting(recipe, [recipe.seed], found)[0]:
                needs = tuple(str(other) for other in table.needed(earlier))
                wanted.setdefault(str(earlier), Start(earlier, (), needs))
        wanted[f"{command} {missing}"] = Start(command, missing, tuple(str(other) for other in needed))
    return list(wanted.values())


def run(todo: Sequence[Start], output_dir: str, ranks: int) -> list[str]:
    """Start one process after another; returns a sentence on each that failed or had to be left out."""
    failed: dict[str, str] = {}
    for i, start in enumerate(todo):
        lost = [need for need in start.needs if need in failed]
        if lost:
            failed[str(start.command)] = f"Left out: {start.command}, since this failed: {lost[0]}"
            continue
        print(
            f"{i + 1} of {len(todo)}: {start.command}, seeds {' '.join(map(str, start.seeds)) or 'as it is'}",
            flush=True,
        )
        # As long as training takes; the runs end with this process (hetero_kt/signals.py).
        status = subprocess.run(start.words(output_dir, ranks), check=False).returncode
        if status:
            failed[str(start.command)] = f"Failed with status {status}: {start.command}"
    return list(failed.values())


# --- Slurm ---


def submit(todo: Sequence[Start], output_dir: str, options: Sequence[str]) -> list[str]:
    """Submit an array of seeds for each of `todo`, through `slurm/array.sbatch`; what it needs comes before.

    An array that waits for others starts once these have succeeded, and is cancelled if one of them fails. What is in
    the queue under the same name already is left there: two jobs would train in one folder.

    Args:
        todo: in an order in which nothing needs a later one.
        output_dir: where runs go.
        options: `sbatch`'s own, for every array.

    Returns:
        A sentence on each array.

    Raises:
        ValueError: no `sbatch` on this machine, a start that is no run, or `sbatch` refuses.
    """
    if shutil.which("sbatch") is None:
        raise ValueError("table: this machine has no sbatch: use --slurm where Slurm is, or --run here.")
    batch = folder("slurm")
    here = {"HETERO_KT_SLURM": str(batch)}  # where the batch file finds job.sh: Slurm runs a copy of the file itself
    queued = _queued()
    jobs: dict[str, str] = {}
    said = []
    for start in todo:
        one = resolved(start.command, "--output-dir", output_dir)
        if one.options.plan:
            raise ValueError(f"table: {start.command} plans and trains nothing: use --run.")
        name = f"{one.recipe.name}/{one.recipe.method.arm}"
        seeds = start.seeds or (one.recipe.seed,)
        if name in queued:
            jobs[str(start.command)] = queued[name]
            said.append(f"{name}: job {queued[name]} is in the queue already, nothing submitted")
            continue
        waits = [jobs[need] for need in start.needs if need in jobs]
        after = [f"--dependency=afterok:{':'.join(waits)}", "--kill-on-invalid-dep=yes"] if waits else []
        words = [
            *("sbatch", "--parsable", f"--job-name={name}", f"--array=0-{len(seeds) - 1}", *after, *options),
            *(str(batch / "array.sbatch"), " ".join(map(str, seeds)), one.recipe.method.arm),
            *(*launcher_words(start.command.launcher), *start.command.options),
            *("--output-dir", str(Path(output_dir).absolute())),
        ]
        # Slurm's commands have time limits of their own (MessageTimeout).
        ended = subprocess.run(words, env=os.environ | here, capture_output=True, text=True, check=False)
        if ended.returncode:
            done = f" (submitted before it: {', '.join(jobs.values())})" if jobs else ""
            raise ValueError(f"table: sbatch refused {name}{done}: {ended.stderr.strip() or 'without a word'}")
        job = ended.stdout.strip().partition(";")[0]  # with several clusters: ID;CLUSTER
        jobs[str(start.command)] = job
        behind = f", after {', '.join(waits)}" if waits else ""
        said.append(f"{name}: job {job}, seed{'s' * (len(seeds) > 1)} {' '.join(map(str, seeds))}{behind}")
    return said or ["Nothing is missing: nothing submitted."]


def _queued() -> dict[str, str]:
    """This user's jobs by name; of an array, its own ID."""
    if shutil.which("squeue") is None:
        return {}
    ended = subprocess.run(
        ["squeue", "--me", "--noheader", "--format=%F %j"], capture_output=True, text=True, check=False
    )
    return {name: job for job, _, name in (line.partition(" ") for line in ended.stdout.splitlines())}
