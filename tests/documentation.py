"""What stands in the fenced blocks of the documentation, and how a block of each language is tried."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import typer
import yaml

from docs.notebooks import markdown, session
from tdkit.cli.app import app, main
from tdkit.errors import TdkitError
from tdkit.planning.policy import Policy
from tdkit.recipes import load_recipe
from tdkit.testing import use_entry_points

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), *DOCS.rglob("*.ipynb")])
FENCE = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n+)?"
    r"""```(?P<language>\w*)(?: title="(?P<title>[^"\n]+)")?[^\n]*\n(?P<text>.*?)^```""",
    re.MULTILINE | re.DOTALL,
)
SHELLS = ("bash", "console")
PLAIN = ("cat", "cd", "export", "git", "ls", "mkdir", "source")  # of the system, which are not checked
MODULES = ("pytest", "venv")
CLONE = "../tdkit/"  # the repository, beside the folder of the guide
COMPLETION = ("--install-completion", "--show-completion")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        reason: why it is not run, from a comment ``<!-- not run: reason -->`` above it; None where it is.
        title: the file that the reader is told to save it as; None where there is none.
    """

    language: str
    text: str
    reason: str | None
    title: str | None = None


def text_of(page: Path) -> str:
    """A page, or a notebook, as Markdown."""
    return markdown(page) if page.suffix == ".ipynb" else page.read_text(encoding="utf-8")


def blocks(page: Path) -> list[Block]:
    """The blocks of a page in order."""
    return [
        Block(found["language"], found["text"], found["reason"], found["title"])
        for found in FENCE.finditer(text_of(page))
    ]


def code(page: Path) -> list[str]:
    """The Python blocks of a page that can run."""
    return [
        block.text
        for block in blocks(page)
        if block.language == "python" and block.reason is None and block.title is None
    ]


def run(page: Path) -> None:
    """The Python blocks of one page in order, in one namespace, as a reader would type them."""
    namespace = session()
    for text in code(page):
        exec(compile(text, str(page), "exec", dont_inherit=True), namespace)


def follow(page: Path) -> None:
    """Carry out a whole page in the current folder, in order: save its files, run its Python and its commands."""
    namespace = session()
    for block in blocks(page):
        if block.title is not None:
            Path(block.title).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            exec(compile(block.text, str(page), "exec", dont_inherit=True), namespace)
        else:
            assert block.language in SHELLS, f"a block of {block.language or 'no language'} cannot be carried out"
            for words in commands(block.text):
                carry_out(words)


def carry_out_small(page: Path) -> None:
    """Carry out the commands of `tdkit` of a page in the current folder, where small things stand in for large ones."""
    for block in blocks(page):
        if block.title is not None:
            Path(block.title).write_text(block.text, encoding="utf-8")
        elif block.language in SHELLS and block.reason is None:
            for words in commands(block.text):
                if words[0] == "tdkit" and words[1] not in COMPLETION:
                    carry_out([word.replace("/models/", "models/").replace("200k", "2k") for word in words])


def carry_out(words: list[str]) -> None:
    """Carry out a command of the documentation; one that makes an environment is only checked, this is one.

    Raises:
        AssertionError: when it fails.
    """
    if words[0] == "tdkit":
        sys.argv = words
        code = 0
        try:
            main()
        except SystemExit as done:
            code = int(done.code or 0)
        assert code == 0, shlex.join(words)
    elif words[0] == "cd":
        os.chdir(words[1])
    elif words == ["pip", "install", "-e", "."]:
        use_entry_points("pyproject.toml")
    elif words[:3] == ["python", "-m", "pytest"]:
        subprocess.run([sys.executable, *words[1:]], check=True)
    else:
        check_command(words)


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a shell block: comments, prompts and line continuations are gone."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars="&;")
        lexer.whitespace_split = True
        command: list[str] = []
        for word in lexer:
            if set(word) <= set("&;"):
                yield command
                command = []
            else:
                command.append(word)
        if command:
            yield command


def check_command(words: list[str]) -> None:
    """Check that a command of the documentation exists and takes these arguments, without running it.

    Raises:
        AssertionError: when it does not.
    """
    program, *arguments = words
    if program == "tdkit":
        parse(arguments)
    elif program in PLAIN or (program == "python" and arguments[:1] == ["-m"] and arguments[1] in MODULES):
        pass
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert arguments[0] in targets, f"make {arguments[0]}: no such target"
    elif words[:2] == ["pip", "install"]:
        for name in (word for word in arguments[1:] if not word.startswith("-")):
            if name.startswith(CLONE):
                assert (ROOT / name.removeprefix(CLONE)).exists(), name
            else:
                check_package(name.removeprefix("../"))
    elif program == "python" and arguments[0] == "-m":
        module = ROOT.joinpath(*arguments[1].split("."))
        assert module.with_suffix(".py").is_file() or (module / "__main__.py").is_file(), arguments[1]
    elif program == "python" and arguments[0] == "-c":
        compile(arguments[1], "<documentation>", "exec")
    elif program == "python":
        assert (ROOT / arguments[0]).is_file(), arguments[0]
    elif program in ("accelerate", "torchrun"):
        start = next(number for number, word in enumerate(arguments) if word == "tdkit")
        parse(arguments[start + 1 :])
    else:
        raise AssertionError(f"{shlex.join(words)}: teach tests/documentation.py to check {program}")


class Read(Exception):  # noqa: N818, no error
    """Raised in place of carrying out a command, when its arguments were read."""


def parse(arguments: list[str]) -> None:
    """Give arguments to the real command line, which reads them and does nothing else."""
    group: Any = typer.main.get_command(app)
    if arguments and arguments[0] in COMPLETION:  # these act while they are read: they write to the shell's files
        assert arguments[0] in {name for parameter in group.params for name in parameter.opts}
        return
    resolve = group.resolve_command

    def stop(**_: object) -> None:
        raise Read

    def without_action(*found: Any) -> Any:
        name, command, rest = resolve(*found)
        command.callback = stop
        return name, command, rest

    group.callback, group.resolve_command = None, without_action
    said, code = StringIO(), 0
    try:
        with redirect_stdout(said), redirect_stderr(said):
            group.main(arguments, prog_name="tdkit")
    except Read:
        return
    except SystemExit as done:  # 0: --help, --version and the like
        code = int(done.code or 0)
    except TdkitError as error:
        code = 2
        said.write(str(error))
    assert code == 0, f"tdkit {shlex.join(arguments)}: {said.getvalue()}"


def check_package(name: str) -> None:
    """Check that a package to install is one of this project, with extras that it has, or one that it names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras: dict[str, list[str]] = project["optional-dependencies"]
    others = {re.split(r"[^\w.-]", line)[0] for lines in extras.values() for line in lines}
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    others |= {line.partition("==")[0] for line in pinned}  # such as that of the model of the demo
    found = re.fullmatch(r"(tdkit|\.)(?:\[([\w,-]+)\])?|(\./)?(plugins/)?tdkit-\w+", name)
    assert found or name in others, f"pip install {name}: no package of this project, and none that it names"
    for extra in filter(None, (found[2] or "" if found else "").split(",")):
        assert extra in extras, f"pip install {name}: no extra {extra}"


def check_block(block: Block, folder: Path) -> None:
    """Try a block that is not Python.

    Raises:
        AssertionError: when it is wrong, or of a language that nothing tries.
    """
    if block.language in SHELLS:
        for words in commands(block.text):
            check_command(words)
    elif block.language == "toml":
        groups = tomllib.loads(block.text)["project"]["entry-points"]
        assert all(group.startswith("tdkit.") for group in groups)
    elif block.language == "yaml":
        if "steps" in yaml.safe_load(block.text):
            file = folder / "recipe.yaml"
            file.write_text(block.text, encoding="utf-8")
            load_recipe(file)
        else:
            Policy.from_yaml(block.text)
    else:
        raise AssertionError(f"a block of {block.language or 'no language'} that nothing tries:\n{block.text}")
