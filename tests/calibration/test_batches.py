"""How a batch is divided: arguments, labels, and what is refused rather than guessed."""

from __future__ import annotations

from collections import UserDict, namedtuple
from typing import Any

import pytest
import torch
from torch import nn

from tdkit.calibration.batches import call_of, check_batches, digest_of, moved
from tdkit.errors import CalibrationError

X, Y, Z = torch.randn(4, 3), torch.arange(4), torch.ones(4)


def model(forward: Any) -> nn.Module:
    """A module with the given function for its forward."""
    return type("Net", (nn.Module,), {"forward": forward})()


one = model(lambda self, x: x)
two = model(lambda self, x, y: x)
option = model(lambda self, x, mask=None: x)
flag = model(lambda self, x, features=False: x)
labelled = model(lambda self, x, labels=None: x)
named = model(lambda self, pixel_values=None, labels=None: pixel_values)
loose = model(lambda self, input_ids=None, **kwargs: input_ids)
anything = model(lambda self, *args, **kwargs: args)


@pytest.mark.parametrize(
    ("net", "batch", "args", "kwargs", "labels", "passed"),
    [
        (one, X, (X,), {}, None, False),
        (one, (X,), (X,), {}, None, False),
        (one, (X, Y), (X,), {}, Y, False),
        (one, [X, Y], (X,), {}, Y, False),
        (two, (X, Z), (X, Z), {}, None, False),
        (two, (X, Z, Y), (X, Z), {}, Y, False),
        (option, (X,), (X,), {}, None, False),
        (option, (X, Z, Y), (X, Z), {}, Y, False),
        (flag, (X, Y), (X,), {}, Y, False),  # no tensor is a flag
        (labelled, (X, Y), (X, Y), {}, Y, True),
        (anything, (X, Y), (X, Y), {}, None, False),
        (one, {"x": X, "labels": Y}, (), {"x": X}, Y, False),
        (one, {"x": X, "target": Y}, (), {"x": X}, Y, False),
        (one, {"x": X, "label": None}, (), {"x": X}, None, False),
        (one, ({"x": X}, Y), (), {"x": X}, Y, False),
        (one, UserDict({"x": X, "labels": Y}), (), {"x": X}, Y, False),
        (named, {"pixel_values": X, "labels": Y}, (), {"pixel_values": X, "labels": Y}, Y, True),
        (loose, {"input_ids": X, "labels": Y}, (), {"input_ids": X}, Y, False),
        (anything, {"x": X, "labels": Y}, (), {"x": X, "labels": Y}, Y, True),
    ],
)
def test_a_batch_is_divided_by_the_signature(
    net: nn.Module, batch: Any, args: Any, kwargs: Any, labels: Any, passed: bool
) -> None:
    call = call_of(net, batch)
    assert len(call.args) == len(args)
    assert all(ours is theirs for ours, theirs in zip(call.args, args, strict=True))
    assert {key: id(value) for key, value in call.kwargs.items()} == {key: id(value) for key, value in kwargs.items()}
    assert call.labels is labels
    assert call.passed is passed
    assert call.examples == 4


@pytest.mark.parametrize(
    ("net", "batch", "message"),
    [
        (option, (X, Y), r"can be the labels or 'mask' of Net\.forward\(x, mask=None\): give dictionaries instead, "),
        (option, (X, Y), r"\{'x': \.\.\., 'labels': \.\.\.\} or \{'x': \.\.\., 'mask': \.\.\.\}"),
        (
            named,
            (X, X, X, X),
            r"a batch has 4 entries, which Net\.forward\(pixel_values=None, labels=None\) does",
        ),
        (two, (X,), r"a batch has 1 entry, which Net\.forward\(x, y\)"),
        (one, (), r"a batch has 0 entries"),
        (one, {"x": X, "text": "a"}, r"a batch has 'text', which Net\.forward\(x\) does not take: leave it out"),
        (named, {"pixel_value": X}, r"'pixel_value'; did you mean 'pixel_values'\?, which"),
        (one, {"x": X, "labels": Y, "target": Y}, r"a batch has 'labels' and 'target': keep one of them"),
    ],
)
def test_what_is_not_clear_is_refused(net: nn.Module, batch: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        call_of(net, batch)


def test_wrappers_show_the_signature_of_what_they_wrap() -> None:
    layer = nn.Sequential(nn.Linear(3, 3))
    for wrapper in (nn.DataParallel(layer), torch.compile(layer, backend="eager")):
        call = call_of(wrapper, (X, Y))
        assert len(call.args) == 1
        assert call.labels is Y


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_forward_without_a_signature_gets_everything() -> None:
    scripted = torch.jit.script(nn.Linear(3, 3))
    assert len(call_of(scripted, (X,)).args) == 1


def test_batches_are_moved_whole() -> None:
    pair = namedtuple("pair", "a b")
    device = torch.device("meta")
    found = moved({"x": [X, (Y,)], "p": pair(X, 1), "text": "a"}, device)
    assert found["x"][0].is_meta
    assert found["x"][1][0].is_meta
    assert found["p"].a.is_meta
    assert found["p"].b == 1
    assert found["text"] == "a"


@pytest.mark.parametrize(("batches", "what"), [(X, "one tensor"), ({"x": X}, "one mapping")])
def test_one_batch_is_not_taken_for_many(batches: Any, what: str) -> None:
    with pytest.raises(CalibrationError, match=rf"batches is {what}, not an iterable of batches: give \[batch\]"):
        check_batches(batches)


def test_only_integers_are_token_ids() -> None:
    ids = torch.zeros(2, 5, dtype=torch.long)
    assert call_of(one, ids).token_ids is ids
    assert call_of(one, X).token_ids is None
    assert call_of(loose, {"input_ids": ids}).token_ids is ids
    assert call_of(loose, {"input_ids": Y}).token_ids is None


def test_a_digest_is_of_all_values_of_all_batches() -> None:
    batches = [(torch.arange(4.0), torch.tensor([1, 2])), {"x": torch.ones(2), "scale": 3}]
    same = [(torch.arange(4.0), torch.tensor([1, 2])), {"x": torch.ones(2), "scale": 3}]
    assert digest_of(batches) == digest_of(iter(same))
    others = [
        batches[:1],
        [batches[0], {"x": torch.ones(2), "scale": 4}],
        [batches[0], {"x": torch.ones(2).double(), "scale": 3}],
        [batches[0], {"x": torch.ones(1, 2), "scale": 3}],
        [(torch.arange(4.0) + 1, torch.tensor([1, 2])), batches[1]],
    ]
    assert len({digest_of(batches), *(digest_of(each) for each in others)}) == 6
