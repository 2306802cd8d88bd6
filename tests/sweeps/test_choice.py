"""Which point is recommended."""

from __future__ import annotations

import math

import pytest

from tdkit.errors import OptionError
from tdkit.records.record import Record
from tdkit.sweeps.choice import OF_DENSE as RELATIVE
from tdkit.sweeps.choice import choose


def point(name: str, params: float, perplexity: float, metric: str = "perplexity", *, higher: bool = False) -> Record:
    return Record(
        name=name,
        model="m",
        class_name="M",
        dense={"params": 100, metric: 20.0},
        compressed={"params": params, metric: perplexity},
        higher_is_better=(metric,) if higher else (),
    )


def test_the_smallest_within_the_loss_is_taken() -> None:
    points = [point("a", 90, 20.1), point("b", 80, 20.9), point("c", 70, 21.1), point("d", 60, math.inf)]
    assert choose(points, 0.05).text == (
        "the largest reduction within 5% of the dense model's perplexity: b, 80.0% of the parameters, perplexity 20.9 "
        "instead of 20"
    )
    assert choose(points, 0.06).record is points[2]
    none = choose(points, 0.001)
    assert none.record is None
    assert "none; the nearest is a" in none.text


def test_more_is_better_where_it_is_said() -> None:
    points = [point("a", 90, 19.5, "accuracy", higher=True), point("b", 80, 10, "accuracy", higher=True)]
    assert choose(points, 0.05).record is points[0]
    assert choose([point("c", 70, -math.inf, "accuracy", higher=True)], 0.05).record is None


def test_an_error_beside_the_dense_model_is_the_loss_itself() -> None:
    points = [
        Record(name=name, model="m", class_name="M", dense={"params": 10, RELATIVE: 0.0}, compressed=figures)
        for name, figures in (
            ("a", {"params": 9, RELATIVE: 0.01}),
            ("b", {"params": 8, RELATIVE: 0.04}),
            ("c", {"params": 7, RELATIVE: 0.06}),
            ("d", {"params": 6, RELATIVE: math.nan}),
        )
    ]
    assert choose(points, 0.05).text == (
        "the largest reduction within 5% of the dense model's outputs: b, 80.0% of the parameters, relative error 0.04"
    )
    assert choose(points, 0.07).record is points[2]


def test_nothing_measured_is_said() -> None:
    bare = Record(name="a", model="m", class_name="M", dense={"params": 10}, compressed={"params": 5})
    assert "the quality was not measured" in choose([bare], 0.05).text
    with pytest.raises(OptionError, match="within=-1 must be a fraction"):
        choose([bare], -1)
