"""``tdkit export``: a model for runtimes that know no factors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from tdkit.cli.options import BatchSize, Build, Data, DtypeOption, ModelName, Weights
from tdkit.cli.output import Command, note

Form = Literal["dense", "exported", "onnx"]


def export(
    model: ModelName = None,
    build: Build = None,
    weights: Weights = None,
    *,
    form: Annotated[
        Form,
        typer.Option(
            "--to",
            help="Dense weights, as a folder of transformers, or with a name that ends in .safetensors as a file; or "
            "a program: of logits by ids, or with --data of outputs by inputs.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="The folder or file to write.")],
    data: Data = None,
    batch_size: BatchSize = 32,
    dtype: DtypeOption = "float32",
) -> None:
    """Write a model as dense weights, as a program of torch.export, or as ONNX.

    A program of a model that is no language model is recorded on the first batch of --data, which has at least two
    examples, and takes any number of them.
    """
    from tdkit.cli import exporting
    from tdkit.cli.loading import check_model, dtype_of, from_here, source_of
    from tdkit.errors import OptionError
    from tdkit.sources.own import load_batches

    check_model(model, build, weights)
    exporting.check(form, out, own=build is not None, data=data)
    if out.exists():
        raise OptionError(f"--out {out} exists: give another path")
    batch = None
    if data is not None:
        from_here()
        batch = next(iter(load_batches(data, batch=batch_size)))
    exporting.write(form, source_of(model, build, weights, dtype_of(dtype)), out, batch)
    note(f"exported to {out}")


COMMANDS = (
    Command(
        export,
        "tdkit export smaller --to exported --out smaller.pt2",
        "tdkit export --model my_pkg.nets:build --weights small --data test.safetensors --to exported --out small.pt2",
    ),
)
