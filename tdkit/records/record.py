"""The record of one compression: a file of JSON beside the model, which no other part of tdkit depends on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from tdkit.errors import CheckpointError, TdkitError
from tdkit.planning.plan import Plan
from tdkit.records.spectra import Spectrum
from tdkit.records.tree import Branch, check_tree
from tdkit.support.documents import read_json
from tdkit.support.files import write_text
from tdkit.support.version import installed_versions

if TYPE_CHECKING:
    from pydantic import BaseModel

FORM = "tdkit-record/1"
RECORD = "record.json"
THEN = "then"  # the option with what was done after the compression, a text for each step
PACKAGES = ("tdkit", "torch", "numpy", "transformers", "tokenizers", "safetensors", "datasets", "accelerate")

Figures = Mapping[str, float]
"""What was measured of a model, by name: params, bytes, tokens_per_second, and metrics such as perplexity."""


@dataclass(frozen=True)
class Data:
    """A text or other data that a compression used.

    Attributes:
        role: 'calibration', 'evaluation' or 'train'.
        name: as it was given.
        tokens: how many tokens of it were used, at most; None for all, or where it has no tokens.
        sha256: of its documents, as in `tdkit.sources.documents.sha256`, or of its batches, as in
            `tdkit.calibration.batches.digest_of`; None where it is not known.
    """

    role: str
    name: str
    tokens: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Sample:
    """A text that a model continued greedily.

    Attributes:
        prompt: what was continued.
        dense: the prompt and its continuation by the model before; None where it was not made.
        compressed: the prompt and its continuation by the model after; None where it was not made.
    """

    prompt: str
    dense: str | None
    compressed: str | None


@dataclass(frozen=True, kw_only=True)
class Record:
    """What was done to one model.

    Attributes:
        name: of the row in tables.
        model: the dense model as it was given.
        class_name: its class.
        policy: in its YAML form; None when it is not known.
        options: of the call besides the policy, such as context, labels, passes.
        seed: of all random generators; None where nothing is drawn.
        command: the command line, or None for a call in Python.
        versions: of Python and packages.
        data: the texts that were used.
        plan: what was carried out, with estimates and errors; None when it failed.
        spectra: singular values of some weights, before they were fitted.
        before: the modules of the model before.
        after: the modules of the model after.
        dense: what was measured of the dense model.
        compressed: what was measured of the compressed model.
        higher_is_better: the metrics of which more is better; of all others less is.
        samples: texts that were continued.
        seconds: the time of the parts of the work, by name.
        unknown: what is not recorded and why, one sentence each.
        failure: why there is no compressed model; empty otherwise.
    """

    name: str
    model: str
    class_name: str
    policy: Mapping[str, Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    command: str | None = None
    versions: Mapping[str, str] = field(default_factory=lambda: installed_versions(PACKAGES))
    data: tuple[Data, ...] = ()
    plan: Plan | None = None
    spectra: tuple[Spectrum, ...] = ()
    before: tuple[Branch, ...] = ()
    after: tuple[Branch, ...] = ()
    dense: Figures = field(default_factory=dict)
    compressed: Figures = field(default_factory=dict)
    higher_is_better: tuple[str, ...] = ()
    samples: tuple[Sample, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    failure: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form; figures that are not finite are written as text, those of the plan left out."""
        return {
            "form": FORM,
            **vars(self),
            "data": [vars(each) for each in self.data],
            "plan": None if self.plan is None else _finite(self.plan.to_dict()),
            "spectra": [each.to_dict() for each in self.spectra],
            "before": [each.to_dict() for each in self.before],
            "after": [each.to_dict() for each in self.after],
            "dense": _written(self.dense),
            "compressed": _written(self.compressed),
            "higher_is_better": list(self.higher_is_better),
            "samples": [vars(each) for each in self.samples],
            "unknown": list(self.unknown),
        }

    @classmethod
    def from_dict(cls, form: Any, place: str = "record") -> Record:
        """Returns a record from the form that `to_dict` returns.

        Raises:
            CheckpointError: when the form is another one or malformed; the message begins with `place`.
        """
        if not isinstance(form, Mapping) or form.get("form") != FORM:
            raise CheckpointError(f"{place} is no record of the form {FORM}: update tdkit, or make it again")
        try:
            plan = None if form["plan"] is None else Plan.from_dict(form["plan"])
            given = _typed().model_validate({key: value for key, value in form.items() if key not in ("form", "plan")})
            for part in ("before", "after"):
                check_tree(getattr(given, part), part)
            return cls(plan=plan, **{name: getattr(given, name) for name in type(given).model_fields})
        except TdkitError as error:
            raise CheckpointError(f"{place}: {error}") from None
        except KeyError:
            raise CheckpointError(f"{place} is damaged: it has no plan") from None
        except ValueError as error:
            raise CheckpointError(f"{place} is damaged: {_told(error)}") from None

    def save(self, file: str | Path) -> Path:
        """Write the record as JSON, completely or not at all; returns the path."""
        write_text(Path(file), json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")
        return Path(file)

    @classmethod
    def read(cls, file: str | Path) -> Record:
        """Returns the record in a file.

        Raises:
            CheckpointError: when it cannot be read, is damaged, or has another form.
        """
        try:
            form = read_json(Path(file))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file} cannot be read as a record: {error}") from None
        return cls.from_dict(form, str(file))


@cache
def _typed() -> type[BaseModel]:
    """Returns a model of the fields of a record but its plan, each of its type."""
    from pydantic import ConfigDict, create_model

    fields: dict[str, Any] = {name: (kind, ...) for name, kind in get_type_hints(Record).items() if name != "plan"}
    return create_model("RecordForm", __config__=ConfigDict(extra="forbid"), **fields)


def _told(error: ValueError) -> str:
    """Returns the faults that pydantic found, on one line."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return str(error)
    return "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()[:3])


def _finite(value: Any) -> Any:
    """Returns a JSON-able value with None for each number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value


def _written(figures: Figures) -> dict[str, float | str]:
    return {name: value if math.isfinite(value) else str(value) for name, value in figures.items()}
