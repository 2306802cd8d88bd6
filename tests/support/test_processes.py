"""Fits shared by several processes give every one of them the model that a single one makes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tdkit.support.processes import processes, shared

PROGRAM = """
import sys, torch, tdkit
from torch import distributed
from tdkit import Auto, Kronecker, LowRank, Policy, Rule
from tests.conftest import make_gpt2

rank, folder = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
torch.manual_seed(5)
model = make_gpt2()
batches = [torch.arange(24).reshape(2, 12) + step for step in range(3)]
policy = Policy([Rule("transformer.h.*.attn.*", Auto(), budget=0.6), Rule("transformer.h.*", LowRank(), budget=0.5)])
tdkit.compress(model, policy, calibration=batches, progress=False)
torch.save({k: v.detach().contiguous() for k, v in model.named_parameters()}, f"{folder}/model-{rank}.pt")
seen = []
try:
    list(tdkit.support.processes.shared(range(5), lambda n: seen.append(n) or 1 // (3 - n)))
except tdkit.errors.TdkitError as error:
    assert "process 1 failed: ZeroDivisionError" in str(error), error
else:
    raise AssertionError("the failure of one process was not told to all")
assert seen == ([0, 2] if rank == 0 else [1, 3]), seen
distributed.destroy_process_group()
"""


def test_alone_everything_is_done_here_in_order() -> None:
    assert processes() == (0, 1)
    assert list(shared([3, 1, 2], lambda n: n * n)) == [9, 1, 4]


@pytest.mark.skipif(sys.platform != "linux", reason="gloo over a file")
def test_two_processes_fit_a_layer_each_and_end_with_the_same_model(tmp_path: Path) -> None:
    import torch

    import tdkit
    from tdkit import Auto, LowRank, Policy, Rule
    from tests.conftest import make_gpt2

    options = {"env": {**os.environ, "OMP_NUM_THREADS": "1"}, "cwd": Path(__file__).parents[2]}
    started = [
        subprocess.Popen([sys.executable, "-c", PROGRAM, str(rank), str(tmp_path)], stderr=subprocess.PIPE, **options)
        for rank in range(2)
    ]
    for process in started:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors.decode()[-2000:]
    torch.manual_seed(5)
    model = make_gpt2()
    batches = [torch.arange(24).reshape(2, 12) + step for step in range(3)]
    rules = [Rule("transformer.h.*.attn.*", Auto(), budget=0.6), Rule("transformer.h.*", LowRank(), budget=0.5)]
    tdkit.compress(model, Policy(rules), calibration=batches, progress=False)
    for rank in range(2):
        found = torch.load(tmp_path / f"model-{rank}.pt", weights_only=True)
        assert list(found) == [name for name, _ in model.named_parameters()]
        for name, tensor in model.named_parameters():
            torch.testing.assert_close(found[name], tensor.detach(), rtol=1e-4, atol=1e-6, msg=name)
