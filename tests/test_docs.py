"""The Python blocks of the documentation run; the names, files and packages that it lists exist."""

from __future__ import annotations

import ast
import importlib
import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from docs import tables
from docs.notebooks import cells
from tdkit.errors import TdkitError
from tests.benchmarks import layers
from tests.documentation import DOCS, PAGES, ROOT, Block, blocks, check_block, check_command, code, run, text_of
from tests.folders import stand_ins
from tests.side_packages import INSTALL, SIDE, use_torchao

NOT_RUN = {  # blocks that cannot run here, and how many of a page
    "docs/ecosystem.md": 1,
    "docs/evaluation.md": 1,
    "docs/how-to/hub.md": 1,
    "docs/speed.md": 1,
}


GUIDE = DOCS / "guide.md"  # of which the commands are carried out as well


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def of_torchvision(page: Path) -> bool:
    return any("torchvision" in text for text in code(page))


@pytest.mark.parametrize("page", [p for p in PAGES if code(p) and not of_torchvision(p) and p != GUIDE], ids=name_of)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TDKIT_TUTORIAL", raising=False)  # the size at which notebooks run
    use_torchao()
    run(page)


def in_a_process_of_its_own(code: str, folder: Path) -> None:
    """Run code in a folder; it can import the tests."""
    head = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path\n"
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    call = [sys.executable, "-c", head + code]
    done = subprocess.run(call, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", [p for p in PAGES if p.suffix == ".ipynb"], ids=name_of)
def test_notebooks_are_small_and_show_what_their_cells_print(page: Path) -> None:
    """``python -m docs.notebooks`` stores it."""
    assert page.stat().st_size < 100_000
    assert len({cell["id"] for cell in cells(page)}) == len(cells(page))
    for cell in (cell for cell in cells(page) if cell["cell_type"] == "code"):
        source = "".join(cell["source"])
        assert cell["execution_count"] is not None, source
        assert bool(cell["outputs"]) == bool(re.search(r"^ *print\(|^Picture\(", source, re.MULTILINE)), source


def test_the_guide_can_be_followed(tmp_path: Path) -> None:
    """From an empty folder, every block in order, up to the plugin and what is made with it."""
    code = f"""
import warnings
from tests.documentation import follow
warnings.simplefilter("error")
follow(Path({str(GUIDE)!r}))
"""
    in_a_process_of_its_own(code, tmp_path)
    assert (tmp_path / "smaller" / "report" / "report.html").is_file()
    assert (tmp_path / "sweep" / "report" / "report.html").is_file()
    assert "mine" in (tmp_path / "mine" / "tdkit.json").read_text(encoding="utf-8")


BY_COMMANDS = [  # pages whose commands a reader copies one after the other
    ROOT / "README.md",
    *(DOCS / name for name in ("healing.md", "recipes.md", "sweep.md")),
    *(DOCS / "how-to" / name for name in ("language-model.md", "resume.md")),
]


@pytest.mark.slow
@pytest.mark.parametrize("page", BY_COMMANDS, ids=name_of)
def test_the_commands_of_a_page_work(page: Path, gpt2_folder: Path, tmp_path: Path) -> None:
    """On a small model in place of those that they name."""
    stand_ins(tmp_path, gpt2_folder)
    shutil.copytree(tmp_path / "smollm2", tmp_path / "models" / "large")
    code = f"""
from tests.side_packages import use_torchao
use_torchao()
from tests.documentation import carry_out_small
carry_out_small(Path({str(page)!r}))
"""
    in_a_process_of_its_own(code, tmp_path)


@pytest.mark.skipif(not SIDE.is_dir(), reason=f"torchvision is not there: {INSTALL}")
@pytest.mark.parametrize("page", [p for p in PAGES if of_torchvision(p)], ids=name_of)
def test_the_code_of_a_page_with_torchvision_runs(page: Path, tmp_path: Path) -> None:
    code = f"""
from tests.side_packages import use_side_packages
use_side_packages()
from tests.documentation import run
run(Path({str(page)!r}))
"""
    in_a_process_of_its_own(code, tmp_path)


OTHERS = [
    pytest.param(block, id=f"{name_of(page)}-{number}")
    for page in [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    for number, block in enumerate(blocks(page))
    if block.language != "python" and block.reason is None
]


@pytest.mark.parametrize("block", OTHERS)
def test_commands_and_files_of_a_page_are_right(block: Block, tmp_path: Path) -> None:
    """Commands are read by the real command line, which then does nothing; YAML and TOML by what reads them."""
    check_block(block, tmp_path)


MENTION = re.compile(r"`(tdkit [^`.]+)`")  # dots stand for what is left out


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=name_of)
def test_commands_in_sentences_have_the_options_that_they_name(page: Path) -> None:
    """They may be incomplete."""
    text = re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)
    for mention in MENTION.findall(text):
        try:
            check_command(shlex.split(mention.replace("COMMAND", "doctor")))
        except AssertionError as error:
            assert re.search("Missing|requires an argument", str(error)), error  # noqa: PT017


def test_blocks_that_are_not_run_are_counted() -> None:
    counts = Counter(name_of(page) for page in PAGES for block in blocks(page) if block.reason is not None)
    assert counts == NOT_RUN


@pytest.mark.parametrize(
    ("block", "says"),
    [
        (Block("bash", "tdkit compres smollm2\n", None), "No such command 'compres'"),
        (Block("bash", "tdkit compress smollm2 --bugdet 0.8\n", None), "No such option: --bugdet"),
        (Block("bash", "tdkit doctor && tdkit eval --context many smaller\n", None), "should be a valid integer"),
        (Block("bash", "make dmeo\n", None), "no such target"),
        (Block("bash", "pip install 'tdkit[hub]'\n", None), "no extra hub"),
        (Block("bash", "curl example.org\n", None), "teach tests/documentation.py to check curl"),
        (Block("", "x = 1\n", None), "nothing tries"),
    ],
)
def test_wrong_blocks_are_found(block: Block, says: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=re.escape(says)):
        check_block(block, tmp_path)


def test_the_tables_of_methods_are_those_of_the_results() -> None:
    """``python -m docs.tables`` writes them."""
    text = tables.PAGE.read_text(encoding="utf-8")
    assert tables.filled(text) == text


def test_the_table_of_layers_is_that_of_the_code() -> None:
    text = layers.PAGE.read_text(encoding="utf-8")
    assert layers.page(text) == text


@pytest.mark.real
def test_the_code_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert code(ROOT / "README.md")
    run(ROOT / "README.md")


def test_contributors_find_every_package_and_module() -> None:
    rows = re.findall(r"^\| `(\w+)(?:\.py)?` \|", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE)
    found = {
        path.stem for path in (ROOT / "tdkit").iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    assert sorted(rows) == sorted(found - {"__init__"})


NAMED = re.compile(r"`(tdkit(?:\.\w+)+)`|^::: (tdkit(?:\.\w+)+)$", re.MULTILINE)
GROUPS = ("allocators", "hosts", "losses", "steps", "texts")  # of entry points, besides those named like a package
NO_OBJECTS = {"tdkit.json", *(f"tdkit.{group}" for group in GROUPS)}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda p: p.stem)
def test_what_a_page_names_exists(page: Path) -> None:
    for name in {"".join(names) for names in NAMED.findall(text_of(page))} - NO_OBJECTS:
        pkgutil.resolve_name(name)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_files_that_are_linked_exist(name: str) -> None:
    """mkdocs checks the links of the pages."""
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / name).read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_page_is_in_the_navigation_and_every_entry_exists() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    navigation = yaml.safe_load(text)["nav"]

    def files(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [name for value in (entry.values() if isinstance(entry, dict) else entry) for name in files(value)]

    assert sorted(files(navigation)) == sorted(str(page.relative_to(DOCS).with_suffix(".md")) for page in PAGES)


@pytest.mark.parametrize("module", ["tdkit.errors", "tdkit_distill.errors"])
def test_every_error_is_in_troubleshooting(module: str) -> None:
    names = {
        name
        for name, kind in vars(importlib.import_module(module)).items()
        if isinstance(kind, type) and issubclass(kind, TdkitError) and kind.__module__ == module
    }
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`\w+`[^|]*)\|", text, re.MULTILINE)
    assert names
    assert names <= set(re.findall(r"`(\w+)`", " ".join(rows)))


def messages() -> str:
    """The texts in the code of tdkit, one a line; what is put into them is left out."""
    lines = []
    for path in (ROOT / "tdkit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                lines.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                lines.append(node.value)
    return "\n".join(lines)


def test_quoted_messages_are_those_of_the_code() -> None:
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\| \*([^*]+)\* \|", text, re.MULTILINE)
    known = messages()
    assert len(quoted) > 10
    assert [message for message in quoted if message not in known] == []


ENTRY = re.compile(r"^::: (\S+)\n((?:    .*\n?|\n(?=    ))*)", re.MULTILINE)


@pytest.mark.parametrize("package", ["tdkit", "tdkit_distill"])
def test_every_public_name_is_in_the_reference(package: str) -> None:
    written: set[str] = set()
    for page in PAGES:
        for name, options in ENTRY.findall(text_of(page)):
            members = (yaml.safe_load(options) or {"options": {}})["options"].get("members", [])
            written |= {name, *(f"{name}.{member}" for member in members)}
    missing = {f"{package}.{name}" for name in importlib.import_module(package).__all__} - written
    assert missing <= {"tdkit.TdkitError"}  # as tdkit.errors.TdkitError
    assert "tdkit.errors.TdkitError" in written


RESULTS = re.compile(r"\(((?:\.\./)?results/[\w-]+\.md)\)")
FIGURE = re.compile(r"(?<![\w.,])-?\d[\d,]*(?:\.\d+)?(?:e[+-]\d+)?(?![\w])")


def figures(text: str) -> set[str]:
    """The numbers of a text that are no small integers: with a decimal point, an exponent or thousands."""
    found: list[str] = FIGURE.findall(re.sub(r"`[^`]*`|\]\([^)]*\)", "", text))
    return {number for number in found if re.search(r"[.,e]", number)}


def claims(page: Path) -> list[tuple[str, list[str]]]:
    """Each paragraph, item of a list, or table with the paragraph above it, that names results, and these files."""
    text = re.sub(
        r"```.*?```|(<!-- [\w ]+): begin.*?\1: end -->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL
    )
    parts = re.split(r"\n\n(?!\|)|\n(?=- )", text)
    return [(part, RESULTS.findall(part)) for part in parts if RESULTS.search(part)]


def is_among(number: str, known: set[str]) -> bool:
    """Whether one of the known figures is this one, rounded to its digits."""
    if number in known:
        return True
    digits = len(number.partition(".")[2])
    values = (float(other.replace(",", "")) for other in known)
    return "e" not in number and any(f"{value:.{digits}f}" == number for value in values)


def test_figures_are_those_of_the_results_that_they_name() -> None:
    """For the pages that say for each figure where it is from."""
    wrong, count = [], 0
    for page in [*(DOCS / "decompositions").glob("*.md"), *(DOCS / "how-to").glob("*.md")]:
        for part, names in claims(page):
            known = set().union(*(figures((page.parent / name).read_text(encoding="utf-8")) for name in names))
            own = figures(part)
            count += len(own)
            wrong += [
                f"{page.name}: {number} is not in {', '.join(names)}"
                for number in sorted(own)
                if not is_among(number, known)
            ]
    assert not wrong, "\n".join(wrong)
    assert count > 100
