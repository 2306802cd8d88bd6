"""Text that a model generates to calibrate on, and the weights of batches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tdkit
from tdkit import Calibration, Policy, Rule
from tdkit.calibration.batches import Weighted, digest_of, unweighted
from tdkit.calibration.measure import recalibrate
from tdkit.calibration.self_generated import SHARE, self_generated
from tdkit.errors import CalibrationError, SourceError
from tdkit.models.sites import survey
from tests.conftest import make_gpt2, make_llama


def close(a: Calibration, b: Calibration) -> bool:
    """Whether two calibrations have the same moments and numbers of rows."""
    pairs = [(a.metric(name), b.metric(name)) for name in a.names]
    same = [
        torch.allclose(x.input, y.input, rtol=1e-4, atol=1e-7) and torch.allclose(x.output, y.output, rtol=1e-4)
        for x, y in pairs
        if x and y and x.input is not None and y.input is not None and x.output is not None and y.output is not None
    ]
    rows = all(a.rows[name] == pytest.approx(b.rows[name]) for name in a.names)
    return a.names == b.names and len(same) == len(pairs) and all(same) and rows and a.units == b.units


def test_a_weight_counts_a_batch_that_often(tiny: nn.Module, batches: list[Tensor]) -> None:
    one, other = batches
    often = tdkit.calibrate(tiny, [one, other, other, other])
    assert close(tdkit.calibrate(tiny, [one, Weighted(other, 3)]), often)
    assert not close(tdkit.calibrate(tiny, [one, other]), often)


def test_a_weight_counts_where_only_gradients_of_weights_are_seen() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(4, 5))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.table).square().sum()

    torch.manual_seed(0)
    model, xs = Bare(), torch.randn(2, 3, 4)
    options = {"loss": lambda output, _: output}
    weighted = tdkit.calibrate(model, [xs[0], Weighted(xs[1], 2)], **options)
    assert close(weighted, tdkit.calibrate(model, [xs[0], xs[1], xs[1]], **options))


def test_weights_stay_in_a_second_measurement_and_in_a_folder(
    tiny: nn.Module, batches: list[Tensor], tmp_path: Path
) -> None:
    one, other = batches
    known = tdkit.calibrate(tiny, [one, Weighted(other, 0.25)])
    loaded = Calibration.load(known.save(tmp_path / "moments"))
    assert loaded.batches is not None
    assert [unweighted(batch)[1] for batch in loaded.batches] == [1.0, 0.25]
    assert close(recalibrate(tiny, survey(tiny).sites, loaded), known)  # the mean of equal moments

    description = tmp_path / "moments" / "calibration.json"
    form = json.loads(description.read_text())
    for wrong in ([1.0], [1.0, 0.0], [1.0, "2"], 3):
        description.write_text(json.dumps(form | {"weights": wrong}))
        with pytest.raises(CalibrationError, match="weight"):
            Calibration.load(tmp_path / "moments")


@pytest.mark.parametrize("weight", [0, -1.0, float("inf"), float("nan"), "2"])
def test_a_weight_that_is_no_positive_number_is_refused(weight: object) -> None:
    with pytest.raises(CalibrationError, match="give a positive number"):
        Weighted(torch.zeros(1), weight)  # type: ignore[arg-type]


def test_a_weight_changes_the_digest(batches: list[Tensor]) -> None:
    long = torch.arange(9000)
    given = [
        batches,
        [Weighted(batches[0], 0.5), batches[1]],
        [Weighted(batches[0], 0.25), batches[1]],
        [Weighted(long, 0.5)],
        [Weighted(long + (long == 4000), 0.5)],
    ]
    assert len({digest_of(each) for each in given} | {digest_of([each]) for each in given}) == 5


@pytest.mark.parametrize("make", [make_gpt2, make_llama])
def test_windows_are_whole_and_the_same_for_a_seed(make: object) -> None:
    model = make()  # type: ignore[operator]
    model.train()
    state = torch.get_rng_state()
    ids = self_generated(model, 70, context=16)
    assert ids.shape == (4, 16)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, self_generated(model, 70, context=16))
    assert not torch.equal(ids, self_generated(model, 70, context=16, seed=1))
    assert model.training
    assert torch.equal(state, torch.get_rng_state())


def test_tokens_are_drawn_from_the_softmax_whatever_the_generation_config_says(tiny: nn.Module) -> None:
    plain = self_generated(tiny, 256, context=16)
    assert len(plain.unique()) > tiny.config.vocab_size // 4
    own = tiny.generation_config
    changed = {"temperature": 0.01, "top_k": 1, "top_p": 0.1, "repetition_penalty": 9.0, "max_length": 3}
    own.update(**changed, eos_token_id=list(range(tiny.config.vocab_size)), suppress_tokens=[1, 2, 3])
    assert torch.equal(plain, self_generated(tiny, 256, context=16))
    assert tiny.generation_config is own
    logits = tiny(plain).logits[:, :-1].log_softmax(-1)
    drawn = logits.gather(-1, plain[:, 1:, None]).squeeze(-1)
    expected = (logits.exp() * logits).sum(-1)
    error = (drawn - expected).std() / drawn.numel() ** 0.5
    assert abs((drawn - expected).mean()) < 4 * error  # the mean log-probability of tokens drawn from the softmax


def test_calibrate_adds_them_with_a_tenth_of_the_weight(tiny: nn.Module, batches: list[Tensor]) -> None:
    known = tdkit.calibrate(tiny, batches, self_generated=48, context=16)
    ids = self_generated(tiny, 48, context=16)
    weight = SHARE / (1 - SHARE) * sum(batch.numel() for batch in batches) / 48
    assert close(known, tdkit.calibrate(tiny, [*batches, *(Weighted(row[None], weight) for row in ids)]))
    assert known.batches is not None
    weights = [unweighted(batch)[1] * unweighted(batch)[0].numel() for batch in known.batches]
    assert sum(weights[len(batches) :]) / sum(weights) == pytest.approx(SHARE)
    policy = Policy([Rule("*", tdkit.LowRank(), budget=0.9)])
    tdkit.compress(tiny, policy, calibration=known, passes=2)  # measures again with the same weights


@pytest.mark.parametrize("count", [-1])
def test_a_number_of_tokens_below_one_is_refused(tiny: nn.Module, batches: list[Tensor], count: int) -> None:
    with pytest.raises(CalibrationError, match="self_generated=-1"):
        tdkit.calibrate(tiny, batches, self_generated=count)


def test_one_tensor_is_no_list_of_batches(tiny: nn.Module, batches: list[Tensor]) -> None:
    with pytest.raises(CalibrationError, match=r"give \[batch\]"):
        tdkit.calibrate(tiny, batches[0], self_generated=48, context=16)


def test_models_that_do_not_generate_are_refused(tiny: nn.Module) -> None:
    with pytest.raises(CalibrationError, match="Linear is none"):
        self_generated(nn.Linear(2, 2), 16)
    with pytest.raises(SourceError, match="positions"):
        self_generated(tiny, 4096, context=4096)
    tiny.config.bos_token_id = tiny.config.eos_token_id = None
    with pytest.raises(CalibrationError, match="no bos_token_id"):
        self_generated(tiny, 16, context=8)


@pytest.fixture
def tiny() -> nn.Module:
    return make_gpt2()


@pytest.fixture
def batches(tiny: nn.Module) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, tiny.config.vocab_size, (2, 12), generator=generator) for _ in range(2)]
