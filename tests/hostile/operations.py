"""What writes files, small: saves, calibrations, recipes, streamed compression, teacher caches and distillation."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tdkit_distill import build_cache, distill
from tdkit_distill.teachers.cache import CachedTeacher
from torch import Tensor

import tdkit
from tdkit.calibration.calibration import Calibration
from tdkit.errors import RecipeError
from tdkit.recipes import load_recipe, run_recipe
from tests.conftest import TiedModel, make_gpt2
from tests.hostile.faults import Operation
from tests.hostile.kinds import (
    IDS,
    QUIET,
    STAGE,
    TIED,
    heal_in,
    make_moments,
    make_plain,
    make_recipe,
    make_text,
    packed,
    rows,
    stream_folder,
    sweep_folder,
)


def seeded(make: Callable[[], Any], seed: int) -> Any:
    torch.manual_seed(seed)
    return make()


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {
        f"{path.name}:{name}": tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Saving:
    """Save over an earlier save: what is there is the one or the other."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.models = [tdkit.compress(seeded(make, seed), POLICY if make is small_gpt2 else TIED) for seed in (1, 2)]
        self.known: list[dict[str, Tensor]] = []

    def prepare(self, folder: Path) -> None:
        for model in self.models[::-1]:
            tdkit.save(model, folder / "m", overwrite=True)
            self.known.insert(0, tensors_of(folder / "m"))

    def act(self, folder: Path) -> None:
        tdkit.save(self.models[1], folder / "m", overwrite=True)

    def check(self, folder: Path, ended: bool) -> None:
        if not (folder / "m").exists():  # until the next call puts it back
            raise AssertionError("the earlier save is not where it was")
        fresh = None if isinstance(self.models[0], tdkit_pretrained()) else TiedModel()
        tdkit.load(folder / "m", model=fresh)
        found = tensors_of(folder / "m")
        assert any(same(found, known) for known in (self.known[1:] if ended else self.known))

    def operation(self) -> Operation:
        return Operation(self.prepare, self.act, self.check)


POLICY = tdkit.Policy([tdkit.Rule("*.mlp.*", tdkit.LowRank(rank=3))])


def small_gpt2() -> Any:
    return make_gpt2(n_layer=1)


def tdkit_pretrained() -> type:
    from transformers import PreTrainedModel

    kind: type = PreTrainedModel
    return kind


def saving_calibration() -> Operation:
    model = seeded(TiedModel, 0)
    measured = [tdkit.calibrate(model, [ids], progress=False) for ids in (IDS, IDS + 1)]
    known: list[dict[str, Tensor]] = []

    def prepare(folder: Path) -> None:
        for each in measured[::-1]:
            each.save(folder / "c", overwrite=True)
            known.insert(0, tensors_of(folder / "c"))

    def check(folder: Path, ended: bool) -> None:
        found = Calibration.load(folder / "c")
        for name in found.names:
            found.metric(name)
        assert any(same(tensors_of(folder / "c"), each) for each in (known[1:] if ended else known))

    return Operation(prepare, lambda folder: measured[1].save(folder / "c", overwrite=True), check)


def running_recipe(plain: Path, *, earlier: bool) -> Operation:
    """Run a recipe; the next call resumes it, or with `earlier` starts it again in the place of an earlier run."""
    expected: dict[str, Tensor] = {}

    def recipe(folder: Path, seed: int = 3) -> Any:
        return load_recipe(str(folder / "recipe.yaml"), [f"model={plain}", f"seed={seed}"])

    def prepare(folder: Path) -> None:
        make_recipe(folder)
        text = (folder / "text.txt").rename(plain.parent / "text.txt")
        (folder / "recipe.yaml").write_text(
            (folder / "recipe.yaml").read_text().replace(str(folder / "text.txt"), str(text))
        )
        run_recipe(recipe(folder), folder / "run", console=QUIET)
        expected.update(tensors_of(folder / "run" / "model"))
        shutil.rmtree(folder / "run")
        if earlier:
            run_recipe(recipe(folder, 4), folder / "run", console=QUIET)

    def act(folder: Path) -> None:
        try:
            run_recipe(recipe(folder), folder / "run", resume=True, console=QUIET)
        except RecipeError:
            run_recipe(recipe(folder), folder / "run", overwrite=True, console=QUIET)

    def check(folder: Path, ended: bool) -> None:
        if ended:
            assert same(tensors_of(folder / "run" / "model"), expected)
            tdkit.load(folder / "run" / "model")

    return Operation(prepare, act, check)


def streaming(plain: Path) -> Operation:
    expected: dict[str, Tensor] = {}
    known = make_moments(plain, plain.parent / "moments")

    def act(folder: Path) -> None:
        stream_folder(plain, known, folder)

    def prepare(folder: Path) -> None:
        act(folder)
        expected.update(tensors_of(folder / "out"))
        shutil.rmtree(folder / "out")

    def check(folder: Path, ended: bool) -> None:
        if ended or (folder / "out").exists():
            assert same(tensors_of(folder / "out"), expected)

    return Operation(prepare, act, check)


def sweeping() -> Operation:
    expected: list[dict[str, Any]] = []

    def rows_in(folder: Path) -> list[dict[str, Any]]:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in sweep_folder(folder)]

    def prepare(folder: Path) -> None:
        expected.extend(rows_in(folder))
        shutil.rmtree(folder / "s")

    def check(folder: Path, ended: bool) -> None:
        if ended:
            assert rows_in(folder) == expected
            assert {path.name for path in (folder / "s").iterdir()} == {"sweep.json", "points"}
            assert not list((folder / "s" / "points").glob("*.lock"))

    return Operation(prepare, sweep_folder, check)


def packing() -> Operation:
    expected: list[Tensor] = []

    def prepare(folder: Path) -> None:
        make_text(folder)
        expected.append(packed(folder))
        shutil.rmtree(folder / "w")

    def check(folder: Path, ended: bool) -> None:
        if ended:
            assert torch.equal(packed(folder), expected[0])

    return Operation(prepare, packed, check)


def ending_alike(
    act: Callable[[Path], Any], result: str, *others: str, look: Callable[[Path], None] = lambda _: None
) -> Operation:
    """An operation that, once ended, has written the tensors of an undisturbed call.

    Args:
        act: what is done in a folder.
        result: the folder of the tensors in it.
        others: what else it writes there.
        look: a further check of the folder of a call that ended.
    """
    expected: dict[str, Tensor] = {}

    def prepare(folder: Path) -> None:
        act(folder)
        expected.update(tensors_of(folder / result))
        for name in (result, *others):
            shutil.rmtree(folder / name)

    def check(folder: Path, ended: bool) -> None:
        if ended:
            look(folder)
            assert same(tensors_of(folder / result), expected)

    return Operation(prepare, act, check)


def healing() -> Operation:
    teacher = seeded(small_gpt2, 0)

    def act(folder: Path) -> None:
        student = tdkit.compress(seeded(small_gpt2, 0), POLICY)
        heal_in(folder, student, teacher)
        tdkit.save(student, folder / "student", overwrite=True)

    return ending_alike(act, "student", "h")


def caching() -> Operation:
    teacher = seeded(small_gpt2, 0)

    def act(folder: Path) -> None:
        build_cache(teacher, rows(), folder / "t", k=5, rows_per_shard=2, progress=False)

    def look(folder: Path) -> None:
        CachedTeacher(folder / "t")

    return ending_alike(act, "t", look=look)


def distilling() -> Operation:
    teacher = seeded(small_gpt2, 0)

    def act(folder: Path) -> None:
        student = seeded(small_gpt2, 1)
        running = {"checkpoint_every": 1, "keep": 2}
        distill(student, teacher, STAGE, rows(), folder=folder / "d", running=running, progress=False)
        tdkit.save(student, folder / "student", overwrite=True)

    def look(folder: Path) -> None:
        lines = (folder / "d" / "log.jsonl").read_text().splitlines()
        assert sum('"loss"' in line for line in lines) == STAGE["steps"]

    return ending_alike(act, "student", "d", look=look)


def operations(place: Path) -> dict[str, Operation]:
    """Returns every operation, by name.

    Args:
        place: a folder for what they share.
    """
    make_plain(place / "plain")
    plain = place / "plain" / "m"
    return {
        "save a module": Saving(TiedModel).operation(),
        "save a transformers model": Saving(small_gpt2).operation(),
        "save a calibration": saving_calibration(),
        "run a recipe": running_recipe(plain, earlier=False),
        "run a recipe over an earlier run": running_recipe(plain, earlier=True),
        "compress a folder": streaming(plain),
        "build a teacher cache": caching(),
        "distil": distilling(),
        "heal": healing(),
        "pack windows": packing(),
        "sweep": sweeping(),
    }
