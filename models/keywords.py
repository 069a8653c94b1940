"""The data of the keyword network: spoken-word-like spectra made here, as ten cepstral coefficients in 49 frames.

A word is a list of sounds; a sound is three formants or a band of noise. The formants of vowels are about the means for
men of G. E. Peterson and H. L. Barney, "Control Methods Used in a Study of the Vowels", J. Acoust. Soc. Am. 24 (1952);
the other sounds are rough. The frames are those of MLPerf Tiny's keyword spotting (C. Banbury et al. 2021): one second,
40 ms every 20 ms.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

FRAMES, COEFFICIENTS = 49, 10
TRAIN_SAMPLES, EVAL_SAMPLES, CALIB_SAMPLES = 4200, 600, 128
SCALE = 0.25
"""What one step of a stored code is worth."""

_BINS = np.arange(1, 257) * (8000 / 256)
_BANDS = 40
_PART = 400


class Sound(NamedTuple):
    """Formants in Hz, how long and loud it is, how much of it is voice, and the middle of its noise in Hz."""

    formants: tuple[float, float, float]
    length: float = 1.0
    level: float = 0.0
    voice: float = 1.0
    noise: float = 4000.0


_SOUNDS = {
    "i": Sound((270, 2290, 3010)),
    "I": Sound((390, 1990, 2550), 0.7),
    "e": Sound((530, 1840, 2480)),
    "a": Sound((730, 1090, 2440)),
    "A": Sound((640, 1190, 2390), 0.8),
    "o": Sound((570, 840, 2410), 1.2),
    "U": Sound((440, 1020, 2240), 0.6),
    "u": Sound((300, 870, 2240)),
    "E": Sound((660, 1720, 2410)),
    "j": Sound((260, 2200, 3000), 0.5, -3),
    "w": Sound((290, 700, 2200), 0.5, -3),
    "r": Sound((330, 1150, 1600), 0.6, -3),
    "l": Sound((360, 1200, 2600), 0.6, -4),
    "n": Sound((250, 1400, 2300), 0.7, -8),
    "m": Sound((250, 1000, 2200), 0.7, -8),
    "d": Sound((250, 1750, 2600), 0.35, -12, 0.6, 3500),
    "g": Sound((250, 2000, 2400), 0.35, -12, 0.6, 2000),
    "p": Sound((400, 900, 2300), 0.4, -20, 0.0, 1000),
    "t": Sound((400, 1750, 2600), 0.4, -14, 0.0, 4500),
    "k": Sound((400, 2000, 2400), 0.4, -16, 0.0, 2200),
    "f": Sound((400, 1100, 2300), 0.8, -18, 0.0, 6000),
    "s": Sound((400, 1750, 2600), 0.9, -10, 0.0, 6200),
}
_WORDS = ("", "jes", "nou", "Ap", "daUn", "left", "raIt", "an", "of", "stap", "gou")
CLASSES = (
    "silence",
    "yes",
    "no",
    "up",
    "down",
    "left",
    "right",
    "on",
    "off",
    "stop",
    "go",
    "other",
)


def samples() -> tuple[NDArray[np.int8], NDArray[np.int64]]:
    """All codes as [N, 49, 10] and their classes, the evaluation samples last."""
    rng = np.random.default_rng(0)
    total = TRAIN_SAMPLES + EVAL_SAMPLES
    labels = rng.integers(len(CLASSES), size=total)
    parts = [_codes(labels[i : i + _PART], rng) for i in range(0, total, _PART)]
    return np.concatenate(parts), labels


def _codes(labels: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int8]:
    """Cepstral coefficients of the power in 40 mel bands, as multiples of SCALE."""
    power = np.stack([_power(int(label), rng) for label in labels])
    bands = np.log(power @ _mel().T + 1e-6)
    angle = np.pi / _BANDS * np.outer(np.arange(COEFFICIENTS), np.arange(_BANDS) + 0.5)
    cepstrum = bands @ (np.cos(angle).T * np.sqrt(2 / _BANDS))
    return np.clip(np.rint(cepstrum / SCALE), -128, 127).astype(np.int8)


def _power(label: int, rng: np.random.Generator) -> Floats:
    """The short-time power spectrum [49, 256] of one sample: a word of one speaker, in noise."""
    tract, pitch = rng.uniform(0.85, 1.2), rng.uniform(80, 260)
    speed, level = rng.uniform(5.0, 9.0), rng.uniform(-6, 6)
    word = _other(rng) if label == len(CLASSES) - 1 else _WORDS[label]
    sounds = [_SOUNDS[s] for s in word]
    lengths = [s.length * speed * rng.uniform(0.75, 1.3) for s in sounds]
    start = rng.uniform(2, max(FRAMES - 2 - sum(lengths), 3))
    ends = start + np.cumsum([0.0, *lengths])
    clean = np.zeros((FRAMES, len(_BINS)))
    at = np.arange(FRAMES)[:, None]
    for sound, begin, end in zip(sounds, ends, ends[1:], strict=False):
        # Sounds fade into each other over about three frames.
        weight = 1 / (1 + np.exp(-2 * (at - begin))) / (1 + np.exp(2 * (at - end)))
        clean += weight * _spectrum(sound, tract, pitch, rng) * 10 ** (level / 10)
    tilt = rng.uniform(-1.5, 0.5)
    floor = (_BINS / 500) ** tilt * 10 ** (rng.uniform(-45, -8) / 10)
    # The power of noise in one frame is spread like an exponential variable.
    return (clean + floor) * (0.3 + 0.7 * rng.exponential(size=clean.shape))


def _spectrum(sound: Sound, tract: float, pitch: float, rng: np.random.Generator) -> Floats:
    """Harmonics through three resonances, and a band of noise."""
    voiced = (1 + np.cos(2 * np.pi * _BINS / pitch)) / (1 + (_BINS / 500) ** 2)
    for i, formant in enumerate(sound.formants):
        centre = formant * tract * rng.normal(1, 0.05)
        width = 60 + 40 * i + 0.03 * formant
        voiced = voiced * (0.02 + 1 / (1 + ((_BINS - centre) / width) ** 2))
    hiss = np.exp(-(((_BINS - sound.noise * rng.normal(1, 0.06)) / 1500) ** 2))
    parts = sound.voice * voiced / voiced.sum() + (1 - sound.voice) * hiss / hiss.sum()
    return parts * len(_BINS) * 10 ** (sound.level / 10)


def _other(rng: np.random.Generator) -> str:
    """Two to five sounds at random that are none of the words."""
    while True:
        word = "".join(rng.choice(list(_SOUNDS), size=int(rng.integers(2, 6))))
        if word not in _WORDS:
            return word


def _mel() -> Floats:
    """Triangles evenly spaced on the mel scale from 20 to 7600 Hz, [40, 256]."""
    low, high = (2595 * np.log10(1 + f / 700) for f in (20.0, 7600.0))
    edges = 700 * (10 ** (np.linspace(low, high, _BANDS + 2) / 2595) - 1)
    left, top, right = (edges[i : i + _BANDS, None] for i in range(3))
    rise, fall = (_BINS - left) / (top - left), (right - _BINS) / (right - top)
    return np.maximum(0.0, np.minimum(rise, fall))
