"""One line of a plan: a weight matrix and its replacement."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tdkit.decompositions.base import Decomposition
from tdkit.decompositions.registered import decomposition, spec_of
from tdkit.errors import PolicyError, did_you_mean
from tdkit.shapes import Shape, is_weight_shape


@dataclass(frozen=True)
class Step:
    """One weight matrix and the decomposition that replaces it, or the reason why it stays dense.

    Attributes:
        names: the names of the layers that use the matrix.
        kinds: the types of these layers.
        shape: of the weight, (out, in) or (out, in, *kernel).
        decomposition: complete, with its rank set; None when the matrix stays dense.
        reason: why the matrix stays dense; empty otherwise.
        params_before: parameters of the dense weight.
        params_after: parameters after the replacement.
        indices: number of integers stored for permutations, which are not counted as parameters.
        multiply_adds_before: multiply-adds per token, or per output position of a convolution (input position if it is
            transposed), of the dense weight, summed over the layers that use it.
        multiply_adds_after: the same after the replacement.
        error: relative error of the fit, in the calibrated metric if there is one; None before the fit.
        loss: estimated increase of the loss in nats per token; None when it was not estimated.
        runner_up: text that names the best other decomposition of at most the same size and its estimated
            loss; None when there was no alternative.
        paths: the names of the fastest paths for 1 and for 512 tokens, or positions of one image, estimated for float32
            on this machine's CPU without a cached weight (see `tdkit.prepare`); None when nothing is multiplied by
            factors.
        computed: 'by factors', or 'dense' when the layer builds the dense weight from its factors and computes with
            that; None when the matrix stays dense.
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    shape: Shape
    decomposition: Decomposition | None
    reason: str
    params_before: int
    params_after: int
    indices: int
    multiply_adds_before: int
    multiply_adds_after: int
    error: float | None = None
    loss: float | None = None
    runner_up: str | None = None
    paths: tuple[str, str] | None = None
    computed: str | None = None

    @property
    def name(self) -> str:
        return self.names[0]

    def to_dict(self) -> dict[str, Any]:
        return {
            "names": list(self.names),
            "kinds": list(self.kinds),
            "shape": list(self.shape),
            "decomposition": spec_of(self.decomposition) if self.decomposition else None,
            "reason": self.reason,
            "params_before": self.params_before,
            "params_after": self.params_after,
            "indices": self.indices,
            "multiply_adds_before": self.multiply_adds_before,
            "multiply_adds_after": self.multiply_adds_after,
            "error": self.error,
            "loss": self.loss,
            "runner_up": self.runner_up,
            "paths": None if self.paths is None else list(self.paths),
            "computed": self.computed,
        }

    @classmethod
    def from_dict(cls, form: Mapping[str, Any], place: str = "step") -> Step:
        """Returns a step from the form that `to_dict` returns.

        Args:
            place: names the step in error messages.

        Raises:
            PolicyError: when the form is invalid; lists all faults of the step.
            OptionError, RegistryError: when its decomposition is invalid or unknown.
        """
        _check_step(form, place)
        spec, paths = form["decomposition"], form.get("paths")
        return cls(
            **{
                **form,
                "paths": None if paths is None else (paths[0], paths[1]),
                "names": tuple(form["names"]),
                "kinds": tuple(form["kinds"]),
                "shape": tuple(form["shape"]),
                "decomposition": decomposition(spec) if spec else None,
            }
        )


def _check_step(form: Any, place: str) -> None:
    if not isinstance(form, Mapping):
        raise PolicyError(f"{place}: {form!r} is no step")
    faults = [f"lacks '{key}'" for key, (_, _, optional) in ENTRIES.items() if key not in form and not optional]
    for key, value in form.items():
        if key not in ENTRIES:
            faults.append(f"has the unknown key '{key}'{did_you_mean(str(key), ENTRIES)}")
            continue
        what, is_right, _ = ENTRIES[key]
        if not is_right(value):
            faults.append(f"{key}={value!r} must be {what}")
    if faults:
        raise PolicyError("\n".join(f"{place}: {fault}" for fault in faults))


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, str) for each in value)


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and is_weight_shape(value)


ENTRIES: dict[str, tuple[str, Callable[[Any], bool], bool]] = {  # description, check, whether optional
    "names": ("a list of layer names", _are_names, False),
    "kinds": ("a list of layer types", _are_names, False),
    "shape": ("two sizes or more", _is_shape, False),
    "decomposition": ("a decomposition or null", lambda value: value is None or isinstance(value, str | dict), False),
    "reason": ("a text", lambda value: isinstance(value, str), False),
    "params_before": ("a count", _is_count, False),
    "params_after": ("a count", _is_count, False),
    "indices": ("a count", _is_count, False),
    "multiply_adds_before": ("a count", _is_count, False),
    "multiply_adds_after": ("a count", _is_count, False),
    "error": ("a number or null", _is_number, True),
    "loss": ("a number or null", _is_number, True),
    "runner_up": ("a text or null", _is_text, True),
    "paths": ("two names or null", lambda value: value is None or (_are_names(value) and len(value) == 2), True),
    "computed": ("a text or null", _is_text, True),
}
