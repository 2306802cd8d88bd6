"""A small run that tests start in processes of their own, to kill it or to stop it.

python run_distillation.py FOLDER RESULT [steps] [pause]
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from distill_models import gpt2, ids

from tdkit_distill import distill
from tdkit_distill.errors import DistillError


def main(folder: str, result: str, steps: str = "12", pause: str = "0", dropout: str = "0.1") -> None:
    torch.set_num_threads(1)
    student, teacher = gpt2(2, 8, seed=1, dropout=float(dropout)), gpt2(2, 16)
    losses = {"logits": {"temperature": 2.0}, "hidden": 0.5, "cross_entropy": 0.1}
    stages: list[Any] = [
        {"name": "one", "losses": losses, "steps": int(steps), "batch_size": 4, "optimizer": {"lr": 1e-2}},
        {"name": "two", "losses": {"cross_entropy": 1}, "steps": 5, "batch_size": 8, "accumulation": 2},
    ]

    def call(model: Any, batch: Any) -> Any:
        time.sleep(float(pause))
        return model(batch["input_ids"])

    where = None if folder == "-" else folder
    try:
        done = distill(student, teacher, stages, ids(), folder=where, running={"checkpoint_every": 3}, call=call)
    except DistillError as error:
        sys.exit(str(error))
    from accelerate import PartialState

    if PartialState().is_main_process:
        torch.save(student.state_dict(), f"{result}.pt")
        losses_seen = [[e["loss"], *e["terms"].values()] for e in done.history if "loss" in e]
        Path(f"{result}.json").write_text(json.dumps({"losses": losses_seen, "resumed_at": done.resumed_at}))


if __name__ == "__main__":
    main(*sys.argv[1:])
