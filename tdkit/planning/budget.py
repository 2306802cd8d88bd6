"""The target size of a model, in parameters, bytes or multiply-adds, and what each choice costs in that unit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, cast, get_args

import torch
from torch import nn

from tdkit.calibration.calibration import Calibration
from tdkit.decompositions.base import Decomposition
from tdkit.decompositions.quantized import GROUPS
from tdkit.errors import BudgetError, PolicyError, did_you_mean
from tdkit.fitting.quantization import Bits, Grid
from tdkit.models.groups.group import Bundle
from tdkit.models.sites import Site, distinct_tensors, num_bytes, num_params
from tdkit.products.cost import DENSE

Unit = Literal["params", "bytes", "multiply_adds"]

FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
INTEGERS: dict[str, Bits] = {"int8": 8, "int4": 4}
DTYPES = (*FLOATS, *INTEGERS)


@dataclass(frozen=True)
class Budget:
    """The target size of a model.

    Attributes:
        ratio: size after / size before, above 0 and at most 1.
        unit: what is counted: parameters, the bytes of all tensors, or the multiply-adds of the products with weights,
            for one token, or for one example where layers see other numbers of rows.
        dtype: of the result, which decides its bytes; that of the model when None. With "int8" and "int4", factors
            and dense weights are rounded by `quantize` after the fit.
    """

    ratio: float
    unit: Unit = "params"
    dtype: str | None = None

    @classmethod
    def read(cls, given: object, place: str) -> Self | None:
        """Returns the budget that a number, a mapping such as ``{"bytes": 0.2, "dtype": "int4"}``, or None stands for.

        Raises:
            PolicyError: when it is none.
        """
        if given is None or isinstance(given, cls):
            return given
        if not isinstance(given, Mapping):
            check_ratio(given, place)
            return cls(cast(float, given))
        form = dict(given)
        dtype = form.pop("dtype", None)
        if dtype is not None and dtype not in DTYPES:
            raise PolicyError(f"{place}: dtype={dtype!r} must be one of {', '.join(DTYPES)}")
        units = get_args(Unit)
        if len(form) != 1:
            raise PolicyError(f"{place}={given!r} must have one of {', '.join(units)}, and dtype where bytes count")
        unit, ratio = next(iter(form.items()))
        if unit not in units:
            raise PolicyError(
                f"{place}: unknown unit '{unit}'{did_you_mean(str(unit), units)}; known: {', '.join(units)}"
            )
        check_ratio(ratio, f"{place} of {unit}")
        return cls(ratio, unit, dtype)

    @property
    def form(self) -> float | dict[str, Any]:
        """What `read` reads back: a number for parameters in the dtype of the model."""
        if self.unit == "params" and self.dtype is None:
            return self.ratio
        return {self.unit: self.ratio} | ({} if self.dtype is None else {"dtype": self.dtype})

    def __str__(self) -> str:
        return f"{self.ratio:g}" + (f" of the {UNITS[self.unit]}" if self.unit != "params" else "")


UNITS: dict[Unit, str] = {"params": "params", "bytes": "bytes", "multiply_adds": "multiply-adds"}


class Costs:
    """What the choices for the sites of a model cost in the unit of a budget.

    Args:
        unit: of the costs.
        dtype: of the result; that of each weight when None.
        calibration: tells how many rows each weight multiplies; one per token without.
    """

    def __init__(self, unit: Unit = "params", dtype: str | None = None, calibration: Calibration | None = None) -> None:
        self.unit, self.dtype, self.calibration = unit, dtype, calibration
        self._multiply_adds: dict[tuple[object, ...], int] = {}

    def of(self, site: Site | Bundle, kind: Decomposition | None = None, params: int | None = None) -> int:
        """Returns the cost of a site: of its factors by a complete decomposition, or of the dense weight when None.

        That of a bundle is the cost of all weights of its groups, as far as they belong to its units.

        Args:
            params: of the factors, where they are known.
        """
        if params is None:
            params = site.params if kind is None else kind.num_params(kind.shape_of(site.shape))
        if self.unit == "params":
            return params
        if isinstance(site, Bundle):
            return self._of_bundle(site, params)
        if self.unit == "multiply_adds":
            return round(self._rows(site) * self._multiply_adds_of(site, kind))
        return dense_bytes(site, self.dtype) if kind is None else factor_bytes(site, kind, self.dtype)

    def whole(self, model: nn.Module, sites: tuple[Site, ...]) -> int:
        """Returns the cost of the dense model, in its own dtype."""
        if self.unit == "params":
            return num_params(model)
        if self.unit == "bytes":
            return num_bytes(model)
        return sum(self.of(site) for site in sites)

    def rest(self, model: nn.Module, sites: tuple[Site, ...]) -> int:
        """Returns the cost, after compression, of what no site holds."""
        if self.unit == "params":
            return num_params(model) - sum(site.params for site in sites)
        if self.unit == "multiply_adds":
            return 0
        return other_bytes(model, sites, self.dtype)

    def _of_bundle(self, bundle: Bundle, params: int) -> int:
        if self.unit == "bytes":
            first = bundle.sites[0]
            partly = sum(len(group.parts) for group in bundle.groups) if self.dtype in INTEGERS else 0
            return _bytes(params, first, self.dtype) + partly * _bytes(1, first, self.dtype)  # of groups of numbers
        units = params // bundle.shape[1]
        return round(
            sum(
                self._rows(part.site) * units * group.heads * part.size * part.site.shape[1 - part.axis]
                for group in bundle.groups
                for part in group.parts
            )
        )

    def _rows(self, site: Site) -> float:
        if not site.multiplications():
            return 0
        rows = None if self.calibration is None else self.calibration.rows.get(site.name)
        if rows is None and site.shape[2:]:
            raise BudgetError(
                f"budget in multiply-adds: the number of positions that {site.name} multiplies is not known: give "
                "calibration= (one saved by an earlier version does not hold it: calibrate again)"
            )
        return site.multiplications() if rows is None else rows

    def _multiply_adds_of(self, site: Site, kind: Decomposition | None) -> int:
        if kind is None:
            return site.multiply_adds
        user = site.users[0]
        key = (site.shape, kind.describe(), user.host.name, user.kind)
        if key not in self._multiply_adds:
            matrix = kind.empty(kind.shape_of(site.shape), device="meta")
            users = [(each.host, each.module, each.weight) for each in site.users]
            dense = all(host.computed(module, weight) == DENSE for host, module, weight in users)
            self._multiply_adds[key] = (
                site.multiply_adds if dense else user.host.multiply_adds(user.module, user.weight, matrix)
            )
        return self._multiply_adds[key]


def dense_bytes(site: Site, dtype: str | None) -> int:
    """Returns the bytes of the dense weight of a site in `dtype`; in its own when None."""
    return _bytes(site.params, site, dtype)


def left_bytes(site: Site, gone: int, dtype: str | None) -> int:
    """Returns the bytes of the dense weight of a site without `gone` parameters."""
    return _bytes(site.params - gone, site, dtype)


def factor_bytes(site: Site, kind: Decomposition, dtype: str | None) -> int:
    """Returns the bytes of the factors of a site by a complete decomposition, permutations included."""
    matrix = kind.empty(kind.shape_of(site.shape), device="meta")
    fixed = sum(buffer.numel() * buffer.element_size() for buffer in matrix.buffers())
    return fixed + sum(_bytes(factor.numel(), site, dtype) for factor in matrix.parameters())


def _bytes(count: int, site: Site, dtype: str | None) -> int:
    if dtype in INTEGERS:
        return Grid(INTEGERS[dtype], GROUPS[INTEGERS[dtype]]).bytes(count)
    return count * (FLOATS[dtype].itemsize if dtype else site.weight.element_size())


def other_bytes(model: nn.Module, sites: tuple[Site, ...], dtype: str | None) -> int:
    """Returns the bytes of the tensors of a model that belong to no site, once their floats are in `dtype`."""
    after = FLOATS.get(dtype or "")
    everything = sum(
        t.numel() * (after.itemsize if after is not None and t.is_floating_point() else t.element_size())
        for t in distinct_tensors(model)
    )
    return everything - sum(
        site.params * (after.itemsize if after is not None else site.weight.element_size()) for site in sites
    )


def check_ratio(value: object, place: str, *, least: float | None = None) -> None:
    """Raise PolicyError unless `value` is None, `least`, or size after / size before in (0, 1]."""
    if value is None:
        return
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not (0 < value <= 1 or value == least):  # type: ignore[operator]
        above = "above 0" if least is None else f"at least {least}"
        raise PolicyError(f"{place}={value!r} must be params after / params before, {above} and at most 1")
