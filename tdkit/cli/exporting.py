"""Write a model for runtimes that know no factors."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import Tensor, nn

from tdkit.calibration.batches import Batch, Call
from tdkit.errors import MissingDependencyError, OptionError, SourceError
from tdkit.evaluation.language_models import check_takes_text
from tdkit.evaluation.running import call_in
from tdkit.models.conversion import to_dense
from tdkit.models.sites import num_bytes
from tdkit.sources.source import Source
from tdkit.support.compatibility import tree_map
from tdkit.support.files import whole_file, whole_folder

PACKAGES = ("onnx", "onnxscript")  # of ONNX files
MOST = 2**31 - 2**20  # bytes of the weights in one file of ONNX
EXAMPLE = (2, 8)  # tokens; the program takes any numbers of texts and tokens
IN_PYTHON = "export it in Python, with inputs of its own (torch.export.export)"


def check(form: str, out: Path, *, own: bool, data: str | None) -> None:
    """Check, before a model is loaded, that a form can be written.

    Args:
        out: where to.
        own: whether the model is of the user's own class.
        data: what it is recorded on.

    Raises:
        OptionError: when something is missing or does not go together.
        MissingDependencyError: when a package that the form needs is not there.
    """
    if form == "dense":
        if data is not None:
            raise OptionError(f"--data {data} is what a program is recorded on: leave it out with --to dense")
        if own and out.suffix != ".safetensors":
            raise OptionError(f"--out {out}: the dense weights of --model are a file, whose name ends in .safetensors")
    elif own and data is None:
        raise OptionError(f"--to {form} records --model on a batch: give --data")
    missing = [name for name in PACKAGES if form == "onnx" and find_spec(name) is None]
    if missing:
        raise MissingDependencyError(f"--to onnx needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def write(form: str, source: Source, out: Path, batch: Batch | None) -> None:
    """Write a model.

    Args:
        form: "dense", "exported" or "onnx".
        batch: what a program is recorded on, with labels or without; None for two short texts.
    """
    if form == "dense":
        _dense(source, out)
        return
    if form == "onnx" and (size := num_bytes(source.model)) >= MOST:
        raise OptionError(
            f"--to onnx writes one file of less than 2 GiB, and this model has {size:,} bytes: {IN_PYTHON}"
        )
    program = _of_text(source.model) if batch is None else _of_batch(source.model, batch)
    if form == "onnx":
        names: dict[str, Any] = {"input_names": ["input_ids"], "output_names": ["logits"]} if batch is None else {}
        with _quiet():
            made: Any = torch.onnx.export(program, dynamo=True, verbose=False, **names)
        with whole_file(out) as target:
            made.save(target, external_data=False)
        return
    with whole_file(out) as target, target.open("wb") as file, _quiet():
        torch.export.save(program, file)


def _dense(source: Source, out: Path) -> None:
    if out.suffix == ".safetensors":
        with whole_file(out) as target:
            save_model(to_dense(source.model), str(target))
        return
    save: Any = getattr(source.model, "save_pretrained", None)
    if save is None:
        raise OptionError(
            f"--to dense writes folders of transformers models, and {type(source.model).__name__} is none: give --out "
            "a name that ends in .safetensors"
        )
    to_dense(source.model)
    with whole_folder(out) as target:
        save(target)
        if source.tokenizer is not None:
            source.tokenizer.save_pretrained(target)


def _of_text(model: nn.Module) -> torch.export.ExportedProgram:
    check_takes_text(model, "--to exported or onnx", f"give --data to record it on, or {IN_PYTHON}")
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with torch.no_grad(), _quiet():
        return torch.export.export(
            _Logits(model).eval(), (torch.zeros(EXAMPLE, dtype=torch.long),), dynamic_shapes=(sizes,)
        )


def _of_batch(model: nn.Module, batch: Batch) -> torch.export.ExportedProgram:
    """Returns the program of a model for any number of examples; labels are left out.

    Raises:
        SourceError: when it cannot be recorded on this batch.
    """
    call = _without_labels(call_in(model, batch, 0))
    if call.examples < 2:
        raise SourceError("a program is recorded on a batch of at least two examples, and the first has fewer")

    def sizes(leaf: Any) -> Any:
        many = isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == call.examples
        return {0: torch.export.Dim.DYNAMIC} if many else None

    shapes = tree_map(sizes, call.kwargs or call.args)  # a batch gives the one or the other
    try:
        with torch.no_grad(), _quiet():
            return torch.export.export(model.eval(), call.args, call.kwargs, dynamic_shapes=shapes)
    except Exception as error:  # whatever of a model cannot be recorded
        said = str(error).strip().split("\n")[0]
        raise SourceError(
            f"torch.export cannot record {type(model).__name__} for any number of examples: {said}; {IN_PYTHON}"
        ) from error


def _without_labels(call: Call) -> Call:
    if not call.passed:
        return call
    kwargs = {name: value for name, value in call.kwargs.items() if value is not call.labels}
    return Call(tuple(value for value in call.args if value is not call.labels), kwargs)


class _Logits(nn.Module):
    """A language model without cache: ids (batch, tokens) to logits (batch, tokens, vocabulary)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits


def _quiet() -> Any:
    """Ignores the warnings of exporters, which are of their own code and that of the model."""
    return warnings.catch_warnings(action="ignore")
