"""Synthetic sounds: 1.28 s of 16 kHz mono PCM16."""

from __future__ import annotations

import io
import wave

import numpy as np
from numpy.typing import NDArray

from morphoquant.embedded.questions import AUDIO_KINDS, Question, ask, choose

RATE = 16000  # samples per second
SECONDS = 1.28
LENGTH = round(RATE * SECONDS)  # samples
PITCHES = {"deep": (130, 230), "low": (430, 700), "high": (1300, 2000), "shrill": (3400, 5200)}
LOUDNESS = {"faint": (0.010, 0.016), "quiet": (0.04, 0.065), "loud": (0.16, 0.26),
            "blaring": (0.65, 0.95)}  # fmt: skip
_TIME = np.arange(LENGTH, dtype=np.float64) / RATE  # seconds


def _burst(rng: np.random.Generator, frequency: float) -> NDArray[np.float64]:
    """A short tone of ``frequency`` Hz with soft edges."""
    length = int(RATE * rng.uniform(0.10, 0.16))
    tone = np.sin(2 * np.pi * frequency * _TIME[:length])
    edge = 400
    tone[:edge] *= np.linspace(0, 1, edge)
    tone[-edge:] *= np.linspace(1, 0, edge)
    return tone


def _bursts(rng: np.random.Generator, slots: list[int], frequency: float) -> NDArray[np.float64]:
    """Short tones in some of the four quarters of the clip, with a random start in each."""
    sound = np.zeros(LENGTH)
    quarter = LENGTH // 4
    for slot in slots:
        tone = _burst(rng, frequency)
        start = slot * quarter + int(rng.integers(0, quarter - len(tone) - 800))
        sound[start : start + len(tone)] = tone
    return sound


def _contour(rng: np.random.Generator, name: str) -> NDArray[np.float64]:
    base = rng.uniform(500, 1200)
    factor = rng.uniform(1.8, 3.0)
    frequency = {
        "rising": np.linspace(base / factor, base * factor, LENGTH),
        "falling": np.linspace(base * factor, base / factor, LENGTH),
        "flat": np.full(LENGTH, base),
        "wavy": base * (1 + 0.35 * np.sin(2 * np.pi * rng.uniform(3, 5) * _TIME)),
    }[name]
    return np.sin(2 * np.pi * np.cumsum(frequency) / RATE)


def _kind(rng: np.random.Generator, name: str) -> NDArray[np.float64]:
    frequency = rng.uniform(200, 900)
    if name == "tone":
        return np.sin(2 * np.pi * frequency * _TIME)
    if name == "noise":
        return np.clip(rng.standard_normal(LENGTH) * 0.4, -1, 1)
    if name == "buzz":
        return np.sign(np.sin(np.pi * frequency * _TIME)) * 0.7
    clicks = np.zeros(LENGTH)
    period = int(RATE * rng.uniform(0.03, 0.09))
    for start in range(int(rng.integers(period)), LENGTH - 40, period):
        clicks[start : start + 40] = np.clip(rng.standard_normal(40) * 0.6, -1, 1)
    return clicks


def draw(rng: np.random.Generator, kind: str) -> tuple[NDArray[np.int16], list[Question]]:
    """A sound, int16 ``[20480]``, about which ``kind`` can be asked, and all its questions.

    The question of the wanted kind comes first.
    """
    asked: dict[str, Question] = {}

    def put(name: str, answer: str) -> None:
        text, pool = AUDIO_KINDS[name]
        asked[name] = ask(name, text, pool, answer)

    amplitude = rng.uniform(0.2, 0.6)
    pitch = choose(rng, tuple(PITCHES))
    frequency = rng.uniform(*PITCHES[pitch])
    if kind == "pitch":
        sound = np.sin(2 * np.pi * frequency * _TIME)
        put("pitch", pitch)
    elif kind == "contour":
        contour = choose(rng, AUDIO_KINDS["contour"][1])
        sound = _contour(rng, contour)
        put("contour", contour)
    elif kind == "notes":
        count = int(rng.integers(1, 5))
        slots = sorted(int(slot) for slot in rng.permutation(4)[:count])
        sound = _bursts(rng, slots, frequency)
        put("notes", str(count))
        put("pitch", pitch)
    elif kind == "when":
        slot = int(rng.integers(4))
        sound = _bursts(rng, [slot], frequency)
        put("when", AUDIO_KINDS["when"][1][slot])
    elif kind == "kind":
        name = choose(rng, AUDIO_KINDS["kind"][1])
        sound = _kind(rng, name)
        put("kind", name)
    elif kind == "loudness":
        loudness = choose(rng, tuple(LOUDNESS))
        amplitude = rng.uniform(*LOUDNESS[loudness])
        sound = np.sin(2 * np.pi * frequency * _TIME)
        put("loudness", loudness)
    else:
        raise ValueError(f"unknown sound kind {kind!r}")
    first = asked.pop(kind)
    signal = amplitude * sound + 0.003 * rng.standard_normal(LENGTH)
    pcm = np.round(np.clip(signal, -1, 1) * 32767).astype(np.int16)
    return pcm, [first, *asked.values()]


def to_wav(pcm: NDArray[np.int16]) -> bytes:
    """A mono 16 kHz WAV file with these samples."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(pcm.astype("<i2").tobytes())
    return buffer.getvalue()


def to_float(pcm: NDArray[np.int16]) -> NDArray[np.float32]:
    """PCM16 to float32 in [-1, 1), as an audio file reader gives it."""
    return pcm.astype(np.float32) / 32768.0
