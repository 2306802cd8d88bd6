"""RNet, the second network of the face detector MTCNN, on scikit-image's faces and other cuttings."""

from __future__ import annotations

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.real import packages
from tests.real.task import Task, percent

SHIFTS = ((0, 0), (0, 2), (2, 0), (2, 2), (1, 1))  # of the 24 x 24 windows of a 26 x 26 image


class RNet(nn.Module):
    """RNet of facenet-pytorch up to the two logits (no face, face); its regression of boxes is left out.

    Source: Zhang et al., Joint Face Detection and Alignment Using Multitask Cascaded Convolutional Networks (2016).
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 28, 3)
        self.prelu1 = nn.PReLU(28)
        self.pool1 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv2 = nn.Conv2d(28, 48, 3)
        self.prelu2 = nn.PReLU(48)
        self.pool2 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv3 = nn.Conv2d(48, 64, 2)
        self.prelu3 = nn.PReLU(64)
        self.dense4 = nn.Linear(576, 128)
        self.prelu4 = nn.PReLU(128)
        self.dense5_1 = nn.Linear(128, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.prelu1(self.conv1(x)))
        x = self.pool2(self.prelu2(self.conv2(x)))
        x = self.prelu3(self.conv3(x)).permute(0, 3, 2, 1).flatten(1)
        logits: Tensor = self.dense5_1(self.prelu4(self.dense4(x)))
        return logits


def rnet() -> Task:
    model = RNet().eval()
    weights = torch.load(packages.file("packages/facenet_pytorch/data/rnet.pt"), map_location="cpu", weights_only=True)
    model.load_state_dict({name: tensor for name, tensor in weights.items() if not name.startswith("dense5_2")})
    grey = torch.from_numpy(numpy.load(packages.file("packages/skimage/data/lfw_subset.npy"))).float()
    labels = torch.arange(200) < 100  # the first half are faces
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    train, test = windows(grey[order[:100]]), windows(grey[order[100:]])
    answers = labels[order[100:]].long().repeat_interleave(2 * len(SHIFTS))
    return Task(
        name="RNet",
        what="face or not, on scikit-image's lfw_subset; 100 images to calibrate and train on, 100 others to test, "
        f"each in {2 * len(SHIFTS)} windows (shifted, mirrored)",
        metric="accuracy",
        model=model,
        train={"x": train},
        test=(test,),
        judge=lambda logits: percent(logits.argmax(-1) == answers),
        distillation={"logits": {"temperature": 2.0}},
    )


def windows(grey: Tensor) -> Tensor:
    """Returns windows (10 n, 3, 24, 24) of grey images (n, 25, 25) in [0, 1], in the range of the network's inputs."""
    images = F.interpolate(grey[:, None], size=(26, 26), mode="bilinear", align_corners=False)
    cut = [images[..., y : y + 24, x : x + 24] for y, x in SHIFTS]
    every = torch.stack([*cut, *(window.flip(-1) for window in cut)], 1).flatten(0, 1)
    return ((every * 255 - 127.5) * 0.0078125).expand(-1, 3, -1, -1).contiguous()
