"""Train the embedded model from scratch and write its two weight folders.

    python -m experiments.tiny_omni.train

does everything with one seed: pools of synthetic media, tokenizer, training, the engineered
outliers, the measured accuracies and the model cards. About three quarters of an hour on two CPU
cores. ``--help`` lists what can be changed.

Notable choices: micro-batches of one modality (no padding across modalities); kinds are sampled by
how badly they are still answered, estimated from the training batches themselves; letters weigh
more than words in the loss; bf16 autocast, float32 weights.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from experiments.tiny_omni import data
from experiments.tiny_omni.architecture import configuration, fast_towers
from experiments.tiny_omni.muon import Optimizers
from experiments.tiny_omni.release import WEIGHTS, describe, measure, rewrite
from morphoquant.embedded.processor import build_processor, build_tokenizer
from morphoquant.embedded.questions import KINDS

BATCH = {"image": 11, "video": 9, "audio": 5, "text": 8}
POOL = {"image": 1800, "video": 1800, "audio": 1000, "text": 4000}  # items per kind
LETTER_WEIGHT = 2.5


class Sampler:
    """Draws items; kinds that are answered badly come more often."""

    def __init__(self, pools: dict[str, dict[str, list[data.Item]]], seed: int) -> None:
        self.pools = pools
        self.rng = np.random.default_rng(seed)
        self.accuracy = {m: dict.fromkeys(kinds, 0.25) for m, kinds in pools.items()}

    def weights(self, modality: str) -> tuple[list[str], np.ndarray]:
        """Kinds and their probabilities: an eighth stays uniform."""
        kinds = list(self.accuracy[modality])
        need = np.array([1.02 - self.accuracy[modality][kind] for kind in kinds])
        return kinds, 0.125 / len(kinds) + 0.875 * need / need.sum()

    def items(self, modality: str, count: int) -> list[data.Item]:
        """``count`` random items."""
        kinds, weights = self.weights(modality)
        chosen = self.rng.choice(len(kinds), count, p=weights)
        pools = [self.pools[modality][kinds[i]] for i in chosen]
        return [pool[int(self.rng.integers(len(pool)))] for pool in pools]

    def update(self, modality: str, kinds: list[str], correct: list[bool]) -> None:
        """Running accuracy of the first question of every item."""
        known = self.accuracy[modality]
        for kind, right in zip(kinds, correct, strict=True):
            if kind in known:  # a trial with few kinds still meets the others' questions
                known[kind] += 0.01 * (float(right) - known[kind])


class Positions:
    """Multimodal rotary positions; they depend on the modality and the length only."""

    def __init__(self, model: Any, builder: data.Builder) -> None:
        self.model, self.builder = model, builder
        self.known: dict[str, torch.Tensor] = {}

    def __call__(self, batch: data.Batch) -> torch.Tensor:
        """Positions ``[3, B, L]`` of a batch."""
        rows, length = batch.input_ids.shape
        if batch.modality in ("text", "audio"):
            return torch.arange(length).expand(3, rows, length)
        known = self.known.get(batch.modality)
        if known is None or known.shape[-1] < length:
            grid = "image_grid_thw" if batch.modality == "image" else "video_grid_thw"
            row = functional.pad(batch.input_ids[:1], (0, 512), value=self.builder.letters[0])
            arguments = {grid: batch.media[grid][:1], "attention_mask": torch.ones_like(row)}
            if batch.modality == "video":
                arguments["second_per_grids"] = torch.as_tensor(
                    batch.media["video_second_per_grid"]
                )
            known = self.known[batch.modality] = self.model.get_rope_index(row, **arguments)[0]
        return known[:, :, :length].expand(3, rows, length)


def hidden_states(model: Any, batch: data.Batch, positions: torch.Tensor) -> torch.Tensor:
    """Last hidden states ``[B, L, hidden]``, as the thinker's forward computes them."""
    embeds = model.get_input_embeddings()(batch.input_ids)
    media = batch.media
    if batch.modality == "audio":
        features = model.get_audio_features(
            media["input_features"], media["feature_attention_mask"], return_dict=True
        ).last_hidden_state
        token = model.config.audio_token_id
    elif batch.modality == "image":
        features = model.visual(
            media["pixel_values"], grid_thw=media["image_grid_thw"]
        ).pooler_output
        token = model.config.image_token_id
    elif batch.modality == "video":
        features = model.visual(
            media["pixel_values_videos"], grid_thw=media["video_grid_thw"]
        ).pooler_output
        token = model.config.video_token_id
    if batch.modality != "text":
        mask = (batch.input_ids == token).unsqueeze(-1)
        embeds = embeds.masked_scatter(mask, features.to(embeds.dtype))
    return model.model(
        inputs_embeds=embeds, position_ids=positions, use_cache=False
    ).last_hidden_state


def letter_logits(model: Any, batch: data.Batch, positions: torch.Tensor) -> torch.Tensor:
    """Logits ``[B, vocabulary]`` where the first answer's letter is predicted."""
    states = hidden_states(model, batch, positions)
    return model.lm_head(states[torch.arange(len(states)), batch.first - 1]).float()


@torch.no_grad()
def dev_accuracy(
    model: Any, builder: data.Builder, positions: Positions, items: dict[str, list[data.Item]]
) -> dict[str, float]:
    """Percent right per ``modality`` and ``modality/kind`` on held-out items, by first letter."""
    model.eval()
    right: dict[str, list[bool]] = defaultdict(list)
    for modality, listed in items.items():
        for start in range(0, len(listed), 48):
            batch = builder.batch(modality, listed[start : start + 48])
            with torch.autocast("cpu", torch.bfloat16):
                said = letter_logits(model, batch, positions(batch)).argmax(-1)
            targets = batch.labels[torch.arange(len(said)), batch.first]
            for kind, ok in zip(batch.kinds, (said == targets).tolist(), strict=True):
                right[modality].append(ok)
                right[f"{modality}/{kind}"].append(ok)
    model.train()
    return {key: round(100 * float(np.mean(values)), 1) for key, values in right.items()}


def learning_rate(step: int, progress: float, peak: float) -> float:
    """Warm-up of 100 steps, then a cosine over ``progress`` (0 to 1) to two percent."""
    warm = min(1.0, (step + 1) / 100)
    return peak * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def make_pools(scale: float, only: set[str] | None) -> dict[str, dict[str, list[data.Item]]]:
    """Pools of training items; ``only`` names kinds (for experiments with a few)."""
    pools = {}
    for modality in data.MODALITIES:
        size = max(8, int(POOL[modality] * scale))
        kinds = [kind for kind in KINDS[modality] if only is None or f"{modality}/{kind}" in only]
        drawn = {
            kind: [data.draw("train", modality, kind, i) for i in range(size)] for kind in kinds
        }
        if drawn:
            pools[modality] = drawn
    return pools


def train(args: argparse.Namespace) -> Path:
    """Train; returns the folder of the last checkpoint."""
    folder = Path(args.checkpoints) / "latest"
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    start = time.time()
    processor = build_processor(build_tokenizer(data.corpus()))
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    model = Qwen2_5OmniThinkerForConditionalGeneration(configuration(processor.tokenizer))
    model.set_attn_implementation("eager")
    only = set(args.only.split(",")) if args.only else None
    pools = make_pools(args.pool, only)
    dev = {
        modality: [data.draw("dev", modality, kind, i) for kind in kinds for i in range(args.dev)]
        for modality, kinds in pools.items()
    }
    builder = data.Builder(processor)
    positions = Positions(model, builder)
    sampler = Sampler(pools, args.seed + 1)
    optimizers = Optimizers(model)
    letters = torch.tensor(builder.letters)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, vocabulary {len(processor.tokenizer)}", flush=True)
    print(f"pools ready after {time.time() - start:.0f} s", flush=True)

    log: list[dict[str, Any]] = []
    mean_loss = None
    start = time.time()
    total = sum(BATCH[modality] for modality in pools)
    model.train()
    for step in range(args.steps):
        losses = []
        for modality in pools:
            items = sampler.items(modality, BATCH[modality])
            batch = builder.batch(modality, items, sampler.rng)
            with torch.autocast("cpu", torch.bfloat16):
                states = hidden_states(model, batch, positions(batch))
                where = batch.labels[:, 1:] != -100
                logits = model.lm_head(states[:, :-1][where]).float()
            targets = batch.labels[:, 1:][where]
            weights = 1 + (LETTER_WEIGHT - 1) * torch.isin(targets, letters).float()
            loss = (functional.cross_entropy(logits, targets, reduction="none") * weights).sum()
            loss = loss / weights.sum() * (BATCH[modality] / total)
            loss.backward()
            losses.append(loss.item())
            # Row-major order: the first supervised token of a row is its first letter.
            starts = torch.cat([torch.zeros(1, dtype=torch.long), where.sum(1).cumsum(0)[:-1]])
            right = logits[starts].argmax(-1) == targets[starts]
            sampler.update(modality, batch.kinds, right.tolist())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        progress = step / args.steps
        if args.minutes:
            progress = max(progress, (time.time() - start) / 60 / args.minutes)
        optimizers.step(learning_rate(step, progress, args.lr))
        mean_loss = sum(losses) if mean_loss is None else 0.98 * mean_loss + 0.02 * sum(losses)
        done = step + 1
        last = done == args.steps or progress >= 1
        if done % args.every == 0 or last:
            scores = dev_accuracy(model, builder, positions, dev)
            seconds = round(time.time() - start, 1)
            log.append({"step": done, "seconds": seconds, "loss": round(mean_loss, 4), **scores})
            shown = " ".join(f"{key}:{value:.0f}" for key, value in scores.items())
            print(f"{done} {seconds:.0f}s loss {mean_loss:.3f} | {shown}", flush=True)
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
            run = describe(args, seconds, sum(BATCH.values()), log)
            (folder / "run.json").write_text(json.dumps(run))
        if last:
            break
    return folder


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2097)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=0, help="end the schedule by then")
    parser.add_argument("--every", type=int, default=250, help="steps between evaluations")
    parser.add_argument("--dev", type=int, default=24, help="dev items per kind")
    parser.add_argument("--pool", type=float, default=1.0, help="scale of the pools")
    parser.add_argument("--only", default="", help="comma-separated modality/kind, for trials")
    parser.add_argument("--checkpoints", default="outputs/tiny_omni", help="float32 checkpoints")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="where the results go")
    return parser.parse_args()


def main() -> None:
    """Train and release."""
    args = arguments()
    with fast_towers():
        checkpoint = train(args)
    if args.only:
        return
    rewrite(checkpoint, json.loads((checkpoint / "run.json").read_text()), args.weights)
    measure(args.weights)


if __name__ == "__main__":
    main()
