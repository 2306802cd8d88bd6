"""From a parameter budget to one decomposition with a rank per layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tdkit.decompositions.base import Decomposition
from tdkit.errors import BudgetError
from tdkit.sites import Site


@dataclass(frozen=True)
class Choice:
    """What a site becomes: a complete decomposition, or None with the reason why it stays dense."""

    decomposition: Decomposition | None
    reason: str = ""


def uniform(open_sites: Sequence[tuple[Site, Decomposition]], available: int, place: str) -> dict[str, Choice]:
    """Give every site the same share of its dense parameters, `available` in all.

    A site that no choice of its decomposition can bring down to the share stays dense, and the others
    share what is left.

    Args:
        open_sites: sites with decompositions whose rank is open.
        available: parameters that these sites may hold together.
        place: what asked for the budget, for the error.

    Raises:
        BudgetError: when not even the smallest choices fit.
    """
    dense = sum(site.params for site, _ in open_sites)
    if available >= dense:
        return {site.name: Choice(None, "the budget is met without it") for site, _ in open_sites}
    chosen: dict[str, Choice] = {}
    shared = list(open_sites)
    while shared:
        share = available / sum(site.params for site, _ in shared)
        fits = [(site, kind.complete(site.shape, math.floor(share * site.params))) for site, kind in shared]
        stuck = {site.name for site, choice in fits if choice is None}
        if not stuck:
            chosen |= {site.name: Choice(choice) for site, choice in fits}
            return chosen
        for site, kind in shared:
            if site.name in stuck:
                chosen[site.name] = Choice(
                    None, f"no {kind.name} has {max(share, 0):.0%} of its {site.params:,} params"
                )
                available -= site.params
        shared = [(site, kind) for site, kind in shared if site.name not in stuck]
    raise BudgetError(
        f"{place} leaves {available:,} params for {len(open_sites)} layers that hold {dense:,}: too few for the "
        f"smallest choice of {', '.join(sorted({kind.name for _, kind in open_sites}))}; raise the budget or "
        "match more layers"
    )
