"""``tdkit eval``: perplexity on texts, tasks of lm-eval, and any model on batches, as a table or a report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tdkit.cli.completion import complete_models
from tdkit.cli.options import BatchSize, Build, Data, DtypeOption, Weights
from tdkit.cli.output import AsJson, Command, Device, DryRun, note, show
from tdkit.errors import OptionError
from tdkit.support.tables import table_of

if TYPE_CHECKING:
    from rich.table import Table

    from tdkit.evaluation.language_models import Evaluation
    from tdkit.evaluation.reports import Report, Result
    from tdkit.evaluation.tasks import Tasks
    from tdkit.sources.documents import Text
    from tdkit.sources.source import Source

ModelNames = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="MODEL...",
        help="Folders, registered names such as smollm2 (tdkit sources lists them), or hub names.",
        autocompletion=complete_models,
        show_default=False,
    ),
]
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
Against = Annotated[
    str | None,
    typer.Option(
        help="The dense model, to compare with on the text or data: as MODEL; with --model, its weights, or the "
        "MODULE:NAME that builds it."
    ),
]


def eval_(
    models: ModelNames = None,
    build: Build = None,
    weights: Weights = None,
    text: Texts = None,
    tasks: TaskNames = None,
    data: Data = None,
    against: Against = None,
    metric: Annotated[
        Literal["accuracy", "mse"] | None,
        typer.Option(help="With --data; by default accuracy of integer labels, else the mean squared error."),
    ] = None,
    tokens: Tokens = None,
    context: Context = None,
    few_shot: Annotated[int | None, typer.Option(help="Examples in the prompts of tasks; theirs by default.")] = None,
    limit: Annotated[int | None, typer.Option(help="Use the first documents of each task only.", min=1)] = None,
    batch: Annotated[int, typer.Option(help="Windows or requests per forward pass.", min=1)] = 1,
    batch_size: BatchSize = 32,
    seed: Annotated[int, typer.Option(help="Of the choice of examples in tasks.")] = 0,
    dtype: DtypeOption = "float32",
    device: Device = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Write the report, as JSON, to this file; those of several models to this folder."),
    ] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Measure models: perplexity of texts, tasks of lm-eval, accuracy on batches, agreement with the dense model."""
    from rich.console import Group

    from tdkit.cli.loading import check_model, dense_of, dtype_of, from_here, source_of
    from tdkit.evaluation.batches import measure_batches
    from tdkit.evaluation.language_models import check_takes_text
    from tdkit.evaluation.reports import report
    from tdkit.evaluation.tasks import Tasks, measure_tasks
    from tdkit.evaluation.texts import compare_text, measure_text, protocol_of, read_texts
    from tdkit.sources.own import load_batches
    from tdkit.sources.positions import check_positions
    from tdkit.support.devices import check_device

    kind = dtype_of(dtype)
    check_device(device)
    given_names: list[str | None] = list(models or []) or [None]
    names = [check_model(each, build, weights) for each in given_names]
    if not text and tasks is None and data is None:
        raise OptionError("there is nothing to measure: give --text, --tasks, --data or several of them")
    for option, is_given, of, there in (
        ("--limit", limit is not None, "tasks: give --tasks", tasks is not None),
        ("--few-shot", few_shot is not None, "tasks: give --tasks", tasks is not None),
        ("--metric", metric is not None, "batches: give --data", data is not None),
        ("--against", against is not None, "texts and batches: give --text or --data", bool(text) or data is not None),
    ):
        if is_given and not there:
            raise OptionError(f"{option} is for {of}, or leave it out")
    files = _files_of(out, names)
    read = read_texts(text) if text else None
    loaded = None if tasks is None else Tasks(_listed(tasks))
    batches = None
    if data is not None:
        from_here()
        batches = load_batches(data, batch=batch_size)
    if dry_run:
        _say_what(" and ".join(names), read, loaded, data, against, tokens, context, as_json)
        return
    dense = None if against is None else dense_of(against, build, kind, device)
    rows: list[tuple[str, Evaluation, Result | None]] = []
    compared: tuple[Result, Evaluation] | None = None
    tables: list[Table] = []
    reports: list[Report] = []
    for number, each in enumerate(given_names):
        source = source_of(each, build, weights, kind, device)
        results: list[Result] = []
        if read is not None:
            check_takes_text(source.model)
            check_positions(source.model, protocol_of(read, context).context)
            result, measured = measure_text(source, read, tokens=tokens, context=context, batch=batch)
            if dense is not None:
                compared = compare_text(
                    result, source, dense, read, known=compared, tokens=tokens, context=context, batch=batch
                )
                result = compared[0]
                rows += [] if number else [(dense.name, compared[1], None)]
            rows.append((source.name, measured, result))
            results.append(result)
        if batches is not None:
            found = measure_batches(source, batches, str(data), metric=metric, dense=dense.model if dense else None)
            results.append(found)
            tables.append(_of_batches(source, dense, found))
        if loaded is not None:
            of_tasks = measure_tasks(source, loaded, few_shot=few_shot, limit=limit, batch=batch, seed=seed)
            results += of_tasks
            tables.append(_of_tasks(of_tasks, limit, source.name if len(names) > 1 else ""))
        reports.append(report(source, results, seed=seed))
        if files:
            if len(files) > 1:
                files[number].parent.mkdir(parents=True, exist_ok=True)
            reports[-1].save(files[number])
            note(f"report written to {files[number]}")
    if rows:
        tables.insert(0, _of_text(rows))
    forms = [made.to_dict() for made in reports]
    show(Group(*tables), forms[0] if len(forms) == 1 else {"models": forms}, as_json)


def _files_of(out: Path | None, names: list[str]) -> list[Path]:
    """Returns the file of each model's report: `out`, or files in the folder `out` for several.

    Raises:
        OptionError: when `out` is not of that kind, or two models would have the same file.
    """
    if out is None:
        return []
    if len(names) == 1:
        if out.is_dir():
            raise OptionError(f"--out {out} is a folder: give the name of a file")
        return [out]
    if out.exists() and not out.is_dir():
        raise OptionError(f"--out {out} is a file, and there are {len(names)} models: give a folder for their reports")
    files = [out / f"{name.rstrip('/').replace('/', '-').lstrip('.-')}.json" for name in names]
    twice = [file.name for file in files if files.count(file) > 1]
    if twice:
        raise OptionError(f"two models would have the report {twice[0]}: measure them one by one")
    return files


def _listed(tasks: str) -> list[str]:
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise OptionError(f"--tasks {tasks!r} names no task")
    return names


def _say_what(
    model: str,
    text: Text | None,
    tasks: Tasks | None,
    batches: str | None,
    against: str | None,
    tokens: int | None,
    context: int | None,
    as_json: bool,
) -> None:
    from tdkit.evaluation.texts import limit_of, protocol_of

    parts: list[str] = []
    data: dict[str, Any] = {"model": model}
    if text is not None:
        size, protocol, limit = sum(len(t) for t in text.documents), protocol_of(text, context), limit_of(text, tokens)
        used = "all tokens" if limit is None else f"up to {limit:,} tokens"
        parts.append(f"on {used} of {size:,} characters")
        data |= {"characters": size, "tokens": limit, "context": protocol.context, "protocol": protocol.describe()}
    if batches is not None:
        parts.append(f"on the batches of {batches}")
        data["data"] = batches
    if tasks is not None:
        parts.append(f"on the tasks {', '.join(tasks.names)}")
        data["tasks"] = tasks.names
    if against is not None:
        parts.append(f"against {against}")
        data["against"] = against
    show(f"would measure {model} {' and '.join(parts)}", data, as_json)


def _of_text(rows: list[tuple[str, Evaluation, Result | None]]) -> Table:
    """The table of perplexities; the result of the dense model that others are compared with is None."""
    compared = len(rows) > 1
    last = rows[-1][2]
    assert last is not None
    columns = ["model", "params", "ratio", "MB", "perplexity", "+-", "agreement", "tokens", "context", "tokens/s"]
    cells = [
        [
            name,
            f"{measured.params:,}",
            f"{measured.params / rows[0][1].params:.3f}",
            f"{measured.bytes / 1e6:.1f}",
            f"{measured.perplexity:.3f}",
            "" if measured.stderr is None else f"{measured.stderr:.3f}",
            _percent(result, "agreement") if result else "",
            f"{measured.tokens:,}",
            str(measured.context),
            f"{measured.tokens_per_second:,.0f}",
        ]
        for name, measured, result in rows
    ]
    left_out = () if rows[0][2] is None else ("agreement",) if compared else ("ratio", "agreement")
    shown = [i for i, column in enumerate(columns) if column not in left_out]
    return table_of(last.protocol.description, [columns[i] for i in shown], [[row[i] for i in shown] for row in cells])


def _of_batches(source: Source, dense: Source | None, result: Result) -> Table:
    from tdkit.models.sites import num_bytes, num_params

    measured = next((name for name in ("accuracy", "mse") if name in result.figures), None)
    columns = ["model", "params", "ratio", "MB", *([measured] if measured else []), "agreement", "relative error"]
    rows = []
    for one in [source] if dense is None else [dense, source]:
        own = one is source
        figure = result.figures[measured if own else f"dense {measured}"] if measured else None
        rows.append(
            [
                one.name,
                f"{num_params(one.model):,}",
                f"{result.figures['ratio'].value:.3f}" if own and dense else "1.000",
                f"{num_bytes(one.model) / 1e6:.1f}",
                *(
                    []
                    if figure is None
                    else [f"{figure.value:.1%}" if measured == "accuracy" else f"{figure.value:.4g}"]
                ),
                _percent(result, "agreement") if own else "",
                f"{result.figures['relative error'].value:.4f}" if own and dense else "",
            ]
        )
    shown = [i for i, column in enumerate(columns) if dense or column not in ("ratio", "agreement", "relative error")]
    title = f"{result.task}: {result.tokens:,} examples in {result.protocol.windows:,} batches"
    return table_of(title, [columns[i] for i in shown], [[row[i] for i in shown] for row in rows])


def _percent(result: Result, name: str) -> str:
    return f"{result.figures[name].value:.1%}" if name in result.figures else ""


def _of_tasks(results: list[Result], limit: int | None, model: str) -> Table:
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
    title = f"{model}: {title}" if model else title
    return table_of(title, ["task", "metric", "value", "+-", "examples", "requests"], rows)


COMMANDS = (
    Command(
        eval_,
        "tdkit eval smaller --text sotu:evaluation --context 512 --tokens 4096",
        "tdkit eval --model my_pkg.nets:build --weights small --data test.safetensors --against net.safetensors",
    ),
)
