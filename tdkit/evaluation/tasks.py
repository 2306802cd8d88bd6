"""Measure a language model on tasks of lm-eval, the evaluation harness of EleutherAI."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tdkit.calibration.runner import as_it_was
from tdkit.errors import EvaluationError, MissingDependencyError, SourceError, did_you_mean
from tdkit.evaluation.reports import DatasetIdentity, Figure, ProtocolReport, Result, tokens_sha256
from tdkit.models import huggingface
from tdkit.sources.documents import commit
from tdkit.sources.source import Source

INSTALL = "pip install 'tdkit[lm-eval]'"
SUFFIXES = (".yaml", ".yml")
OFFLINE = (
    "Offline, give tasks whose data lies on disk: the path of a task's YAML file with dataset_path: json and "
    "dataset_kwargs: {data_files: FILE}, or of a folder of such files"
)


class Tasks:
    """Tasks of lm-eval with their data, loaded before any model runs.

    Args:
        names: names of tasks or groups, such as ``hellaswag``; paths of YAML files that define a task; folders of them.

    Raises:
        MissingDependencyError: when lm-eval is not installed.
        EvaluationError: when there is no such task, or its data cannot be had.
    """

    def __init__(self, names: Sequence[str | Path]) -> None:
        harness = _harness()
        paths = [Path(name) for name in names if _is_path(name)]
        given = [str(name) for name in names if not _is_path(name)]
        folders = [str(path if path.is_dir() else path.parent) for path in paths]
        # the index of all tasks takes seconds to build: not for tasks given by path alone
        self.manager = harness.tasks.TaskManager(include_path=folders or None, include_defaults=bool(given))
        given += [name for path in paths for name in self._names_in(path)]
        loaded = {name: self._load(name) for name in given}
        inside = {task for name, each in loaded.items() if name in each["groups"] for task in each["tasks"]}
        self.loaded: dict[str, Any] = {name: each for name, each in loaded.items() if name not in inside}

    @property
    def names(self) -> list[str]:
        """The names of the tasks, and of the groups in place of their tasks."""
        return list(self.loaded)

    def _names_in(self, path: Path) -> list[str]:
        """Returns the names of the tasks that a YAML file or the files in a folder define."""
        inside = path.resolve()
        found = [
            name
            for name, entry in self.manager.task_index.items()
            if entry.yaml_path is not None and Path(entry.yaml_path).resolve().is_relative_to(inside)
        ]
        if not found:
            raise EvaluationError(f"{path} defines no task of lm-eval: a task's YAML file has a line 'task: NAME'")
        return sorted(found)

    def _load(self, name: str) -> Any:
        if name not in self.manager.task_index:
            known = self.manager.all_tasks
            raise EvaluationError(
                f"lm-eval has no task '{name}'{did_you_mean(name, known) or '.'} Give a name that `lm-eval ls tasks` "
                "lists, or the path of a task's YAML file"
            )
        try:
            return self.manager.load([name])
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise EvaluationError(f"task '{name}' or its data cannot be had: {reason}. {OFFLINE}") from error


def measure_tasks(
    source: Source,
    tasks: Tasks | Sequence[str | Path],
    *,
    few_shot: int | None = None,
    limit: int | None = None,
    batch: int = 1,
    seed: int = 0,
) -> list[Result]:
    """Measure a language model of transformers on tasks of lm-eval.

    The model runs in eval mode on its device; its mode and the random state are restored.

    Args:
        source: the model, compressed or dense, and its tokenizer.
        tasks: their names or paths, see `Tasks`.
        few_shot: number of examples in each prompt; that of the task when None.
        limit: use the first documents of each task only; for trying out.
        batch: requests per forward pass.
        seed: of the choice of examples.

    Returns:
        A result for each task, and for each group a result with its aggregated figures.

    Raises:
        MissingDependencyError, EvaluationError: as `Tasks`; also when the model is not one of transformers.
        SourceError: when there is no tokenizer.
    """
    harness = _harness()
    package = huggingface.transformers()
    if not isinstance(source.model, package.PreTrainedModel):
        raise EvaluationError(
            f"lm-eval runs language models of transformers, and this is a {type(source.model).__name__}: measure it in "
            "Python by tdkit.evaluation.score(model, batches, metric)"
        )
    if source.tokenizer is None:
        raise SourceError("this model has no tokenizer: give a folder that holds one")
    results: list[Result] = []
    with _random_state():
        tasks = tasks if isinstance(tasks, Tasks) else Tasks(tasks)
        with as_it_was(source.model, None, freeze=False):
            runner = _runner(harness, source, batch)
            for name, loaded in tasks.loaded.items():
                found = harness.simple_evaluate(
                    runner,
                    tasks=[loaded["groups"][name]] if name in loaded["groups"] else list(loaded["tasks"].values()),
                    num_fewshot=few_shot,
                    limit=limit,
                    log_samples=True,
                    task_manager=tasks.manager,
                    random_seed=seed,
                    numpy_random_seed=seed,
                    torch_random_seed=seed,
                    fewshot_random_seed=seed,
                )
                results += [_result(each, task, found, runner, limit) for each, task in loaded["tasks"].items()]
                results += [_group(each, group, found, results, limit) for each, group in loaded["groups"].items()]
    return results


def _runner(harness: Any, source: Source, batch: int) -> Any:
    """Returns lm-eval's wrapper of a model, without its warnings that it did not load the model itself."""
    log = logging.getLogger(harness.models.huggingface.__name__)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        return harness.models.huggingface.HFLM(pretrained=source.model, tokenizer=source.tokenizer, batch_size=batch)
    finally:
        log.setLevel(level)


def _result(name: str, task: Any, found: Any, runner: Any, limit: int | None) -> Result:
    config, samples = found["configs"][name], found["samples"][name]
    first = [each for each in samples if each["filter"] == samples[0]["filter"]]
    rows = [runner.tok_encode(_seen(arguments)) for each in first for arguments in each["arguments"]]
    documents = hashlib.sha256()
    for each in first:
        documents.update((json.dumps(each["doc"], sort_keys=True, default=str) + "\n").encode())
    path, split = config.get("dataset_path"), config.get("test_split") or config.get("validation_split")
    files = config.get("dataset_kwargs") or {}
    dataset = DatasetIdentity(
        name=str(path) if not files.get("data_files") else f"{path}: {json.dumps(files['data_files'])}",
        config=config.get("dataset_name"),
        split=split,
        revision=files.get("revision") or _revision(task, split),
        sha256=documents.hexdigest(),
    )
    return Result(
        task=name,
        dataset=dataset,
        protocol=ProtocolReport(
            name="lm-eval",
            description=f"{config.get('output_type')}, prompts of the task {name} of lm-eval",
            context=runner.max_length,
            windows=len(rows),
            few_shot=found["n-shot"].get(name),
            limit=limit,
            version=str(found["versions"].get(name)),
        ),
        tokens=sum(len(row) for row in rows),
        tokens_sha256=tokens_sha256(rows),
        figures=_figures(found["results"][name]),
    )


def _group(name: str, group: Any, found: Any, results: Sequence[Result], limit: int | None) -> Result:
    """Returns the result of a group: its figures, and the tokens of its tasks together."""
    tasks = {task.task_name for task in group.get_all_tasks()}
    inside = [each for each in results if each.task in tasks]
    digest = hashlib.sha256("".join(f"{each.tokens_sha256}  {each.task}\n" for each in inside).encode())
    return Result(
        task=name,
        dataset=None,
        protocol=ProtocolReport(
            name="lm-eval",
            description=f"the group {name} of lm-eval: {', '.join(each.task for each in inside)}",
            context=inside[0].protocol.context,
            windows=sum(each.protocol.windows for each in inside),
            limit=limit,
            version=str(found["versions"].get(name)),
        ),
        tokens=sum(each.tokens for each in inside),
        tokens_sha256=digest.hexdigest(),
        figures=_figures(found["results"].get(name, {})),
    )


def _seen(arguments: Sequence[Any]) -> str:
    """Returns the text of a request, context and continuation together."""
    return "".join(part for part in arguments if isinstance(part, str))


def _figures(found: dict[str, Any]) -> dict[str, Figure]:
    """Returns the figures of lm-eval's ``METRIC,FILTER`` and ``METRIC_stderr,FILTER`` by metric."""
    figures = {}
    for key, value in found.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr") or isinstance(value, str | bool):
            continue
        stderr = found.get(f"{metric}_stderr,{chosen}")
        name = metric if chosen == "none" else key
        figures[name] = Figure(value=float(value), stderr=None if stderr in (None, "N/A") else float(stderr))
    return figures


def _revision(task: Any, split: str | None) -> str | None:
    try:
        return commit(task.dataset[split].info)
    except (AttributeError, KeyError, TypeError):
        return None


def _is_path(name: str | Path) -> bool:
    return isinstance(name, Path) or Path(name).suffix in SUFFIXES or Path(name).is_dir()


def _harness() -> Any:
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise MissingDependencyError(f"tasks are run by lm-eval ({error}): {INSTALL}") from error
    return lm_eval


@contextmanager
def _random_state() -> Iterator[None]:
    """Restore the random states that lm-eval seeds."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
