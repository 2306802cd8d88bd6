"""Names to decompositions: built-ins, packages' entry points, conflicts, options."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tdkit import CanonicalPolyadic, Kronecker, LowRank, PermutedKronecker, SpatialLowRank, TTMatrix, Tucker
from tdkit.decompositions.registered import decomposition, decompositions, spec_of
from tdkit.errors import OptionError, RegistryError
from tdkit.registry import Registry


def install_package(folder: Path, name: str, entries: dict[str, str], code: str = "") -> None:
    """A real, if minimal, installed package: a module and its metadata with entry points."""
    module = name.replace("-", "_")
    (folder / f"{module}.py").write_text(code, encoding="utf-8")
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
    lines = "\n".join(f"{key} = {value}" for key, value in entries.items())
    (info / "entry_points.txt").write_text(f"[test.group]\n{lines}\n", encoding="utf-8")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def registry(built_in: dict[str, str] | None = None) -> Registry[Any]:
    return Registry("test.group", "thing", built_in or {})


def test_built_in_decompositions() -> None:
    every = (LowRank, Kronecker, PermutedKronecker, TTMatrix, Tucker, CanonicalPolyadic, SpatialLowRank)
    assert {kind.name for kind in every} <= set(decompositions.names())
    for kind in every:
        assert decompositions.get(kind.name) is kind


def test_a_package_adds_a_name_and_is_imported_only_when_asked(site: Path) -> None:
    install_package(site, "adds-one", {"square": "adds_one:square"}, "def square(x):\n    return x * x\n")
    names = registry()
    assert names.names() == ["square"]
    assert names.origins() == {"square": ["adds-one"]}
    assert "adds_one" not in sys.modules
    assert names.get("square")(3) == 9
    assert names.get("square") is names.get("square")


def test_a_name_taken_twice_names_both_packages(site: Path) -> None:
    install_package(site, "first-pack", {"square": "first_pack:x"}, "x = 1\n")
    install_package(site, "second-pack", {"square": "second_pack:x", "other": "second_pack:x"}, "x = 2\n")
    names = registry({"built": "math:pi"})
    with pytest.raises(RegistryError, match=r"thing 'square' is provided by .*uninstall one or rename it") as raised:
        names.get("square")
    assert "first-pack" in str(raised.value)
    assert "second-pack" in str(raised.value)
    assert names.get("other") == 2  # the conflict breaks only itself
    assert names.get("built") == pytest.approx(3.14159, abs=1e-4)


def test_a_package_cannot_take_a_built_in_name(site: Path) -> None:
    install_package(site, "greedy", {"built": "greedy:x"}, "x = 1\n")
    with pytest.raises(RegistryError, match=r"'built' is provided by tdkit and greedy"):
        registry({"built": "math:pi"}).get("built")


@pytest.mark.parametrize(
    ("code", "value", "reason"),
    [
        ("raise RuntimeError('no such card')\n", "broken:x", "RuntimeError: no such card"),
        ("import surely_not_installed\n", "broken:x", "No module named 'surely_not_installed'"),
        ("x = 1\n", "broken:y", "AttributeError"),
    ],
)
def test_an_entry_that_fails_to_import_breaks_only_itself(site: Path, code: str, value: str, reason: str) -> None:
    sys.modules.pop("broken", None)
    install_package(site, "broken", {"bad": value}, code)
    names = registry({"built": "math:pi"})
    assert names.names() == ["bad", "built"]
    assert names.get("built") > 3
    with pytest.raises(RegistryError, match=rf"thing 'bad' of package broken .*failed to import: .*{reason}"):
        names.get("bad")


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(
        RegistryError, match=r"unknown decomposition 'low_rnak'; did you mean 'low_rank'\?; known: .*tt_matrix"
    ):
        decompositions.get("low_rnak")
    with pytest.raises(RegistryError, match=r"unknown thing 'x'; known: none"):
        registry().get("x")


def test_a_decomposition_from_each_of_its_forms() -> None:
    assert decomposition("low_rank") == LowRank()
    assert decomposition({"low_rank": {"rank": 3}}) == LowRank(rank=3)
    assert decomposition({"kronecker": {"terms": 2, "a": [3, 4]}}) == Kronecker(terms=2, a=(3, 4))
    assert decomposition({"low_rank": None}) == LowRank()
    kind = TTMatrix(ranks=(2, 3))
    assert decomposition(kind) is kind


def test_the_specification_holds_only_what_differs_from_the_defaults() -> None:
    assert spec_of(LowRank()) == {"low_rank": {}}
    assert spec_of(Kronecker(terms=4, b=(2, 4))) == {"kronecker": {"terms": 4, "b": [2, 4]}}
    assert spec_of(PermutedKronecker(cols=False)) == {"permuted_kronecker": {"cols": False}}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"low_rank": {"rnak": 3}}, r"low_rank: unknown option 'rnak'; did you mean 'rank'\?; known: rank"),
        ({"low_rank": {"rank": 0}}, r"low_rank: rank=0 must be an integer of at least 1"),
        ({"low_rank": {"rank": True}}, r"low_rank: rank=True must be an integer"),
        ({"low_rank": {"rank": 2.5}}, r"low_rank: rank=2.5 must be an integer"),
        ({"low_rank": 3}, r"low_rank: options must be 'option: value' pairs, not 3"),
        ({"low_rank": {}, "kronecker": {}}, r"a decomposition is a name or one 'name: \{options\}' pair"),
        (7, r"a decomposition is a name or one 'name: \{options\}' pair, not 7"),
        ({"kronecker": {"a": [3]}}, r"kronecker: a=\(3,\) must be two integers"),
        ({"kronecker": {"a": [3, 0]}}, r"kronecker: a=0 must be an integer of at least 1"),
        ({"permuted_kronecker": {"rows": 1}}, r"permuted_kronecker: rows=1 must be true or false"),
        ({"permuted_kronecker": {"seed": -1}}, r"permuted_kronecker: seed=-1 must be an integer of at least 0"),
        ({"tt_matrix": {"in_modes": [2, 2], "out_modes": [2, 2, 2]}}, r"tt_matrix: in_modes=.* differ in length"),
        ({"tt_matrix": {"ranks": [2, 2, 2]}}, r"tt_matrix: 3 ranks for 3 cores; give 2"),
        ({"tt_matrix": {"cores": 0}}, r"tt_matrix: cores=0 must be an integer of at least 1"),
    ],
)
def test_impossible_options_are_told(spec: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        decomposition(spec)
