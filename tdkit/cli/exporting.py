"""Write a language model for runtimes that know no factors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tdkit.errors import MissingDependencyError, OptionError
from tdkit.evaluation.language_models import check_takes_text
from tdkit.models.conversion import to_dense
from tdkit.models.sites import num_bytes
from tdkit.sources.source import Source
from tdkit.support.files import whole_file, whole_folder

PACKAGES = ("onnx", "onnxscript")  # of ONNX files
MOST = 2**31 - 2**20  # bytes of the weights in one file of ONNX
EXAMPLE = (2, 8)  # tokens; the program takes any numbers of texts and tokens
IN_PYTHON = "export it in Python, with inputs of its own (torch.export.export)"


def check_packages(form: str) -> None:
    """Check that the packages are there that a form needs.

    Raises:
        MissingDependencyError: when they are not.
    """
    missing = [name for name in PACKAGES if form == "onnx" and find_spec(name) is None]
    if missing:
        raise MissingDependencyError(f"--to onnx needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def _dense(source: Source, out: Path) -> None:
    save: Any = getattr(source.model, "save_pretrained", None)
    if save is None:
        raise OptionError(f"--to dense writes models of transformers, not a {type(source.model).__name__}")
    to_dense(source.model)
    with whole_folder(out) as target:
        save(target)
        if source.tokenizer is not None:
            source.tokenizer.save_pretrained(target)


def _exported(source: Source, out: Path) -> None:
    program = _program(source.model)
    with whole_file(out) as target, target.open("wb") as file, _quiet():
        torch.export.save(program, file)


def _onnx(source: Source, out: Path) -> None:
    size = num_bytes(source.model)
    if size >= MOST:
        raise OptionError(
            f"--to onnx writes one file of less than 2 GiB, and this model has {size:,} bytes: {IN_PYTHON}"
        )
    with _quiet():
        names: dict[str, Any] = {"input_names": ["input_ids"], "output_names": ["logits"]}
        program: Any = torch.onnx.export(_program(source.model), dynamo=True, verbose=False, **names)
    with whole_file(out) as target:
        program.save(target, external_data=False)


def _program(model: nn.Module) -> torch.export.ExportedProgram:
    check_takes_text(model, "--to exported or onnx", IN_PYTHON)
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with torch.no_grad(), _quiet():
        return torch.export.export(
            _Logits(model).eval(), (torch.zeros(EXAMPLE, dtype=torch.long),), dynamic_shapes=(sizes,)
        )


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


WRITERS: dict[str, Callable[[Source, Path], None]] = {"dense": _dense, "exported": _exported, "onnx": _onnx}
