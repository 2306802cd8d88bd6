"""Hosts of other packages that do what they must not: each is named, and the model stays as it was."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tdkit
from tdkit.errors import TdkitError
from tdkit.models.hosts import registered
from tdkit.models.hosts.registered import hosts
from tests.hostile.plugins import installed

GOOD = """\
import torch
from torch import nn
from tdkit.models.hosts import FactorizedLayer, Host

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 12))
    def forward(self, x):
        return x @ self.weight.T

class Factorized(FactorizedLayer):
    host = "{name}"
    replaces = "Layer"
    def __init__(self, matrix):
        super().__init__()
        self.matrix = matrix
    def forward(self, x):
        return self.matrix(x)

class thing(Host):
    name = "{name}"
    def accepts(self, module):
        return type(module) is Layer
    def build(self, module, matrices, options):
        return Factorized(matrices["weight"])
    def undo(self, layer):
        dense = Layer()
        dense.weight = nn.Parameter(layer.matrix.dense().detach())
        return dense
"""

RAISES = "raise ZeroDivisionError('on purpose')"
METHODS: dict[str, str] = {  # the arguments of each method
    "accepts": "module",
    "weights": "module",
    "refusal": "module, weight",
    "canonical": "stored, weight",
    "build": "module, matrices, options",
    "options": "module",
    "params": "module, weight",
    "multiplications": "module, weight",
    "stacked": "module, weight",
    "computed": "module, weight",
    "attach": "module, weight, observe",
    "attach_gradient": "module, weight, observe",
    "undo": "layer",
}
RETURNS: dict[str, tuple[str, ...]] = {  # wrong results of each method
    "accepts": ("isinstance(module, nn.Linear) or type(module) is Layer",),
    "weights": ("'weight'", "None", "('nonsense',)"),
    "refusal": ("3",),
    "canonical": ("None", "stored[:-1]", "stored.flatten()", "stored.clone()"),
    "build": ("None", "nn.Identity()", "module"),
    "options": ("None", "{'x': object()}"),
    "params": ("None", "-1"),
    "multiplications": ("None", "'x'"),
    "computed": ("None",),
    "attach": ("None",),
    "undo": ("None", "layer"),
}
FAULTS: dict[str, str] = {
    **{f"{name} raises": f"    def {name}(self, {given}): {RAISES}\n" for name, given in METHODS.items()},
    **{
        f"{name} returns {value}": f"    def {name}(self, {METHODS[name]}): return {value}\n"
        for name, values in RETURNS.items()
        for value in values
    },
    "attach observes other shapes": (
        "    def attach(self, module, weight, observe):\n"
        "        return module.register_forward_hook(lambda _, args, y: observe(args[0][..., :3], y))\n"
    ),
    "its layer has no matrices": (
        "    def build(self, module, matrices, options):\n"
        "        class Empty(Factorized):\n"
        "            matrices = {}\n"
        "        return Empty(matrices['weight'])\n"
    ),
    "its layer is of another host": (
        "    def build(self, module, matrices, options):\n"
        "        made = Factorized(matrices['weight'])\n"
        "        type(made).host = 'nonsense'\n"
        "        return made\n"
    ),
}

PACKAGES = {
    "raises at import": "raise RuntimeError('no card')",
    "exits at import": "import sys; sys.exit(3)",
    "is a function": "def thing(): pass",
    "is an instance": "thing = 3",
    "is abstract": "from tdkit.models.hosts import Host\nclass thing(Host):\n    name = '{name}'\n",
    "has another name": GOOD + "    name = 'another'\n",
    "raises in its constructor": GOOD + f"    def __init__(self): {RAISES}\n",
}


def tried(folder: Path, what: str) -> str:
    """Use a model with a layer of a host that misbehaves; returns "error", "warning" or "success".

    Models without that layer must work, and all that is done with the others must end well or name the host.
    """
    name = f"faulty_host_{list(FAULTS).index(what)}"
    place = folder / name
    place.mkdir()
    with installed(place, name, GOOD + FAULTS[what], group="tdkit.hosts"), _hosts_anew():
        found = _others_work(name, anyway=what.startswith("accepts"))
        layer = import_module(name).Layer
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                _used(layer, place)
        except TdkitError as error:
            if name not in str(error):
                raise AssertionError(f"the host is not named: {error}") from error
            return "error"
        finally:
            sys.modules.pop(name, None)
        return "warning" if any(name in str(each.message) for each in seen) else found


def imported(folder: Path, what: str) -> str:
    """Install a package with something that is no host; returns "warning", which names it."""
    name = f"faulty_package_{list(PACKAGES).index(what)}"
    place = folder / name
    place.mkdir()
    with installed(place, name, PACKAGES[what], group="tdkit.hosts"), _hosts_anew():
        hosts.summary(name)
        found = _others_work(name, anyway=False)
    if found != "warning":
        raise AssertionError("nothing is said")
    return found


def _others_work(name: str, *, anyway: bool) -> str:
    """Plan and compress a model that has nothing to do with the host; with `anyway`, an error may name the host."""
    model = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            tdkit.compress(model, tdkit.Policy([tdkit.Rule("*", "low_rank")], budget=0.8))
        except TdkitError as error:
            if not (anyway and name in str(error)):
                raise AssertionError(f"other layers are not compressed: {error}") from error
            return "error"
    return "warning" if any(name in str(each.message) for each in seen) else "success"


def _used(kind: type[nn.Module], place: Path) -> None:
    """Calibrate, plan, compress, save, load and undo; an error must leave the model as it was."""

    def made() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(kind(), nn.ReLU(), nn.Linear(12, 12))

    model = made()
    layers, before = list(model), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    policy = tdkit.Policy([tdkit.Rule("*", "low_rank")], budget=0.8)
    try:
        known = tdkit.calibrate(model, [torch.randn(8, 12)], loss=lambda y, _: y.square().sum(), progress=False)
        tdkit.compress(model, policy, calibration=known)
    except TdkitError:
        if list(model) != layers:
            raise AssertionError("the model changed") from None
        for key, tensor in model.state_dict().items():
            if not torch.equal(tensor, before[key]):
                raise AssertionError(f"{key} changed") from None
        raise
    x = torch.randn(3, 12)
    tdkit.save(model, place / "m")
    again: Any = tdkit.load(place / "m", model=made())
    if not torch.equal(again(x), model(x)):
        raise AssertionError("the loaded model computes something else")
    if not torch.allclose(tdkit.to_dense(model)(x), again(x), atol=1e-4):
        raise AssertionError("the dense model computes something else")


class _hosts_anew:  # noqa: N801, used as a context manager
    """The installed hosts are looked up inside, and forgotten afterwards."""

    def __enter__(self) -> None:
        registered._all.cache_clear()

    def __exit__(self, *_: object) -> None:
        registered._all.cache_clear()
