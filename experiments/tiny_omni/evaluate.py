"""Accuracy of a weights folder on benchmark rows: real processor, greedy generation, first letter.

    python -m experiments.tiny_omni.evaluate WEIGHTS [--benchmarks FOLDER] [--bits w4a4]

A yardstick for the recipe, independent of the project's evaluation through lmms-eval.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from morphoquant.calibration import readers
from morphoquant.compat import prepare_torchvision
from morphoquant.embedded import benchmarks, clips
from morphoquant.embedded.processor import VIDEO_KWARGS

KIND_COLUMN = {"mmmu": "subfield", "scienceqa": "skill"}


@dataclass(frozen=True)
class Asked:
    """A sample with its question kind."""

    sample: readers.Sample
    kind: str


def load(folder: Path) -> tuple[Any, Any]:
    """Model in float32 (evaluation mode) and processor of a weights folder."""
    prepare_torchvision()
    from transformers import Qwen2_5OmniProcessor, Qwen2_5OmniThinkerForConditionalGeneration

    model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), Qwen2_5OmniProcessor.from_pretrained(folder)


def samples(root: Path, split: str = "evaluation") -> Iterator[Asked]:
    """All samples of the embedded benchmarks' ``evaluation`` or ``calibration`` split."""
    from datasets import load_from_disk

    kinds = {task: kind for kind, task in benchmarks.AIR_TASKS.items()}
    by_label = {labels: kind for kind, labels in benchmarks.VIDEO_LABELS.items()}
    for name, (evaluation, _, _) in benchmarks.BENCHMARKS.items():
        rows = load_from_disk(str(root / name))
        for row in rows[evaluation if split == "evaluation" else split]:
            if name == "mmmu":
                yield Asked(readers.mmmu(row), row["subfield"])
            elif name == "scienceqa":
                yield Asked(readers.scienceqa(row), row["skill"])
            elif name == "videomme":
                labels = (row["domain"], row["sub_category"], row["task_type"])
                yield Asked(readers.videomme(row, root / "videos"), by_label[labels])
            else:
                yield Asked(readers.air_bench(row), kinds[row["task_name"]])


def encode(processor: Any, batch: list[readers.Sample]) -> dict[str, torch.Tensor]:
    """Model inputs of some samples, padded on the left, media in order of appearance."""
    text, images, videos, audio = [], [], [], []
    for sample in batch:
        text.append(
            processor.apply_chat_template(
                sample.messages, tokenize=False, add_generation_prompt=True
            )
        )
        for part in sample.messages[0]["content"]:
            if part["type"] == "image":
                images.append(part["image"])
            elif part["type"] == "video":
                frames = clips.from_mp4(part["video"])
                videos.append(torch.from_numpy(frames).permute(0, 3, 1, 2))
            elif part["type"] == "audio":
                audio.append(part["audio"])
    media: dict[str, Any] = {}
    if images:
        media["images"] = images
    if videos:
        media.update(videos=videos, videos_kwargs=VIDEO_KWARGS)
    if audio:
        media["audio"] = audio
    return dict(processor(text=text, padding=True, return_tensors="pt", **media))


@torch.no_grad()
def answers(model: Any, processor: Any, listed: list[readers.Sample], size: int = 32) -> list[str]:
    """Greedy answers, in order."""
    said: list[str] = []
    for start in range(0, len(listed), size):
        inputs = encode(processor, listed[start : start + size])
        output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        new = output[:, inputs["input_ids"].shape[1] :]
        said += processor.batch_decode(new, skip_special_tokens=True)
    return said


def accuracy(model: Any, processor: Any, asked: list[Asked]) -> dict[str, tuple[int, int]]:
    """(right, asked) per modality and per ``modality/kind``."""
    count: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for modality in ("text", "image", "audio", "video"):
        part = [item for item in asked if item.sample.modality == modality]
        said = answers(model, processor, [item.sample for item in part])
        for item, text in zip(part, said, strict=True):
            right = text.strip()[:1] == item.sample.answer
            for key in (modality, f"{modality}/{item.kind}"):
                count[key][0] += right
                count[key][1] += 1
    return {key: (right, total) for key, (right, total) in count.items()}


def fake_quantize(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Symmetric round-to-nearest over the last axis, simulated."""
    top = 2 ** (bits - 1) - 1
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-8) / top
    return (x / scale).round().clamp(-top - 1, top) * scale


@torch.no_grad()
def quantize_decoder(model: Any, weight_bits: int, activation_bits: int) -> int:
    """Round-to-nearest of the decoder's linears, weights per output channel, inputs per token.

    A coarse check of the weights' character, not one of the project's methods. Returns how many
    linears were changed.
    """
    count = 0
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            if weight_bits < 16:
                module.weight.copy_(fake_quantize(module.weight, weight_bits))
            if activation_bits < 16:

                def forward(x: torch.Tensor, linear: torch.nn.Linear = module) -> torch.Tensor:
                    quantized = fake_quantize(x, activation_bits)
                    return functional.linear(quantized, linear.weight, linear.bias)

                module.forward = forward  # type: ignore[method-assign, assignment]
            count += 1
    return count


def main() -> None:
    """Print the accuracies of a weights folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("weights", type=Path)
    parser.add_argument("--benchmarks", type=Path, help="where they are or will be written")
    parser.add_argument("--split", default="evaluation", choices=("evaluation", "calibration"))
    parser.add_argument("--bits", default="w16a16", help="round-to-nearest, such as w4a4")
    args = parser.parse_args()
    model, processor = load(args.weights)
    weight_bits, activation_bits = (int(n) for n in args.bits.lstrip("w").split("a"))
    if min(weight_bits, activation_bits) < 16:
        quantize_decoder(model, weight_bits, activation_bits)
    with tempfile.TemporaryDirectory() as temporary:
        root = benchmarks.build(args.benchmarks or Path(temporary) / "benchmarks")
        asked = list(samples(root, args.split))
        scores = accuracy(model, processor, asked)
    for key, (right, total) in sorted(scores.items()):
        print(f"{key:20s} {100 * right / total:5.1f}  ({right}/{total})")


if __name__ == "__main__":
    main()
