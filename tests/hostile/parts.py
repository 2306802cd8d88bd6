"""The parts of the harness, each at any share of its full size."""

from __future__ import annotations

import gc
import logging
import os
import resource
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tdkit_distill import Windows, distill
from torch import Tensor

import tdkit
from tdkit.models import swap
from tests.conftest import TiedModel, make_gpt2, make_llama
from tests.hostile import hosts, numerics, plugins
from tests.hostile.exceptions import InjectedError, State, calls_in, tried
from tests.hostile.faults import ERRORS, Scene
from tests.hostile.forks import run_all
from tests.hostile.kinds import IDS, KINDS, POLICY, STAGE, Bench, rows
from tests.hostile.operations import operations

MUTATIONS = 10_800
NUMBERS = 5  # no divisor of the numbers of dtypes, metrics, weights and kinds, so that all of these are met
GROWTH = 20  # MB that a process may grow by while it does the same again and again
CALLS = 100  # of each case of the exceptions, besides those that replace layers


@dataclass
class Part:
    """What one part found.

    Attributes:
        name: of the part.
        rows: by what was tried, how often each outcome came.
        bad: what must not happen, each with its text.
        figures: other numbers.
        seconds: that it took.
    """

    name: str
    rows: dict[str, Counter[str]] = field(default_factory=dict)
    bad: list[str] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def count(self, what: str, outcome: str, said: str | None = None) -> None:
        """Count an outcome; `said` makes it a bad one."""
        self.rows.setdefault(what, Counter())[outcome if said is None else "bad"] += 1
        if said is not None:
            self.bad.append(f"{what}: {said}")

    @property
    def tried(self) -> int:
        return sum(sum(row.values()) for row in self.rows.values())


def files(share: float, seed: int = 0) -> Part:
    """Mutated files of every kind."""
    part = Part("files")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        inputs = range(seed, seed + max(len(KINDS), round(MUTATIONS * share)))
        outcomes = run_all(inputs, bench.mutated)
        for number, outcome in zip(inputs, outcomes, strict=True):
            kind = bench.names[number % len(bench.names)]
            part.count(kind, outcome.kind, None if outcome.good else f"{outcome.kind} {outcome.note}: {outcome.said}")
    part.figures["longest, processor seconds"] = max(outcome.seconds for outcome in outcomes)
    part.figures["most memory, MB"] = round(max(outcome.bytes for outcome in outcomes) / 1e6, 1)
    return part


def kills(share: float, _: int = 0) -> Part:
    """kill -9 before every change of the file system."""
    part = Part("kills")
    with _scenes(part) as scenes:
        for name, scene, changes in scenes:
            for number in range(0, changes, _stride(share)):
                part.count(name, "whole", scene.killed(number))
    return part


def faults(share: float, _: int = 0) -> Part:
    """A disk that is full or read-only from some change on, files that may not grow, and two at once."""
    part = Part("faults")
    with _scenes(part) as scenes:
        for name, scene, changes in scenes:
            for text, error in ERRORS.items():
                for number in range(0, changes, 2 * _stride(share)):
                    part.count(f"{text}: {name}", "whole", scene.fails(number, error))
            for size in (0, 1, 100, 1000, 3000, 10_000, 30_000)[:: min(_stride(share), 3)]:
                part.count(f"files of at most n bytes: {name}", "whole", scene.full(size))
            part.count(f"two at once: {name}", "whole", scene.twice())
    return part


@contextmanager
def _scenes(part: Part) -> Iterator[list[tuple[str, Scene, int]]]:
    """A context manager that yields every operation with its number of changes."""
    with tempfile.TemporaryDirectory() as folder:
        made = []
        for name, operation in operations(Path(folder) / "shared").items():
            scene = Scene(Path(folder) / name.replace(" ", "-"), operation)
            made.append((name, scene, scene.changes()))
            part.figures[f"changes: {name}"] = made[-1][2]
        yield made


def _stride(share: float) -> int:
    return max(1, round(1 / share))


def exceptions(share: float, _: int = 0) -> Part:
    """An exception, or Ctrl-C, at a call of a function of tdkit."""
    part = Part("exceptions")
    with tempfile.TemporaryDirectory() as folder:
        for name, (make, work, spilled) in _cases(Path(folder)).items():
            before, swap.SPILL_FROM = swap.SPILL_FROM, 0 if spilled else swap.SPILL_FROM
            try:
                _interrupt(part, name, make, work, share, same=not spilled)
            finally:
                swap.SPILL_FROM = before
    return part


def _interrupt(
    part: Part, name: str, make: Callable[[], Any], work: Callable[[Any], object], share: float, *, same: bool
) -> None:
    whole = make()
    work(whole)
    calls = calls_in(lambda: work(make()))
    total, wanted = len(calls), max(6, round(CALLS * share))
    spread = {round(i * (total - 1) / wanted) for i in range(wanted + 1)}
    files = ("swap.py", "tied_names.py", "attributes.py", "filling.py", "vocabulary.py", "registration.py")
    tender = [i for i, call in enumerate(calls) if call.split(":")[0].endswith(files) or i > total - 40]
    spread |= set(tender[:: max(1, len(tender) // wanted)])
    for turn, number in enumerate(sorted(spread)):
        kind = (InjectedError, KeyboardInterrupt)[turn % 2]
        said = tried(number, kind, make, work, State.of(whole), same=same)
        part.count(name, "whole", said and f"{said} differs after {kind.__name__} in {calls[number]} ({number})")
    part.figures[f"calls: {name}"] = total


def _cases(folder: Path) -> dict[str, tuple[Callable[[], Any], Callable[[Any], object], bool]]:
    def made(build: Callable[[], Any]) -> Callable[[], Any]:
        def make() -> Any:
            torch.manual_seed(0)
            return build()

        return make

    one, two, llama = made(lambda: make_gpt2(n_layer=1)), made(lambda: make_gpt2(n_layer=2)), made(make_llama)
    saved = tdkit.save(tdkit.compress(one().double(), POLICY), folder / "saved")
    mlps = tdkit.Policy([tdkit.Rule("*.mlp.*", tdkit.LowRank(rank=2))])
    half = tdkit.Policy([tdkit.Rule("*", tdkit.LowRank())], budget={"bytes": 0.4, "dtype": "float16"})
    shrink = tdkit.Policy([tdkit.Rule("*.mlp.*", tdkit.Shrink(units=20))])
    known, units = (tdkit.calibrate(make(), [IDS], progress=False) for make in (two, llama))
    return {
        "compress": (one, lambda m: tdkit.compress(m, POLICY), False),
        "compress, weights on disk": (one, lambda m: tdkit.compress(m, POLICY), True),
        "compress to float16": (one, lambda m: tdkit.compress(m, half), False),
        "compress, sequential": (two, lambda m: tdkit.compress(m, mlps, calibration=known, sequential=True), False),
        "compress, two passes": (two, lambda m: tdkit.compress(m, mlps, calibration=known, passes=2), False),
        "compress to fewer units": (llama, lambda m: tdkit.compress(m, shrink, calibration=units), False),
        "calibrate": (one, lambda m: tdkit.calibrate(m, [IDS], progress=False), False),
        "load into a model": (one, lambda m: tdkit.load(saved, model=m), False),
    }


def numbers(share: float, seed: int = 0) -> Part:
    """Every decomposition, dtype and metric with degenerate weights; of all combinations one in `NUMBERS`."""
    part = Part("numbers")
    stride = NUMBERS * _stride(share)
    for case in islice(numerics.cases(), seed % stride, None, stride):
        try:
            part.count(case[0], numerics.tried(*case))
        except Exception:
            part.count(case[0], "bad", f"{case}: {traceback.format_exc()[-600:]}")
    return part


def misbehaving(_: float, __: int = 0) -> Part:
    """Plugins that do what they must not."""
    part = Part("plugins")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        tries = {
            **{name: partial(plugins.tried, name) for name in plugins.NAMES},
            **{name: partial(plugins.imported, place, name) for name in plugins.CODE},
            **{f"host: {name}": partial(hosts.tried, place, name) for name in hosts.FAULTS},
            **{f"host: {name}": partial(hosts.imported, place, name) for name in hosts.PACKAGES},
        }
        for name, attempt in tries.items():
            try:
                part.count(name, attempt())
            except BaseException:
                part.count(name, "bad", traceback.format_exc()[-600:])
    return part


def memory(share: float, _: int = 0) -> Part:
    """Many compressions, and one distillation of many steps, in one process; and as many threads as one or two."""
    part = Part("memory")
    sizes = [_compressed() for _ in range(2 + max(3, round(50 * share)))]
    _flat(part, "compressions", sizes[1:])
    steps = max(100, round(2000 * share))
    watched = Watched(torch.arange(48).reshape(6, 8) % 40)
    torch.manual_seed(0)
    stage = {"losses": {"logits": {}}, "steps": steps, "batch_size": 2}
    distill(make_gpt2(n_layer=1), make_gpt2(n_layer=1), stage, watched, progress=False)
    _flat(part, "training steps", watched.sizes[50:])
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for what, work in (("compress", _factors), ("distil", _student)):
            first, second = work(), work()
            same = all(torch.equal(tensor, second[name]) for name, tensor in first.items())
            part.count(f"{what} twice, threads: {threads}", "identical", None if same else "the numbers differ")
    torch.set_num_threads(before)
    return part


class Watched(Windows):
    """Windows that note the size of the process whenever a batch is asked for."""

    def __init__(self, ids: Tensor) -> None:
        super().__init__(ids)
        self.sizes: list[int] = []

    def batch(self, rows: Tensor, generator: torch.Generator) -> Any:
        self.sizes.append(_resident())
        return super().batch(rows, generator)


def _flat(part: Part, what: str, sizes: list[int]) -> None:
    """Count the sizes of the process over time, whose last may not be far above the first."""
    grown = round((sizes[-1] - sizes[0]) / 1e6, 1)
    part.count(what, "flat", None if grown < GROWTH else f"the process grows by {grown} MB")
    part.figures |= {f"number of {what}": len(sizes) - 1, f"MB that the process grows by, {what}": grown}


def _compressed() -> int:
    """Compress a model; returns the size of the process afterwards."""
    torch.manual_seed(0)
    tdkit.compress(make_gpt2(n_layer=1), POLICY)
    gc.collect()
    return _resident()


def _factors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return tdkit.compress(TiedModel(), tdkit.Policy([tdkit.Rule("*", tdkit.Auto())], budget=0.7)).state_dict()


def _student() -> dict[str, Tensor]:
    torch.manual_seed(0)
    teacher, student = make_gpt2(n_layer=1), make_gpt2(n_layer=1)
    distill(student, teacher, STAGE, rows(), progress=False)
    found: dict[str, Tensor] = student.state_dict()
    return found


def _resident() -> int:
    with Path("/proc/self/statm").open(encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


PARTS: dict[str, Callable[[float, int], Part]] = {
    "files": files,
    "kills": kills,
    "faults": faults,
    "exceptions": exceptions,
    "numbers": numbers,
    "plugins": misbehaving,
    "memory": memory,
}

IN_MEMORY = Path("/dev/shm")  # where a change of a file takes no time, if there is such a place


def run(name: str, share: float, seed: int = 0) -> Part:
    """Run one part, quietly and on one thread."""
    torch.set_num_threads(1)
    tempfile.tempdir = str(IN_MEMORY) if os.access(IN_MEMORY, os.W_OK) else None
    gc.collect()
    gc.freeze()  # in the many processes that are forked from this one, training would look through all that is loaded
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    started = time.perf_counter()
    try:
        part = PARTS[name](share, seed)
    finally:
        logging.disable(disabled)
        tempfile.tempdir = None
        gc.unfreeze()
    part.seconds = round(time.perf_counter() - started, 1)
    return part
