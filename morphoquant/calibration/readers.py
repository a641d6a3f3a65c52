"""One row of a benchmark's data set -> the chat messages that lmms-eval's stock task builds of it.

Calibration has to see what evaluation will see, word for word, without importing lmms-eval (seven
seconds). These are pure functions of a row; a test compares them with the stock task code. The
order of the parts is the stock order too: MMMU puts an image where the question says ``<image 1>``,
the others put the media first and one text after it.
"""

from __future__ import annotations

import ast
import hashlib
import io
import re
import wave
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

LETTER_PROMPT = "Answer with the option's letter from the given choices directly."
OPEN_PROMPT = "Answer the question using a single word or phrase."
VIDEOMME_PROMPT = (
    "Select the best answer to the following multiple-choice question based on the video and the "
    "subtitles. Respond with only the letter (A, B, C, or D) of the correct option."
)
SAMPLE_RATE = 16000  # Hz, of the audio in messages

Part = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """One question as a chat: ``messages`` hold PIL images, video paths and 16 kHz float audio."""

    id: str
    messages: list[dict[str, Any]]
    answer: str
    modality: str


def _user(parts: list[Part]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": parts}]


def _text(text: str) -> Part:
    return {"type": "text", "text": text}


def _options(choices: list[str]) -> str:
    return "\n".join(f"{chr(ord('A') + i)}. {choice}" for i, choice in enumerate(choices))


def mmmu_text(row: Mapping[str, Any]) -> str:
    """The whole prompt of an MMMU row, with ``<image 1>`` still in it."""
    if row["question_type"] != "multiple-choice":
        return f"{row['question']}\n\n{OPEN_PROMPT}"
    options = _options([str(option) for option in ast.literal_eval(row["options"])])
    return f"{row['question']}\n{options}\n\n{LETTER_PROMPT}"


def mmmu(row: Mapping[str, Any]) -> Sample:
    """MMMU: images stand where the question refers to them."""
    prompt = mmmu_text(row)
    named = sorted(set(re.findall(r"<image \d+>", prompt)))
    images = [row[name.strip("<>").replace(" ", "_")].convert("RGB") for name in named]
    pieces = re.split(r"<image [1-7]>", prompt)
    parts: list[Part] = []
    for i, image in enumerate(images):
        before = pieces[i].strip() if i < len(pieces) - 1 else ""
        if before:
            parts.append(_text(before))
        parts.append({"type": "image", "image": image})
    # The stock code keeps only the piece after the last reference, so text between repeated
    # references to one image is lost there, and here.
    parts.append(_text(pieces[-1].strip()))
    return Sample(str(row["id"]), _user(parts), str(row["answer"]), "image")


def scienceqa_text(row: Mapping[str, Any]) -> str:
    """The prompt of a ScienceQA row."""
    hint = row["hint"]
    context = f"Context: {hint}\n" if hint else ""
    return f"{context}{row['question']}\n{_options(list(row['choices']))}\n{LETTER_PROMPT}"


def scienceqa(row: Mapping[str, Any]) -> Sample:
    """ScienceQA: text, or one image and text. Rows without an id get one from their content."""
    text = scienceqa_text(row)
    image = row["image"]
    parts = [_text(text)]
    if image is not None:
        parts.insert(0, {"type": "image", "image": image.convert("RGB")})
    answer = chr(ord("A") + int(row["answer"]))
    name = row.get("id")
    if name is None:
        digest = hashlib.sha256(text.encode())
        if image is not None:
            digest.update(image.convert("RGB").tobytes())
        name = f"scienceqa_{digest.hexdigest()[:16]}"
    return Sample(str(name), _user(parts), answer, "text" if image is None else "image")


def videomme_text(row: Mapping[str, Any]) -> str:
    """The prompt of a Video-MME row (its options carry their letters)."""
    options = "\n".join(row["options"])
    return f"{VIDEOMME_PROMPT}\n{row['question']}\n{options}\n\n{LETTER_PROMPT}"


def videomme(row: Mapping[str, Any], video_root: Path) -> Sample:
    """Video-MME: the file ``<videoID>.mp4`` under ``video_root``, then the text."""
    path = Path(video_root) / f"{row['videoID']}.mp4"
    parts = [{"type": "video", "video": str(path)}, _text(videomme_text(row))]
    return Sample(str(row["question_id"]), _user(parts), str(row["answer"]), "video")


def air_bench_text(row: Mapping[str, Any]) -> str:
    """The prompt of an AIR-Bench foundation row: always four option lines, as the stock task."""
    choices = [row["choice_a"], row["choice_b"], row.get("choice_c"), row.get("choice_d")]
    return f"{row['question']}\n{_options([str(c) for c in choices])}\n\n{LETTER_PROMPT}"


def air_bench(row: Mapping[str, Any]) -> Sample:
    """AIR-Bench foundation: one audio, then the text."""
    choices = [row["choice_a"], row["choice_b"], row.get("choice_c"), row.get("choice_d")]
    answer = chr(ord("A") + choices.index(row["answer_gt"]))
    parts = [{"type": "audio", "audio": read_audio(row["audio"])}, _text(air_bench_text(row))]
    return Sample(str(row["uniq_id"]), _user(parts), answer, "audio")


def read_audio(audio: Mapping[str, Any]) -> NDArray[np.float32]:
    """An audio column's value as 16 kHz mono float32 ``[samples]``.

    Takes ``{"bytes", "path"}`` (undecoded) or ``{"array", "sampling_rate"}`` (decoded). PCM16
    mono WAV at 16 kHz is read here; everything else goes through PyAV.
    """
    if audio.get("array") is not None:
        array = np.asarray(audio["array"], np.float32)
        if array.ndim == 2:
            array = array.mean(axis=int(np.argmin(array.shape)), dtype=np.float32)
        if int(audio["sampling_rate"]) == SAMPLE_RATE:
            return array
        return _resample(array, int(audio["sampling_rate"]))
    data = audio.get("bytes")
    if data is None:
        data = Path(audio["path"]).read_bytes()
    if data[:4] == b"RIFF":
        try:
            with wave.open(io.BytesIO(data)) as file:
                if file.getparams()[:3] == (1, 2, SAMPLE_RATE):
                    pcm = np.frombuffer(file.readframes(file.getnframes()), "<i2")
                    return pcm.astype(np.float32) / 32768.0
        except wave.Error:  # WAV, but not PCM
            pass
    return _decode(data)


def _decode(data: bytes) -> NDArray[np.float32]:
    import av

    resampler = av.AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE)
    with av.open(io.BytesIO(data)) as container:
        frames = [out for f in container.decode(audio=0) for out in resampler.resample(f)]
    frames += resampler.resample(None)
    return np.concatenate([frame.to_ndarray().reshape(-1) for frame in frames]).astype(np.float32)


def _resample(array: NDArray[np.float32], rate: int) -> NDArray[np.float32]:
    import av

    resampler = av.AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE)
    frame = av.AudioFrame.from_ndarray(array[None], format="flt", layout="mono")
    frame.sample_rate = rate
    frames = [*resampler.resample(frame), *resampler.resample(None)]
    return np.concatenate([out.to_ndarray().reshape(-1) for out in frames]).astype(np.float32)
