"""The points of a sweep."""

from __future__ import annotations

from typing import Any

import pytest

from tdkit import Auto, Kronecker, LowRank, Policy, Rule
from tdkit.errors import OptionError
from tdkit.sweeps.grid import points_of, read_axes


def test_a_grid_is_all_combinations() -> None:
    points = points_of(
        {"budget": [0.9, {"bytes": 0.5, "dtype": "int8"}], "with": ["low_rank", "auto"]}, match="*.mlp.*"
    )
    assert [point.name for point in points] == [
        "low_rank 0.9",
        "low_rank bytes 0.5 dtype int8",
        "auto 0.9",
        "auto bytes 0.5 dtype int8",
    ]
    assert points[0].policy == Policy([Rule("*.mlp.*", LowRank())], budget=0.9)
    assert points[3].policy.rules[0].decomposition == Auto()
    assert points[1].varied == {"with": "low_rank", "budget": '{"bytes": 0.5, "dtype": "int8"}'}


def test_a_grid_takes_decompositions_as_objects() -> None:
    points = points_of({"with": [LowRank(), Kronecker(terms=2)], "budget": [0.5]})
    assert [point.name for point in points] == ["low_rank 0.5", "kronecker terms=2 0.5"]
    assert points[1].policy.rules[0].decomposition == Kronecker(terms=2)
    assert points[1].varied["with"] == "kronecker(terms=2)"


def test_a_grid_varies_a_policy_and_leaves_its_kept_layers() -> None:
    base = Policy([Rule("head", keep=True), Rule("*", LowRank(), min_keep=0.2)], budget=0.5, allocation="uniform")
    (point,) = points_of({"with": [{"kronecker": {"terms": 2}}]}, base)
    assert point.policy == Policy(
        [Rule("head", keep=True), Rule("*", Kronecker(terms=2), min_keep=0.2)], budget=0.5, allocation="uniform"
    )


def test_policies_are_given_by_name_or_in_a_list() -> None:
    policy = Policy([Rule("*", LowRank())], budget=0.5)
    assert [point.name for point in points_of({"a/b: c": policy})] == ["a b c"]
    assert [point.name for point in points_of([policy, policy])] == ["low_rank 0.5", "low_rank 0.5 2"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"budgt": [0.9]}, "a sweep cannot vary 'budgt'; did you mean 'budget'?"),
        ({"budget": 0.9}, "budget=0.9 must be a list of values"),
        ({"with": "low_rank"}, "with='low_rank' must be a list of values"),
        ({"budget": [0.9, 2], "with": ["low_rnk"]}, "did you mean 'low_rank'"),
        ({"budget": [2], "with": ["low_rank"]}, "low_rank 2: policy budget"),
        ([], "there is no point"),
        (["low_rank"], "point 'str' is a str, not a tdkit.Policy"),
    ],
)
def test_faults_name_the_value_and_the_remedy(given: Any, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        points_of(given)
    assert message in str(caught.value)


def test_axes_are_read_as_yaml_lists() -> None:
    found = read_axes(["budget=0.9,0.8", "with=low_rank,{kronecker: {terms: 2, b: [2, 4]}}"])
    assert found == {"budget": [0.9, 0.8], "with": ["low_rank", {"kronecker": {"terms": 2, "b": [2, 4]}}]}
    for text, message in (("budget", "must be KEY=VALUE,VALUE"), ("budget=", "must be"), ("budget={", "not YAML")):
        with pytest.raises(OptionError, match=message):
            read_axes([text])
