"""Hosts of other packages, whose faults are told as errors that name them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

from torch import Tensor, nn

from tdkit.errors import RegistryError, told_as
from tdkit.models.hosts.base import FactorizedModule, Host, Observer

Fault = Callable[..., str | None]


def guarded(host: Host) -> Host:
    """Returns `host`, whose methods now raise no other exceptions than tdkit's, and return what `Host` says.

    Hosts of tdkit itself stay as they are.
    """
    if not type(host).__module__.startswith("tdkit."):
        for name in METHODS:
            vars(host)[name] = partial(_called, host, name, getattr(host, name))
    return host


def _called(host: Host, name: str, method: Callable[..., Any], *given: Any) -> Any:
    place = f"the host '{host.name}' ({type(host).__module__}) failed in {name} for a {type(given[0]).__name__}"
    if name == "attach":
        module, weight, observe = given
        given = (module, weight, partial(_observed, host, place, module, weight, observe))
    with told_as(RegistryError, place, but=(MemoryError,)):
        found = method(*given)
        fault = METHODS[name](host, found, *given)
    if fault is not None:
        raise RegistryError(f"{place}: {fault}")
    return found


def _observed(
    host: Host, place: str, module: nn.Module, weight: str, observe: Observer, x: Tensor, y: Tensor
) -> Tensor:
    """Call an observer of the products with a weight, whose rows must be as wide as the weight."""
    if not isinstance(module, FactorizedModule) and not host.stacked(module, weight):
        out, *rest = host.canonical(getattr(module, weight), weight).shape
        wanted = (None, math.prod(rest)) if host.multiplications(module, weight) == 0 else (math.prod(rest), out)
        seen = (x.shape[-1] if wanted[0] else None, y.shape[-1])
        if seen != wanted:
            raise RegistryError(f"{place}: rows of (in, out) = {seen} are observed, and the weight has {wanted}")
    return observe(x, y)


def _instance(*kinds: type) -> Fault:
    def fault(_: Host, found: object, *__: Any) -> str | None:
        names = " or ".join(kind.__name__ for kind in kinds)
        return None if type(found) in kinds or isinstance(found, kinds) else f"it returned {_said(found)}, no {names}"

    return fault


def _names(_: Host, found: object, *__: Any) -> str | None:
    whole = isinstance(found, tuple | list) and all(isinstance(name, str) for name in found)
    return None if whole else f"it returned {_said(found)}, no tuple of names"


def _count(_: Host, found: object, *__: Any) -> str | None:
    whole = isinstance(found, int) and not isinstance(found, bool) and found >= 0
    return None if whole else f"it returned {_said(found)}, no number of 0 or more"


def _matrix(_: Host, found: object, stored: Tensor, *__: Any) -> str | None:
    if not isinstance(found, Tensor) or found.ndim < 2 or found.numel() != stored.numel():
        return f"it returned {_said(found)}, no view (out, in) of all of a weight {tuple(stored.shape)}"
    return None


def _layer(host: Host, found: object, _: nn.Module, matrices: Mapping[str, Any], *__: Any) -> str | None:
    if not isinstance(found, FactorizedModule):
        return f"it returned {_said(found)}, no FactorizedModule"
    if any(found.matrices.get(name) is not matrix for name, matrix in matrices.items()):
        return "the `matrices` of its layer are not those that it was given"
    if found.builder is None and found.host != host.name:
        return f"the `host` of its layer is {found.host!r}"
    return None


def _options(_: Host, found: object, *__: Any) -> str | None:
    if not isinstance(found, dict):
        return f"it returned {_said(found)}, no dict"
    json.dumps(found)  # whose exception says what is not JSON
    return None


def _handle(_: Host, found: object, *__: Any) -> str | None:
    return None if callable(getattr(found, "remove", None)) else f"it returned {_said(found)}, which has no remove()"


def _dense(_: Host, found: object, *__: Any) -> str | None:
    whole = isinstance(found, nn.Module) and not isinstance(found, FactorizedModule)
    return None if whole else f"it returned {_said(found)}, no dense layer"


def _said(found: object) -> str:
    if isinstance(found, Tensor):
        return f"a tensor {tuple(found.shape)}"
    return f"a {type(found).__name__}" if isinstance(found, nn.Module) else repr(found)[:80]


METHODS: Final[dict[str, Fault]] = {
    "accepts": _instance(bool),
    "weights": _names,
    "refusal": _instance(str, type(None)),
    "canonical": _matrix,
    "stored": _instance(Tensor),
    "build": _layer,
    "undo": _dense,
    "sequential": _instance(nn.Sequential, type(None)),
    "resized": _dense,
    "options": _options,
    "adopt": lambda *_: None,
    "computed": _instance(str),
    "params": _count,
    "multiplications": _count,
    "stacked": _instance(bool),
    "attach": _handle,
    "attach_gradient": _handle,
    "attach_stack": _handle,
    "path": _instance(str),
}
