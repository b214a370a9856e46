"""Print the runs that a launcher's command line means and that have no result yet: `python slurm/unfinished.py
launchers/X.py OPTIONS`.

A line is a run's folder and the step of its newest complete checkpoint, 0 for none. Nothing is printed when all are
finished. The folders are found as the launcher finds them: its recipes, its options, one run per seed and arm. RANK and
WORLD_SIZE in the environment name the ranks that are to come, so that a batch too small for them is refused here.
"""

import runpy
import sys

from hetero_kt import options
from hetero_kt.distributed import layout
from hetero_kt.folder import finished_steps, run_folder


def main(launcher: str, *arguments: str) -> None:
    variants = runpy.run_path(launcher)["VARIANTS"]
    recipe, given = options.resolve(variants, arguments)
    if given.print or given.plan:
        raise ValueError("--print and --plan train nothing: call the launcher without Slurm.")
    for one in (*options.runs_before(recipe, given, variants), *options.runs(recipe, given)):
        folder = run_folder(one)
        last = min(one.steps, given.max_steps or one.steps) if one.name == recipe.name else one.steps
        if finished_steps(folder) < last:
            saved = layout.complete(folder / "checkpoints")
            print(folder, saved[-1].name if saved else 0)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except SystemExit as end:  # --help, or a complaint of the command line's parser
        sys.exit(end.code or 2)
