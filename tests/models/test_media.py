"""Frames, pictures and sound."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from morphoquant.models.media import MediaError, as_rgb, as_waveform, frame_indices, read_clip


@given(
    total=st.integers(1, 5000),
    source_fps=st.floats(1.0, 120.0),
    fps=st.floats(0.1, 30.0),
    limit=st.integers(2, 64),
)
def test_frame_indices(total: int, source_fps: float, fps: float, limit: int) -> None:
    taken = frame_indices(total, source_fps, fps, limit)
    assert 1 <= len(taken) <= min(limit, total)
    assert len(taken) % 2 == 0 or total == 1
    assert taken[0] == 0
    assert taken[-1] == total - 1
    assert (np.diff(taken) > 0).all()
    gaps = np.diff(taken)
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


def test_frame_count_follows_rate_and_cap() -> None:
    assert len(frame_indices(240, 24.0, 2.0, 32)) == 20
    assert len(frame_indices(240, 24.0, 2.0, 8)) == 8
    assert len(frame_indices(240, 24.0, 2.0, 7)) == 6
    assert len(frame_indices(3, 24.0, 2.0, 8)) == 2
    assert len(frame_indices(1, 24.0, 2.0, 8)) == 1


def write_clip(path: Path, frames: int, rate: int) -> None:
    """Frame i is uniformly grey, level 8 * i."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.options = {"crf": "1"}
        for i in range(frames):
            pixels = np.full((48, 64, 3), 8 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def test_read_clip_takes_the_right_frames(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write_clip(path, 24, 8)
    clip = read_clip(path, fps=2.0, max_frames=32)
    assert clip.frames.shape == (6, 3, 48, 64)
    assert clip.frames.dtype == torch.uint8
    assert clip.fps == pytest.approx(2.0)
    expected = 8 * torch.from_numpy(frame_indices(24, 8.0, 2.0, 32))
    assert (clip.frames.float().mean((1, 2, 3)) - expected).abs().max() < 4


def test_capped_clip_says_its_real_rate(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write_clip(path, 24, 8)
    clip = read_clip(path, fps=8.0, max_frames=4)
    assert clip.frames.shape[0] == 4
    assert clip.fps == pytest.approx(4 / 3)  # four frames of a clip of three seconds


def test_embedded_clip_decodes(mini_root: Path) -> None:
    path = sorted((mini_root / "videos").glob("*.mp4"))[0]
    clip = read_clip(path, fps=2.0, max_frames=8)
    assert clip.frames.shape[0] % 2 == 0
    assert clip.frames.float().std() > 1


def test_missing_clip(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"gone\.mp4: video file not found"):
        read_clip(tmp_path / "gone.mp4", 2.0, 8)


@pytest.mark.parametrize("content", [b"", b"this is no video" * 50])
def test_corrupt_clip(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.mp4"
    path.write_bytes(content)
    with pytest.raises(MediaError, match=r"broken\.mp4"):
        read_clip(path, 2.0, 8)


def test_clip_cut_in_half(tmp_path: Path) -> None:
    path = tmp_path / "cut.mp4"
    write_clip(path, 24, 8)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MediaError, match=r"cut\.mp4"):
        read_clip(path, 2.0, 8)


def test_sound_file_has_no_video(tmp_path: Path) -> None:
    import wave

    path = tmp_path / "sound.mp4"
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(b"\0\0" * 16000)
    with pytest.raises(MediaError, match="no video stream"):
        read_clip(path, 2.0, 8)


def test_transparency_becomes_white() -> None:
    for mode, pixel in (("RGBA", (10, 20, 30, 0)), ("LA", (10, 0))):
        image = as_rgb(Image.new(mode, (2, 2), pixel))
        assert image.mode == "RGB"
        assert image.getpixel((0, 0)) == (255, 255, 255)
    assert as_rgb(Image.new("RGBA", (2, 2), (10, 20, 30, 255))).getpixel((1, 1)) == (10, 20, 30)
    assert as_rgb(Image.new("L", (2, 2), 7)).getpixel((0, 0)) == (7, 7, 7)


def test_paletted_transparency_becomes_white() -> None:
    image = Image.new("P", (2, 2), 0)
    image.putpalette([200, 0, 0] + [0] * 765)
    assert as_rgb(image).getpixel((0, 0)) == (200, 0, 0)
    image.info["transparency"] = 0
    assert as_rgb(image).getpixel((0, 0)) == (255, 255, 255)


def test_not_an_image() -> None:
    with pytest.raises(MediaError, match="str, expected a PIL image"):
        as_rgb("picture.png")


@pytest.mark.parametrize("audio", [np.zeros((2, 100)), np.zeros(0), 3.0])
def test_audio_shape(audio: object) -> None:
    with pytest.raises(MediaError, match="mono 16 kHz"):
        as_waveform(audio)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_audio_values(value: float) -> None:
    with pytest.raises(MediaError, match="NaN or infinite"):
        as_waveform(np.array([0.0, value]))


def test_audio_is_float32() -> None:
    assert as_waveform([0, 1, 0]).dtype == np.float32
