"""Two processes make the steps of one: the same global batch, the same losses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

SCRIPT = Path(__file__).with_name("run_distillation.py")


def test_two_processes_give_the_losses_of_one(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    for count, extra in ((1, []), (2, ["--main_process_port", "0"])):
        name = str(tmp_path / str(count))
        command = [*launch, "--num_processes", str(count), *extra, str(SCRIPT), name, name, "12", "0", "0"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (torch.tensor(json.loads((tmp_path / f"{n}.json").read_text())["losses"][:12]) for n in (1, 2))
    assert torch.allclose(one, two, atol=1e-4, rtol=0)
    assert float((one[0] - one[-1]).abs().max()) > 0.01, "the run did learn"
    weights = [torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in (1, 2)]
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=1e-3) for name in weights[0])
    for n in (1, 2):
        state = json.loads(next((tmp_path / str(n)).glob("step-00000017")).joinpath("state.json").read_text())
        assert state["position"] == {"stage": 2, "step": 0, "total": 17}
