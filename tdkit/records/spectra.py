"""The singular values of some weights, in the metric of the fit, with the ranks that were chosen."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from tdkit.calibration.calibration import Calibration
from tdkit.decompositions.low_rank import LowRank
from tdkit.decompositions.shrink import Shrink
from tdkit.errors import OptionError
from tdkit.fitting.low_rank import squared_singular_values
from tdkit.fitting.metric import Metric
from tdkit.models.sites import Site
from tdkit.planning.step import Step

LARGEST = 8192  # the smaller side of a matrix above which its singular values take minutes
POINTS = 64  # of a spectrum that are kept


@dataclass(frozen=True)
class Spectrum:
    """The singular values of one weight.

    Attributes:
        name: of the weight.
        kind: its name with the depth left out, which layers of one kind share.
        rank: of the low-rank factors that replace it; None for another decomposition.
        becomes: the decomposition in words.
        calibrated: whether the values are those of S^(1/2) W C^(1/2), with the calibrated moments C of the inputs and S
            of the output gradients, rather than those of W.
        indices: which singular values are kept, from 1.
        values: the singular values at these indices, divided by the largest.
    """

    name: str
    kind: str
    rank: int | None
    becomes: str
    calibrated: bool
    indices: tuple[int, ...]
    values: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "indices": list(self.indices), "values": list(self.values)}


def kind_of(name: str) -> str:
    """Returns the name of a weight with numbers, such as the depth, replaced by '*'."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", "*", name)


def spectra_of(pairs: Sequence[tuple[Step, Site]], calibration: Calibration | None) -> tuple[Spectrum, ...]:
    """Returns the spectra of the first, the middle and the last rewritten weight of every kind, before they are fitted.

    Weights without a single matrix form (stacks, weights that lose hidden units) and those with more than `LARGEST`
    rows and columns are left out.

    Args:
        pairs: the steps that replace a weight, each with its site.
        calibration: the moments that the weights are fitted in.
    """
    kinds: dict[str, list[tuple[Step, Site]]] = {}
    for step, site in pairs:
        kinds.setdefault(kind_of(step.name), []).append((step, site))
    found = []
    for kind, members in kinds.items():
        for place in sorted({0, len(members) // 2, len(members) - 1}):
            spectrum = _spectrum(kind, *members[place], calibration)
            if spectrum is not None:
                found.append(spectrum)
    return tuple(found)


@torch.inference_mode()
def _spectrum(kind: str, step: Step, site: Site, calibration: Calibration | None) -> Spectrum | None:
    if site.stacked or isinstance(step.decomposition, Shrink) or step.decomposition is None:
        return None
    try:
        shape = LowRank().shape_of(site.shape)
    except OptionError:
        return None
    if len(shape) != 2 or min(shape) > LARGEST:
        return None
    weight = LowRank().view(site.weight.detach())
    if weight.is_meta or not bool(torch.isfinite(weight).all()) or not bool(weight.any()):
        return None
    metric = calibration.metric(site.name) if calibration is not None else None
    values = squared_singular_values(weight.cpu(), metric or Metric()).sqrt()
    if not float(values[0]) > 0:
        return None
    count = len(values)
    indices = sorted({round(1 + each * (count - 1) / (POINTS - 1)) for each in range(POINTS)})
    kept = [float(f"{float(values[i - 1] / values[0]):.4g}") for i in indices]
    rank = step.decomposition.rank if isinstance(step.decomposition, LowRank) else None
    becomes = step.decomposition.describe()
    return Spectrum(step.name, kind, rank, becomes, metric is not None, tuple(indices), tuple(kept))
