"""A launcher's one call, `main`: the command line, then one run, or a comparison of runs.

Modules that take seconds to import are imported behind the command line, so that `--help`, a misspelt option or a wrong
name is answered at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from hetero_kt import signals
from hetero_kt.config import Recipe, flat
from hetero_kt.messages import first_line
from hetero_kt.options import Options, leave, parse, runs, runs_before

FRESH = Options()
"""How the variants of `--first` run: to their end, from where they stopped."""


def main(variants: Mapping[str, Callable[[], Recipe]]) -> None:
    """A launcher's one call. Wrong input ends it with one sentence, on the first rank, before any engine starts."""
    signals.end_quietly()
    recipe, options = parse(variants)
    try:
        if options.plan:
            _show_plan(recipe, options)
        elif options.unfinished:
            _show_unfinished(recipe, options, variants)
        else:
            runs_before(recipe, options, variants)  # a misspelt name ends here, not after the process group has met
    except ValueError as error:
        leave(error, alone=True)
    if not (options.plan or options.unfinished):
        _train(recipe, options, variants)


def _train(recipe: Recipe, options: Options, variants: Mapping[str, Callable[[], Recipe]]) -> None:
    """Join the ranks, and run one recipe, or several one after another. Collective."""
    signals.outlive_terminal()
    signals.end_with_starter()
    import torch
    import torch.distributed as dist

    from hetero_kt import parts, report
    from hetero_kt.data import Unreadable
    from hetero_kt.distributed import launch
    from hetero_kt.distributed.agreement import Unwritable, UserError, agreed
    from hetero_kt.distributed.heartbeat import Heartbeat
    from hetero_kt.distributed.meeting import NoMeeting
    from hetero_kt.methods import Diverged
    from hetero_kt.run import run

    try:
        if options.deterministic:
            launch.make_deterministic()
        ranks, stop = launch.start(agreed_on(recipe, options)), launch.StopSignal()
        torch.autograd.set_detect_anomaly(options.debug)
    except ValueError as error:
        leave(error, status=1 if isinstance(error, NoMeeting) else 2, alone=True)
    try:
        how = replace(FRESH, resume="never") if options.debug else FRESH
        teachers = [(one, how) for one in runs_before(recipe, options, variants)]
        wanted = [(one, options) for one in runs(recipe, options)]
        with agreed():  # hours of a teacher's training before a complaint about its student would be unkind
            for one in {one.method.arm: one for one, _ in wanted}.values():
                parts.check_pairs(one, {made.name for made, _ in teachers}, ranks.world)
        with Heartbeat(ranks, options.patience) as pulse:
            finished = all(run(one, how, ranks, stop, pulse) for one, how in (*teachers, *wanted))
            pulse.long("leaving")
            dist.barrier()
    except (UserError, Diverged) as error:
        # All ranks are here. After an error of one rank only, leaving the group would wait for the others.
        dist.destroy_process_group()
        leave(error, status=1 if isinstance(error, Diverged) else 2)
    except (Unreadable, Unwritable) as error:  # of this rank only: whoever started the ranks ends the others
        leave(error, alone=True)
    except Exception as error:
        if not stop.received:
            raise
        # The signal has ended something that this rank needed, such as a compiler in the same terminal.
        cause = f"stopped by a signal without a new checkpoint ({first_line(error)})"
        leave(ValueError(f"{cause}: the same command goes on from the last one."), 128 + stop.received, alone=True)
    dist.destroy_process_group()
    if finished and ranks.first:
        report.finish(Path(recipe.output_dir) / recipe.name)


def agreed_on(recipe: Recipe, options: Options) -> dict[str, str]:
    """What every rank has to be started with. Data may lie elsewhere on each node: what it holds is compared later."""
    fields = {**flat(recipe), **dataclasses.asdict(options)}
    return {f"--{path.replace('_', '-')}": str(value) for path, value in fields.items() if path != "data_dir"}


def _show_plan(recipe: Recipe, options: Options) -> None:
    """Print on the first rank what the run would cost."""
    from hetero_kt import plan
    from hetero_kt.distributed.launch import place

    rank, world = place()
    if rank == 0:
        plan.show(recipe, world, options.gpu_memory)


def _show_unfinished(recipe: Recipe, options: Options, variants: Mapping[str, Callable[[], Recipe]]) -> None:
    """Print the runs that this command line means and that have no result yet, a line each with the step of the newest
    complete checkpoint (0 for none), then how many there are. RANK and WORLD_SIZE in the environment name the ranks
    that are to come, so that a batch too small for them is refused.

    Where the command asks for another start than `--resume auto`, that is noted in the runs' folders: the ranks may die
    before they reach them, and the batch file adds `--resume auto` to a restart.
    """
    from hetero_kt.distributed import layout
    from hetero_kt.folder import asked, finished_steps, note_intent, run_folder

    count = 0
    for one in (*runs_before(recipe, options, variants), *runs(recipe, options)):
        folder = run_folder(one)
        last = min(one.steps, options.max_steps or one.steps) if one.name == recipe.name else one.steps
        # --debug begins anew at every start, and asks for that by itself: there is nothing to remember.
        if options.resume != "auto" and not options.debug and one.name == recipe.name:
            note_intent(folder, options.resume)
        if (resume := asked(folder)) != "auto":
            print(f"unfinished: {folder} --resume {resume}", flush=True)
            count += 1
        elif finished_steps(folder) < last:
            saved = layout.complete(folder / "checkpoints")
            print(f"unfinished: {folder} {saved[-1].name if saved else 0}", flush=True)
            count += 1
    print(f"unfinished runs: {count}", flush=True)
