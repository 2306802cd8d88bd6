"""The benchmark of drafts on a small model: what is counted, and the page."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import tdkit
from tdkit import LowRank, Policy, Rule
from tests.benchmarks import draft
from tests.conftest import make_gpt2

PROMPTS = draft.prompts_of(torch.randint(60, (40,), generator=torch.Generator().manual_seed(0)), 2)


def tiny() -> Any:
    return make_gpt2(n_positions=96, initializer_range=0.4)


@pytest.mark.parametrize("drafted", [1, 3])
def test_the_model_itself_is_always_accepted(drafted: int) -> None:
    dense = tiny()
    found = draft.assisted(dense, copy.deepcopy(dense), PROMPTS, new_tokens=16, drafted=drafted)
    assert found.same == 1.0
    assert found.proposed >= 2 * 16 * drafted // (drafted + 1) - drafted
    assert found.acceptance > 0.9
    assert found.time_ratio > 0


def test_a_bad_draft_is_accepted_less_and_changes_no_token() -> None:
    dense = tiny()
    bad = tdkit.compress(copy.deepcopy(dense), Policy([Rule("*.mlp.*", LowRank(rank=1))]), progress=False)
    found = draft.assisted(dense, bad, PROMPTS, new_tokens=16, drafted=3)
    assert found.same == 1.0
    assert 0.0 <= found.acceptance < 0.7


def test_rows_are_stored_and_shown(tmp_path: Path) -> None:
    row = {"drafted": 5, "perplexity": 20.0, "acceptance": 0.5, "same": 1.0, "time_ratio": 1.5}
    row |= {"prompts": 2, "new_tokens": 8, "threads": 1, "calibration_tokens": 64}
    for keep in (0.8, 1.0):
        draft.store(tmp_path, {"keep": keep, **row})
    page = draft.markdown(draft.read(tmp_path))
    assert page.index("| 100% (dense) | 20.0 | 5 | 50% | 1.50 | 100% |") < page.index("| 80% of the blocks |")
