"""Every kind of file that tdkit reads: how a small one is made, and how it is read as a user would read it."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from safetensors.torch import load_file
from tdkit_distill import Windows, build_cache, distill, heal
from tdkit_distill.data.text import text_windows
from tdkit_distill.healing import heal as heal_module
from tdkit_distill.loop.checkpoints import _digest_of, checkpoints, digest_of_file
from tdkit_distill.teachers.cache import CachedTeacher

import tdkit
from tdkit.calibration.calibration import Calibration
from tdkit.compression.work import Work
from tdkit.models.checkpoint.description import digest
from tdkit.planning.plan import Plan
from tdkit.recipes import Recipe, load_recipe, run_recipe, steps
from tdkit.records.tree import render_tree
from tdkit.reporting.gather import gather
from tdkit.sources.models import load_model
from tdkit.sources.on_disk import open_model
from tdkit.sweeps.folder import Folder
from tests.conftest import TiedModel, make_gpt2, make_llama
from tests.hostile.mutations import mutate
from tests.side_packages import QUANTIZATION

IDS = torch.arange(14).reshape(2, 7)

POLICY = tdkit.Policy(
    [
        tdkit.Rule("*.c_fc", tdkit.PermutedKronecker(terms=1)),
        tdkit.Rule("*.c_proj", tdkit.TTMatrix()),
        tdkit.Rule("*", tdkit.LowRank()),
    ],
    budget=0.7,
)

TIED = tdkit.Policy(
    [tdkit.Rule("up", tdkit.PermutedKronecker(terms=1, a=(6, 6))), tdkit.Rule("*", tdkit.LowRank(rank=3))]
)

RECIPE = """\
name: mine
description: &text toy
source: *text
model: {folder}
data: {{evaluation: {text}, calibration: {text}, calibration_tokens: 256, evaluation_tokens: 256, context: 32}}
seed: 3
steps:
- compress:
    rules:
    - {{match: "re:.*mlp.*", with: {{low_rank: {{rank: 3}}}}}}
    - {{match: "*.attn.*", with: kronecker}}
    budget: 0.9
- save: {{folder: model}}
"""


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        make: writes one into an empty folder.
        read: reads it and uses what it holds.
        repair: makes the digests in a mutated folder those of its files, so that what comes after them is reached.
    """

    make: Callable[[Path], object]
    read: Callable[[Path], object]
    repair: Callable[[Path], object] = lambda folder: None


def used(model: Any) -> None:
    with torch.no_grad():
        model(IDS)


# A module and its tdkit.json


def make_module(folder: Path) -> None:
    tdkit.save(tdkit.compress(TiedModel(), TIED), folder / "m")


def read_module(folder: Path) -> None:
    """Also checks that a failed load leaves the model alone."""
    model = TiedModel()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = dict(model.named_modules())
    try:
        used(tdkit.load(folder / "m", model=model))
    except tdkit.errors.TdkitError:
        if dict(model.named_modules()) != modules:
            raise AssertionError("a failed load left other layers") from None
        for name, tensor in model.state_dict().items():
            if not torch.equal(tensor, before[name]):
                raise AssertionError(f"a failed load changed {name}") from None
        raise


def repair_saved(folder: Path) -> None:
    tensors = load_file(folder / "m" / "model.safetensors")
    for name in ("tdkit.json", "config.json"):
        path = folder / "m" / name
        if path.is_file():
            form = json.loads(path.read_text())
            holder = form.get("quantization_config", {}) if name == "config.json" else form
            if "sha256" in holder:
                holder["sha256"] = digest(tensors)
                path.write_text(json.dumps(form))


def make_quantized(folder: Path) -> None:
    """In a child, so that torchao is imported nowhere else: only writing needs it."""
    child = os.fork()
    if not child:
        code = 1
        try:
            sys.path.append(str(QUANTIZATION))
            tdkit.save(tdkit.quantize(tdkit.compress(TiedModel(), TIED), 4), folder / "m")
            code = 0
        finally:
            os._exit(code)
    if os.waitpid(child, 0)[1]:
        raise AssertionError("torchao is missing: make .venv/side.done")


# Folders of transformers


def make_factors(folder: Path) -> None:
    tdkit.save(tdkit.compress(make_gpt2(n_layer=2), POLICY), folder / "m")


def make_shrunk(folder: Path) -> None:
    policy = tdkit.Policy([tdkit.Rule("*.0.mlp.*", tdkit.Shrink(units=20))])
    tdkit.save(tdkit.compress(make_llama(), policy, calibration=[IDS]), folder / "m")


def make_plain(folder: Path) -> None:
    make_gpt2(n_layer=2).save_pretrained(folder / "m")
    tokenizer().save_pretrained(folder / "m")


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"?": 0, **{word: n + 1 for n, word in enumerate("abcdefgh")}}, unk_token="?"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="?", eos_token="?")


def read_saved(folder: Path) -> None:
    used(tdkit.load(folder / "m"))


def read_source(folder: Path) -> None:
    source = load_model(str(folder / "m"))
    used(source.model)


def read_on_disk(folder: Path) -> None:
    opened = open_model(folder / "m")
    for parameter in opened.model.parameters():
        opened.weights.read(parameter)


# Texts


def make_policy(folder: Path) -> None:
    (folder / "policy.yaml").write_text(
        tdkit.Policy(
            [tdkit.Rule("re:.*mlp.*", tdkit.LowRank(rank=3), min_params=1), tdkit.Rule("*.attn.*", tdkit.Kronecker())],
            budget={"bytes": 0.8, "dtype": "float16"},
        ).to_yaml()
    )


def read_policy(folder: Path) -> None:
    tdkit.plan(SHARED["gpt2"], tdkit.Policy.from_yaml(folder / "policy.yaml"))


def make_plan(folder: Path) -> None:
    (folder / "plan.json").write_text(
        tdkit.plan(TiedModel(), tdkit.Policy([tdkit.Rule("*", tdkit.LowRank())], 0.7)).to_json()
    )


def read_plan(folder: Path) -> None:
    path = folder / "plan.json"
    plan = Plan.from_json(path.read_text(encoding="utf-8", errors="surrogateescape") if path.is_file() else "")
    str(plan)
    used(tdkit.compress(TiedModel(), plan))


def make_recipe(folder: Path) -> None:
    text = folder / "text.txt"
    text.write_text("a b c d e f g h " * 100)
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder / "m", text=text))


def read_recipe(folder: Path) -> None:
    str(load_recipe(str(folder / "recipe.yaml")).to_yaml())


QUIET = Console(quiet=True)


def make_run(folder: Path) -> None:
    make_plain(folder)
    make_recipe(folder)
    recipe = load_recipe(str(folder / "recipe.yaml"), [f"model={SHARED['plain']}"])
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    with mock.patch.object(steps, "save", side_effect=KeyboardInterrupt), suppress(KeyboardInterrupt):
        run_recipe(recipe, folder / "run", console=QUIET)  # killed in its last step
    shutil.rmtree(folder / "m")


def read_run(folder: Path) -> None:
    recipe: Recipe = SHARED["recipe"]
    run_recipe(recipe, folder / "run", resume=True, console=QUIET)


# Calibrations


def make_calibration(folder: Path) -> None:
    tdkit.calibrate(TiedModel(), [IDS], progress=False).save(folder / "c")


def read_calibration(folder: Path) -> None:
    found = Calibration.load(folder / "c")
    for name in found.names:
        found.metric(name)
    tdkit.compress(TiedModel(), tdkit.Policy([tdkit.Rule("*", tdkit.LowRank())], budget=0.7), calibration=found)


def repair_calibration(folder: Path) -> None:
    path = folder / "c" / "calibration.json"
    form = json.loads(path.read_text())
    form["digests"] = {file.name: digest_of_file(file) for file in (folder / "c").glob("*.safetensors")}
    path.write_text(json.dumps(form))


# Distillation


STAGE = {"losses": {"logits": {}}, "steps": 4, "batch_size": 2}


def rows() -> Windows:
    return Windows(torch.arange(48).reshape(6, 8) % 40)


def make_cache(folder: Path) -> None:
    build_cache(make_gpt2(n_layer=1), rows(), folder / "t", k=5, rows_per_shard=4, progress=False)


def read_cache(folder: Path) -> None:
    cache = CachedTeacher(folder / "t")
    for row in range(6):
        cache.view(
            {"input_ids": rows().batch(torch.tensor([row]), torch.Generator())["input_ids"]}, torch.tensor([row])
        )


def repair_cache(folder: Path, name: str = "t") -> None:
    path = folder / name / "teacher.json"
    form = json.loads(path.read_text())
    form["digests"] = {
        str(int(file.stem.split("-")[1])): digest_of_file(file) for file in (folder / name).glob("shard-*.safetensors")
    }
    path.write_text(json.dumps(form))


RUNNING = {"checkpoint_every": 2}


def make_checkpoint(folder: Path) -> None:
    torch.manual_seed(1)
    student = make_gpt2(n_layer=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    distill(student, SHARED["teacher"], STAGE, rows(), folder=folder / "d", running=RUNNING)
    shutil.rmtree(checkpoints(folder / "d")[-1])  # that of the end: what remains is resumed


def read_checkpoint(folder: Path) -> None:
    torch.manual_seed(1)
    student = make_gpt2(n_layer=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    distill(student, SHARED["teacher"], STAGE, rows(), folder=folder / "d", running=RUNNING)


def repair_checkpoint(folder: Path, name: str = "d") -> None:
    for place in checkpoints(folder / name):
        path = place / "state.json"
        form = json.loads(path.read_text())
        form["digests"] = {file.stem: digest_of_file(file) for file in place.glob("*.safetensors")}
        form.pop("digest", None)
        form["digest"] = _digest_of(form)
        path.write_text(json.dumps(form))


# Unfinished work


def make_moments(plain: Path, folder: Path) -> Path:
    """Save a calibration of the model in `plain`."""
    return tdkit.calibrate(load_model(str(plain)).model, [IDS], progress=False).save(folder)


def stream_folder(plain: Path, moments: Path, folder: Path) -> None:
    tdkit.compress_folder(plain, STREAMED, folder / "out", calibration=moments, overwrite=True, progress=False)


STREAMED = tdkit.Policy([tdkit.Rule("*.mlp.*", tdkit.LowRank())], budget=0.9)


def make_work(folder: Path) -> None:
    """What a call that was killed before its last step leaves."""
    make_moments(SHARED["plain"], folder / "moments")
    with mock.patch.object(Work, "once", side_effect=KeyboardInterrupt), suppress(KeyboardInterrupt):
        stream_folder(SHARED["plain"], folder / "moments", folder)
    shutil.move(folder / "moments", SHARED["plain"].parent / "moments")


def read_work(folder: Path) -> None:
    stream_folder(SHARED["plain"], SHARED["plain"].parent / "moments", folder)
    used(tdkit.load(folder / "out"))


def sweep_folder(folder: Path) -> list[dict[str, Any]]:
    torch.manual_seed(2)
    model = TiedModel()
    grid = {"with": ["low_rank", "kronecker"], "budget": [0.8, 0.7]}
    measure = {"measure": lambda m: {"size": float(m(IDS).square().mean())}}
    return tdkit.sweep(model, grid, calibration=[IDS], folder=folder / "s", progress=False, **measure)


def make_sweep(folder: Path) -> None:
    """A sweep that was killed before its last point."""
    with mock.patch.object(Folder, "finish", side_effect=KeyboardInterrupt), suppress(KeyboardInterrupt):
        sweep_folder(folder)
    sorted((folder / "s" / "points").glob("*.json"))[-1].unlink()


def read_sweep(folder: Path) -> None:
    sweep_folder(folder)


def read_report(folder: Path) -> None:
    """Without the drawings, which take matplotlib seconds."""
    for entry in gather([folder / "s"]).entries:
        entry.sentence(), entry.row(entry.metrics), render_tree(entry.record.before), entry.record.to_dict()


def make_text(folder: Path) -> None:
    (folder / "text.txt").write_text("a b c d e f g h " * 100)
    os.utime(folder / "text.txt", (1, 1))  # the date is part of what tells texts apart


def packed(folder: Path) -> torch.Tensor:
    """Returns the windows of the text in `folder`, packed in ``w``."""
    before = Path.cwd()
    os.chdir(folder)  # so is its path
    try:
        found = text_windows("text.txt", tokenizer(), length=8, cache=folder / "w").train
    finally:
        os.chdir(before)
    return found.batch(torch.arange(len(found)), torch.Generator())["input_ids"]


def make_windows(folder: Path) -> None:
    make_text(folder)
    packed(folder)


def read_windows(folder: Path) -> None:
    model = SHARED["gpt2"]
    with torch.no_grad():
        model(packed(folder)[:2])


def heal_in(folder: Path, student: Any, teacher: Any) -> None:
    data = torch.arange(96).reshape(12, 8) % 40
    options = {"tokens": 48, "batch_size": 1, "measurements": 3, "precision": "no", "device": "cpu"}
    heal(student, teacher, data, folder=folder / "h", progress=False, say=lambda _: None, **options)


def make_healing(folder: Path) -> None:
    with mock.patch.object(heal_module, "measurements_of", side_effect=KeyboardInterrupt), suppress(KeyboardInterrupt):
        heal_in(folder, make_gpt2(n_layer=1), SHARED["teacher"])
    shutil.rmtree(checkpoints(folder / "h" / "run")[-1], ignore_errors=True)


def read_healing(folder: Path) -> None:
    torch.manual_seed(1)
    heal_in(folder, make_gpt2(n_layer=1), SHARED["teacher"])


def repair_healing(folder: Path) -> None:
    repair_cache(folder, "h/teacher")
    repair_checkpoint(folder, "h/run")


KINDS: dict[str, Kind] = {
    "module": Kind(make_module, read_module, repair_saved),
    "quantized module": Kind(make_quantized, read_module, repair_saved),
    "transformers, factors": Kind(make_factors, read_saved, repair_saved),
    "transformers, fewer units": Kind(make_shrunk, read_saved, repair_saved),
    "transformers, plain": Kind(make_plain, read_source),
    "transformers, streamed": Kind(make_plain, read_on_disk),
    "policy": Kind(make_policy, read_policy),
    "plan": Kind(make_plan, read_plan),
    "recipe": Kind(make_recipe, read_recipe),
    "run": Kind(make_run, read_run),
    "calibration": Kind(make_calibration, read_calibration, repair_calibration),
    "teacher cache": Kind(make_cache, read_cache, repair_cache),
    "distillation checkpoint": Kind(make_checkpoint, read_checkpoint, repair_checkpoint),
    "unfinished work of a folder": Kind(make_work, read_work),
    "sweep": Kind(make_sweep, read_sweep),
    "report": Kind(make_sweep, read_report),
    "packed windows": Kind(make_windows, read_windows),
    "healing": Kind(make_healing, read_healing, repair_healing),
}

SHARED: dict[str, Any] = {}  # what several kinds read with


class Bench:
    """Whole files of every kind in a folder, of which mutated copies are read."""

    def __init__(self, folder: Path, names: list[str] | None = None) -> None:
        self.folder = folder
        self.names = list(names or KINDS)
        torch.manual_seed(0)
        SHARED["gpt2"] = make_gpt2(n_layer=2)
        SHARED["teacher"] = make_gpt2(n_layer=1)
        SHARED["plain"] = folder / "plain" / "m"
        make_plain(folder / "plain")
        for number, name in enumerate(self.names):
            place = folder / f"whole-{number}"
            place.mkdir(parents=True)
            KINDS[name].make(place)
            if name == "run":
                SHARED["recipe"] = load_recipe(str(place / "recipe.yaml"))
            with tempfile.TemporaryDirectory(dir=folder) as where:
                KINDS[name].read(shutil.copytree(place, Path(where) / "copy"))  # which may finish what it holds

    def mutated(self, seed: int) -> str:
        """Read a mutated copy of one kind, which the seed chooses."""
        rng = random.Random(seed)
        number = seed % len(self.names)
        kind = KINDS[self.names[number]]
        with tempfile.TemporaryDirectory(dir=self.folder) as where:
            place = Path(where) / "copy"
            shutil.copytree(self.folder / f"whole-{number}", place)
            note = f"{self.names[number]}: {mutate(place, rng)}"
            if rng.random() < 0.6:
                try:
                    kind.repair(place)
                except Exception:  # of what a mutation has left
                    note += " (stale digest)"
            try:
                kind.read(place)
            except BaseException as error:
                error.add_note(note)
                raise
            return note
