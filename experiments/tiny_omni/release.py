"""From a trained model to the two weight folders: rounding, outliers, measurements, model card.

    python -m experiments.tiny_omni.release [CHECKPOINT]

repeats this step for a checkpoint folder of ``train.py`` (which calls it at the end of a run);
without one it measures the weights that are there and writes their cards again.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from experiments.tiny_omni import evaluate, outliers
from morphoquant.embedded import benchmarks
from morphoquant.embedded.questions import KINDS

WEIGHTS = Path(__file__).parents[2] / "morphoquant" / "embedded" / "weights"
PLAIN, OUTLYING = "tiny_omni_as_trained", "tiny_omni"
LOG = "training_log.json"
SCHEMES = {"W16A16": (16, 16), "W8A8": (8, 8), "W4A16": (4, 16), "W4A4": (4, 4)}
TOLERANCE = 1e-4  # largest change of a float32 logit that the rewriting may cause
MODALITIES = ("text", "image", "audio", "video")

CARD = """# {title}

A `Qwen2_5OmniThinkerForConditionalGeneration` of {parameters:,} parameters with a real
`Qwen2_5OmniProcessor`, trained from scratch on synthetic questions about text, images, audio and
video. It exists so that everything in this project can be run without a download: for plumbing,
regression tests and the direction of effects. **It cannot rank good quantization methods**, whose
differences on it are smaller than their noise.

{about}

## Measured

Embedded benchmarks, evaluation questions (never trained on, never used for a choice), real
processor, greedy generation, first letter of the answer; float32 arithmetic on these weights.

{accuracy}

Round-to-nearest of the decoder's linears, simulated: weights symmetric per output channel,
activations symmetric per token (percent right):

{quantized}

Largest against median channel range, and weight of the tails (kurtosis; 3 is Gaussian), of the
norms' outputs on calibration prompts, mean over the norms:

{statistics}

Overlap of the four largest channels between modalities (Jaccard index, mean over the norms):
{overlap}

## Limits

- The options of a question kind always come in the same order, and the letter of an answer is its
  place in that order: the questions are classification, not option reading. Chance is 25 %.
- Synthetic content only: coloured shapes, tones, moving discs and a few dozen words. It knows
  nothing else, and it answers only in the form `B. red`.
- Rotary theta 300 and sections [2, 4, 10], two position ids per second, where the 7B model has
  1,000,000, [16, 24, 24] and 25: scaled down unchanged, one step to the right would turn the width
  channels by a few milliradians. What this choice is worth was not measured by itself.

## How it was made

`{command}`: {steps} steps of {batch} sequences,
seed {seed}, {minutes:.0f} minutes on {cores} CPU cores ({torch_version}; bfloat16 autocast).
Threads, versions and processors change the rounding, so a repetition gives a similar model, not
the same bits. `training_log.json` has the accuracies on development questions during training.
{note}
"""

AS_TRAINED = """The weights as they came out of training, rounded to bfloat16. Activations after the
norms are close to Gaussian. The folder `tiny_omni` beside this one holds the same function with
engineered outliers."""

ENGINEERED = """**The outlier channels of these weights are engineered.** The norms were fused, the
residual stream was rotated so that directions in which one modality carries much more energy than
the others became single channels, and four channels per modality ({channels}) got a gain of 4
that their consumers divide out (`experiments/tiny_omni/outliers.py`). In float32 the logits moved
by at most {exact:.1e}; rounding to bfloat16 afterwards moved them by {rounded:.4f} on average (the
standard deviation of a logit is {spread:.1f}). Smoothing and rotation undo an engineered gain
almost by construction. The folder `tiny_omni_as_trained` holds the weights before this step."""


def write(model: Any, processor: Any, folder: Path) -> None:
    """Save as bfloat16 safetensors with the processor and a greedy generation config."""
    from transformers import GenerationConfig

    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.iterdir():
        if stale.is_file():
            stale.unlink()
    config = model.config.text_config
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)


@torch.no_grad()
def last_logits(model: Any, processor: Any, asked: list[evaluate.Asked]) -> torch.Tensor:
    """Logits ``[samples, vocabulary]`` of the first answer token, a few samples per modality."""
    found = []
    for modality in MODALITIES:
        part = [item.sample for item in asked if item.sample.modality == modality][:24]
        found.append(model(**evaluate.encode(processor, part)).logits[:, -1].float())
    return torch.cat(found)


def quantized_accuracy(folder: Path, asked: list[evaluate.Asked]) -> dict[str, dict[str, Any]]:
    """Scheme -> (right, asked) per modality and kind."""
    scores = {}
    for name, bits in SCHEMES.items():
        model, processor = evaluate.load(folder)
        if min(bits) < 16:
            evaluate.quantize_decoder(model, *bits)
        scores[name] = evaluate.accuracy(model, processor, asked)
        shown = {m: round(100 * scores[name][m][0] / scores[name][m][1], 1) for m in MODALITIES}
        print(folder.name, name, shown, flush=True)
    return scores


def _accuracy_table(scores: dict[str, tuple[int, int]]) -> str:
    lines = ["| modality | percent | n | by kind (n) |", "|---|---|---|---|"]
    for modality in MODALITIES:
        right, total = scores[modality]
        parts = []
        for key, (good, count) in scores.items():
            if key.startswith(f"{modality}/"):
                parts.append(f"{key.split('/')[1]} {100 * good / count:.0f} ({count})")
        lines.append(f"| {modality} | {100 * right / total:.1f} | {total} | {', '.join(parts)} |")
    return "\n".join(lines)


def _quantized_table(scores: dict[str, dict[str, tuple[int, int]]]) -> str:
    lines = [f"| scheme | {' | '.join(MODALITIES)} | mean |", "|---" * 6 + "|"]
    for name, values in scores.items():
        percent = [100 * values[m][0] / values[m][1] for m in MODALITIES]
        cells = [f"{value:.1f}" for value in [*percent, sum(percent) / 4]]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _statistics_table(statistics: dict[str, Any]) -> str:
    lines = ["| | " + " | ".join(MODALITIES) + " |", "|---" * 5 + "|"]
    for key, name in (("max_over_median", "largest / median"), ("kurtosis", "kurtosis")):
        values = " | ".join(f"{statistics[key][m]:.1f}" for m in MODALITIES)
        lines.append(f"| {name} | {values} |")
    return "\n".join(lines)


def rewrite(checkpoint: Path, run: dict[str, Any], weights: Path = WEIGHTS) -> None:
    """Write both weight folders from a float32 checkpoint; ``run`` describes the training."""
    torch.manual_seed(run["seed"])
    plain, outlying = weights / PLAIN, weights / OUTLYING
    with tempfile.TemporaryDirectory() as temporary:
        root = benchmarks.build(Path(temporary) / "benchmarks")
        calibration = list(evaluate.samples(root, "calibration"))
        model, processor = evaluate.load(checkpoint)
        write(model, processor, plain)
        model, processor = evaluate.load(plain)  # rounded once, before the rewriting
        before = last_logits(model, processor, calibration)
        prompts = [item.sample for item in calibration]
        channels = outliers.engineer(model, processor, prompts, run["seed"])
        exact = float((last_logits(model, processor, calibration) - before).abs().max())
        if exact > TOLERANCE:
            raise RuntimeError(f"the rewriting moved a logit by {exact:.2e}")
        write(model, processor, outlying)
    for folder in (plain, outlying):
        summary: dict[str, Any] = {"training": run}
        if folder == outlying:
            summary["engineered"] = {"channels": channels, "largest_logit_change": exact}
        _save(folder, summary)


def _save(folder: Path, summary: dict[str, Any]) -> None:
    (folder / LOG).write_text(json.dumps(summary, separators=(",", ":")) + "\n")


def measure(weights: Path = WEIGHTS) -> None:
    """Measure both weight folders and write their cards; the weights stay as they are."""
    with tempfile.TemporaryDirectory() as temporary:
        root = benchmarks.build(Path(temporary) / "benchmarks")
        calibration = list(evaluate.samples(root, "calibration"))
        prompts = [item.sample for item in calibration]
        asked = list(evaluate.samples(root))
        logits = {}
        for name in (PLAIN, OUTLYING):
            folder = weights / name
            scores = quantized_accuracy(folder, asked)
            model, processor = evaluate.load(folder)
            logits[name] = last_logits(model, processor, calibration)
            statistics = outliers.statistics(outliers.norm_outputs(model, processor, prompts))
            print(name, statistics, flush=True)
            summary = json.loads((folder / LOG).read_text())
            about = AS_TRAINED
            if name == OUTLYING:
                made = summary["engineered"]
                about = ENGINEERED.format(
                    channels=", ".join(map(str, made["channels"])),
                    exact=made["largest_logit_change"],
                    rounded=float((logits[OUTLYING] - logits[PLAIN]).abs().mean()),
                    spread=float(logits[PLAIN].std()),
                )
            overlap = statistics["jaccard"].items()
            run = summary["training"]
            card = CARD.format(
                title=name,
                parameters=sum(p.numel() for p in model.parameters()),
                about=about,
                accuracy=_accuracy_table(scores["W16A16"]),
                quantized=_quantized_table(scores),
                statistics=_statistics_table(statistics),
                overlap=", ".join(f"{pair} {value:.2f}" for pair, value in overlap) + ".",
                **{key: value for key, value in run.items() if key != "log"},
            )
            (folder / "README.md").write_text(card)
            summary["accuracy"] = {key: list(value) for key, value in scores["W16A16"].items()}
            summary["quantized"] = {
                scheme: {m: list(values[m]) for m in MODALITIES}
                for scheme, values in scores.items()
            }
            summary["outliers"] = statistics
            _save(folder, summary)


def describe(
    args: argparse.Namespace, seconds: float, batch: int, log: list[dict[str, Any]]
) -> dict[str, Any]:
    """What the card says about a training run."""
    steps = log[-1]["step"]
    return {
        "command": f"python -m experiments.tiny_omni.train --seed {args.seed} --steps {steps}",
        "seed": args.seed,
        "steps": steps,
        "note": "",
        "batch": batch,
        "minutes": seconds / 60,
        "cores": os.cpu_count(),
        "torch_version": f"torch {torch.__version__}",
        "kinds": {modality: list(kinds) for modality, kinds in KINDS.items()},
        "log": log,
    }


def main() -> None:
    """Rewrite and measure a checkpoint folder that holds ``run.json``, or only measure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path, nargs="?", help="none: measure what is there")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    if args.checkpoint is not None:
        run = json.loads((args.checkpoint / "run.json").read_text())
        rewrite(args.checkpoint, run, args.weights)
    measure(args.weights)


if __name__ == "__main__":
    main()
