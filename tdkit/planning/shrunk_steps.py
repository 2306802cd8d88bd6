"""The steps of weights that lose hidden units together."""

from __future__ import annotations

from dataclasses import replace

from tdkit.calibration.calibration import Calibration
from tdkit.decompositions.shrink import Shrink
from tdkit.models.groups.group import Bundle, Part, bias_of
from tdkit.models.sites import Site
from tdkit.planning.allocation import Choice
from tdkit.planning.step import Step
from tdkit.shapes import Shape


def bundle_steps(bundle: Bundle, choice: Choice, calibration: Calibration | None) -> dict[str, Step]:
    """Returns the steps of the weights of a bundle, by site name; the estimated loss is that of the consumer."""
    found = {}
    for group in bundle.groups:
        kind, error = choice.decomposition, choice.error
        if isinstance(kind, Shrink) and kind.units is not None and error is not None and calibration is not None:
            error = calibration.elimination(group, kind).error(kind.units)
        for part in group.parts:
            own = replace(choice, error=error if part is group.consumer else None)
            found[part.site.name] = _part_step(part, group.heads, own)
    return found


def _part_step(part: Part, heads: int, choice: Choice) -> Step:
    """Returns the step of one weight of a group, with the parameters of the bias if units are its entries."""
    site, kind = part.site, choice.decomposition
    units = len(part.places)
    left = heads * kind.units if isinstance(kind, Shrink) and kind.units is not None else units
    gone = (units - left) * part.params_per_unit
    rest = site.params - units * part.size * site.shape[1 - part.axis]
    before = rest + units * part.params_per_unit
    adds = site.multiply_adds - (units - left) * part.size * site.shape[1 - part.axis]
    times = site.multiplications()
    return Step(
        names=site.names,
        kinds=site.kinds,
        shape=site.shape,
        decomposition=kind,
        reason=choice.reason,
        params_before=before,
        params_after=before - gone,
        indices=0,
        multiply_adds_before=times * site.multiply_adds,
        multiply_adds_after=times * adds,
        loss=None if choice.error is None else choice.error / 2,
    )


def resized_step(site: Site, dense: Shape) -> Step:
    """Returns the step that made a dense layer smaller, read from the layer.

    Args:
        site: the smaller weight.
        dense: the shape (out, in) that it had.
    """
    axis = 0 if site.shape[0] != dense[0] else 1
    bias = axis == 0 and bias_of(site) is not None
    times, rest = site.multiplications(), site.shape[1 - axis]
    return Step(
        names=site.names,
        kinds=site.kinds,
        shape=dense,
        decomposition=Shrink(units=site.shape[axis]),
        reason="",
        params_before=dense[axis] * (rest + bias),
        params_after=site.shape[axis] * (rest + bias),
        indices=0,
        multiply_adds_before=times * dense[axis] * rest,
        multiply_adds_after=times * site.multiply_adds,
    )
