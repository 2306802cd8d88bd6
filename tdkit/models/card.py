"""The model card of a saved folder: README.md with the front matter that hubs read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from tdkit.models import huggingface
from tdkit.models.sites import factorized_groups, num_bytes, num_params
from tdkit.support.documents import parse_yaml

CARD = "README.md"
UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a model card says besides what the model itself tells.

    Attributes:
        policy: the policy or plan that the model was compressed by, as YAML or other text.
        budget: the budget that the policy asked for, as it takes it.
        evaluation: figures with their conditions, such as ``evaluate(model, ids).to_dict()``.
        base_model: the hub name of the dense model; when None, the name that a transformers model was loaded by.
        licence: of the base model; when None, that of its README.md, if its folder is here.
    """

    policy: str | None = None
    budget: float | Mapping[str, Any] | None = None
    evaluation: Mapping[str, Any] | None = None
    base_model: str | None = None
    licence: str | None = None

    def write(self, model: nn.Module, folder: Path) -> None:
        """Write the card of `model` to `folder`."""
        (folder / CARD).write_text(self.text(model), encoding="utf-8")

    def text(self, model: nn.Module) -> str:
        """Returns the card of `model` as Markdown."""
        base = self.base_model or str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
        licence = self.licence or licence_of(base)
        is_name = base.count("/") == 1 and not Path(base).exists()
        front: dict[str, Any] = {"library_name": "transformers" if huggingface.is_pretrained(model) else "tdkit"}
        front |= {"tags": ["tdkit", "tensor-decomposition", "model-compression"]}
        front |= {"base_model": base} if is_name else {"compressed_from": base} if base else {}
        front |= {"license": licence} if licence else {}
        parts = [
            f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
            f"# {huggingface.class_of(model).__name__} with factorised weights",
            f"Compressed by [tdkit](https://pypi.org/project/tdkit/). Base model: {base or UNKNOWN}. Licence of the "
            f"base model: {licence or f'{UNKNOWN}, see the base model'}.",
            _figures(model),
            _budget(self.budget),
            f"## Policy\n\n```yaml\n{self.policy.strip()}\n```" if self.policy else "",
            _evaluation(self.evaluation),
            _how_to_load(model),
        ]
        return "\n\n".join(part for part in parts if part) + "\n"


def _budget(budget: float | Mapping[str, Any] | None) -> str:
    if budget is None:
        return ""
    asked = {"params": budget} if not isinstance(budget, Mapping) else dict(budget)
    dtype = f", in {asked.pop('dtype')}" if "dtype" in asked else ""
    unit, ratio = next(iter(asked.items()))
    return f"Budget: {ratio:g} of the {'parameters' if unit == 'params' else unit.replace('_', '-')}{dtype}."


def _figures(model: nn.Module) -> str:
    groups: dict[str, list[tuple[int, int, float | None]]] = {}
    dense = after = 0
    for matrix, _ in factorized_groups(model):
        before = math.prod(matrix.sizes)
        groups.setdefault(matrix.decomposition.name, []).append((before, matrix.params, matrix.error))
        dense, after = dense + before, after + matrix.params
    params = num_params(model)
    lines = [
        "## Size",
        "",
        f"{params:,} parameters instead of {params - after + dense:,} (ratio {params / (params - after + dense):.3f}), "
        f"{num_bytes(model) / 1e6:,.1f} MB of tensors; tied weights are counted once.",
        "",
        "| decomposition | matrices | parameters before | after | mean relative error of the fits |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, rows in sorted(groups.items()):
        errors = [error for _, _, error in rows if error is not None]
        mean = f"{sum(errors) / len(errors):.4f}" if errors else UNKNOWN
        before, kept = sum(row[0] for row in rows), sum(row[1] for row in rows)
        lines.append(f"| {name} | {len(rows)} | {before:,} | {kept:,} | {mean} |")
    return "\n".join(lines if groups else lines[:3])


def _evaluation(figures: Mapping[str, Any] | None) -> str:
    if figures is None:
        return "## Evaluation\n\nNo evaluation was given when this folder was saved."
    rows = [
        f"| {key} | {value:,.6g} |" if isinstance(value, float) else f"| {key} | {value} |"
        for key, value in figures.items()
    ]
    return "\n".join(["## Evaluation", "", "| | |", "| --- | --- |", *rows])


def _how_to_load(model: nn.Module) -> str:
    kind = huggingface.class_of(model).__name__
    if not huggingface.is_pretrained(model):
        code = f"model = tdkit.load(folder, model={kind}(...))  # the dense model, newly built"
        return f"## How to load\n\n```text\nimport tdkit\n\n{code}\n```"
    return (
        "## How to load\n\n```text\nimport tdkit  # before from_pretrained; transformers alone refuses the folder\n"
        f"from transformers import {kind}\n\nmodel = {kind}.from_pretrained(folder)\n"
        "model = tdkit.load(folder)  # the same, verified by its SHA-256\n```"
    )


def licence_of(base: str) -> str | None:
    """Returns the licence in the front matter of the README.md of a local folder or a cached hub model, or None."""
    if not base:
        return None
    path: Any = Path(base) / CARD
    if not path.is_file():
        path = huggingface.cached_file(base, CARD)
    licence = _front(path).get("license")
    return licence if isinstance(licence, str) else None


def base_of(folder: str | Path) -> str | None:
    """Returns the name or folder of the dense model, as the card of a saved folder has it, or None."""
    front = _front(Path(folder) / CARD)
    base = front.get("compressed_from") or front.get("base_model")
    return base if isinstance(base, str) else None


def _front(path: Any) -> dict[str, Any]:
    """The front matter of a card; empty when there is none that can be read."""
    try:
        _, front, _ = Path(path).read_text(encoding="utf-8").split("---", 2)
        found = parse_yaml(front)
    except (OSError, ValueError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}
