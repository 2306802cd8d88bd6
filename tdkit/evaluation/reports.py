"""One JSON form for every measurement, so that rows can be compared across runs, models and papers."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from tdkit.calibration.runner import device_of
from tdkit.errors import EvaluationError
from tdkit.models.sites import factorized_groups, num_bytes, num_params, survey
from tdkit.sources.source import Source
from tdkit.support.files import digest_of_file, write_text
from tdkit.support.version import installed_versions

PACKAGES = ("tdkit", "torch", "transformers", "tokenizers", "datasets", "lm_eval")
WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.gguf")  # of the first form that a folder has


class Form(BaseModel):
    """Settings of all parts: unknown keys are errors, numbers that are not finite are written as text."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class DenseWeight(Form):
    """A weight of two or more dimensions that is stored dense.

    Attributes:
        names: of the layers that use it.
        shape: (out, in) or (out, in, *kernel).
        params: number of its parameters.
        reason: why it is dense.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    params: int
    reason: str


class ModelIdentity(Form):
    """Which model was measured.

    Attributes:
        name: as it was given.
        class_name: the class of the model.
        sha256: of the weights, see `sha256_of`.
        sha256_of: 'file' for the weights file of the folder; 'files' for several, then of the lines ``sha256  name`` of
            each, sorted by name; 'tensors' for a model without a folder, of the names, dtypes, shapes and bytes of its
            state.
        params: number of parameters; tied ones are counted once.
        bytes: size of the tensors; tied ones are counted once.
        dtypes: the dtypes of the parameters.
        device: where it ran.
        decompositions: the number of factorised matrices by decomposition; empty for a dense model.
        left_dense: the weights that are not factorised.
    """

    name: str
    class_name: str
    sha256: str
    sha256_of: Literal["file", "files", "tensors"]
    params: int
    bytes: int
    dtypes: tuple[str, ...]
    device: str
    decompositions: dict[str, int]
    left_dense: tuple[DenseWeight, ...]


class DatasetIdentity(Form):
    """Which data was measured on.

    Attributes:
        name: as it was given: a text, or the name of a task's dataset.
        config: the configuration of the dataset, if any.
        split: the split, if any.
        revision: the commit of the dataset on the hub; None where it is not known, as for files.
        sha256: of the documents joined by blank lines, in UTF-8; of a task, of its documents as JSON lines.
    """

    name: str
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    sha256: str


class ProtocolReport(Form):
    """How it was measured.

    Attributes:
        name: of the protocol: that of its text, 'windows' for any other text, 'batches', or 'lm-eval' for a task.
        description: in words.
        context: the maximum number of tokens of one input.
        stride: tokens from the start of a window to that of the next; None for a task.
        windows: number of windows, of batches, or of requests of a task.
        few_shot: number of examples in a prompt; None for a text.
        limit: maximum number of documents, or None for all.
        version: of the task; None for a text.
    """

    name: str
    description: str
    context: int | None
    stride: int | None = None
    windows: int
    few_shot: int | None = None
    limit: float | None = None
    version: str | None = None


class Figure(Form):
    """A number and its standard error, where there is one."""

    value: float
    stderr: float | None = None


class Result(Form):
    """The figures on one text, task or data set.

    Attributes:
        task: the name of the text or task.
        dataset: the data; None where the task does not say.
        protocol: how it was measured.
        tokens: number of predicted tokens of a text; of a task, number of tokens that the model saw; of batches, number
            of examples.
        tokens_sha256: of the token ids that the model saw, see `tokens_sha256`; of batches, of the dtypes, shapes and
            bytes of their tensors.
        figures: by metric.
    """

    task: str
    dataset: DatasetIdentity | None
    protocol: ProtocolReport
    tokens: int
    tokens_sha256: str
    figures: dict[str, Figure]


class Report(Form):
    """One model on any number of texts and tasks.

    Attributes:
        form: the name and version of this form.
        model: which model.
        results: one for each text or task.
        seed: of what is random in the tasks, such as the choice of examples in prompts.
        versions: of Python and the packages that were installed.
    """

    form: Literal["tdkit-evaluation/1"] = "tdkit-evaluation/1"
    model: ModelIdentity
    results: tuple[Result, ...]
    seed: int
    versions: dict[str, str] = Field(default_factory=lambda: installed_versions(PACKAGES))

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form."""
        found: dict[str, Any] = self.model_dump(mode="json")
        return found

    def save(self, file: str | Path) -> Path:
        """Write the report as JSON, completely or not at all; returns the path."""
        path = Path(file)
        write_text(path, self.model_dump_json(indent=2) + "\n")
        return path

    @classmethod
    def read(cls, file: str | Path) -> Report:
        """Returns a report that `save` wrote.

        Raises:
            EvaluationError: when there is no such file, or it has another form; all faults are named.
        """
        try:
            return cls.model_validate_json(Path(file).read_bytes())
        except OSError as error:
            raise EvaluationError(f"{file} cannot be read: {error}") from None
        except ValidationError as error:
            faults = [f"{'.'.join(map(str, each['loc'])) or 'the file'}: {each['msg']}" for each in error.errors()]
            raise EvaluationError(
                f"{file} is no report of the form tdkit-evaluation/1:\n" + "\n".join(faults)
            ) from None


def report(source: Source, results: Iterable[Result], *, seed: int = 0) -> Report:
    """Returns results together with the identity of the model and the versions of packages."""
    return Report(model=identity(source), results=tuple(results), seed=seed)


def identity(source: Source) -> ModelIdentity:
    """Returns what identifies a loaded model."""
    model = source.model
    found, decompositions = survey(model), Counter(each.decomposition.name for each, _ in factorized_groups(model))
    why = "the policy kept it" if decompositions else "the model is not compressed"
    dense = [DenseWeight(names=site.names, shape=site.shape, params=site.params, reason=why) for site in found.sites]
    dense += [
        DenseWeight(
            names=kept.names, shape=kept.shape, params=kept.params, reason=f"cannot be rewritten: {kept.reason}"
        )
        for kept in found.untouchable
    ]
    sha256, kind = _digest(source)
    return ModelIdentity(
        name=source.name,
        class_name=type(model).__name__,
        sha256=sha256,
        sha256_of=kind,
        params=num_params(model),
        bytes=num_bytes(model),
        dtypes=tuple(sorted({str(each.dtype).removeprefix("torch.") for each in model.parameters()})),
        device=str(device_of(model)),
        decompositions=dict(decompositions),
        left_dense=tuple(dense),
    )


def tokens_sha256(rows: Iterable[Sequence[int] | Tensor]) -> str:
    """Returns the SHA-256 of rows of token ids: of each its length and its ids, as little-endian int64."""
    digest = hashlib.sha256()
    for row in rows:
        ids = torch.as_tensor(row, dtype=torch.int64).reshape(-1).cpu()
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(ids.numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def _digest(source: Source) -> tuple[str, Literal["file", "files", "tensors"]]:
    folder = Path(source.name)
    files = next((found for form in WEIGHTS if (found := sorted(folder.glob(form)))), []) if folder.is_dir() else []
    if len(files) == 1:
        return digest_of_file(files[0]), "file"
    if files:
        lines = "".join(f"{digest_of_file(file)}  {file.name}\n" for file in files)
        return hashlib.sha256(lines.encode()).hexdigest(), "files"
    return _of_tensors(source.model), "tensors"


def _of_tensors(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
