"""The `hetero-kt` command: what can take part, what a run costs, the papers' tables, what runs have shown, where models
lie; shards of pictures, and pictures of features."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hetero_kt import __version__, requirements
from hetero_kt.messages import printable

if typing.TYPE_CHECKING:
    from hetero_kt.report import Report


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command.

    Raises:
        SystemExit: 2 after bad input, with one sentence; otherwise the command's own status unless that is 0.
    """
    arguments = _parser().parse_args(argv)
    try:
        for warning in requirements.check():
            print(warning, file=sys.stderr, flush=True)
        status = arguments.command(arguments)
    except ValueError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130  # as shells say it; every command begins again, or goes on, when it is started again
    if status:
        raise SystemExit(status)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hetero-kt", description=__doc__)
    parser.add_argument("--version", action="version", version=f"hetero-kt {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("recipes", help="list the launchers, ZeRO blocks and batch files, or copy one")
    command.add_argument("action", nargs="?", choices=("list", "copy"), default="list", help="(list)")
    command.add_argument("names", nargs="*", metavar="NAME", help="to copy: xvlm_vqa, zero3, train.sbatch, ...")
    command.add_argument("--to", default=".", metavar="FOLDER", help="where copies go (.)")
    command.set_defaults(command=_recipes)

    command = commands.add_parser("sites", help="list a model's weights that can take part in a transfer")
    command.add_argument("name", metavar="NAME", help="timm:resnet50, cifar:mobilenetv2, bert:4x256, ...")
    command.add_argument("--classes", type=int, default=100, help="outputs of the classifier (100)")
    command.add_argument("--image-size", type=int, default=32, help="for models of a fixed input size (32)")
    command.set_defaults(command=_sites)

    command = commands.add_parser("plan", help="print what a launcher's run would cost, without running it")
    command.add_argument("--gpus", type=int, default=1, help="of each node (1); name options before the launcher")
    command.add_argument("--nodes", type=int, default=1, help="to plan for (1)")
    command.add_argument("--memory", type=float, default=0.0, help="GiB of a GPU that it has to fit into (this one's)")
    command.add_argument("launcher", metavar="LAUNCHER", help="a file, or an installed one: cifar_mergenet, ...")
    command.add_argument("options", nargs=argparse.REMAINDER, metavar="...", help="the launcher's own options")
    command.set_defaults(command=_plan)

    command = commands.add_parser("table", help="show a published table beside our runs, and run what is missing")
    command.add_argument("name", nargs="?", default="", metavar="TABLE", help="mergenet-1, fbt-1, ...")
    command.add_argument("--list", action="store_true", help="name the tables")
    command.add_argument("--budget", choices=("cpu", "gpu", "paper"), default="cpu", help="size of the runs (cpu)")
    command.add_argument("--seeds", type=int, default=5, metavar="N", help="seeds that count, from --first-seed on (5)")
    command.add_argument("--first-seed", type=int, default=0, metavar="SEED", help="(0)")
    command.add_argument("--output-dir", default="runs", metavar="FOLDER", help="where runs are, and go (runs)")
    command.add_argument("--runs", nargs="+", default=[], metavar="FOLDER", help="look for runs there too")
    missing = command.add_mutually_exclusive_group()
    missing.add_argument("--run", action="store_true", help="start what is missing, one process after another")
    missing.add_argument(
        "--slurm",
        nargs="?",
        const="",
        metavar="OPTIONS",
        help="submit what is missing to Slurm, an array of seeds per row; sbatch's options as one word: "
        "--slurm='--gpus-per-node 1 --time 2:00:00'",
    )
    missing.add_argument("--commands", action="store_true", help="only print the commands that are missing, in order")
    command.add_argument("--ranks", type=int, default=1, help="processes of each run (1)")
    _add_forms(command)
    command.set_defaults(command=_table)

    command = commands.add_parser("report", help="compare finished runs over controls and seeds")
    command.add_argument("runs", nargs="+", metavar="RUNS", help="run folders, or folders that hold some")
    command.add_argument(
        "--table",
        nargs="+",
        metavar="TABLE",
        help="published tables to show beside the runs, or none (those in which they fill a row and its baseline)",
    )
    command.add_argument(
        "--budget", choices=("cpu", "gpu", "paper"), default="", help="of these tables (those that the runs are of)"
    )
    command.add_argument("--curves", metavar="FILE", help="draw there what the runs did over their steps")
    _add_forms(command)
    command.set_defaults(command=_report)

    command = commands.add_parser("shards", help="write a data set of pictures as webdataset shards, for training")
    command.add_argument(
        "source",
        metavar="IMAGEFOLDER|PARQUET",
        help="class folders, or train/ and val/ with such; Parquet; or a folder of pictures without classes",
    )
    command.add_argument("out", metavar="OUT", help="gets train/ and, where there is a validation part, validation/")
    command.add_argument("--shard-size", default="256MB", metavar="SIZE", help="samples (10000) or bytes (256MB)")
    command.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes, a shard each (all cores)")
    command.add_argument(
        "--validation", nargs="+", default=[], metavar="FILES", help="Parquet files, or a folder of class folders"
    )
    command.set_defaults(command=_shards)

    command = commands.add_parser("export", help="plain weights: where a run has them, or from a checkpoint")
    command.add_argument("run", metavar="RUN", help="a run folder, one that holds some, or a checkpoint")
    command.add_argument(
        "--official",
        metavar="FILE",
        help="write an X-VLM's weights there, named as its authors' code reads them (.th for torch.load)",
    )
    command.set_defaults(command=_export)

    command = commands.add_parser("ask", help="ask a trained X-VLM about a picture, or which caption fits it")
    command.add_argument("run", metavar="RUN", help="a run folder, or its export")
    command.add_argument("image", metavar="IMAGE", help="a picture")
    command.add_argument("question", nargs="?", default="", metavar="QUESTION", help="for a model that answers")
    command.add_argument("--captions", nargs="+", metavar="TEXT", help="for a model that matches: texts to be ranked")
    command.add_argument("--top", type=int, default=5, help="answers that are shown (5)")
    command.set_defaults(command=_ask)

    command = commands.add_parser("features", help="draw the features of models' four stages on pictures")
    command.add_argument("models", nargs="+", metavar="MODEL", help="timm:resnet50, cifar:mobilenetv2, ...")
    command.add_argument("--images", nargs="+", required=True, metavar="FILES_OR_FOLDER", help="pictures, at most 16")
    command.add_argument("--png", required=True, metavar="OUT", help="write the figure there")
    command.add_argument(
        "--init",
        nargs="+",
        default=(),
        metavar="FILE",
        help="weights, one for each model: a safetensors file, a finished run's folder, or - for fresh ones",
    )
    command.add_argument("--pretrained", action="store_true", help="take the weights that timm publishes")
    command.add_argument("--image-size", type=int, default=224, help="pixels of the square that models see (224)")
    command.add_argument("--classes", type=int, default=1000, help="outputs of the classifiers (1000)")
    command.set_defaults(command=_features)
    return parser


def _add_forms(command: argparse.ArgumentParser) -> None:
    """What `table` and `report` have in common."""
    command.add_argument(
        "--best",
        action="store_true",
        help="count each run's best evaluation instead of its last: on the test set that is optimistic, and is said so",
    )
    command.add_argument("--markdown", metavar="FILE", help="write the tables there too")
    command.add_argument("--csv", metavar="FILE", help="write the numbers there")
    command.add_argument("--png", metavar="FILE", help="draw the differences there, with their intervals")
    command.add_argument("--html", metavar="FILE", help="write all of it there, as one page for a browser")


def _recipes(arguments: argparse.Namespace) -> int:
    from hetero_kt import shipped

    if arguments.action == "copy":
        if not arguments.names:
            raise ValueError("recipes copy: name what to copy; hetero-kt recipes lists what there is.")
        for name in arguments.names:
            new, *beside = shipped.copy(name, Path(arguments.to))
            more = f" (reads {', '.join(map(str, beside))})" if beside else ""
            print(f"{new}{more}: {_USES[new.suffix].format(new)}")
        return 0
    if arguments.names:
        raise ValueError(f"recipes {arguments.names[0]}: use recipes copy {arguments.names[0]}, or recipes alone.")
    for kind, title in _KINDS.items():
        table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name in shipped.names(kind):
            suffix = ".sbatch" if kind == "slurm" else ""
            table.add_row(Text(f"{name}{suffix}"), Text(shipped.about(kind, name)))
        Console().print(table)
        print()
    print("hetero-kt recipes copy NAME puts one here.")
    return 0


_KINDS = {
    "launchers": "Launchers: deepspeed --module hetero_kt.launchers.NAME, or torchrun -m, srun python -m, python -m",
    "ds_configs": "ZeRO blocks: --zero-config ds_configs/NAME.json",
    "slurm": "Batch files for any launcher: copy one, then sbatch slurm/NAME",
}
_USES = {
    ".py": "deepspeed {}",
    ".json": "--zero-config {}",
    ".sbatch": "sbatch {} LAUNCHER.py",
}
"""How a copied file is used, by its suffix."""


def _sites(arguments: argparse.Namespace) -> int:
    from hetero_kt.checks import BERTS, XVLMS
    from hetero_kt.models import build
    from hetero_kt.nn.reencode import list_weights

    if arguments.name.partition(":")[0] in BERTS:
        from hetero_kt.models import bert

        model = bert.build(arguments.name, "classification", vocabulary=30_522, classes=arguments.classes)[0]
        weights = list_weights(model)
    elif arguments.name in XVLMS:
        import torch

        from hetero_kt.models import xvlm

        size = arguments.image_size
        with torch.device("meta"):
            forms = [xvlm.build(arguments.name, task, vocabulary=30_522, image_size=size)[0] for task in xvlm.FORMS]
        weights = list({weight.name: weight for form in forms for weight in list_weights(form)}.values())
    else:
        weights = list_weights(build(arguments.name, arguments.classes, image_size=arguments.image_size))
    table = Table(title=arguments.name, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("weight", overflow="fold")
    table.add_column("kind")
    table.add_column("matrix", justify="right", no_wrap=True)
    table.add_column("parameters", justify="right", no_wrap=True)
    notes = any(weight.note for weight in weights)
    if notes:
        table.add_column("note")
    for weight in weights:
        matrix = f"{weight.shape[0]} x {weight.shape[1]}"
        # As Text: `qkv.weight[v]` would lose its brackets to rich's markup.
        row: list[Text | str] = [Text(weight.name), weight.kind, matrix, f"{weight.parameters:,}"]
        table.add_row(*row, *([weight.note] if notes else []))
    Console().print(table)
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from hetero_kt.shipped import find_launcher

    launcher = find_launcher(arguments.launcher)
    if arguments.gpus < 1 or arguments.nodes < 1 or arguments.memory < 0:
        raise ValueError("plan: --gpus and --nodes are counts from 1 on, --memory is in GiB.")
    first_of_many = os.environ | {"RANK": "0", "WORLD_SIZE": str(arguments.gpus * arguments.nodes)}
    fits = ["--gpu-memory", str(arguments.memory)] if arguments.memory else []
    command = [sys.executable, *launcher, *arguments.options, "--plan", *fits]
    return subprocess.run(command, check=False, env=first_of_many).returncode


def _table(arguments: argparse.Namespace) -> int:
    from hetero_kt import tables
    from hetero_kt.report import Report, comparison, history
    from hetero_kt.report import runs as folders
    from hetero_kt.tables import runs, show, start

    if arguments.list:
        for name in tables.names():
            print(f"{name:18}{tables.read(name).title}")
        return 0
    if not arguments.name:
        raise ValueError("table: name one, or use --list to see which there are.")
    if arguments.seeds < 1 or arguments.first_seed < 0 or arguments.ranks < 1:
        raise ValueError("table: --seeds and --ranks are counts from 1 on, --first-seed is 0 or more.")
    table, budget, output_dir = tables.read(arguments.name), arguments.budget, arguments.output_dir
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)

    def find(best: bool = False) -> list[folders.Run]:
        found = folders.find([output_dir, *arguments.runs])
        return [history.best(run) for run in found] if best else found

    def fill(found: list[folders.Run]) -> tuple[list[runs.Line], list[str]]:
        return runs.fill(table, budget, seeds, found, "--output-dir", output_dir)

    failed: list[str] = []
    if arguments.commands or arguments.run or arguments.slurm is not None:
        # What has run has run, whichever of its evaluations counts.
        todo = start.starts(table, budget, fill(find())[0], seeds, output_dir)
        if arguments.commands:
            for one in todo:
                print(shlex.join(one.words(output_dir, arguments.ranks)))
            return 0
        if arguments.slurm is not None:
            if arguments.ranks > 1:
                raise ValueError(
                    "table: with --slurm ranks are tasks: --slurm='--ntasks-per-node 2' instead of --ranks."
                )
            for line in start.submit(todo, output_dir, shlex.split(arguments.slurm)):
                print(line)
            return 0
        failed = start.run(todo, output_dir, arguments.ranks)
    found = find(arguments.best)
    lines, notes = fill(found)
    counted = [run for line in lines for run in line.runs.values()]
    sheet = show.sheet(table, budget, lines, [*notes, *failed])
    more, note = show.beside([line.wanted for line in lines], [sheet], found)
    report = Report(
        tuple(comparison.experiments({run.folder: run for run in counted}.values())[0]),
        (sheet, *more),
        (note,) if note else (),
    )
    report.show(Console())
    _write(arguments, report)
    return 1 if failed else 0


def _report(arguments: argparse.Namespace) -> int:
    from hetero_kt import report

    wanted = [] if arguments.table == ["none"] else arguments.table
    gathered = report.gather(arguments.runs, best=arguments.best, tables=wanted, budget=arguments.budget)
    gathered.show(Console())
    _write(arguments, gathered, arguments.curves)
    return 0


def _write(arguments: argparse.Namespace, report: Report, curves: str = "") -> None:
    """The forms that were asked for; `curves` is the file of the runs' own.

    Raises:
        ValueError: a file that cannot be written, or a picture of nothing.
    """
    from hetero_kt.files import write_named
    from hetero_kt.report import figures, page

    try:
        for name, form in ((arguments.markdown, report.markdown), (arguments.csv, report.csv)):
            if name:
                write_named(name, form())
        if arguments.html:
            page.write(report, arguments.html)
        if arguments.png:
            figures.intervals(report.sheets, arguments.png)
        if curves:
            figures.curves(report.experiments, curves)
    except OSError as error:
        raise ValueError(f"{error.filename} cannot be written ({error.strerror}): name another file.") from error


def _shards(arguments: argparse.Namespace) -> int:
    from hetero_kt.data import inputs, sharding

    how: dict[str, Any] = {"shard_size": arguments.shard_size, "workers": arguments.workers}
    plain = inputs.is_plain(arguments.source)
    if plain:
        if arguments.validation:
            raise ValueError("shards: --validation goes with classes: shard the other folder by a command of its own.")
        parts = [sharding.write_plain(arguments.source, arguments.out, **how)]
    else:
        parts = sharding.write(arguments.source, arguments.out, validation=arguments.validation, **how)
    for part in parts:
        earlier = f", {part.kept} of them from an earlier run" if part.kept else ""
        classes = "" if plain else f" of {part.classes} classes"
        print(
            f"{part.folder}: {part.pictures:,} pictures{classes} in {part.shards} shards{earlier}, "
            f"{part.bytes / 1e6:,.1f} MB"
        )
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from hetero_kt.distributed import layout
    from hetero_kt.report import runs

    if arguments.official:
        from hetero_kt.ask import Trained

        Trained(arguments.run).write_official(arguments.official)
        print(arguments.official)
        return 0
    if (Path(arguments.run) / "DONE").is_file():
        _write_export(Path(arguments.run))
        return 0
    some = False
    for run in runs.find([arguments.run], demand=True):
        export = run.folder / "export"
        files = sorted([*export.glob("*.safetensors"), *export.glob("*/model.safetensors")])
        saved = layout.complete(run.folder / "checkpoints")
        if run.finished and files:
            for file in files:
                print(printable(str(file)))
        elif saved and (not run.finished or saved[-1].name == str(run.steps)):
            if not run.finished:
                said = f"{run.folder} {run.problem}: these are its weights of step {saved[-1].name}."
                print(printable(said), file=sys.stderr)
            _write_export(saved[-1], export)
        elif run.finished:
            raise ValueError(f"export: {run.folder} has lost its export: start its launcher again with --resume never.")
        else:
            said = f"{run.folder} {run.problem}: start its launcher again with the same options, which resumes it"
            print(printable(f"{said} and exports at the end."), file=sys.stderr)
            continue
        some = True
    return 0 if some else 1


def _write_export(checkpoint: Path, to: Path | None = None) -> None:
    from hetero_kt.export import write

    for file in write(checkpoint, to):
        print(printable(str(file)))


def _ask(arguments: argparse.Namespace) -> int:
    from hetero_kt.ask import Trained

    if bool(arguments.question) == bool(arguments.captions):
        raise ValueError("ask: give a QUESTION about the picture, or --captions to be ranked, one of the two.")
    if arguments.top < 1:
        raise ValueError(f"ask: --top {arguments.top} shows nothing: use 1 or more.")
    trained = Trained(arguments.run)
    if arguments.captions:
        found = trained.rank(arguments.image, arguments.captions)
    else:
        found = trained.ask(arguments.image, arguments.question, arguments.top)
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("caption" if arguments.captions else "answer", overflow="fold")
    table.add_column("fits (%)" if arguments.captions else "probability (%)", justify="right")
    for text, chance in found:
        table.add_row(Text(printable(text)), f"{100 * chance:.1f}")
    Console().print(table)
    return 0


def _features(arguments: argparse.Namespace) -> int:
    from hetero_kt import extras
    from hetero_kt.features import features

    extras.load("matplotlib", "report", "features")
    features(
        arguments.models,
        arguments.images,
        arguments.png,
        inits=arguments.init,
        pretrained=arguments.pretrained,
        image_size=arguments.image_size,
        classes=arguments.classes,
    )
    print(arguments.png)
    return 0


if __name__ == "__main__":
    main()
