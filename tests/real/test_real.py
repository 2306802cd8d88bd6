"""Real models of every kind: their weights load, and calibrated compression keeps what they compute."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import tdkit
from tdkit import LowRank, Policy, Rule
from tdkit.errors import MissingDependencyError
from tdkit.models.sites import num_params
from tests.real import packages
from tests.real.crepe import crepe
from tests.real.digits import digits
from tests.real.efficientnet import efficientnet
from tests.real.minilm import minilm
from tests.real.ocr import ocr
from tests.real.rnet import rnet
from tests.real.speaker import equal_error_rate, speaker
from tests.real.speech import mel_spectrogram
from tests.real.task import Task, multiply_adds, outputs, signed_outputs

pytestmark = pytest.mark.real
SHOWN, CALIBRATED_ON = 40, 60  # rows of the test, rows of the calibration

QUICK = [rnet, digits, speaker]
LONGER = [crepe, ocr, minilm, efficientnet]  # over ten seconds each
TOO_FEW = pytest.mark.xfail(strict=True, reason="few pictures: the moments of 1,280 features are of too few images")
MARKS = {efficientnet: (pytest.mark.slow, TOO_FEW)}


@pytest.fixture(autouse=True)
def _packages_are_there() -> None:
    try:
        for folder in (*packages.PACKAGES, "mails"):
            packages.file(folder)
    except MissingDependencyError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    "make",
    [*QUICK, *(pytest.param(make, marks=MARKS.get(make, pytest.mark.slow)) for make in LONGER)],
    ids=lambda make: make.__name__,
)
def test_calibration_keeps_the_outputs_of_a_real_model(make: Callable[[], Task]) -> None:
    task = make()
    shown = tuple(column[:SHOWN] for column in task.test)
    exact = outputs(task.model, *shown)
    batches = task.batches()[: -(-CALIBRATED_ON // task.calibration_batch)]
    calibration = tdkit.calibrate(task.model, batches, loss=signed_outputs())
    policy = Policy([Rule("*", LowRank())], budget=0.6)

    def error_of(given: tdkit.Calibration | None) -> float:
        model = tdkit.compress(copy.deepcopy(task.model), policy, calibration=given)
        assert num_params(model) <= 0.6 * num_params(task.model)
        return float((outputs(model, *shown) - exact).norm() / exact.norm())

    assert error_of(calibration) < 0.9 * error_of(None)


@pytest.mark.parametrize(
    ("make", "least"),
    [(rnet, 99.0), (digits, 85.0), pytest.param(crepe, 99.0, marks=pytest.mark.slow)],
    ids=["rnet", "digits", "crepe"],
)
def test_the_dense_model_solves_its_task(make: Callable[[], Task], least: float) -> None:
    task = make()
    assert task.score(task.model) >= least
    flat = copy.deepcopy(task.model)
    with torch.no_grad():
        for parameter in flat.parameters():
            parameter.zero_()
    assert task.score(flat) < 60


def test_multiply_adds_of_an_lstm_are_counted() -> None:
    lstm = nn.LSTM(40, 256, 3, batch_first=True)
    assert multiply_adds(lstm, (torch.zeros(1, 10, 40),)) == 10 * 4 * 256 * (40 + 5 * 256)


def test_equal_error_rate_of_known_pairs() -> None:
    embedded = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [0.8, 0.6]])
    assert equal_error_rate(embedded, torch.tensor([0, 1, 1, 0])) == pytest.approx(25.0)
    assert equal_error_rate(torch.eye(2).repeat_interleave(2, 0), torch.tensor([0, 0, 1, 1])) == 0


def test_a_tone_is_in_the_band_of_its_pitch() -> None:
    time = torch.arange(16000) / 16000
    loudest = mel_spectrogram((2 * torch.pi * 440 * time).sin())[10:-10].mean(0).argmax()
    assert int(loudest) == 5  # bands are 79.8 Hz apart below 1 kHz, the first is centred at 79.8 Hz
