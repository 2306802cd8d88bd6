"""Speech of many voices by eSpeak NG, which the package espeakng-loader carries, and its mel spectrograms."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from math import gcd

import numpy
import torch
from scipy.signal import resample_poly
from torch import Tensor

from tests.real import packages

RATE, FFT, HOP, MELS = 16000, 400, 160, 40  # Hz, samples, samples, bands
RETRIEVE, UTF8, VOICE_OK = 1, 1, 0  # of espeak-ng's speak_lib.h
RATE_PARAMETER, PITCH_PARAMETER = 1, 3


@functools.cache
def speaker() -> Speaker:
    """Returns the one eSpeak NG of this process; a second initialisation of the library does not return."""
    return Speaker()


class Speaker:
    """eSpeak NG's library."""

    def __init__(self) -> None:
        folder = packages.file("packages/espeakng_loader")
        self.library = ctypes.CDLL(str(folder / "libespeak-ng.so"))
        self.rate = self.library.espeak_Initialize(RETRIEVE, 0, str(folder).encode(), 0)
        self.heard: list[numpy.ndarray] = []
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self.callback = kind(self._hear)  # kept, as the library holds only its address
        self.library.espeak_SetSynthCallback(self.callback)

    def _hear(self, samples: object, count: int, events: object) -> int:
        if samples and count > 0:
            self.heard.append(numpy.ctypeslib.as_array(samples, (count,)).astype(numpy.float32) / 2**15)
        return 0

    def voices(self) -> list[str]:
        """Returns the names of the voice variants, each a speaker."""
        folder = packages.file("packages/espeakng_loader/espeak-ng-data/voices/!v")
        return sorted(path.name for path in folder.iterdir() if " " not in path.name)

    def say(self, text: str, voice: str, *, words_per_minute: int, pitch: int) -> Tensor:
        """Returns the sound (samples,) at 16 kHz of a text spoken by a voice variant; `pitch` is 0 to 99."""
        if self.library.espeak_SetVoiceByName(f"en+{voice}".encode()) != VOICE_OK:
            raise ValueError(f"eSpeak NG has no voice variant '{voice}'")
        self.library.espeak_SetParameter(RATE_PARAMETER, words_per_minute, 0)
        self.library.espeak_SetParameter(PITCH_PARAMETER, pitch, 0)
        self.heard.clear()
        said = text.encode()
        self.library.espeak_Synth(said, len(said) + 1, 0, 0, 0, UTF8, None, None)
        self.library.espeak_Synchronize()
        common = gcd(RATE, self.rate)
        sound = resample_poly(numpy.concatenate(self.heard), RATE // common, self.rate // common)
        return torch.from_numpy(sound.astype(numpy.float32))


def mel_spectrogram(sound: Tensor) -> Tensor:
    """Returns the mel power spectrogram (frames, 40) of a sound (samples,), as librosa computes it by default.

    Source: Slaney, Auditory Toolbox (1998), for the scale.
    """
    window = torch.hann_window(FFT)
    power = torch.stft(sound, FFT, HOP, window=window, pad_mode="constant", return_complex=True).abs().square()
    return (_filters() @ power).T


def _filters() -> Tensor:
    """The triangular filters (40, 201) of equal area."""
    linear, step = 1000 * 3 / 200, numpy.log(6.4) / 27
    top = linear + numpy.log(RATE / 2 / 1000) / step
    mels = numpy.linspace(0, top, MELS + 2)
    hertz = numpy.where(mels < linear, mels * 200 / 3, 1000 * numpy.exp(step * (mels - linear)))
    frequencies = numpy.linspace(0, RATE / 2, FFT // 2 + 1)
    ramps = hertz[:, None] - frequencies
    width = numpy.diff(hertz)[:, None]
    filters = numpy.maximum(0, numpy.minimum(-ramps[:-2] / width[:-1], ramps[2:] / width[1:]))
    return torch.from_numpy((filters * (2 / (hertz[2:] - hertz[:-2]))[:, None]).astype(numpy.float32))


def normalised(sound: Tensor, decibels: float = -30) -> Tensor:
    """Returns a sound that is as loud as the decibels say, relative to full scale."""
    return sound * 10 ** (decibels / 20) / sound.square().mean().sqrt()


def windows(sounds: Sequence[Tensor], frames: int) -> Tensor:
    """Returns spectrograms (n, frames, 40) of the beginnings of sounds.

    Raises:
        ValueError: when a sound is shorter.
    """
    short = [number for number, sound in enumerate(sounds) if len(sound) < HOP * frames]
    if short:
        raise ValueError(f"sound {short[0]} is shorter than {frames} frames of {HOP} samples: take a longer text")
    return torch.stack([mel_spectrogram(normalised(sound[: HOP * frames]))[:frames] for sound in sounds])
