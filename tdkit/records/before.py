"""What is to be recorded of a model before it is compressed, since it is gone afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from tdkit.calibration.calibration import Calibration
from tdkit.models.sites import num_bytes, num_params
from tdkit.planning.plan import Plan
from tdkit.planning.planner import applied_plan
from tdkit.planning.policy import Policy
from tdkit.planning.resolution import Resolved
from tdkit.records.record import Data, Figures, Record, Sample
from tdkit.records.spectra import Spectrum, spectra_of
from tdkit.records.tree import Branch, tree_of

NO_SPECTRA = "no singular values are recorded: no rewritten weight is a single matrix of moderate size"


@dataclass(frozen=True)
class Before:
    """A dense model and what is planned for it.

    Attributes:
        plan: as it was made.
        tree: the modules of the model.
        spectra: of the weights to be rewritten.
        sizes: the parameters and bytes of the model.
    """

    plan: Plan
    tree: tuple[Branch, ...]
    spectra: tuple[Spectrum, ...]
    sizes: Figures

    @classmethod
    def of(cls, resolved: Resolved, plan: Plan, calibration: Calibration | None = None) -> Before:
        """Look at the model of `resolved`, which is not changed, and at the weights that `plan` rewrites."""
        model = resolved.model
        return cls(
            plan,
            tuple(tree_of(model)),
            spectra_of(resolved.pairs(plan), calibration),
            sizes_of(model, plan.bytes_before),
        )

    def record(
        self,
        model: nn.Module,
        *,
        name: str,
        source: str,
        policy: Policy,
        options: Mapping[str, Any] | None = None,
        seed: int | None = None,
        command: str | None = None,
        data: Sequence[Data] = (),
        dense: Figures | None = None,
        compressed: Figures | None = None,
        higher_is_better: Sequence[str] = (),
        samples: Sequence[Sample] = (),
        seconds: Mapping[str, float] | None = None,
    ) -> Record:
        """Returns the record of the compression that made `model`; the arguments are those of `Record`.

        Args:
            model: the compressed model.
            source: the dense model as it was given.
        """
        unknown = [] if self.spectra or not self.plan.rewritten else [NO_SPECTRA]
        return Record(
            name=name,
            model=source,
            class_name=type(model).__name__,
            policy=policy.to_dict(),
            options=dict(options or {}),
            seed=seed,
            command=command,
            data=tuple(data),
            plan=carried_out(self.plan, applied_plan(model)),
            spectra=self.spectra,
            before=self.tree,
            after=tuple(tree_of(model)),
            dense={**self.sizes, **(dense or {})},
            compressed={**sizes_of(model), **(compressed or {})},
            higher_is_better=tuple(higher_is_better),
            samples=tuple(samples),
            seconds=dict(seconds or {}),
            unknown=tuple(unknown),
        )


def sizes_of(model: nn.Module, size: int | None = None) -> dict[str, float]:
    """Returns the parameters and the bytes of a model; the latter as given, if they are."""
    return {"params": num_params(model), "bytes": num_bytes(model) if size is None else size}


def carried_out(made: Plan, applied: Plan) -> Plan:
    """Returns the plan of a compressed model with what only the plan before knows: reasons, estimates, runners-up.

    Estimates of weights that got another decomposition than planned, as with several passes, are left out.
    """
    steps = []
    for step in applied.steps:
        try:
            planned = made[step.name]
        except KeyError:
            steps.append(step)
            continue
        if step.decomposition is None:
            steps.append(replace(step, reason=planned.reason or step.reason))
        elif step.decomposition == planned.decomposition:
            steps.append(replace(step, loss=planned.loss, runner_up=planned.runner_up))
        else:
            steps.append(step)
    return replace(
        applied, steps=tuple(steps), budget=made.budget, warnings=made.warnings, bytes_before=made.bytes_before
    )
