"""Media decoding: clips with PyAV, pictures to RGB, sound checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from morphoquant.errors import HarnessError

SAMPLE_RATE = 16_000


class MediaError(HarnessError, ValueError):
    """A picture, clip or sound that cannot be decoded; the message names it."""


@dataclass(frozen=True)
class Clip:
    """Frames taken from a video: ``frames`` uint8 [frames, 3, height, width]; ``fps`` is the rate
    of the *taken* frames, which sets the temporal positions of the video tokens."""

    frames: torch.Tensor
    fps: float


def frame_indices(total: int, source_fps: float, fps: float, max_frames: int) -> np.ndarray:
    """Indices of the frames to take: ``fps`` per second, at most ``max_frames``, evenly spread.

    The count is even wherever the clip has two frames or more, because the vision tower merges
    frames in pairs.
    """
    wanted = min(max(round(total / source_fps * fps), 2), max_frames, total)
    if wanted > 1:
        wanted -= wanted % 2
    return np.linspace(0, total - 1, wanted).round().astype(int)


def read_clip(path: str | Path, fps: float, max_frames: int) -> Clip:
    """Decode a video file and take its frames evenly.

    Two passes over the packets: the first counts frames (container headers are often wrong), the
    second converts only those that are kept, so a long clip never sits in memory whole.

    Raises:
        MediaError: the file is missing, has no video stream or does not decode.
    """
    import av

    def frames() -> Any:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise MediaError(f"{path}: no video stream in this file")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            yield from container.decode(stream)

    if not Path(path).is_file():
        raise MediaError(f"{path}: video file not found")
    try:
        with av.open(str(path)) as container:
            rate = container.streams.video[0].average_rate if container.streams.video else None
        total = sum(1 for _ in frames())
        if total == 0:
            raise MediaError(f"{path}: no frame could be decoded")
        source_fps = float(rate) if rate else fps
        keep = frame_indices(total, source_fps, fps, max_frames)
        wanted = set(keep.tolist())
        kept = {i: f.to_ndarray(format="rgb24") for i, f in enumerate(frames()) if i in wanted}
    except av.error.FFmpegError as error:
        raise MediaError(f"{path}: this video does not decode ({error})") from error
    array = np.stack([kept[i] for i in keep.tolist()])
    taken_fps = len(keep) / (total / source_fps)
    return Clip(torch.from_numpy(array).permute(0, 3, 1, 2).contiguous(), taken_fps)


def as_rgb(image: Any) -> Any:
    """A PIL image in RGB; transparency is put on white, as viewers do."""
    from PIL import Image

    if not isinstance(image, Image.Image):
        raise MediaError(f"an image part holds {type(image).__name__}, expected a PIL image")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(canvas, image).convert("RGB")
    return image.convert("RGB")


def as_waveform(audio: Any) -> np.ndarray:
    """float32 [samples] at 16 kHz, checked."""
    array = np.asarray(audio, dtype=np.float32)
    if array.ndim != 1 or array.size == 0:
        raise MediaError(f"an audio part has shape {array.shape}, expected [samples], mono 16 kHz")
    if not np.isfinite(array).all():
        raise MediaError("an audio part holds NaN or infinite samples")
    return array
