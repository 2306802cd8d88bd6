"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from tdkit.cli.completion import complete_decompositions, complete_models

ModelName = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="A folder, a registered name such as smollm2 (tdkit sources lists them), or a hub name.",
        autocompletion=complete_models,
        show_default=False,
    ),
]
NamedModel = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder, a registered name such as smollm2 (tdkit sources lists them), or a hub name.",
        autocompletion=complete_models,
    ),
]
Build = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODULE:NAME",
        help="Instead of MODEL: a function or class of yours that returns a torch module, such as my_pkg.nets:build. "
        "The module is imported, from the current folder too.",
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option("--weights", help="With --model: its weights, a .safetensors file or a folder that tdkit saved."),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="PATH|MODULE:NAME",
        help="Batches: a .safetensors or .npz file with inputs and labels, a folder of these, or by import path a "
        "function of yours that returns batches.",
    ),
]
BatchSize = Annotated[int, typer.Option("--batch-size", help="With --data of files: examples per batch.", min=1)]

Dtype = Literal["float32", "float64", "bfloat16", "float16"]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Of the weights.")]
Context = Annotated[int, typer.Option(help="Tokens per window.", min=2)]

PolicyFile = Annotated[Path | None, typer.Option("--policy", help="A YAML policy; instead of --with and --match.")]
With = Annotated[
    str,
    typer.Option(
        "--with",
        help="A decomposition, also as YAML: '{kronecker: {terms: 4, b: [2, 4]}}'.",
        autocompletion=complete_decompositions,
    ),
]
Match = Annotated[list[str] | None, typer.Option("--match", help="Globs of the layers to rewrite; all by default.")]
Budget = Annotated[
    str | None,
    typer.Option(
        help="Params after / params before of the whole model, or another unit: '{bytes: 0.3, dtype: int4}', "
        "'{multiply_adds: 0.5}'."
    ),
]
Every = Annotated[bool, typer.Option("--every", help="One row per layer, and every layer that is kept.")]

Labels = Literal["data", "sampled"]
CalibrationText = Annotated[
    list[str] | None,
    typer.Option(
        "--calibration",
        help="Fit in the metric of this text: a file, a folder, a name (sotu:calibration); or of saved moments: a "
        "folder that tdkit calibrate wrote.",
    ),
]
CalibrationTokens = Annotated[int, typer.Option(help="How many tokens of the calibration text to use.", min=2)]
SelfGenerated = Annotated[
    int,
    typer.Option(
        help="Also calibrate on this many tokens that the model generates itself: text of other kinds suffers less.",
        min=0,
    ),
]
CalibrationLabels = Annotated[
    Labels,
    typer.Option(
        "--labels", help="Calibrate on the text's own next tokens, or on ones the model draws (light compression)."
    ),
]
InputsOnly = Annotated[
    bool,
    typer.Option("--inputs-only", help="Calibrate on the inputs of layers alone; for encoders, which have no loss."),
]

EvaluationText = Annotated[
    list[str] | None,
    typer.Option(
        "--evaluation", help="Measure perplexity on this text before and after, for the report; as --text of eval."
    ),
]
EvaluationTokens = Annotated[
    int | None, typer.Option(help="How many tokens of the evaluation text to use; 16384 by default.", min=2)
]
EvaluationData = Annotated[
    str | None,
    typer.Option(
        "--evaluation-data",
        metavar="PATH|MODULE:NAME",
        help="Measure on these batches before and after, given as --data: the accuracy or the squared error by their "
        "labels, without labels the agreement with the dense model.",
    ),
]
Prompt = Annotated[str | None, typer.Option(help="Continue this text with the model before and after, for the report.")]
NoReport = Annotated[bool, typer.Option("--no-report", help="Leave no report in the folder.")]
Within = Annotated[
    float | None,
    typer.Option(
        help="Recommend the smallest model whose metric is within this share of the dense model's; 0.05 by default.",
        min=0,
    ),
]
