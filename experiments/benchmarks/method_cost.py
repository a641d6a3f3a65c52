"""What quantization costs by method, and GPTQ and AWQ beside llm-compressor's.

    python -m experiments.benchmarks.method_cost               # the embedded model and a 3B block
    python -m experiments.benchmarks.method_cost --size 7b
    python -m experiments.benchmarks.method_cost --size rivals --shape 3b --repeats 3

``embedded`` is the shipped small model; ``3b`` and ``7b`` are one decoder block with the shapes of
Qwen2.5-Omni and random weights. All of them read calibration prompts of every modality and take a
run's own code: transform, then the walk over blocks (statistics, rounding, masks, ranges, search),
without the atlas and the checks of a run. Ratios are to a plain forward pass over the same prompts
in the same process. Rotations that are learned take ``--spin-steps`` steps, and the others are
extrapolated from them.

``rivals`` times GPTQ on one linear and AWQ's scale search on one MLP, in turns with
llm-compressor's, on the same tensors and settings (see :mod:`rivals`).

Seconds are those of the processor, so that other work on the machine counts as little as it can;
with one thread (the default of ``--threads``) they are what an idle machine takes. Of ``--repeats``
rounds the fastest counts.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.benchmarks import rivals
from experiments.benchmarks.blocks import (
    SHAPES,
    Shape,
    embedded_model,
    one_block_model,
)
from morphoquant.config import RunConfig, load
from morphoquant.quantization.gptq import Hessian, gptq
from morphoquant.tracking.progress import progress

CONF = Path(__file__).parents[2] / "conf"
METHODS = (
    "rtn",
    "rtn_static",
    "smoothquant",
    "awq",
    "gptq",
    "quarot",
    "spinquant",
    "mbq",
    "mquant",
    "svdquant",
    "atom",
    "morphoquant",
)
ALL = tuple(sorted(path.stem for path in (CONF / "method").glob("*.yaml")))


def configure(methods: tuple[str, ...], samples: int, cache: Path) -> dict[str, RunConfig]:
    """Every method at W4A4, or at the widths that it has, without the atlas."""
    from hydra import compose, initialize_config_dir

    from morphoquant.config.store import register

    register()
    common = (
        f"calibration.samples={samples}",
        f"calibration.search_samples={max(4, samples // 4)}",
        "statistics.enabled=false",
        f"paths.cache={cache}",
    )
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return {
            name: load(compose("config", overrides=[f"method={name}", *common])) for name in methods
        }


@dataclass
class Cost:
    """Seconds of a method's parts."""

    transform: float
    walk: float

    @property
    def total(self) -> float:
        return self.transform + self.walk


def quantize(config: RunConfig, adapter: Any, calibration: Any, spin_steps: int) -> Cost:
    """Quantize ``adapter`` as a run does."""
    from morphoquant.calibration.samples import batches
    from morphoquant.quantization.transforms import TransformInput, apply_transform
    from morphoquant.quantize import walk_blocks

    method, steps = config.method, config.method.transform.steps
    learns = method.transform.name == "spin" and steps > spin_steps
    start = time.process_time()
    if method.transform.name != "none":
        adapter.untie_head()
        groups = batches(calibration.samples, config.calibration.batch_size)
        encoded = [adapter.encode([s.messages for s in group]) for group in groups]
        if learns:
            few = method.transform.model_copy(update={"steps": spin_steps})
            method = method.model_copy(update={"transform": few})
        ends: list[float] = []
        apply_transform(
            TransformInput(
                adapter,
                method,
                config.bits,
                encoded,
                calibration.samples,
                lambda _count: ends.append(time.process_time()),
            )
        )
        if learns:
            start -= (ends[-1] - ends[0]) / (len(ends) - 1) * (steps - spin_steps)
    middle = time.process_time()
    walk_blocks(config, adapter, ["decoder"], calibration)
    return Cost(middle - start, time.process_time() - middle)


def forward(config: RunConfig, adapter: Any, calibration: Any) -> tuple[float, int]:
    """Seconds and tokens of a plain forward pass over the calibration prompts, encoded before."""
    from morphoquant.calibration.samples import batches

    groups = batches(calibration.samples, config.calibration.batch_size)
    encoded = [adapter.encode([s.messages for s in group]) for group in groups]
    adapter.logits(encoded[0])
    start = time.process_time()
    for batch in encoded:
        adapter.logits(batch)
    return time.process_time() - start, sum(int(b["attention_mask"].sum()) for b in encoded)


def row(name: str, config: RunConfig, cost: Cost, plain: float) -> str:
    """A method's line of the table."""
    learned = " *" if config.method.transform.name == "spin" else ""
    return (
        f"| {name}{learned} | {config.bits.scheme} | {cost.transform:.1f} | {cost.walk:.1f} | "
        f"{cost.total:.1f} | {cost.total / plain:.1f} |"
    )


def table(
    title: str,
    methods: tuple[str, ...],
    samples: int,
    repeats: int,
    spin_steps: int,
    build: Callable[[], Any],
    cache: Path,
) -> None:
    """Print one line per method, fastest of ``repeats`` rounds over all of them."""
    from morphoquant.calibration.samples import load_samples
    from morphoquant.embedded.benchmarks import build as build_mini

    configs = configure(methods, samples, cache)
    some = next(iter(configs.values()))
    calibration = load_samples(some.calibration, build_mini(cache / "mini"))
    original = build()
    best: dict[str, Cost] = {}
    seconds = [forward(some, original, calibration) for _ in range(repeats)]
    plain, tokens = min(seconds)
    print(
        f"\n{title}, {torch.get_num_threads()} thread(s), {samples} prompts of {tokens} tokens, "
        f"plain forward {plain:.2f} s"
    )
    print("| method | scheme | transform s | walk s | total s | x forward |")
    print("|---|---|---:|---:|---:|---:|", flush=True)
    with progress(f"Timing {title}", repeats * len(configs), unit="methods") as step:
        for last in range(1, repeats + 1):
            for name, config in configs.items():
                adapter = type(original)(
                    copy.deepcopy(original.model), original.processor, original.config
                )
                found = quantize(config, adapter, calibration, spin_steps)
                if name not in best or found.total < best[name].total:
                    best[name] = found
                del adapter
                step(1)
                if last == repeats:  # at once: an interrupted benchmark keeps what it has
                    print(row(name, config, best[name], plain), flush=True)
    if any(c.method.transform.name == "spin" for c in configs.values()):
        print(f"\\* {spin_steps} steps, extrapolated to all", flush=True)


def compare(name: str, rows: dict[str, Any], repeats: int, error: Callable[[Any], float]) -> None:
    """Print two implementations' fastest times, taken in turns, and the ratio of their errors."""
    if rows["theirs"] is None:
        print(f"{name}: llm-compressor is not installed")
        return
    results: dict[str, Any] = {}
    found = dict.fromkeys(rows, float("inf"))
    with progress(f"Timing {name}", repeats * len(rows), unit="calls") as step:
        for _ in range(repeats):
            for key, work in rows.items():  # in turns: a busy machine slows both alike
                start = time.process_time()
                results[key] = work()
                found[key] = min(found[key], time.process_time() - start)
                step(1)
    errors = {key: error(result) for key, result in results.items()}
    print(
        f"| {name} | {found['ours']:.2f} | {found['theirs']:.2f} | "
        f"{found['ours'] / found['theirs']:.2f} | {errors['ours'] / errors['theirs']:.4f} |",
        flush=True,
    )


def gptq_pair(outputs: int, inputs: int, tokens: int, group: int | None) -> dict[str, Any]:
    """Both GPTQs on one linear at 4 bits, asymmetric, and what the squared output error is."""
    draw = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(outputs, inputs, generator=draw)
    moments = Hessian(inputs)
    for _ in range(0, tokens, 1024):
        moments.update(rivals.activations(min(1024, tokens), inputs, draw))
    hessian = moments.value()
    del moments

    def error(found: torch.Tensor) -> float:
        lost = found - weight
        return float(torch.einsum("nk,nk->", lost @ hessian, lost))

    granularity: Any = "per_channel" if group is None else "per_group"
    theirs = rivals.their_gptq(weight, hessian, 4, False, group)

    def ours() -> torch.Tensor:
        return gptq(
            weight, hessian, 4, granularity, group or 128, False, static_groups=True
        ).dequantized

    return {"ours": ours, "theirs": theirs, "error": error}


def side_by_side(shape: Shape, linear: str, tokens: int, repeats: int) -> None:
    """GPTQ on one linear and AWQ's search on the MLP, ours and llm-compressor's."""
    sizes = {
        "down": (shape.hidden, shape.intermediate),
        "gate": (shape.intermediate, shape.hidden),
        "o": (shape.hidden, shape.hidden),
    }
    outputs, inputs = sizes[linear]
    print("| work | ours s | llm-compressor s | time ratio | error ratio |")
    print("|---|---:|---:|---:|---:|")
    for group, words in ((None, "per channel"), (rivals.GROUP, "groups of 128")):
        pair = gptq_pair(outputs, inputs, tokens, group)
        error = pair.pop("error")
        compare(f"GPTQ {linear} [{outputs}, {inputs}], {words}", pair, repeats, error)
    pair = rivals.awq_pair(shape.hidden, shape.intermediate, tokens)
    title = f"AWQ search, MLP {shape.hidden} x {shape.intermediate}, {tokens} tokens"
    compare(title, dict(pair), repeats, lambda result: result[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--size", nargs="+", choices=["embedded", "rivals", *SHAPES], default=["embedded", "3b"]
    )
    parser.add_argument("--methods", nargs="+", choices=ALL, default=list(METHODS))
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--samples", type=int, help="prompts: 128 embedded, else 8")
    parser.add_argument("--spin-steps", type=int, default=3, help="at least 2")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shape", choices=list(SHAPES), default="3b", help="of rivals")
    parser.add_argument("--linear", choices=["down", "gate", "o"], default="down", help="of GPTQ")
    parser.add_argument("--tokens", type=int, default=512, help="of rivals")
    parser.add_argument("--cache", type=Path, default=Path(".cache/morphoquant"))
    chosen = parser.parse_args()
    if chosen.spin_steps < 2 or chosen.repeats < 1:
        parser.error("--spin-steps must be at least 2 and --repeats at least 1")
    torch.set_num_threads(chosen.threads)
    methods = tuple(chosen.methods)
    common = (chosen.repeats, chosen.spin_steps)
    for size in chosen.size:
        if size == "rivals":
            side_by_side(SHAPES[chosen.shape], chosen.linear, chosen.tokens, chosen.repeats)
        elif size == "embedded":
            table(
                "embedded model, float64",
                methods,
                chosen.samples or 128,
                *common,
                embedded_model,
                chosen.cache,
            )
        else:
            shape = SHAPES[size]
            title = f"one {size.upper()} block, float32"
            table(
                title,
                methods,
                chosen.samples or 8,
                *common,
                lambda shape=shape: one_block_model(shape),  # type: ignore[misc]
                chosen.cache,
            )


if __name__ == "__main__":
    main()
