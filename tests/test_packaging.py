"""What is built of the repository: twice the same, whole, and enough to work with where nothing else of it is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from tests.lowest import PROJECTS, requirements

ROOT = Path(__file__).parents[1]
BUILT = {".": "tdkit", "plugins/tdkit-distill": "tdkit_distill"}  # the package by the folder of its project
NOT_BUILT = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", "dist", "runs", "site", "shared", ".w*")


def test_projects_agree_on_what_they_share() -> None:
    ours, plugins = ({each.name: str(each.specifier) for each in requirements(project)} for project in PROJECTS)
    assert {name: ours[name] for name in plugins if name in ours} == {name: plugins[name] for name in plugins}


@pytest.fixture(scope="module")
def hatchling(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a build; pip fetches what builds."""
    place = tmp_path_factory.mktemp("hatchling")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt")]
    subprocess.run([*pip, "--target", str(place), "hatchling"], check=True)
    return {**os.environ, "PYTHONPATH": str(place), "SOURCE_DATE_EPOCH": "1700000000"}


@pytest.fixture(scope="module")
def wheels(hatchling: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """The wheel and the sdist of each project, by its folder."""
    return {project: built(project, hatchling, tmp_path_factory.mktemp("first")) for project in BUILT}


def built(project: str, environment: dict[str, str], place: Path) -> tuple[Path, Path]:
    """Build a copy of a project, whose files have other dates; returns the wheel and the sdist."""
    copy = shutil.copytree(ROOT, place / "copy", ignore=NOT_BUILT, copy_function=shutil.copyfile) / project
    return packed(copy, environment, place / "dist")


def packed(folder: Path, environment: dict[str, str], out: Path) -> tuple[Path, Path]:
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(out)]
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


@pytest.mark.slow
@pytest.mark.parametrize("project", BUILT)
def test_a_second_build_has_the_same_bytes(
    project: str, wheels: dict[str, tuple[Path, Path]], hatchling: dict[str, str], tmp_path: Path
) -> None:
    for first, second in zip(wheels[project], built(project, hatchling, tmp_path), strict=True):
        assert first.name == second.name
        assert first.read_bytes() == second.read_bytes(), first.name


@pytest.mark.slow
@pytest.mark.parametrize("project", BUILT)
def test_wheels_hold_the_package_and_no_more(project: str, wheels: dict[str, tuple[Path, Path]]) -> None:
    package = BUILT[project]
    names = {name for name in zipfile.ZipFile(wheels[project][0]).namelist() if ".dist-info/" not in name}
    ours = {
        path.relative_to(ROOT / project).as_posix()
        for path in (ROOT / project / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == ours
    assert f"{package}/py.typed" in names


@pytest.mark.slow
@pytest.mark.parametrize("project", BUILT)
def test_the_source_gives_the_same_wheel(
    project: str, wheels: dict[str, tuple[Path, Path]], hatchling: dict[str, str], tmp_path: Path
) -> None:
    wheel, sdist = wheels[project]
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    again, _ = packed(folder, hatchling, tmp_path / "dist")
    assert again.read_bytes() == wheel.read_bytes()


USE = """
from importlib.metadata import version
from importlib.resources import files
import torch, tdkit
from torch import nn
from tdkit.cli.app import main
from tdkit.reporting.report import write_report

assert version("tdkit") == tdkit.__version__
model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
rows = tdkit.sweep(model, {"with": ["low_rank"], "budget": [0.9]}, folder="sweep")
write_report(["sweep"], "report")
tdkit.save(tdkit.compress(model, tdkit.Policy([tdkit.Rule("*", "low_rank")], budget=0.8)), "saved")
again = tdkit.load("saved", model=nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)))
x = torch.randn(3, 32)
assert torch.equal(again(x), model(x))
print(tdkit.__file__)
"""

TRAIN = """
import torch, tdkit, tdkit_distill
from tests_of import student
from tdkit_distill.losses.loss import losses

assert {"logits", "attention"} <= set(losses.names())
data = torch.arange(96).reshape(12, 8) % 40
done = tdkit.heal(student(), student(), data, tokens=96, precision="no", device="cpu", folder="healed")
assert done.finished
print(tdkit_distill.__file__)
"""

STUDENT = """
from transformers import GPT2Config, GPT2LMHeadModel

def student():
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 40, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
"""


@pytest.fixture(scope="module")
def installed(wheels: dict[str, tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` of an environment with the wheels, and with the packages of this environment but those of tdkit."""
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, with_pip=False, symlinks=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(place), "platbase": str(place)}))
    others = place / "others"
    others.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(("tdkit", "_tdkit", "__editable__")) and entry.suffix != ".pth":
            (others / entry.name).symlink_to(entry)
    (site / "others.pth").write_text(f"{others}\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--python", str(place / "bin" / "python"), "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--no-index", *(str(wheel) for wheel, _ in wheels.values())], check=True)
    return place / "bin"


def said(folder: Path, *command: str | Path) -> str:
    """Run a command in an empty folder, without the repository on any path; returns what it prints."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert str(ROOT) not in done.stdout
    return done.stdout


@pytest.mark.slow
def test_the_wheels_work_where_nothing_else_of_the_repository_is(installed: Path, tmp_path: Path) -> None:
    python, tdkit = installed / "python", installed / "tdkit"
    for command in (("--help",), ("doctor",), ("heal", "--help"), ("decompositions",)):
        assert said(tmp_path, tdkit, *command)
    listed = said(tmp_path, tdkit, "recipes")
    assert "smollm2-demo" in listed
    assert "gpt2-kngpt2" in listed, "the recipes of the plugin are found by its entry point"
    assert str(installed.parent) in said(tmp_path, python, "-c", USE)
    assert (tmp_path / "report" / "report.html").is_file()
    said(tmp_path, tdkit, "new-plugin", "mine")  # from templates in the wheel
    (tmp_path / "tests_of.py").write_text(STUDENT, encoding="utf-8")
    assert str(installed.parent) in said(tmp_path, python, "-c", TRAIN)
