"""Decompositions of other packages that do what they must not: each is named, and the model stays as it was."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import tdkit
from tdkit.decompositions.base import Point
from tdkit.decompositions.low_rank import LowRank, LowRankMatrix
from tdkit.decompositions.registered import decompositions
from tdkit.errors import TdkitError
from tdkit.fitting.metric import Metric
from tdkit.models.hosts.registered import hosts

Fit = Callable[[Tensor, Any], Any]


@dataclass(frozen=True, kw_only=True)
class Plugin(LowRank):
    """A decomposition whose parts are replaced one by one."""

    name: ClassVar[str] = "plugin"
    fit_by: ClassVar[Fit | None] = None
    curve_by: ClassVar[Fit | None] = None

    def fit(self, weight: Tensor, metric: Metric | None = None) -> LowRankMatrix:
        plain = super().fit(weight, metric)
        found: LowRankMatrix = plain if Plugin.fit_by is None else Plugin.fit_by(weight, plain)
        return found

    def curve(self, weight: Tensor, metric: Metric | None = None) -> list[Point]:
        points = super().curve(weight, metric)
        return points if Plugin.curve_by is None else list(Plugin.curve_by(weight, points))


def _raises(kind: type[BaseException]) -> Fit:
    def fit(*_: Any) -> Any:
        raise kind("on purpose")

    return fit


def _nan(_: Tensor, matrix: Any) -> Any:
    matrix.left.data[0, 0] = torch.nan
    return matrix


def _changes(weight: Tensor, result: Any) -> Any:
    weight.zero_()
    return result


FITS: dict[str, Fit] = {
    "fit raises ZeroDivisionError": _raises(ZeroDivisionError),
    "fit raises RecursionError": _raises(RecursionError),
    "fit returns None": lambda *_: None,
    "fit returns a tensor": lambda weight, _: weight,
    "fit returns another shape": lambda weight, _: LowRank(rank=1).fit(weight[:-1]),
    "fit returns NaN": _nan,
}
CURVES: dict[str, Fit] = {
    "curve raises TypeError": _raises(TypeError),
    "curve returns NaN": lambda _, points: [Point(p.decomposition, p.params, math.nan) for p in points],
    "curve returns no points": lambda *_: [1, 2, 3],
}
HARMLESS: dict[str, Fit] = {"fit changes the weight in place": _changes}
HARMLESS_CURVES: dict[str, Fit] = {"curve changes the weight in place": _changes}
NAMES = (*FITS, *CURVES, *HARMLESS, *HARMLESS_CURVES)

CODE = {
    "raises at import": "raise RuntimeError('no card')",
    "exits at import": "import sys; sys.exit(3)",
    "is a function": "def thing(): pass",
    "is an instance": "thing = 3",
    "is abstract": ("from tdkit import Decomposition\nclass thing(Decomposition):\n    name = '{name}'\n"),
    "has no docstring": (
        "from tdkit import LowRank\nclass thing(LowRank):\n    name = '{name}'\nthing.__doc__ = None\n"
    ),
    "has another name": "from tdkit import LowRank as thing",
    "raises in its constructor": (
        "from tdkit import LowRank\n"
        "class thing(LowRank):\n    name = '{name}'\n    def __post_init__(self): raise OSError('no card')\n"
    ),
}


def tried(name: str) -> str:
    """Let a decomposition misbehave; returns "error" or "success", and raises if more than itself is broken."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12))
    layers, before = list(model), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    Plugin.fit_by = {**FITS, **HARMLESS}.get(name)
    Plugin.curve_by = {**CURVES, **HARMLESS_CURVES}.get(name)
    calibration = tdkit.calibrate(model, [torch.randn(8, 12)], loss=lambda y, _: y.square().sum(), progress=False)
    try:
        tdkit.compress(model, tdkit.Policy([tdkit.Rule("*", Plugin())], budget=0.8), calibration=calibration)
    except TdkitError as error:
        text = str(error)
        if "plugin" not in text or not ("0" in text or "2" in text):
            raise AssertionError(f"neither the plugin nor the layer is named: {text}") from error
        if list(model) != layers:
            raise AssertionError("the model changed") from error
        for key, tensor in model.state_dict().items():
            if not torch.equal(tensor, before[key]):
                raise AssertionError(f"{key} changed") from error
        return "error"
    finally:
        Plugin.fit_by = Plugin.curve_by = None
    if name in FITS or name in CURVES:
        raise AssertionError("nothing is said")
    return "success"


@contextmanager
def installed(folder: Path, name: str, code: str, group: str = "tdkit.decompositions") -> Iterator[None]:
    """A context manager inside which a package is installed that registers its ``thing`` under its own name."""
    (folder / f"{name}.py").write_text(code.replace("{name}", name), encoding="utf-8")
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {name}:thing\n", encoding="utf-8")
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for registry in (decompositions, hosts):
            registry._loaded.pop(name, None)


def imported(folder: Path, what: str) -> str:
    """Use an installed plugin; returns "error" or "success"."""
    name = f"p{abs(hash(what)) % 10**8}"
    place = folder / name
    place.mkdir()
    with installed(place, name, CODE[what]):
        decompositions.summary(name)  # what ``tdkit decompositions`` prints
        model = nn.Linear(12, 12)
        tdkit.plan(model, tdkit.Policy([tdkit.Rule("*", "low_rank")], budget=0.8))  # others work
        try:
            tdkit.plan(model, tdkit.Policy([tdkit.Rule("*", name)], budget=0.8))
        except TdkitError as error:
            if name not in str(error):
                raise AssertionError(f"the plugin is not named: {error}") from error
            return "error"
    return "success"
