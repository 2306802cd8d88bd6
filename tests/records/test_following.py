"""A record is continued by further steps; where there is none it says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import tdkit
from tdkit import LowRank, Policy, Rule
from tdkit.records import Data, Record, Sample, followed, record_of


@pytest.fixture
def small() -> nn.Module:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    return tdkit.compress(model, Policy([Rule("0", LowRank(rank=2))]), progress=False)


def test_a_dense_model_is_what_comes_before() -> None:
    model = nn.Linear(16, 16)
    record = record_of(model, "mine:build")
    assert (record.plan, record.unknown, record.dense) == (None, (), {"params": 272, "bytes": 1088})
    with torch.no_grad():
        after = tdkit.compress(model, Policy([Rule("*", LowRank(rank=2))]), progress=False)
    made = followed(record, after, name="small", then="cut", command="tdkit cut", seconds={"cut": 1.0})
    assert made.compressed["params"] == 2 * 32 + 16
    assert (made.command, made.options, made.seconds) == ("tdkit cut", {"then": ["cut"]}, {"cut": 1.0})
    assert made.plan is not None
    assert made.plan.ratio == made.compressed["params"] / 272
    assert made.before != made.after


def test_a_compressed_model_without_a_record_is_said_to_have_none(small: nn.Module, tmp_path: Path) -> None:
    record = record_of(small, "small", tmp_path)
    assert record.dense["params"] == 16 * 32 + 32 + 32 * 8 + 8
    assert "small was compressed without a record" in record.unknown[0]
    (tmp_path / "record.json").write_text("{")
    assert "cannot be read as a record" in record_of(small, "small", tmp_path).unknown[0]


def test_what_was_done_before_is_kept_and_what_was_measured_before_is_not(small: nn.Module, tmp_path: Path) -> None:
    first = Record(
        name="first",
        model="dense",
        class_name="Sequential",
        seed=3,
        command="tdkit compress",
        data=(Data("calibration", "a"),),
        plan=tdkit.applied_plan(small),
        dense={"params": 808, "perplexity": 20.0},
        compressed={"params": 1, "perplexity": 30.0},
        samples=(Sample("a", "a b", "a c"),),
        unknown=("something",),
    )
    first.save(tmp_path / "record.json")
    given = record_of(small, "x", tmp_path)
    made = followed(given, small, name="second", then="healed", command="tdkit heal", data=[Data("train", "b")])
    made = followed(made, small, name="third", then="rounded", command="tdkit quantize", dense={"accuracy": 1.0})
    assert made.command == "tdkit compress && tdkit heal && tdkit quantize"
    assert made.options["then"] == ["healed", "rounded"]
    assert (made.name, made.model, made.seed, made.unknown) == ("third", "dense", 3, ("something",))
    assert [each.role for each in made.data] == ["calibration", "train"]
    assert made.dense == {"params": 808, "perplexity": 20.0, "accuracy": 1.0}
    assert set(made.compressed) == {"params", "bytes"}
    assert made.samples == (Sample("a", "a b", None),)
    assert Record.read(made.save(tmp_path / "again.json")) == made
