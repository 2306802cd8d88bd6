"""``tdkit heal``: the last step after ``tdkit compress``."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from tdkit.cli.options import NamedModel, NoReport
from tdkit.cli.output import AsJson, DryRun, note, settings, show
from tdkit.cli.reports import command_line, leave_record
from tdkit.errors import OptionError
from tdkit.models.card import Card, base_of
from tdkit.models.checkpoint import is_saved, save
from tdkit.records import Data, Record, followed, record_of
from tdkit.sources.models import load_model
from torch import nn

from tdkit_distill.errors import HealingWarning
from tdkit_distill.healing.heal import InterruptedHealing
from tdkit_distill.healing.heal import heal as heal_model
from tdkit_distill.healing.report import Healing
from tdkit_distill.healing.settings import MEASUREMENTS, PATIENCE, RANK, Method
from tdkit_distill.loop.progress import LOG

REPORT = "healing.json"
INTERRUPTED = 130  # the exit code of a program that Ctrl-C ends


def heal(
    model: NamedModel,
    text: Annotated[
        list[str],
        typer.Option("--text", help="To train on: a file, a folder, a name such as sotu:calibration; or more."),
    ],
    tokens: Annotated[str, typer.Option(help="To train on, such as 200k or 1M.")] = "200k",
    self_generated: Annotated[
        str, typer.Option("--self-generated", help="How many of them the teacher generates itself, such as 50k.")
    ] = "0",
    teacher: Annotated[
        str | None,
        typer.Option(
            help="The dense model, by name or folder; by default the one that DIR's card names; none for none."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Where to save the healed model; MODEL-healed.")] = None,
    method: Annotated[
        Method, typer.Option(help="What is trained: all but embeddings, the factors, or adapters of dense layers.")
    ] = "all",
    held_out: Annotated[
        str | None, typer.Option("--held-out", help="A text to choose the best weights by; part of --text by default.")
    ] = None,
    other: Annotated[
        list[str] | None,
        typer.Option("--other", help="Texts of other kinds to watch; what Python says of itself by default."),
    ] = None,
    context: Annotated[int | None, typer.Option(help="Tokens per window; 512 by default.", min=2)] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of AdamW; that of the method by default.")] = None,
    batch: Annotated[int | None, typer.Option(help="Windows per optimizer step.", min=1)] = None,
    rank: Annotated[int, typer.Option(help="Of adapters.", min=1)] = RANK,
    measurements: Annotated[int, typer.Option(help="How many times the texts are measured.", min=1)] = MEASUREMENTS,
    patience: Annotated[
        int, typer.Option(help="Measurements without a new best after which to stop; 0 goes on.", min=0)
    ] = PATIENCE,
    precision: Annotated[
        Literal["auto", "no", "bf16"], typer.Option(help="bf16, no, or auto: bfloat16 where it is faster.")
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Of the choice and order of windows.")] = 0,
    device: Annotated[str | None, typer.Option(help="Where to train: cpu or cuda; what there is by default.")] = None,
    no_report: NoReport = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier save.")] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Train a compressed model for a short time by its dense one, and save the best weights, with a report.

    [bold]tdkit heal smaller --text sotu:calibration --tokens 200k --out healed[/bold]

    Time and memory are told first (--dry-run stops there). Ctrl-C saves the best weights so far, and the same call goes
    on from there.
    """
    target = out or Path(f"{Path(model).name}-healed")
    run = target.with_name(f"{target.name}.run")  # beside it, until the run is finished
    _check_target(target, run, overwrite)
    by = _teacher(model, teacher)
    source = load_model(model)
    if source.tokenizer is None:
        raise OptionError(f"{model} holds no tokenizer to read --text with: save it with one, or heal it in Python")

    record = record_of(source.model, model, model)

    def write(made: Healing) -> None:
        save(source.model, target, tokenizer=source.tokenizer, overwrite=True, card=_card(made, by))
        made.save(target / REPORT)
        shutil.copyfile(run / "run" / LOG, target / LOG)
        leave_record(_record(record, source.model, made, text, target, seed), target, report=not no_report)

    if not dry_run:
        settings.kept = f"what was computed is kept in {run}: the same call goes on from there"
    try:
        with warnings.catch_warnings(action="ignore", category=HealingWarning):  # they are told below
            made = heal_model(
                source.model,
                by,
                text,
                tokens=tokens,
                self_generated=self_generated,
                method=method,
                tokenizer=source.tokenizer,
                context=context,
                held_out=held_out,
                others=other,
                learning_rate=learning_rate,
                batch_size=batch,
                rank=rank,
                measurements=measurements,
                patience=patience or None,
                precision=precision,
                device=device,
                folder=run,
                seed=seed,
                dry_run=dry_run,
                say=note,
            )
    except InterruptedHealing as stopped:
        write(stopped.healing)
        _tell(stopped.healing)
        note(f"{stopped}\n{target} holds them; the same call goes on from there, with what is in {run}")
        show(stopped.healing.table(), stopped.healing.to_dict(), as_json)
        raise typer.Exit(INTERRUPTED) from None
    _tell(made)
    if dry_run:
        show("nothing was trained", made.to_dict(), as_json)
        return
    write(made)
    shutil.rmtree(run, ignore_errors=True)
    note(f"saved to {target}, with {REPORT}")
    show(made.table(), made.to_dict(), as_json)


def _tell(made: Healing) -> None:
    for line in (*made.notes, *made.warnings):
        note(f"warning: {line}")


def _check_target(target: Path, run: Path, overwrite: bool) -> None:
    """Refuse a folder with anything but an unfinished healing, unless it may be replaced."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not target.is_dir() or not is_saved(target):
        raise OptionError(f"--out {target} holds other files: give a new folder")
    if not overwrite and not (_is_unfinished(target) and run.is_dir()):
        raise OptionError(f"--out {target} holds a saved model: give another folder, or --overwrite it")


def _is_unfinished(target: Path) -> bool:
    try:
        form: Any = json.loads((target / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(form, dict) and form.get("finished") is False


def _teacher(model: str, teacher: str | None) -> str | None:
    if teacher == "none":
        return None
    found = teacher or base_of(model)
    if found is None:
        raise OptionError(
            f"the card of {model} does not say which dense model it is from: give --teacher NAME, or --teacher none to "
            "train by the text alone"
        )
    return found


def _record(earlier: Record, model: nn.Module, made: Healing, text: list[str], target: Path, seed: int) -> Record:
    trained = made.measurements[-1]
    own = made.settings["self_generated"]
    source = " + ".join([*text, *([f"{own:,} tokens that the teacher generated"] if own else [])])
    gain = f"healed on {made.after.tokens:,} tokens" if made.kept else f"trained on {trained.tokens:,} tokens in vain"
    return followed(
        earlier,
        model,
        name=target.name,
        then=gain,
        command=command_line(),
        seed=seed,
        data=[Data("train", source, trained.tokens)],
        dense={f"{name} perplexity": value for name, value in (made.teacher or {}).items()},
        compressed={f"{name} perplexity": value for name, value in made.after.perplexity.items()},
        seconds={"healing": trained.seconds},
    )


def _card(made: Healing, teacher: str | None) -> Card:
    figures: dict[str, Any] = {f"perplexity of {name}": value for name, value in made.after.perplexity.items()}
    return Card(base_model=teacher, evaluation={**figures, "healed with tokens": made.after.tokens})
