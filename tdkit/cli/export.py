"""``tdkit export``: a language model for runtimes that know no factors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from tdkit.cli.options import DtypeOption, NamedModel
from tdkit.cli.output import Command, note

Form = Literal["dense", "exported", "onnx"]


def export(
    model: NamedModel,
    form: Annotated[
        Form, typer.Option("--to", help="A folder of transformers with dense weights, or a program of logits by ids.")
    ],
    out: Annotated[Path, typer.Option("--out", help="The folder (dense) or file (exported, onnx) to write.")],
    dtype: DtypeOption = "float32",
) -> None:
    """Write a model as dense weights, as a program of torch.export, or as ONNX."""
    from tdkit.cli import exporting
    from tdkit.cli.loading import dtype_of
    from tdkit.errors import OptionError
    from tdkit.sources.models import load_model

    exporting.check_packages(form)
    if out.exists():
        raise OptionError(f"--out {out} exists: give another path")
    exporting.WRITERS[form](load_model(model, dtype=dtype_of(dtype)), out)
    note(f"exported to {out}")


COMMANDS = (Command(export, "tdkit export smaller --to exported --out smaller.pt2"),)
