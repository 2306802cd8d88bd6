"""Fit the factors of single layers, and put them into the model so that it can be undone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tdkit.decompositions.base import FactorizedMatrix
from tdkit.errors import PolicyError
from tdkit.hosts import install
from tdkit.layers import FactorizedLayer
from tdkit.metric import Metric
from tdkit.plan import Step
from tdkit.sites import Site, replace_module
from tdkit.ties import follow_ties

Fitted = list[tuple[Site, FactorizedMatrix]]


def fit_step(
    step: Step, site: Site, metric: Metric | None = None, device: torch.device | str | None = None
) -> FactorizedMatrix:
    """The factors that `step` asks for, with their relative error, on the weight's own device.

    Args:
        metric: calibrated moments; the Frobenius norm when None.
        device: where to fit; the weight's own when None.

    Raises:
        PolicyError: when the weight is not finite.
    """
    assert step.decomposition is not None
    weight = site.weight.detach()
    if not bool(torch.isfinite(weight).all()):
        raise PolicyError(f"{site.name} holds NaN or infinite weights: repair it, or keep it with a rule")
    at = weight if device is None else weight.to(device)
    there = None if metric is None else Metric(_to(metric.input, at.device), _to(metric.output, at.device))
    matrix = step.decomposition.fit(at, there)
    matrix.error = step.decomposition.error(at, matrix, there)
    return matrix.to(weight.device)


class Swap:
    """Layers put in the place of others, in order; each can be undone."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._done: list[tuple[str, nn.Module]] = []

    def put(self, fitted: Fitted) -> None:
        """Replace every layer of each site by one around its factors."""
        for site, matrix in fitted:
            built: dict[int, FactorizedLayer] = {}  # one layer per module, also when it has several names
            for user in site.users:
                if id(user.module) not in built:
                    layer = user.host.build(user.module, matrix, user.host.options(user.module))
                    built[id(user.module)] = install(user.module, layer)
            for user in site.users:
                self._done.append((user.name, user.module))
                replace_module(self.model, user.name, built[id(user.module)])

    def undo(self) -> None:
        """Put back everything that was replaced."""
        for name, module in reversed(self._done):
            replace_module(self.model, name, module)
        self._done.clear()


@contextmanager
def swapping(model: nn.Module) -> Iterator[Swap]:
    """A `Swap` that stands when the block ends and is undone when it raises, Ctrl-C included."""
    swap = Swap(model)
    try:
        yield swap
        follow_ties(model)
    except BaseException:
        swap.undo()
        raise


def _to(moment: Tensor | None, device: torch.device) -> Tensor | None:
    return None if moment is None else moment.to(device)
