"""The plan of a compression: what each weight matrix is replaced by, to print, edit or save before it is applied."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tdkit.errors import PolicyError, TdkitError
from tdkit.models.sites import Untouchable
from tdkit.planning.budget import Budget
from tdkit.planning.step import Step
from tdkit.planning.table import PlanTable, plan_table
from tdkit.support.documents import parse_json
from tdkit.support.tables import render

if TYPE_CHECKING:
    from rich.console import Group

FORMAT_VERSION = 2


@dataclass(frozen=True)
class Plan:
    """Every weight matrix of a model and the decomposition that replaces it, if any.

    Attributes:
        steps: one per weight matrix, in the model's order; includes those that stay dense.
        params_before: parameters of the dense model, tied weights counted once.
        params_after: parameters of the compressed model, tied weights counted once.
        untouchable: the weights that tdkit cannot rewrite, with size and reason.
        budget: the budget of the policy, as it takes it; None when it has none.
        warnings: what the plan does that may not be meant, such as layers of which little is left.
        bytes_before: bytes of all tensors of the dense model, tied ones counted once; None where it is not known.
        bytes_after: bytes after compression, in the dtype that the budget asks for.
    """

    steps: tuple[Step, ...]
    params_before: int
    params_after: int
    untouchable: tuple[Untouchable, ...] = ()
    budget: float | Mapping[str, Any] | None = None
    warnings: tuple[str, ...] = ()
    bytes_before: int | None = None
    bytes_after: int | None = None

    @property
    def ratio(self) -> float:
        """Params after / params before of the whole model."""
        return self.params_after / self.params_before if self.params_before else 1.0

    @property
    def target(self) -> Budget | None:
        """The budget as an object."""
        return Budget.read(self.budget, "plan budget")

    @property
    def kept(self) -> dict[str, str]:
        """Maps the name of each weight that tdkit cannot rewrite to the reason."""
        return {weight.name: weight.reason for weight in self.untouchable}

    @property
    def weights(self) -> int:
        """Number of parameters in tensors of two or more dimensions, tied ones counted once, without factors."""
        return sum(step.params_before for step in self.steps) + sum(weight.params for weight in self.untouchable)

    @property
    def share_rewritable(self) -> float:
        """Share of `weights` in tensors that tdkit can rewrite."""
        return sum(step.params_before for step in self.steps) / self.weights if self.weights else 1.0

    @property
    def share_rewritten(self) -> float:
        """Share of `weights` in tensors that the plan replaces."""
        return sum(step.params_before for step in self.rewritten) / self.weights if self.weights else 0.0

    @property
    def rewritten(self) -> tuple[Step, ...]:
        """The steps that replace a weight."""
        return tuple(step for step in self.steps if step.decomposition is not None)

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, name: str) -> Step:
        """Returns the step of the layer called `name`.

        Raises:
            KeyError: when no step has such a layer.
        """
        for step in self.steps:
            if name in step.names:
                return step
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        return {
            "version": FORMAT_VERSION,
            "budget": self.budget,
            "params_before": self.params_before,
            "params_after": self.params_after,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "steps": [step.to_dict() for step in self.steps],
            "kept": {
                weight.name: {
                    "kind": weight.kind,
                    "shape": list(weight.shape),
                    "params": weight.params,
                    "reason": weight.reason,
                    "others": list(weight.others),
                }
                for weight in self.untouchable
            },
            "weights": self.weights,
            "share_rewritable": self.share_rewritable,
            "share_rewritten": self.share_rewritten,
            "warnings": list(self.warnings),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, form: Mapping[str, Any]) -> Plan:
        """Returns a plan from the form that `to_dict` returns.

        Raises:
            PolicyError: when the form is invalid; the message lists the faults of all steps.
        """
        if not isinstance(form, Mapping):
            raise PolicyError(f"not a tdkit plan: it is a {type(form).__name__}, not a mapping")
        wanted = {"version": int, "params_before": int, "params_after": int, "steps": list, "kept": Mapping}
        for key, kind in wanted.items():
            if not isinstance(form.get(key), kind):
                raise PolicyError(f"not a tdkit plan: {key}={form.get(key)!r} must be a {kind.__name__}")
        if form["version"] > FORMAT_VERSION:
            raise PolicyError(f"plan version {form['version']} is newer than {FORMAT_VERSION}: update tdkit")
        steps, faults = [], []
        for number, step in enumerate(form["steps"]):
            try:
                steps.append(Step.from_dict(step, f"step {number}"))
            except TdkitError as error:
                faults.append(str(error) if isinstance(error, PolicyError) else f"step {number}: {error}")
        try:
            untouchable = _untouchable_of(form["kept"])
        except PolicyError as error:
            faults.append(str(error))
        if faults:
            raise PolicyError("not a tdkit plan:\n" + "\n".join(faults))
        warnings = form.get("warnings", [])
        if not isinstance(warnings, list) or not all(isinstance(text, str) for text in warnings):
            raise PolicyError(f"not a tdkit plan: warnings={warnings!r} must be texts")
        Budget.read(form.get("budget"), "not a tdkit plan: budget")
        sizes = form["params_before"], form["params_after"]
        counts = [form.get(key) for key in ("bytes_before", "bytes_after")]
        for count in counts:
            if count is not None and (type(count) is not int or count < 0):
                raise PolicyError(f"not a tdkit plan: bytes {count!r} must be a count or null")
        return cls(tuple(steps), *sizes, untouchable, form.get("budget"), tuple(warnings), *counts)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Returns a plan from the text that `to_json` returns.

        Raises:
            PolicyError: when the text is not JSON, or as `from_dict`.
        """
        try:
            form = parse_json(text)
        except ValueError as error:
            raise PolicyError(f"not a tdkit plan: {error}") from None
        return cls.from_dict(form)

    def summary(self) -> str:
        """Returns two lines: the share of the weights that is rewritten, and the size of the whole model."""
        rewritten = sum(step.params_before for step in self.rewritten)
        after = sum(step.params_after for step in self.rewritten)
        unknown = sum(not weight.params for weight in self.untouchable)
        asked = f", budget {self.target}" if self.target is not None else ""
        return (
            f"of {self.weights:,} weights {percent(self.share_rewritable)} can be rewritten: "
            f"{percent(self.share_rewritten)} are ({rewritten:,} -> {after:,}), "
            f"{percent(1 - self.share_rewritten, up=True)} are kept ({self.weights - rewritten:,})"
            + (f", and {unknown} tensors of unknown size are kept" if unknown else "")
            + f"\n{self.params_before:,} -> {self.params_after:,} params (ratio {self.ratio:.4f}{asked}), "
            f"{len(self.rewritten)} of {len(self.steps) + len(self.untouchable)} tensors rewritten" + self._bytes()
        )

    def _bytes(self) -> str:
        if self.bytes_after is None:
            return ""
        dtype = f" in {self.target.dtype}" if self.target and self.target.dtype else ""
        before = "" if self.bytes_before is None else f"{megabytes(self.bytes_before)} -> "
        return f"; {before}{megabytes(self.bytes_after)}{dtype}"

    def table(self, *, every: bool = False) -> PlanTable:
        """Returns a table with layer, shape, replacement, parameters, multiply-adds and paths.

        Relative error, estimated loss and runner-up are added where they are known. Columns that its width has no room
        for are left out, and a line says which.

        Args:
            every: one row per layer, also for those that stay dense; otherwise layers of a long plan that differ only
                in their depth and have the same shape and decomposition share a row, with the range of their ranks,
                and those that stay dense are summed up below the table, by reason.
        """
        return plan_table(self.steps, self.untouchable, every=every)

    def report(self, *, every: bool = False) -> Group:
        """Returns what a plan prints: its summary, table and warnings.

        Args:
            every: as in `table`.
        """
        from rich.console import Group
        from rich.text import Text

        warnings = [Text(f"warning: {text}", style="yellow") for text in self.warnings]
        return Group(Text(self.summary(), style="bold"), self.table(every=every), *warnings)

    def __rich__(self) -> Group:
        return self.report()

    def __str__(self) -> str:
        return render(self.report())


def megabytes(count: int) -> str:
    """Format a number of bytes in units of 10^6, or of 10^3 below."""
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def percent(share: float, *, up: bool = False) -> str:
    """Format a share with one decimal, rounded down, or `up`, so that 100.0% and 0.0% are exact."""
    tenths = round(share * 1000, 6)  # of floating-point noise
    return f"{(math.ceil(tenths) if up else math.floor(tenths)) / 10:.1f}%"


def _untouchable_of(kept: Mapping[str, Any]) -> tuple[Untouchable, ...]:
    """Returns the weights that cannot be rewritten; version 1 wrote their reasons alone."""
    found, faults = [], []
    for name, entry in kept.items():
        if isinstance(entry, str):
            found.append(Untouchable(name, "", 0, entry))
            continue
        try:
            shape, others = tuple(entry["shape"]), tuple(entry["others"])
            params = entry.get("params", math.prod(shape) if shape else 0)  # not written before
            found.append(Untouchable(name, entry["kind"], params, entry["reason"], shape, others))
        except (KeyError, TypeError):
            faults.append(f"kept '{name}': {entry!r} must have kind, shape, reason and others")
    if faults:
        raise PolicyError("\n".join(faults))
    return tuple(found)
