"""The steps of a plan for single weights, chosen or read from the layers of a compressed model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from torch import nn

from tdkit.decompositions.base import FactorizedMatrix
from tdkit.decompositions.stacks import FactorizedStack
from tdkit.models.hosts.base import Host
from tdkit.models.hosts.registered import builder_of
from tdkit.models.sites import FactorizedUser, Site
from tdkit.planning.allocation import Choice
from tdkit.planning.step import Step
from tdkit.products.cost import DENSE


def applied_step(matrix: FactorizedMatrix, users: Sequence[FactorizedUser]) -> Step:
    """Returns the step that has been applied to the users of one factorized weight."""
    size = math.prod(matrix.shape)
    times = sum(user.multiplications for user in users)
    computed = _computed((builder_of(user.module), user.module, user.weight) for user in users)
    host, place = builder_of(users[0].module), (users[0].module, users[0].weight)
    multiply_adds = size // (matrix.sizes[0] if isinstance(matrix, FactorizedStack) else 1)
    return Step(
        names=tuple(user.name for user in users),
        kinds=tuple(user.module.replaces for user in users),
        shape=matrix.sizes,
        decomposition=matrix.decomposition,
        reason="",
        params_before=size,
        params_after=matrix.params,
        indices=matrix.indices,
        multiply_adds_before=times * multiply_adds,
        multiply_adds_after=times * (multiply_adds if computed == DENSE else host.multiply_adds(*place, matrix)),
        error=matrix.error,
        paths=_paths_of(matrix, host, *place) if times and computed != DENSE else None,
        computed=computed,
    )


def site_step(site: Site, choice: Choice, allow_growth: bool) -> Step:
    """Returns the step of a site; it is kept where the choice holds no fewer parameters, unless growth is allowed."""
    kind, reason = choice.decomposition, choice.reason
    params, indices, multiply_adds, paths, computed = site.params, 0, site.multiply_adds, None, None
    times = site.multiplications()
    if kind is not None:
        matrix = kind.empty(kind.shape_of(site.shape), device="meta")
        if matrix.params >= site.params and not allow_growth:
            reason = f"{kind.describe()} would hold {matrix.params:,} params, not fewer (allow_growth permits it)"
            kind = None
        else:
            host, place = site.users[0].host, (site.users[0].module, site.users[0].weight)
            params, indices, multiply_adds = matrix.params, matrix.indices, host.multiply_adds(*place, matrix)
            paths = _paths_of(matrix, host, *place) if times else None
            computed = _computed((user.host, user.module, user.weight) for user in site.users)
            if computed == DENSE:
                multiply_adds, paths = site.multiply_adds, None
    return Step(
        names=site.names,
        kinds=site.kinds,
        shape=site.shape,
        decomposition=kind,
        reason=reason,
        params_before=site.params,
        params_after=params,
        indices=indices,
        multiply_adds_before=times * site.multiply_adds,
        multiply_adds_after=times * multiply_adds,
        loss=None if choice.error is None else choice.error / 2,
        runner_up=None
        if kind is None or choice.runner_up is None
        else f"{choice.runner_up.decomposition.describe()}: {choice.runner_up.error / 2:.3g}",
        paths=paths,
        computed=computed,
    )


def _computed(users: Iterable[tuple[Host, nn.Module, str]]) -> str:
    """Returns 'dense' if every user builds the dense weight, and 'by factors' otherwise."""
    return DENSE if all(host.computed(module, weight) == DENSE for host, module, weight in users) else "by factors"


def _paths_of(matrix: FactorizedMatrix, host: Host, module: nn.Module, weight: str) -> tuple[str, str]:
    """Returns the names of the paths with the least estimated time for 1 and for 512 tokens."""
    if isinstance(matrix, FactorizedStack):
        few, many = (min(matrix.member_paths(tokens), key=lambda path: path.seconds()) for tokens in (1, 512))
        return few.name, many.name
    return host.path(module, weight, matrix, 1), host.path(module, weight, matrix, 512)
