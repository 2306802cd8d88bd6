"""Fits of small weights use one thread, and leave the setting as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tdkit import Kronecker, LowRank, Metric
from tdkit.decompositions.base import Decomposition
from tdkit.fitting import low_rank, variable_projection
from tdkit.support.threads import SMALL, threads_for


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_one_thread_below_the_limit_and_the_setting_comes_back() -> None:
    with threads_for(SMALL):
        assert torch.get_num_threads() == 2
    with pytest.raises(ValueError, match="inner"), threads_for(SMALL - 1):
        assert torch.get_num_threads() == 1
        raise ValueError("inner")
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("kind", [LowRank(), Kronecker()], ids=lambda kind: kind.name)
def test_fits_and_curves_of_a_small_weight_use_one_thread(kind: Decomposition, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watched(module: object, name: str) -> None:
        original = getattr(module, name)

        def call(*args: object, **options: object) -> object:
            seen.append(torch.get_num_threads())
            return original(*args, **options)

        monkeypatch.setattr(module, name, call)

    watched(variable_projection, "minimise")
    watched(low_rank, "_whitened_gram")
    weight, metric = torch.randn(16, 12), Metric(torch.rand(12) + 1, torch.rand(16) + 1)
    kind.curve(weight, metric)
    choice = kind.complete((16, 12), 100)
    assert choice is not None
    choice.fit(weight, metric)
    assert set(seen) == {1}
    assert len(seen) >= 2
    assert torch.get_num_threads() == 2
