"""Resemblyzer's speaker encoder: whether two utterances are of one voice."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tdkit.sources.texts import load_texts
from tests.real import packages, speech
from tests.real.speech import Speaker
from tests.real.task import Task

FRAMES, UTTERANCES = 160, 5  # frames of 10 ms, utterances of each voice
LEFT_OUT = ("whisper", "whisperf")  # voices without a pitch


class VoiceEncoder(nn.Module):
    """Unit embeddings (n, 256) of mel spectrograms (n, frames, 40).

    Source: Wan et al., Generalized End-to-End Loss for Speaker Verification (2018).
    """

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(40, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)

    def forward(self, mels: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(mels)
        return F.normalize(F.relu(self.linear(hidden[-1])), dim=1)


def speaker() -> Task:
    model = VoiceEncoder().eval()
    saved = torch.load(packages.file("packages/resemblyzer/pretrained.pt"), map_location="cpu", weights_only=True)
    wanted = model.state_dict()
    model.load_state_dict({name: tensor for name, tensor in saved["model_state"].items() if name in wanted})
    espeak, texts = speech.speaker(), sentences()
    voices = [name for name in espeak.voices() if name not in LEFT_OUT]
    order = torch.randperm(len(voices), generator=torch.Generator().manual_seed(0)).tolist()
    half = len(voices) // 2
    train, _ = utterances(espeak, [voices[i] for i in order[:half]], texts[: len(texts) // 2], seed=0)
    test, test_voices = utterances(espeak, [voices[i] for i in order[half:]], texts[len(texts) // 2 :], seed=1)
    return Task(
        name="Resemblyzer",
        what=f"whether two utterances are of one voice, of eSpeak NG's voices; {half} voices to calibrate and train "
        f"on, {len(voices) - half} others with other sentences to test, {UTTERANCES} utterances of 1.6 s each",
        metric="100 - equal error rate",
        model=model,
        train={"mels": train},
        test=(test,),
        judge=lambda embedded: 100 - equal_error_rate(embedded, test_voices),
        distillation={"logits": {"kind": "mse"}},
        calibration_batch=2,
        steps=50,
        lr=1e-4,  # 1e-3 raises the training loss
    )


def sentences() -> list[str]:
    """Returns beginnings of sentences, eight words that take longer than 1.6 s to say."""
    found = " ".join(load_texts("sotu:evaluation")).replace("\n", " ").split(". ")
    beginnings = [" ".join(sentence.split()[:8]) for sentence in found]
    return [text for text in beginnings if len(text) > 45]


def utterances(espeak: Speaker, voices: list[str], texts: list[str], *, seed: int) -> tuple[Tensor, Tensor]:
    """Returns spectrograms (n, 160, 40) of sentences and the number (n,) of the voice that says each."""
    generator = torch.Generator().manual_seed(seed)
    sounds, numbers = [], []
    for number, voice in enumerate(voices):
        for _ in range(UTTERANCES):
            chosen, speed, pitch = torch.rand(3, generator=generator).tolist()
            text = texts[int(chosen * len(texts))]
            sounds.append(espeak.say(text, voice, words_per_minute=150 + int(50 * speed), pitch=40 + int(20 * pitch)))
            numbers.append(number)
    return speech.windows(sounds, FRAMES), torch.tensor(numbers)


def equal_error_rate(embedded: Tensor, voices: Tensor) -> float:
    """Returns the percentage at which as many pairs of one voice are refused as pairs of two voices are accepted."""
    pairs = torch.triu_indices(len(embedded), len(embedded), 1)
    same = voices[pairs[0]] == voices[pairs[1]]
    same = same[(embedded @ embedded.T)[pairs[0], pairs[1]].argsort()]  # from the least to the most alike
    none = torch.zeros(1, dtype=torch.float64)
    refused = torch.cat([none, same.double().cumsum(0) / same.sum()])
    accepted = torch.cat([none, (~same).double().cumsum(0) / (~same).sum()]).neg() + 1
    gap = refused - accepted
    after = int((gap >= 0).nonzero()[0])
    share = float(gap[after - 1] / (gap[after - 1] - gap[after]))  # where a line between both points crosses zero
    return 100 * float(refused[after - 1].lerp(refused[after], share))
