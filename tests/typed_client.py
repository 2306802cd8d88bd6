"""A client of the public API, which mypy checks in strict mode (make check); it is not run."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import tdkit
from tdkit import Calibration, Card, Metric, Plan, Policy, Rule, TdkitError


def compressed(model: nn.Module, batches: list[Tensor]) -> nn.Module:
    policy = Policy(
        [Rule("*.mlp.*", tdkit.LowRank(), types=("Linear",)), Rule("*", tdkit.Kronecker(terms=2), min_keep=0.1)],
        budget={"bytes": 0.5, "dtype": "float16"},
    )
    calibration: Calibration = tdkit.calibrate(model, batches, labels="sampled")
    plan: Plan = tdkit.plan(model, policy, calibration=calibration)
    for step in plan:
        names: tuple[str, ...] = step.names
        print(names, step.params_after, step.decomposition)
    return tdkit.compress(model, plan, calibration=calibration, device=torch.device("cpu"), passes=2)


def saved(model: nn.Module, folder: Path) -> nn.Module:
    try:
        place: Path = tdkit.save(model, folder, overwrite=True, card=Card())
    except TdkitError as error:
        raise SystemExit(str(error)) from error
    tdkit.prepare(model)
    tdkit.quantize(model, 8)
    dense: nn.Sequential = tdkit.to_dense(nn.Sequential(model))
    print(dense)
    return tdkit.load(place, model=model)


class Mine(tdkit.LowRank):
    def fit(self, weight: Tensor, metric: Metric | None = None) -> tdkit.FactorizedMatrix:  # type: ignore[override]
        return super().fit(weight, metric)
