"""``tdkit eval``: perplexity on texts and tasks of lm-eval, as a table or a report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.table import Table

from tdkit.cli.options import Dtype, ModelName, dtype_of
from tdkit.cli.output import AsJson, Device, DryRun, note, show
from tdkit.errors import OptionError
from tdkit.evaluation.language_models import Evaluation, check_takes_text
from tdkit.evaluation.reports import Result, report
from tdkit.evaluation.tasks import Tasks, measure_tasks
from tdkit.evaluation.texts import limit_of, measure_text, protocol_of, read_texts
from tdkit.sources.documents import Text
from tdkit.sources.models import load_model
from tdkit.sources.positions import check_positions
from tdkit.support.devices import check_device
from tdkit.support.tables import table_of

Texts = Annotated[
    list[str] | None,
    typer.Option("--text", help="A file, a folder, a name (sotu:evaluation, wikitext-2, lambada) or a dataset."),
]
TaskNames = Annotated[
    str | None,
    typer.Option("--tasks", help="Tasks of lm-eval, by comma: names, paths of YAML files or folders of these."),
]
Tokens = Annotated[
    int | None,
    typer.Option(help="How many tokens of the text to use; 16384, or all for a text with its own protocol.", min=2),
]
Context = Annotated[
    int | None, typer.Option(help="Tokens per window; 1024, or those of the text's own protocol.", min=2)
]


def eval_(
    model: ModelName,
    text: Texts = None,
    tasks: TaskNames = None,
    tokens: Tokens = None,
    context: Context = None,
    few_shot: Annotated[int | None, typer.Option(help="Examples in the prompts of tasks; theirs by default.")] = None,
    limit: Annotated[int | None, typer.Option(help="Use the first documents of each task only.", min=1)] = None,
    batch: Annotated[int, typer.Option(help="Windows or requests per forward pass.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Of the choice of examples in tasks.")] = 0,
    dtype: Dtype = "float32",
    device: Device = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the report, as JSON, to this file.")] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Measure a language model: perplexity of texts, tasks of lm-eval, parameters, bytes, tokens per second."""
    kind = dtype_of(dtype)
    check_device(device)
    if not text and tasks is None:
        raise OptionError("there is nothing to measure: give --text, --tasks or both")
    for option, given in {"--limit": limit is not None, "--few-shot": few_shot is not None}.items():
        if given and tasks is None:
            raise OptionError(f"{option} is for tasks: give --tasks, or leave it out")
    if out is not None and out.is_dir():
        raise OptionError(f"--out {out} is a folder: give the name of a file")
    read = read_texts(text) if text else None
    loaded = None if tasks is None else Tasks(_listed(tasks))
    if dry_run:
        _say_what(model, read, loaded, tokens, context, as_json)
        return
    source = load_model(model, dtype=kind, device=device)
    results: list[Result] = []
    tables: list[Table] = []
    if read is not None:
        check_takes_text(source.model)
        check_positions(source.model, protocol_of(read, context).context)
        result, measured = measure_text(source, read, tokens=tokens, context=context, batch=batch)
        results.append(result)
        tables.append(_of_text(model, measured, result))
    if loaded is not None:
        found = measure_tasks(source, loaded, few_shot=few_shot, limit=limit, batch=batch, seed=seed)
        results += found
        tables.append(_of_tasks(found, limit))
    made = report(source, results, seed=seed)
    if out is not None:
        made.save(out)
        note(f"report written to {out}")
    show(Group(*tables), made.to_dict(), as_json)


def _listed(tasks: str) -> list[str]:
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise OptionError(f"--tasks {tasks!r} names no task")
    return names


def _say_what(
    model: str, text: Text | None, tasks: Tasks | None, tokens: int | None, context: int | None, as_json: bool
) -> None:
    parts: list[str] = []
    data: dict[str, Any] = {"model": model}
    if text is not None:
        size, protocol, limit = sum(len(t) for t in text.documents), protocol_of(text, context), limit_of(text, tokens)
        used = "all tokens" if limit is None else f"up to {limit:,} tokens"
        parts.append(f"on {used} of {size:,} characters")
        data |= {"characters": size, "tokens": limit, "context": protocol.context, "protocol": protocol.describe()}
    if tasks is not None:
        parts.append(f"on the tasks {', '.join(tasks.names)}")
        data["tasks"] = tasks.names
    show(f"would measure {model} {' and '.join(parts)}", data, as_json)


def _of_text(model: str, measured: Evaluation, result: Result) -> Table:
    columns = ["model", "params", "MB", "perplexity", "+-", "tokens", "context", "tokens/s"]
    row = [
        model,
        f"{measured.params:,}",
        f"{measured.bytes / 1e6:.1f}",
        f"{measured.perplexity:.3f}",
        "" if measured.stderr is None else f"{measured.stderr:.3f}",
        f"{measured.tokens:,}",
        str(measured.context),
        f"{measured.tokens_per_second:,.0f}",
    ]
    return table_of(result.protocol.description, columns, [row])


def _of_tasks(results: list[Result], limit: int | None) -> Table:
    rows = [
        [
            each.task if not number else "",
            metric,
            f"{figure.value:.4f}",
            "" if figure.stderr is None else f"{figure.stderr:.4f}",
            "" if each.protocol.few_shot is None else str(each.protocol.few_shot),
            f"{each.protocol.windows:,}",
        ]
        for each in results
        for number, (metric, figure) in enumerate(each.figures.items())
    ]
    title = "tasks of lm-eval" if limit is None else f"tasks of lm-eval, the first {limit} documents of each only"
    return table_of(title, ["task", "metric", "value", "+-", "examples", "requests"], rows)


COMMANDS = (eval_,)
