"""Training data: pools of media that went through real files, and batches of chat sequences.

Prompts are the stock benchmark prompts, built from rows by the calibration readers. Media tensors
come from the real processor, called once per modality and step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from morphoquant.calibration import readers
from morphoquant.embedded import benchmarks, clips, pictures, sentences, sounds
from morphoquant.embedded.processor import NAMED_TOKENS, VIDEO_KWARGS
from morphoquant.embedded.questions import KINDS, MUSIC_KINDS, Question, generator

MODALITIES = ("text", "image", "audio", "video")
MEDIA_TEXT = {
    "image": "<|vision_bos|><|IMAGE|><|vision_eos|>",
    "video": "<|vision_bos|><|VIDEO|><|vision_eos|>",
    "audio": "<|audio_bos|><|AUDIO|><|audio_eos|>",
}


def prompt(question: Question, modality: str, variant: int = 0) -> str:
    """The text of the benchmark that asks such questions; images have two (MMMU, ScienceQA)."""
    if modality == "text" or (modality == "image" and variant % 4 == 3):
        return readers.scienceqa_text(benchmarks.scienceqa_row(question, None, "train", 0))
    if modality == "image":
        row = benchmarks.mmmu_row(question, None, "train", 0)
        return readers.mmmu_text(row).replace("<image 1>", "").strip()
    if modality == "video":
        return readers.videomme_text(benchmarks.videomme_row(question, "train", 0))
    subset = "music" if question.kind in MUSIC_KINDS else "sound"
    return readers.air_bench_text(benchmarks.air_bench_row(question, None, subset, "train", 0))


def answer(question: Question) -> str:
    """What the model is trained to say."""
    return f"{question.letter}. {question.answer}"


@dataclass
class Item:
    """Media (``None`` for text) with the questions that can be asked about it."""

    media: Any
    questions: list[Question]


def draw(split: str, modality: str, kind: str, index: int) -> Item:
    """One item; clips go through an mp4 file, as they will in evaluation."""
    rng = generator(split, f"{modality}/{kind}", index)
    if modality == "text":
        return Item(None, [sentences.draw(rng, kind, split)])
    if modality == "image":
        return Item(*pictures.draw(rng, kind))
    if modality == "audio":
        return Item(*sounds.draw(rng, kind))
    frames, questions = clips.draw(rng, kind)
    return Item(clips.from_mp4(clips.to_mp4(frames)), questions)


def pool(split: str, modality: str, size: int) -> dict[str, list[Item]]:
    """``size`` items of every kind of a modality."""
    return {kind: [draw(split, modality, kind, i) for i in range(size)] for kind in KINDS[modality]}


def corpus() -> Iterator[str]:
    """Text for the tokenizer: real prompts and answers of training items."""
    for modality in MODALITIES:
        for kind in KINDS[modality]:
            for i in range(400 if modality == "text" else 60):
                for question in draw("train", modality, kind, i).questions:
                    for variant in (0, 3):
                        asked = prompt(question, modality, variant)
                        yield f"user\n{asked}\nassistant\n{answer(question)}\n"


@dataclass
class Batch:
    """Sequences of one modality, padded on the right."""

    modality: str
    input_ids: torch.Tensor  # [B, L]
    labels: torch.Tensor  # [B, L], -100 where nothing is supervised
    media: dict[str, torch.Tensor]  # what the processor made of the media
    first: torch.Tensor  # [B], index of the first answer's letter
    kinds: list[str]  # [B], kind of the first question


class Builder:
    """Turns items into batches; remembers what texts encode to."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.letters = [self.encode(letter)[0] for letter in "ABCD"]
        names = ("image_token", "audio_token", "video_token")
        self._media_tokens = {self.encode(NAMED_TOKENS[name])[0] for name in names}
        self._memory: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _remembered(self, text: str) -> list[int]:
        if text not in self._memory:
            if len(self._memory) > 100_000:
                self._memory.clear()
            self._memory[text] = self.encode(text)
        return self._memory[text]

    def media(self, modality: str, items: list[Item]) -> tuple[dict[str, torch.Tensor], int]:
        """The processor's tensors of one batch, and the number of tokens per item."""
        if modality == "text":
            return {}, 0
        values = [item.media for item in items]
        text = [NAMED_TOKENS[f"{modality}_token"]] * len(items)
        kwargs: dict[str, Any] = {"text": text, "return_tensors": "pt"}
        if modality == "image":
            kwargs["images"] = [torch.from_numpy(v).permute(2, 0, 1) for v in values]
        elif modality == "video":
            kwargs["videos"] = [torch.from_numpy(v).permute(0, 3, 1, 2) for v in values]
            kwargs["videos_kwargs"] = VIDEO_KWARGS
        else:
            kwargs["audio"] = [sounds.to_float(v) for v in values]
        output = dict(self.processor(**kwargs))
        tokens = output.pop("input_ids")
        output.pop("attention_mask")
        return output, int(tokens.shape[1])

    def batch(
        self, modality: str, items: list[Item], rng: np.random.Generator | None = None
    ) -> Batch:
        """A batch; with ``rng`` the questions of an item come in random order, two at most."""
        tensors, count = self.media(modality, items)
        sequences, labels, first, kinds = [], [], [], []
        for number, item in enumerate(items):
            questions = item.questions[:1]
            if rng is not None:
                order = rng.permutation(len(item.questions))[:2]
                questions = [item.questions[i] for i in order]
            sequence: list[int] = []
            label: list[int] = []
            for turn, question in enumerate(questions):
                variant = number if rng is None else int(rng.integers(4))
                ids = self._remembered("\n" * (turn > 0) + "<|im_start|>user\n")
                if turn == 0 and modality != "text":
                    for token in self._remembered(MEDIA_TEXT[modality]):
                        is_media = token in self._media_tokens
                        ids = ids + [token] * (count if is_media else 1)
                ids = ids + self._remembered(
                    prompt(question, modality, variant) + "<|im_end|>\n<|im_start|>assistant\n"
                )
                said = self._remembered(answer(question) + "<|im_end|>")
                if turn == 0:
                    first.append(len(ids))
                    kinds.append(question.kind)
                sequence += ids + said
                label += [-100] * len(ids) + said
            sequences.append(sequence)
            labels.append(label)
        length = max(map(len, sequences))
        input_ids = torch.full((len(items), length), self.tokenizer.pad_token_id)
        targets = torch.full((len(items), length), -100)
        for row, (sequence, label) in enumerate(zip(sequences, labels, strict=True)):
            input_ids[row, : len(sequence)] = torch.tensor(sequence)
            targets[row, : len(label)] = torch.tensor(label)
        return Batch(modality, input_ids, targets, tensors, torch.tensor(first), kinds)
