"""The model that a command is given: by name, or by the import path of a function that builds it."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tdkit.cli.options import Dtype
from tdkit.errors import OptionError
from tdkit.sources.models import DTYPES, load_model
from tdkit.sources.own import build_model, is_import_path
from tdkit.sources.source import Source


def dtype_of(name: Dtype) -> torch.dtype:
    """Returns the dtype of this name."""
    return DTYPES[name]


def check_model(model: str | None, build: str | None, weights: Path | None) -> str:
    """Returns the name of the model, for messages, after a check that it is given once.

    Raises:
        OptionError: when it is not.
    """
    if (model is None) == (build is None):
        raise OptionError("give one model: MODEL by name or folder, or --model MODULE:NAME by import path")
    if weights is not None and build is None:
        raise OptionError(f"--weights {weights} goes with --model MODULE:NAME, which builds the model to fill")
    return model or str(build)


def source_of(
    model: str | None,
    build: str | None,
    weights: str | Path | None,
    dtype: torch.dtype,
    device: str | None = None,
) -> Source:
    """Load the model of a command that `check_model` has seen."""
    if model is not None:
        return load_model(model, dtype=dtype, device=device)
    from_here()
    return build_model(str(build), weights, dtype=dtype, device=device)


def dense_of(against: str, build: str | None, dtype: torch.dtype, device: str | None = None) -> Source:
    """Load the dense model that a command compares with: by name, or as `build` makes it, or filled with weights."""
    if build is None:
        return load_model(against, dtype=dtype, device=device)
    from_here()
    if is_import_path(against):
        return build_model(against, dtype=dtype, device=device)
    return build_model(build, against, dtype=dtype, device=device)


def from_here() -> None:
    """Let modules of the current folder be imported, as ``python -m`` does."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
