"""Records: what they hold, and their way to a file and back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tdkit
from tdkit import LowRank, Policy, Rule
from tdkit.compression.apply import compress_resolved
from tdkit.errors import CheckpointError
from tdkit.planning.planner import planned
from tdkit.planning.resolution import resolve
from tdkit.records import Before, Record

POLICY = Policy([Rule("*.mlp.*", LowRank())], budget=0.9)


@pytest.fixture
def record(gpt2: Any, ids: Tensor) -> Record:
    resolved = resolve(gpt2, POLICY)
    known = tdkit.calibrate(gpt2, [ids])
    plan = planned(resolved, known)
    before = Before.of(resolved, plan, known)
    compress_resolved(resolved.following(plan), known)
    return before.record(
        gpt2, name="small", source="gpt2", policy=POLICY, compressed={"perplexity": float("inf")}, seed=3
    )


def test_a_record_knows_the_model_before_and_after(record: Record, gpt2: Any) -> None:
    assert record.dense["params"] > record.compressed["params"] == sum(p.numel() for p in gpt2.parameters())
    assert record.plan is not None
    assert record.plan.params_before == record.dense["params"]
    rewritten = record.plan.rewritten
    assert all(step.error is not None and step.loss is not None for step in rewritten)
    kept = [step for step in record.plan.steps if step.decomposition is None]
    assert kept
    assert all(step.reason and step.reason != "dense" for step in kept)
    assert {branch.kind for branch in record.before} >= {"GPT2LMHeadModel", "Conv1D"}
    assert "FactorizedConv1D" in {branch.kind for branch in record.after}


def test_spectra_are_those_of_the_weights_in_the_metric_of_the_fit(record: Record, gpt2: Any) -> None:
    assert {spectrum.kind for spectrum in record.spectra} == {"transformer.h.*.mlp.c_fc", "transformer.h.*.mlp.c_proj"}
    assert record.plan is not None
    for spectrum in record.spectra:
        assert spectrum.calibrated
        assert spectrum.rank == getattr(record.plan[spectrum.name].decomposition, "rank")  # noqa: B009
        assert spectrum.values[0] == 1
        assert list(spectrum.values) == sorted(spectrum.values, reverse=True)


def test_uncalibrated_spectra_are_those_of_torch(gpt2: Any) -> None:
    weight = gpt2.transformer.h[0].mlp.c_fc.weight.detach().double().clone()
    resolved = resolve(gpt2, POLICY)
    found = Before.of(resolved, planned(resolved)).spectra[0]
    values = torch.linalg.svdvals(weight)
    expected = (values / values[0])[torch.tensor(found.indices) - 1]
    torch.testing.assert_close(torch.tensor(found.values).double(), expected, rtol=1e-3, atol=1e-4)


def test_a_record_is_read_back_as_it_was(record: Record, tmp_path: Path) -> None:
    file = record.save(tmp_path / "record.json")
    assert Record.read(file) == record


def test_numbers_that_are_not_finite_are_written_as_json(record: Record, tmp_path: Path) -> None:
    assert record.plan is not None
    steps = tuple(replace(step, loss=float("nan")) for step in record.plan.steps)
    odd = replace(record, plan=replace(record.plan, steps=steps))
    again = Record.read(odd.save(tmp_path / "record.json"))
    assert again.compressed["perplexity"] == float("inf")
    assert again.plan is not None
    assert [step.loss for step in again.plan.steps] == [None] * len(steps)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_weights_without_a_spectrum_have_none(gpt2: Any, value: float) -> None:
    with torch.no_grad():
        gpt2.transformer.h[0].mlp.c_fc.weight.fill_(value)
    resolved = resolve(gpt2, POLICY)
    names = {spectrum.name for spectrum in Before.of(resolved, planned(resolved)).spectra}
    assert names
    assert "transformer.h.0.mlp.c_fc" not in names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"form": "tdkit-record/9"}, "is no record of the form tdkit-record/1"),
        ({"plan": {"version": 1}}, "not a tdkit plan"),
        ({"spectra": [{}]}, r"is damaged: spectra\.0\.name: Field required"),
        ({"odd": 1}, "is damaged: odd: Extra inputs"),
    ],
)
def test_a_damaged_record_is_refused(record: Record, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = tmp_path / "record.json"
    file.write_text(json.dumps({**record.to_dict(), **change}))
    with pytest.raises(CheckpointError, match=message):
        Record.read(file)


def test_a_record_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as a record"):
        Record.read(tmp_path / "record.json")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("spectra", 0, "values"), "many"),
        (("spectra", 0, "values", 0), "x"),
        (("dense", "params"), [1]),
        (("options",), 3),
        (("seconds", "plan"), "long"),
        (("before", 0, "params"), [1]),
        (("before", 0, "depth"), 10**30),
        (("after", 1, "depth"), 10**6),
        (("after", 1, "depth"), -1),
        (("data",), [{"role": "train", "name": 3}]),
        (("samples",), [{"prompt": None, "dense": None, "compressed": None}]),
        (("seed",), "x"),
        (("name",), None),
    ],
)
def test_fields_of_other_types_are_told(
    record: Record, place: tuple[str | int, ...], value: Any, tmp_path: Path
) -> None:
    """A report would fail on them much later."""
    file = record.save(tmp_path / "record.json")
    form: Any = json.loads(file.read_text())
    *way, last = place
    holder = form
    for key in way:
        holder = holder[key]
    holder[last] = value
    file.write_text(json.dumps(form))
    with pytest.raises(CheckpointError, match=r"record\.json is damaged"):
        Record.read(file)
