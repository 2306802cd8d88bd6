"""Arguments and options that several commands have."""

from __future__ import annotations

from typing import Annotated

import torch
import typer

from tdkit.errors import OptionError
from tdkit.sources.models import DTYPES

ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A folder, a registered name such as smollm2 (tdkit sources lists them), or a hub name."
    ),
]
Dtype = Annotated[str, typer.Option(help=f"Of the weights: {', '.join(DTYPES)}.")]
Context = Annotated[int, typer.Option(help="Tokens per window.", min=2)]


def dtype_of(name: str) -> torch.dtype:
    """Returns the dtype of this name.

    Raises:
        OptionError: when there is none.
    """
    if name not in DTYPES:
        raise OptionError(f"--dtype {name} is none of {', '.join(DTYPES)}")
    return DTYPES[name]
