"""Rules in order, what they select, how they complain, and their YAML."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tdkit
from tdkit import Kronecker, LowRank, PermutedKronecker, Policy, Rule, TTMatrix
from tdkit.errors import PolicyError
from tdkit.models.sites import survey


@pytest.fixture
def model() -> nn.Module:
    block = {"attn": nn.Linear(8, 8), "mlp": nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 8))}
    blocks = nn.ModuleList([nn.ModuleDict(block), nn.ModuleDict({"attn": nn.Linear(8, 8), "mlp": nn.Linear(8, 16)})])
    return nn.ModuleDict({"transformer": nn.ModuleDict({"wte": nn.Embedding(50, 8), "h": blocks})})


def selected(model: nn.Module, *rules: Rule) -> dict[str, str]:
    """Layer name to the pattern of its rule."""
    return {name: rule.match for name, rule in Policy(rules).assign(survey(model)).items()}


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.mlp*", ["transformer.h.0.mlp.0", "transformer.h.0.mlp.1", "transformer.h.1.mlp"]),
        ("transformer.h.?.attn", ["transformer.h.0.attn", "transformer.h.1.attn"]),
        ("transformer.h.[0-5].mlp.1", ["transformer.h.0.mlp.1"]),
        ("re:.*h\\.1\\..*", ["transformer.h.1.attn", "transformer.h.1.mlp"]),
        ("re:transformer\\.(wte|h\\.0\\.attn)", ["transformer.wte", "transformer.h.0.attn"]),
        ("transformer.wte", ["transformer.wte"]),
    ],
)
def test_patterns(model: nn.Module, pattern: str, names: list[str]) -> None:
    assert list(selected(model, Rule(pattern, LowRank()))) == names


def test_a_pattern_must_match_the_whole_name(model: nn.Module) -> None:
    with pytest.raises(PolicyError, match="matched no layer"):
        selected(model, Rule("mlp", LowRank()))
    with pytest.raises(PolicyError, match="matched no layer"):
        selected(model, Rule("re:mlp", LowRank()))


def test_types_sizes_and_predicates(model: nn.Module) -> None:
    assert list(selected(model, Rule("*", LowRank(), types=("Embedding",)))) == ["transformer.wte"]
    assert list(selected(model, Rule("*", LowRank(), types="Embedding"))) == ["transformer.wte"]  # type: ignore[arg-type]
    assert list(selected(model, Rule("*", LowRank(), min_params=400))) == ["transformer.wte"]
    assert len(selected(model, Rule("*", LowRank(), max_params=64))) == 2
    assert list(selected(model, Rule("*", LowRank(), where=lambda site: site.shape[0] == 16))) == [
        "transformer.h.1.mlp"
    ]


def test_the_first_match_wins(model: nn.Module) -> None:
    found = selected(model, Rule("*.attn", keep=True), Rule("*.h.0.*", LowRank()), Rule("*", Kronecker()))
    assert found["transformer.h.0.attn"] == "*.attn"
    assert found["transformer.h.0.mlp.0"] == "*.h.0.*"
    assert found["transformer.h.1.mlp"] == "*"


def test_a_tied_layer_is_found_by_each_of_its_names(tied: Any) -> None:
    assert list(selected(tied, Rule("head", LowRank()))) == ["embed"]
    assert list(selected(tied, Rule("embed", LowRank()))) == ["embed"]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule("transfomer.*", LowRank()), r"rule 'transfomer.\*' matched no layer; did you mean 'transformer.\*'\?"),
        (Rule("*.atn", LowRank()), r"rule '\*.atn' matched no layer; did you mean '\*.attn'\?"),
        (Rule("transformer.wtee", LowRank()), r"did you mean 'transformer.wte'\?"),
        (Rule("zzz", LowRank()), r"rule 'zzz' matched no layer. Layers are named like 'transformer.wte'"),
        (Rule("re:zzz", LowRank()), r"rule 're:zzz' matched no layer. Layers are named like 'transformer.wte'"),
        (
            Rule("*.attn", LowRank(), types=("Conv1D",)),
            r"rule '\*.attn' matches 2 layers by name, but its types, size bounds or predicate leave none "
            r"\(types Linear; 64 to 64 params\)",
        ),
        (Rule("*.attn", LowRank(), min_params=65), r"matches 2 layers by name, but its types, size bounds"),
    ],
)
def test_a_rule_that_matches_nothing_says_what_is_near(model: nn.Module, rule: Rule, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        selected(model, rule, Rule("*", LowRank()))


def test_rules_that_match_nothing_are_reported_together(model: nn.Module) -> None:
    with pytest.raises(PolicyError) as raised:
        selected(model, Rule("nothing.here", LowRank()), Rule("*", LowRank()), Rule("re:nor_here", keep=True))
    assert "'nothing.here'" in str(raised.value)
    assert "'re:nor_here'" in str(raised.value)


def test_a_model_without_layers_says_so() -> None:
    with pytest.raises(PolicyError, match="the model has no layer that can be rewritten"):
        selected(nn.Sequential(nn.ReLU()), Rule("*", LowRank()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rule("", LowRank()), r"rule match='' must be a glob"),
        (lambda: Rule("re:(", LowRank()), r"rule 're:\(' is not a regular expression"),
        (lambda: Rule("*"), r"rule '\*' must name a decomposition or say keep, not both or neither"),
        (lambda: Rule("*", LowRank(), keep=True), r"must name a decomposition or say keep"),
        (lambda: Rule("*", LowRank(), budget=1.5), r"rule '\*': budget=1.5 must be params after / params before"),
        (lambda: Rule("*", LowRank(), budget=0), r"budget=0 must be"),
        (lambda: Policy([]), r"a policy needs at least one rule"),
        (lambda: Policy(Rule("*", LowRank())), r"a policy's rules must be a list of Rule"),
        (lambda: Policy(["*"]), r"a policy's rules must be a list of Rule"),
        (lambda: Policy([Rule("*", LowRank())], budget=66), r"policy budget=66 must be params after / params before"),
        (lambda: Policy([Rule("*", LowRank())], budget=True), r"policy budget=True must be"),
        (lambda: Policy([Rule("*", LowRank())], budget="0.5"), r"policy budget='0.5' must be"),
        (lambda: Policy([Rule("*", LowRank())], budget=float("nan")), r"policy budget=nan must be"),
        (lambda: Rule("*", LowRank(), min_params="many"), r"rule '\*': min_params='many' must be an integer"),
        (lambda: Rule("*", LowRank(), min_params=9, max_params=8), r"min_params=9 is above max_params=8"),
    ],
)
def test_malformed_rules_and_policies(make: Any, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        make()


def test_a_decomposition_by_name_or_options() -> None:
    assert Rule("*", "low_rank").decomposition == LowRank()  # type: ignore[arg-type]
    assert Rule("*", {"low_rank": {"rank": 3}}).decomposition == LowRank(rank=3)  # type: ignore[arg-type]


def test_yaml_is_what_a_person_would_write() -> None:
    policy = Policy(
        [Rule("*.mlp.*", Kronecker(terms=4, b=(2, 4))), Rule("*.attn.*", keep=True), Rule("*", LowRank())], budget=0.66
    )
    assert policy.to_dict() == {
        "rules": [
            {"match": "*.mlp.*", "with": {"kronecker": {"terms": 4, "b": [2, 4]}}},
            {"match": "*.attn.*", "keep": True},
            {"match": "*", "with": "low_rank"},
        ],
        "budget": 0.66,
    }


def test_a_policy_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("rules:\n  - {match: '*', with: {low_rank: {rank: 3}}}\nbudget: 0.5\nallow_growth: true\n")
    assert Policy.from_yaml(path) == Policy([Rule("*", LowRank(rank=3))], budget=0.5, allow_growth=True)


names = st.text(string.ascii_letters + string.digits + ".*?_-:[]# '\"", min_size=1, max_size=20).filter(
    lambda text: not text.startswith("re:")
)
sizes = st.integers(1, 10**9)
pairs = st.tuples(st.integers(1, 64), st.integers(1, 64))
ratios = st.floats(0.001, 1.0)
kinds = st.one_of(
    st.builds(LowRank, rank=st.none() | sizes),
    st.builds(Kronecker, terms=st.none() | sizes, a=st.none() | pairs),
    st.builds(
        PermutedKronecker, terms=st.none() | sizes, b=st.none() | pairs, rows=st.booleans(), seed=st.integers(0, 99)
    ),
    st.builds(
        TTMatrix, ranks=st.none() | sizes | st.tuples(sizes, sizes), in_modes=st.none() | st.tuples(sizes, sizes, sizes)
    ),
)
rules = st.builds(
    Rule,
    names,
    kinds,
    types=st.lists(st.sampled_from(["Linear", "Conv1D", "Embedding"]), max_size=2).map(tuple),
    min_params=st.none() | st.integers(0, 99),
    max_params=st.none() | st.integers(100, 10**9),
    budget=st.none() | ratios,
) | st.builds(Rule, names, keep=st.just(True))


@given(
    st.builds(Policy, st.lists(rules, min_size=1, max_size=4), budget=st.none() | ratios, allow_growth=st.booleans())
)
def test_yaml_and_python_are_the_same_thing(policy: Policy) -> None:
    assert Policy.from_yaml(policy.to_yaml()) == policy
    assert Policy.from_dict(policy.to_dict()) == policy


def test_a_predicate_cannot_be_written_as_yaml() -> None:
    with pytest.raises(PolicyError, match=r"rule '\*' has a predicate \(where=\), which cannot be written as YAML"):
        Policy([Rule("*", LowRank(), where=lambda site: True)]).to_yaml()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rules: [", r"not YAML: "),
        ("42", r"a policy is 'rules:' and, mostly, 'budget:'"),
        ("", r"a policy is 'rules:'"),
        ("budget: 0.5", r"a policy needs at least one rule"),
        ("rules: low_rank", r"a policy's 'rules' must be a list"),
        ("rules: [{match: '*', with: low_rank}]\nbuget: 0.5", r"policy: unknown key 'buget'; did you mean 'budget'\?"),
        ("rules: [{match: '*', wiht: low_rank}]", r"rule 1: rule '\*': unknown key 'wiht'; did you mean 'with'\?"),
        ("rules: [{with: low_rank}]", r"rule 1: rule \{'with': 'low_rank'\} lacks 'match'"),
        ("rules: ['*']", r"rule 1: a rule is 'match:' with 'with:' or 'keep: true', not '\*'"),
        ("rules: [{match: '*', with: lowrank}]", r"rule 1: unknown decomposition 'lowrank'; did you mean 'low_rank'\?"),
        ("rules: [{match: '*', with: {low_rank: {rank: -2}}}]", r"rule 1: low_rank: rank=-2 must be an integer"),
        ("rules: [{match: '*', keep: 'no'}]", r"rule 1: .*keep='no' must be true or false"),
        (
            "rules: [{match: '*', with: low_rank}]\nallow_growth: 'no'",
            r"policy allow_growth='no' must be true or false",
        ),
        ("rules: [{match: '*', with: low_rank, types: 3}]", r"rule 1: .*types=3 must be layer types"),
        ("rules: [{match: 3, with: low_rank}]", r"rule 1: rule match=3 must be a glob"),
    ],
)
def test_malformed_yaml(text: str, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        Policy.from_yaml(text)


def test_the_faults_of_one_file_are_reported_together() -> None:
    text = "rules: [{match: '*', with: lowrank}, {match: '*'}, {with: low_rank}]\nbuget: 0.5\nbudget: 7"
    with pytest.raises(PolicyError) as raised:
        Policy.from_yaml(text)
    for part in ("rule 1: unknown decomposition", "rule 2: ", "rule 3: ", "unknown key 'buget'", "budget=7"):
        assert part in str(raised.value)


class Wide(nn.Linear):
    """A layer of the user's."""


def test_types_are_those_of_torch_and_of_the_user_with_their_bases() -> None:
    model = nn.ModuleDict(
        {
            "wide": Wide(8, 8),
            "plain": nn.Linear(8, 8),
            "conv": nn.Conv2d(4, 8, 3),
            "rnn": nn.LSTM(8, 8),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
        }
    )
    for types, names in {
        ("Wide",): ["wide"],
        ("Linear",): ["wide", "plain", "normed"],
        ("Conv2d",): ["conv"],
        ("LSTM",): ["rnn.weight_ih_l0", "rnn.weight_hh_l0"],
        ("Conv2d", "Wide"): ["wide", "conv"],
    }.items():
        assert list(selected(model, Rule("*", LowRank(), types=types))) == names


def odd_model() -> nn.Module:
    return nn.ModuleDict({"odd": nn.Linear(8, 8, dtype=torch.complex64), "fc": nn.Linear(8, 8)})


@pytest.mark.parametrize("pattern", ["re:(odd|fc)", "re:odd|f."])
def test_a_rule_that_names_what_cannot_be_rewritten_is_refused(pattern: str) -> None:
    with pytest.raises(PolicyError, match=r"names weights that cannot be rewritten: odd \(its dtype is complex64"):
        selected(odd_model(), Rule(pattern, LowRank()))


@pytest.mark.parametrize("pattern", ["*", "re:.*d.*|fc", "re:[of].*"])
def test_a_wildcard_passes_by_what_cannot_be_rewritten(pattern: str) -> None:
    assert list(selected(odd_model(), Rule(pattern, LowRank()))) == ["fc"]


def test_what_cannot_be_rewritten_may_be_kept_by_name() -> None:
    assert list(selected(odd_model(), Rule("odd", keep=True), Rule("*", LowRank()))) == ["fc"]


def test_what_cannot_be_rewritten_is_named_by_each_of_its_layers() -> None:
    model = odd_model()
    model.add_module("tied", nn.Linear(8, 8))
    model.tied.weight = model.odd.weight
    with pytest.raises(PolicyError, match=r"'tied' matches only layers that cannot be rewritten: odd \("):
        selected(model, Rule("tied", LowRank()))


def test_a_rule_that_matches_what_is_factorised_already_says_so(tied: Any) -> None:
    tdkit.compress(tied, Policy([Rule("*", LowRank(rank=2))]))
    with pytest.raises(PolicyError, match=r"'\*' matches only weights that are factorised already \(embed, up, down\)"):
        selected(tied, Rule("*", LowRank()))


def test_the_floor_of_a_policy_is_a_share_or_0() -> None:
    policy = Policy([Rule("*", LowRank(), min_keep=0)], budget=0.5, min_keep=0.2)
    assert Policy.from_yaml(policy.to_yaml()) == policy
    with pytest.raises(PolicyError, match=r"policy min_keep=-0.1 must be .*, at least 0 and at most 1"):
        Policy([Rule("*", LowRank())], min_keep=-0.1)
    with pytest.raises(PolicyError, match=r"policy min_keep=True must be"):
        Policy([Rule("*", LowRank())], min_keep=True)


def test_a_policy_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    damaged = (
        (b"\xff\xfe", "can't decode"),
        (b"rules: [2001-02-30]", "day is out of range"),
        (b"[" * 5000, "nested"),
    )
    for content, message in damaged:
        path.write_bytes(content)
        with pytest.raises(PolicyError, match=rf"policy file .* cannot be read: .*{message}"):
            Policy.from_yaml(path)
    with pytest.raises(PolicyError, match="cannot be read"):
        Policy.from_yaml(tmp_path)


def test_an_expression_that_python_would_never_finish_is_matched() -> None:
    assert not Rule("re:(a*)*b", LowRank()).names_match("a" * 60)
    with pytest.raises(PolicyError, match="groupref is not supported in layer names"):
        Rule(r"re:(a)\1", LowRank())
