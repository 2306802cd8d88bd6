"""The digit network of digit-recognizer-py on scikit-learn's handwritten digits."""

from __future__ import annotations

import csv
import gzip

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.real import packages
from tests.real.task import Task, percent

TRAIN = 797
MEAN, DEVIATION = 0.1307, 0.3081  # of the pixels that the network was trained on


def digits() -> Task:
    model = packages.module("packages/digit_recognizer/model.py", "tdkit_digit_model").CNN().eval()
    weights = packages.file("packages/digit_recognizer/models/handwriting_model.pth")
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    images, labels = read()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:TRAIN], order[TRAIN:]
    return Task(
        name="digit network",
        what=f"digits of scikit-learn, enlarged to 20 x 20 of 28 x 28 pixels as MNIST's are; "
        f"{len(train)} to calibrate and train on, {len(test)} to test",
        metric="accuracy",
        model=model,
        train={"x": images[train]},
        test=(images[test],),
        judge=lambda logits: percent(logits.argmax(-1) == labels[test]),
        distillation={"logits": {"temperature": 2.0}},
    )


def read() -> tuple[Tensor, Tensor]:
    """Returns the images (1797, 1, 28, 28), as the network wants them, and their digits (1797,)."""
    with gzip.open(packages.file("packages/sklearn/datasets/data/digits.csv.gz"), "rt") as rows:
        table = torch.tensor([[float(entry) for entry in row] for row in csv.reader(rows)])
    small = table[:, :-1].view(-1, 1, 8, 8) / 16
    images = F.pad(F.interpolate(small, size=(20, 20), mode="bicubic", align_corners=False).clamp(0, 1), (4, 4, 4, 4))
    return (images - MEAN) / DEVIATION, table[:, -1].long()
