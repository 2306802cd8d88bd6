"""Two processes make the steps of one: with the whole models each (DDP), and with shards of them (FSDP).

They are started by torch's launcher: ``accelerate launch --cpu --num_processes 2`` starts one process, whatever
the number, unless MPI does it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_models import factorized, uneven
from launch import started
from run_processes import PADDED, figures, run

Found = dict[str, Any]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the two processes leave what they found; one launch for all tests, since its imports take longest."""
    folder = tmp_path_factory.mktemp("processes")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    with started("run_processes.py", folder, launcher=launcher) as process:
        _, message = process.communicate()
    assert process.returncode == 0, message[-4000:]
    return folder


@pytest.fixture(scope="module")
def two(place: Path) -> tuple[Found, Found]:
    """What each of the two processes found."""
    first, second = (torch.load(place / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    return first, second


@pytest.fixture(scope="module")
def one() -> Found:
    """The same run in this process alone."""
    torch.set_num_threads(1)
    student = factorized()
    result = run(student)
    return {"state": student.state_dict(), **figures(result)}


def assert_equal(found: Found, other: Found, atol: float = 1e-4, weights: float = 1e-3) -> None:
    for mine, theirs in zip(found["steps"], other["steps"], strict=True):
        assert mine == pytest.approx(theirs, abs=atol)
    assert found["held_out"] == pytest.approx(other["held_out"], abs=atol)
    assert found["state"].keys() == other["state"].keys()
    for name, tensor in found["state"].items():
        assert torch.allclose(tensor, other["state"][name], atol=weights, rtol=0), name


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_two_processes_with_unlike_numbers_of_labels_give_the_losses_of_one(
    two: tuple[Found, Found], engine: str
) -> None:
    student = factorized()
    result = run(student, stages=PADDED, data=uneven())
    for found in two:
        assert_equal(found[f"padded {engine}"], {"state": student.state_dict(), **figures(result)})


@pytest.mark.parametrize("engine", ["ddp", "fsdp", "loaded"])
def test_two_processes_give_the_losses_of_one(two: tuple[Found, Found], one: Found, engine: str) -> None:
    """`loaded`: one process had the weights, the layers were named, and activations were checkpointed."""
    moved = max(float((one["state"][n] - tensor).abs().max()) for n, tensor in factorized().state_dict().items())
    assert moved > 0.05, "the run changed more than is tolerated"
    for found in two:
        assert_equal(found[engine], one)


def test_both_processes_end_with_the_same_student(two: tuple[Found, Found]) -> None:
    for engine in ("ddp", "fsdp", "bf16"):
        mine, theirs = (found[engine]["state"] for found in two)
        assert all(torch.equal(mine[name], theirs[name]) for name in mine), engine


def test_each_process_holds_its_share_of_both_models(two: tuple[Found, Found]) -> None:
    first, second = (found["shares"] for found in two)
    assert len(first) == len(second) == 2, "the teacher's and the student's layers, whoever was called"
    assert all(0.4 < share < 0.6 for share in (*first, *second))


def test_a_sharded_student_is_left_as_an_ordinary_module(two: tuple[Found, Found]) -> None:
    for found in two:
        assert found["ordinary"]
        assert found["left"] == [True] * 4, "stopped, dead, stopped, not a number"


def test_a_sharded_run_that_was_stopped_and_killed_ends_with_the_same_weights(two: tuple[Found, Found]) -> None:
    for found in two:
        assert found["resumed_at"] == 9
        assert found["same"]


def test_a_sharded_run_goes_on_from_the_checkpoint_of_a_run_with_whole_models(
    two: tuple[Found, Found], one: Found, place: Path
) -> None:
    assert all(found["handed over"] for found in two)
    assert_equal(two[0]["handed"], one)
    for name in ("fsdp", "handed"):
        state = json.loads((place / name / "step-00000011" / "state.json").read_text())
        assert state["position"] == {"stage": 3, "step": 0, "total": 11, "tokens": 768}


def test_what_fails_in_one_process_is_raised_in_both(two: tuple[Found, Found]) -> None:
    for found in two:
        assert found["full disk"], "only the first process writes checkpoints"
        assert "is damaged (its SHA-256 is not the one written down)" in found["damaged"], "only the second reads it"


def test_sharded_bf16_is_near_float32(two: tuple[Found, Found]) -> None:
    exact, rough = two[0]["fsdp"], two[0]["bf16"]
    assert rough["steps"] != exact["steps"]
    for mine, theirs in zip(rough["steps"], exact["steps"], strict=True):
        assert mine == pytest.approx(theirs, rel=0.05, abs=0.05)
    assert rough["held_out"] == pytest.approx(exact["held_out"], abs=0.01)
