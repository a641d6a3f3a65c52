"""Synthetic pictures: 64 x 64 RGB, a position-dependent background, coloured shapes, noise."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from morphoquant.embedded.questions import COLOR_NAMES, COLORS, IMAGE_KINDS, Question, ask, choose

SIZE = 64  # pixels
RADII = {"tiny": (4.0, 5.5), "small": (8.5, 10.5), "large": (14.0, 17.0), "huge": (22.0, 27.0)}
#: centres (x, y) of the places that "where" knows
PLACES = {"left": (12, 32), "right": (52, 32), "top": (32, 12), "bottom": (32, 52)}


def background(rng: np.random.Generator, size: int) -> NDArray[np.float32]:
    """A dark gradient, float32 ``[size, size, 3]``: red grows to the right, blue downwards.

    The gradient is a position cue: the vision tower only knows relative positions.
    """
    image = np.full((size, size, 3), rng.integers(0, 30), np.float32)
    ramp = np.linspace(0, 80, size, dtype=np.float32)
    image[..., 0] += ramp[None, :]
    image[..., 2] += ramp[:, None]
    return image


def shade(rng: np.random.Generator, color: str) -> NDArray[np.float64]:
    """The RGB value of ``color`` with a little variation."""
    return np.array(COLORS[color], np.float64) + rng.normal(0, 8, 3)


def add_noise(
    rng: np.random.Generator, pixels: NDArray[np.float32], sigma: float
) -> NDArray[np.uint8]:
    """Gaussian pixel noise, then uint8."""
    noise = rng.standard_normal(pixels.shape, dtype=np.float32) * sigma
    return np.clip(pixels + noise, 0, 255).astype(np.uint8)


def disc(size: int, x: float, y: float, radius: float) -> NDArray[np.bool_]:
    """Mask ``[size, size]`` of a disc."""
    rows, columns = np.mgrid[0:size, 0:size]
    return (columns - x) ** 2 + (rows - y) ** 2 <= radius * radius


def _shape_mask(name: str, x: float, y: float, r: float) -> NDArray[np.bool_]:
    rows, columns = np.mgrid[0:SIZE, 0:SIZE]
    dx, dy = np.abs(columns - x), np.abs(rows - y)
    if name == "square":
        return (dx <= 0.85 * r) & (dy <= 0.85 * r)
    if name == "cross":
        return ((dx <= 0.28 * r) & (dy <= r)) | ((dy <= 0.28 * r) & (dx <= r))
    if name == "ring":
        distance = np.hypot(dx, dy)
        return (distance <= r) & (distance >= 0.62 * r)
    if name == "triangle":  # apex at the top
        return (rows - y <= 0.9 * r) & (rows - y >= -r) & (2 * dx <= rows - y + r)
    raise ValueError(f"unknown shape {name!r}")


def _pattern_mask(rng: np.random.Generator, name: str) -> NDArray[np.bool_]:
    # Period 8 is the patch size: any phase is then the same small set of patch contents.
    phase_x, phase_y = rng.integers(0, 8, 2)
    rows, columns = np.mgrid[0:SIZE, 0:SIZE]
    across = ((columns + phase_x) // 4) % 2 == 0
    down = ((rows + phase_y) // 4) % 2 == 0
    masks = {
        "plain": np.zeros((SIZE, SIZE), bool),
        "rows": down,
        "columns": across,
        "checks": across == down,
    }
    return masks[name]


def draw(rng: np.random.Generator, kind: str) -> tuple[NDArray[np.uint8], list[Question]]:
    """A picture ``[64, 64, 3]`` about which ``kind`` can be asked, and all its questions.

    The question of the wanted kind comes first.
    """
    image = background(rng, SIZE)
    color = choose(rng, COLOR_NAMES)
    asked: dict[str, Question] = {}

    def put(name: str, answer: str, **words: str) -> None:
        text, pool = IMAGE_KINDS[name]
        asked[name] = ask(name, text.format(**words), pool, answer)

    if kind in ("shape", "color"):
        shape = choose(rng, IMAGE_KINDS["shape"][1])
        x, y = 32 + rng.uniform(-8, 8, 2)
        image[_shape_mask(shape, x, y, rng.uniform(18, 23))] = shade(rng, color)
        put("shape", shape)
        put("color", color)
    elif kind == "size":
        size = choose(rng, IMAGE_KINDS["size"][1])
        radius = rng.uniform(*RADII[size])
        x, y = 32 + rng.uniform(-1, 1, 2) * max(0.0, 29 - radius)
        image[disc(SIZE, x, y, radius)] = shade(rng, color)
        put("size", size)
    elif kind in ("count", "where"):
        count = int(rng.integers(1, 5))
        places = [list(PLACES)[i] for i in rng.permutation(4)[:count]]
        colors = [COLOR_NAMES[i] for i in rng.permutation(len(COLOR_NAMES))[:count]]
        for place, name in zip(places, colors, strict=True):
            x, y = PLACES[place] + rng.uniform(-2.5, 2.5, 2)
            image[disc(SIZE, x, y, rng.uniform(7.0, 9.5))] = shade(rng, name)
        target = int(rng.integers(count))
        put("count", str(count))
        put("where", places[target], color=colors[target])
    elif kind == "pattern":
        pattern = choose(rng, IMAGE_KINDS["pattern"][1])
        image[_pattern_mask(rng, pattern)] = shade(rng, color)
        put("pattern", pattern)
    else:
        raise ValueError(f"unknown picture kind {kind!r}")
    first = asked.pop(kind)
    return add_noise(rng, image, 6.0), [first, *asked.values()]
