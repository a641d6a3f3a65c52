"""The vocabulary of the synthetic questions: kinds, option pools and the :class:`Question`.

Notable choices:

- The options of a kind always come in the same order, so the letter of an answer is its place in
  the kind's pool. A small model learns this within minutes, while shuffled options (reading the
  option list to find the letter) stay at chance for thousands of steps. It makes every question a
  classification; the model card says so.
- Pools with more than four entries are shown in groups of four: the group that holds the answer.
- Which split a piece of content belongs to is decided by a hash of the content (text) or by the
  seed stream it is drawn from (media); see :data:`SPLITS`.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

LETTERS = "ABCD"

#: Seed stream of every split. Media of different splits never share a random generator.
SPLITS = {"train": 0, "dev": 1, "calibration": 2, "evaluation": 3}

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 230),
    "yellow": (235, 215, 50),
    "purple": (160, 60, 200),
    "white": (240, 240, 240),
    "orange": (245, 140, 30),
    "cyan": (60, 210, 220),
}
COLOR_NAMES = tuple(COLORS)
COUNTS = ("1", "2", "3", "4")

#: kind -> (question, option pool), for the kinds whose wording is constant
IMAGE_KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "color": ("What color is the shape?", COLOR_NAMES),
    "shape": ("Which shape is shown?", ("square", "cross", "ring", "triangle")),
    "size": ("How large is the disc?", ("tiny", "small", "large", "huge")),
    "count": ("How many discs are there?", COUNTS),
    "where": ("Where is the {color} disc?", ("left", "right", "top", "bottom")),
    "pattern": ("Which pattern is shown?", ("plain", "rows", "columns", "checks")),
}
SOUND_KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "kind": ("What kind of sound is it?", ("tone", "noise", "buzz", "clicks")),
    "loudness": ("How loud is the sound?", ("faint", "quiet", "loud", "blaring")),
    "when": ("When does the beep come?", ("first", "early", "late", "last")),
}
MUSIC_KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "pitch": ("How high is the note?", ("deep", "low", "high", "shrill")),
    "contour": ("How does the pitch move?", ("rising", "falling", "flat", "wavy")),
    "notes": ("How many notes are there?", COUNTS),
}
AUDIO_KINDS = {**SOUND_KINDS, **MUSIC_KINDS}
VIDEO_KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "starts": ("What color is the disc at first?", COLOR_NAMES),
    "becomes": ("What color does the disc become?", COLOR_NAMES),
    "change": ("How does the disc change?", ("growing", "shrinking", "blinking", "steady")),
    "direction": ("Which way does the disc move?", ("left", "right", "up", "down")),
    "light": ("How does the light change?", ("brighter", "darker", "flickering", "constant")),
}
TEXT_POOLS: dict[str, tuple[str, ...]] = {
    "category": ("animal", "plant", "metal", "food"),
    "season": ("spring", "summer", "autumn", "winter"),
    "state": ("freezing", "cool", "warm", "boiling"),
    "trend": ("rising", "falling", "flat", "mixed"),
    "order": ("red", "green", "blue", "yellow"),
}

KINDS: dict[str, tuple[str, ...]] = {
    "image": tuple(IMAGE_KINDS),
    "audio": tuple(AUDIO_KINDS),
    "video": tuple(VIDEO_KINDS),
    "text": tuple(TEXT_POOLS),
}


@dataclass(frozen=True)
class Question:
    """One multiple-choice question with four options, without its media."""

    kind: str
    text: str
    options: tuple[str, str, str, str]
    correct: int
    hint: str = ""

    @property
    def letter(self) -> str:
        """The letter of the correct option, ``"A"`` to ``"D"``."""
        return LETTERS[self.correct]

    @property
    def answer(self) -> str:
        """The word of the correct option."""
        return self.options[self.correct]


def ask(kind: str, text: str, pool: tuple[str, ...], answer: str, hint: str = "") -> Question:
    """A question whose options are the group of four of ``pool`` that holds ``answer``."""
    index = pool.index(answer)
    first = 4 * (index // 4)
    a, b, c, d = pool[first : first + 4]
    return Question(kind, text, (a, b, c, d), index - first, hint)


def choose(rng: np.random.Generator, pool: tuple[str, ...]) -> str:
    """One entry of ``pool``, uniformly."""
    return pool[int(rng.integers(len(pool)))]


def generator(split: str, modality: str, index: int) -> np.random.Generator:
    """The random generator of one item: the same item for the same arguments, always."""
    return np.random.default_rng([SPLITS[split], zlib.crc32(modality.encode()), index])


def content_split(key: object) -> str:
    """The split that a piece of text content belongs to, from a hash of the content itself."""
    bucket = zlib.crc32(repr(key).encode()) % 8
    return {0: "evaluation", 1: "dev", 2: "calibration"}.get(bucket, "train")
