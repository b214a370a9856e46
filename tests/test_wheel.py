"""The package without its checkout: a wheel in an environment and a folder of their own.

The environment borrows the libraries of this one, and nothing else: the package itself is the wheel's.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RECIPE, TAUGHT, PLAIN = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
Started = Callable[..., str]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(wheel, sdist); the wheel is built from the sdist, so that both are whole or neither is."""
    sources = tmp_path_factory.mktemp("sources") / "hetero_kt"
    ignored = shutil.ignore_patterns(".*", "runs", "results", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, sources, ignore=ignored)
    out = tmp_path_factory.mktemp("dist")
    ended = subprocess.run(
        [sys.executable, "-m", "build", "--outdir", out, sources], capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def python(distributions: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment in which the wheel is installed."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True, timeout=120)
    own = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    borrowed = [path for path in sys.path if path.endswith("site-packages")]
    # Lines of a .pth add folders whose own .pth files do not count: no editable install comes along.
    (own / "borrowed.pth").write_text("\n".join(dict.fromkeys([sysconfig.get_path("purelib"), *borrowed])) + "\n")
    command = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*command, distributions[0]], check=True, timeout=120)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder outside of any checkout, in which a user works."""
    return tmp_path_factory.mktemp("user")


@pytest.fixture(scope="module")
def start(python: Path, empty: Path) -> Started:
    """`start(words, status=0)`: what a command of the new environment prints, in the user's folder."""

    def run(*words: object, status: int = 0) -> str:
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        environment |= {"PATH": f"{python.parent}:{environment['PATH']}", "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
        ended = subprocess.run(
            [str(word) for word in (python, *words)],
            cwd=empty,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert ended.returncode == status, ended.stdout + ended.stderr
        return ended.stdout + ended.stderr

    return run


def test_every_folder_of_the_package_is_listed_for_the_wheel() -> None:
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    inside = {".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "hetero_kt").rglob("__init__.py")}
    beside = {f"hetero_kt.{folder}" for folder in ("launchers", "ds_configs", "slurm")}
    assert set(settings["packages"]) == inside | beside


@pytest.mark.slow
def test_the_wheel_holds_what_a_checkout_has_at_its_top(distributions: tuple[Path, Path]) -> None:
    wheel, sdist = distributions
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for folder, pattern in (("launchers", "*.py"), ("ds_configs", "*.json"), ("slurm", "*.sbatch")):
        for file in (ROOT / folder).glob(pattern):
            assert f"hetero_kt/{folder}/{file.name}" in names
    for name in ("slurm/job.sh", "py.typed", "tables/mergenet-1.yaml", "report/page.html"):
        assert f"hetero_kt/{name}" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "launchers/"))]
    with tarfile.open(sdist) as archive:
        sources = {name.partition("/")[2] for name in archive.getnames()}
    assert {"tests/conftest.py", "tests/test_adapter.py", "launchers/xvlm_vqa.py", "Makefile"} <= sources


@pytest.mark.slow
def test_the_package_is_the_wheels(start: Started, python: Path) -> None:
    told = start(
        "-c", "import hetero_kt, sys; print(hetero_kt.__file__, hetero_kt.__version__, 'torch' in sys.modules)"
    )
    file, version, torch = told.split()
    assert Path(file).is_relative_to(python.parents[1])
    assert torch == "False"
    assert start("-m", "hetero_kt", "--version").split() == ["hetero-kt", version]


@pytest.mark.slow
def test_the_readmes_recipes_and_loop_run(start: Started, empty: Path) -> None:
    (empty / "mine.py").write_text(RECIPE)
    (empty / "taught.py").write_text(TAUGHT)
    (empty / "plain.py").write_text(PLAIN)
    ranks = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    start(
        *ranks, "mine.py", "--compare", "none", "--seeds", "0", "--steps", "12", "--method.transfers.to-resnet.cycle", 4
    )
    assert (empty / "runs/digits_mutual/report.html").is_file()
    start("taught.py", "--first", "teacher", "--debug", "--method", "kd")
    assert (empty / "runs/digits_taught_debug/kd/seed0/result.json").is_file()
    start("plain.py")
    assert (empty / "narrow.pt").is_file()


@pytest.mark.slow
def test_a_launcher_runs_on_two_ranks_by_its_module(start: Started, empty: Path) -> None:
    deepspeed = Path(sys.executable).with_name("deepspeed")
    module = ("--module", "hetero_kt.launchers.cifar_mergenet")
    start(deepspeed, "--num_accelerators", 2, *module, "--debug", "--compare", "none")
    assert (empty / "runs/cifar_mergenet_debug/none/seed0/export/resnet50.safetensors").is_file()


@pytest.mark.slow
def test_every_command_works_in_an_empty_folder(start: Started, empty: Path) -> None:
    run = ("-m", "hetero_kt")
    listed = start(*run, "recipes")
    assert all(name in listed for name in ("xvlm_vqa", "zero3_offload", "array.sbatch"))
    start(*run, "recipes", "copy", "self_transfer", "zero2", "train.sbatch")
    assert (empty / "slurm" / "job.sh").is_file()
    for file in (empty / "slurm").iterdir():
        subprocess.run(["bash", "-n", file], check=True)
    start("self_transfer.py", "--debug", "--zero-config", "zero2.json")
    assert "fc.weight" in start(*run, "sites", "cifar:resnet_tiny")
    assert "ZeRO" in start(*run, "plan", "cifar_fbt", "--variant", "digits")
    assert "mergenet-1" in start(*run, "table", "--list")
    command = start(*run, "table", "mergenet-1", "--seeds", "1", "--commands")
    assert "-m hetero_kt.launchers.cifar_mergenet" in command
    start(*run, "report", "runs/self_transfer_irb16_debug", "--html", "page.html")
    assert (empty / "page.html").is_file()
    assert "safetensors" in start(*run, "export", "runs/self_transfer_irb16_debug")
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("one", "two"):
            (empty / "images" / part / name).mkdir(parents=True)
            for i in range(3):
                pixels = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(empty / "images" / part / name / f"{i}.png")
    start(*run, "shards", "images", "shards")
    assert list((empty / "shards" / "train").glob("*.tar"))


@pytest.mark.slow
def test_a_wrong_name_is_one_sentence(start: Started) -> None:
    said = start("-m", "hetero_kt", "recipes", "copy", "xvlm_vqq", status=2)
    assert said == "error: no recipe, block or batch file is called xvlm_vqq: use xvlm_vqa or xvlm_retrieval.\n"
    said = start("-m", "hetero_kt.launchers.cifar_fbt", "--zero-config", "ds_configs/zero7.json", status=2)
    assert "--zero-config ds_configs/zero7.json does not exist" in said


@pytest.mark.slow
def test_the_tests_of_the_sdist_run(distributions: tuple[Path, Path], python: Path, tmp_path: Path) -> None:
    with tarfile.open(distributions[1]) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    chosen = ("tests/test_adapter.py", "tests/test_engine.py", "tests/test_cli.py")
    # -P: the installed package, not the folder that lies here.
    command = [python, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=400)
    assert ended.returncode == 0, ended.stdout + ended.stderr
