"""An allocator: large weights give up a larger share of their parameters than small ones."""

from __future__ import annotations

from tdkit.errors import BudgetError
from tdkit.planning import Choice, Request

STEPS = 40  # of bisection


def by_size(request: Request) -> dict[str, Choice]:
    """Give every weight a share of its parameters that falls with the square root of its size.

    Raises:
        BudgetError: when not even the smallest choices fit.
    """
    low, high = 0.0, max(one.site.params**0.5 for one in request.sites)
    found = None
    for _ in range(STEPS):
        middle = (low + high) / 2
        choices = _choices(request, middle)
        if _held(request, choices) <= request.available:
            low, found = middle, choices
        else:
            high = middle
    if found is None:
        raise BudgetError(f"{request.place} leaves {request.available:,} params: too few for 'by_size'")
    return found


def _choices(request: Request, scale: float) -> dict[str, Choice]:
    choices = {}
    for one in request.sites:
        share = min(1.0, scale / one.site.params**0.5)
        kind = one.complete(one.clipped(share), request.calibration)
        choices[one.site.name] = Choice(kind, "" if kind else f"no {one.kind.name} has {share:.0%} of its params")
    return choices


def _held(request: Request, choices: dict[str, Choice]) -> int:
    held = 0
    for one in request.sites:
        kind = choices[one.site.name].decomposition
        held += one.site.params if kind is None else kind.num_params(one.site.shape)
    return held
