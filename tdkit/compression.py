"""Fit the factors a plan asks for and put them in the model: all of them, or none."""

from __future__ import annotations

import torch
from torch import nn

from tdkit.decompositions.base import FactorizedMatrix
from tdkit.errors import PolicyError
from tdkit.hosts import install
from tdkit.layers import FactorizedLayer
from tdkit.plan import Plan, Step
from tdkit.planning import plan
from tdkit.policy import Policy
from tdkit.progress import progress_bar
from tdkit.sites import Site, replace_module, survey
from tdkit.ties import follow_ties


def compress(
    model: nn.Module,
    policy: Policy | Plan,
    *,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> nn.Module:
    """Replace the weights that `policy` selects by factors, in place, and return the same model.

    All matrices are fitted before the first layer is replaced, so that an exception, Ctrl-C included,
    leaves the model exactly as it was. The same model and policy give the same factors.

    Args:
        model: any torch module.
        policy: a policy, or a plan made from one.
        device: where to fit; the weight's own device when None. Factors end on the weight's device.
        progress: show a progress bar; on a terminal only when None.

    Raises:
        PolicyError, OptionError, BudgetError: as `plan`, before any work.
    """
    chosen = policy if isinstance(policy, Plan) else plan(model, policy)
    sites = _sites_of(model, chosen)
    fitted: list[tuple[Site, FactorizedMatrix]] = []
    with progress_bar("fit", len(sites), progress) as bar:
        for step, site in sites:
            bar.now(step.name)
            fitted.append((site, _fit(step, site, device)))
            bar.advance()
    _swap(model, fitted)
    return model


def _sites_of(model: nn.Module, chosen: Plan) -> list[tuple[Step, Site]]:
    by_name = {site.name: site for site in survey(model).sites}
    pairs = []
    for step in chosen.rewritten:
        site = by_name.get(step.name)
        if site is None or site.names != step.names or site.shape != step.shape:
            raise PolicyError(
                f"the plan's layer {step.name} ({step.shape[0]}x{step.shape[1]}) is not in this model: "
                "plan again for this model"
            )
        pairs.append((step, site))
    return pairs


def _fit(step: Step, site: Site, device: torch.device | str | None) -> FactorizedMatrix:
    assert step.decomposition is not None
    weight = site.weight.detach()
    if not bool(torch.isfinite(weight).all()):
        raise PolicyError(f"{site.name} holds NaN or infinite weights: repair it, or keep it with a rule")
    at = weight if device is None else weight.to(device)
    matrix = step.decomposition.fit(at)
    matrix.error = step.decomposition.error(at, matrix)
    return matrix.to(weight.device)


def _swap(model: nn.Module, fitted: list[tuple[Site, FactorizedMatrix]]) -> None:
    layers: list[tuple[str, nn.Module, FactorizedLayer]] = []
    for site, matrix in fitted:
        built: dict[int, FactorizedLayer] = {}  # one layer per module, also when it has several names
        for user in site.users:
            if id(user.module) not in built:
                layer = user.host.build(user.module, matrix, user.host.options(user.module))
                built[id(user.module)] = install(user.module, layer)
            layers.append((user.name, user.module, built[id(user.module)]))
    done = []
    try:
        for name, module, layer in layers:
            done.append((name, module))
            replace_module(model, name, layer)
        follow_ties(model)
    except BaseException:
        for name, module in done:
            replace_module(model, name, module)
        raise
