"""Synthetic video clips: 8 frames of 48 x 48 RGB at 2 frames per second, and their mp4 files."""

from __future__ import annotations

import io
from fractions import Fraction
from typing import BinaryIO

import av
import numpy as np
from numpy.typing import NDArray

from morphoquant.embedded.pictures import add_noise, background, disc, shade
from morphoquant.embedded.questions import COLOR_NAMES, VIDEO_KINDS, Question, ask, choose

SIZE = 48  # pixels
FRAMES = 8
FPS = 2


def draw(rng: np.random.Generator, kind: str) -> tuple[NDArray[np.uint8], list[Question]]:
    """A clip ``[8, 48, 48, 3]`` about which ``kind`` can be asked, and all its questions.

    The question of the wanted kind comes first.
    """
    asked: dict[str, Question] = {}

    def put(name: str, answer: str) -> None:
        text, pool = VIDEO_KINDS[name]
        asked[name] = ask(name, text, pool, answer)

    time = np.arange(FRAMES)
    first = last = choose(rng, COLOR_NAMES)
    x = np.full(FRAMES, rng.uniform(15, 33))
    y = np.full(FRAMES, rng.uniform(15, 33))
    radius = np.full(FRAMES, rng.uniform(6, 8))
    light = np.zeros(FRAMES)
    visible = np.ones(FRAMES, bool)
    put("starts", first)
    if kind in ("direction", "becomes", "starts"):
        last = choose(rng, COLOR_NAMES)
        direction = choose(rng, VIDEO_KINDS["direction"][1])
        path = rng.uniform(7, 13) + rng.uniform(3.6, 4.0) * time
        if direction in ("left", "right"):
            x = path if direction == "right" else SIZE - path
        else:
            y = path if direction == "down" else SIZE - path
        put("direction", direction)
        put("becomes", last)
    elif kind == "change":
        change = choose(rng, VIDEO_KINDS["change"][1])
        x[:], y[:] = rng.uniform(17, 31, 2)
        if change == "growing":
            radius = np.linspace(4, 13, FRAMES)
        elif change == "shrinking":
            radius = np.linspace(13, 4, FRAMES)
        elif change == "blinking":
            visible = (time // 2 + rng.integers(2)) % 2 == 0
            asked.clear()  # the first frames may be empty
        put("change", change)
    elif kind == "light":
        name = choose(rng, VIDEO_KINDS["light"][1])
        ramp = np.linspace(0, 110, FRAMES)
        flicker = 100.0 * ((time // 2 + rng.integers(2)) % 2)
        light = {
            "brighter": ramp,
            "darker": ramp[::-1],
            "flickering": flicker,
            "constant": np.full(FRAMES, rng.uniform(0, 110)),
        }[name]
        put("light", name)
    else:
        raise ValueError(f"unknown clip kind {kind!r}")

    frames = np.repeat(background(rng, SIZE)[None], FRAMES, 0)
    before, after = shade(rng, first), shade(rng, last)
    for i in range(FRAMES):
        frames[i] += light[i]
        if visible[i]:
            color = before if i < FRAMES // 2 else after
            frames[i][disc(SIZE, x[i], y[i], radius[i])] = color
    wanted = asked.pop(kind)
    return add_noise(rng, frames, 4.0), [wanted, *asked.values()]


def to_mp4(frames: NDArray[np.uint8]) -> bytes:
    """An H.264 mp4 file (yuv420p, high quality) of frames ``[T, H, W, 3]`` at 2 per second."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(FPS))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # One thread and a constant quantizer: with x264's look-ahead rate control the bytes of
        # some clips differ from one call to the next, and the same seed must give the same file.
        stream.codec_context.thread_count = 1
        stream.options = {"qp": "10", "preset": "veryfast"}
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            for packet in stream.encode(picture):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return buffer.getvalue()


def from_mp4(file: str | bytes | BinaryIO) -> NDArray[np.uint8]:
    """All frames of an mp4 file (path, bytes or open file) as uint8 ``[T, H, W, 3]``."""
    source = io.BytesIO(file) if isinstance(file, bytes) else file
    with av.open(source) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
