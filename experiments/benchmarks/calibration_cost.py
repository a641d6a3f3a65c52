"""What MorphoQuant's calibration and range search cost, in plain forward passes.

    python -m experiments.benchmarks.calibration_cost             # both sizes
    python -m experiments.benchmarks.calibration_cost --size 3b --tokens 2048

``embedded`` is the shipped small model with its calibration data; ``3b`` is one decoder block with
the shapes of Qwen2.5-Omni-3B and random weights. The ratio is the time of the walk (statistics,
masks, search; activations of every input group seen once) over the time of a plain forward pass
over the same prompts. Rounding the weights is timed apart: it depends on no data.
"""

from __future__ import annotations

import argparse
import resource
from pathlib import Path
from typing import Any

import torch

from experiments.benchmarks.blocks import (
    SHAPES,
    embedded_model,
    fastest,
    linears,
    one_block_model,
)
from morphoquant.calibration.samples import batches, load_samples
from morphoquant.calibration.walk import Segment, run_block, walk
from morphoquant.config.schema import (
    ActivationConfig,
    BitsConfig,
    CalibrationConfig,
    CalibrationSource,
    CompensationConfig,
    MethodConfig,
    RangeConfig,
    WeightConfig,
)
from morphoquant.models.qwen_omni import text_model
from morphoquant.models.structure import Block, Modality
from morphoquant.quantization.engine import (
    PROBE,
    PROBE_QUANTIZED,
    SEARCH,
    STATISTICS,
    BlockQuantizer,
)
from morphoquant.quantization.weights import quantize_weight

BITS = BitsConfig(weight=4, activation=4)
SOURCES = (
    ("mmmu", "mini:mmmu"),
    ("scienceqa", "mini:scienceqa"),
    ("videomme", "mini:videomme"),
    ("air_bench", "mini:air_bench_sound"),
    ("air_bench", "mini:air_bench_music"),
)


def morphoquant(chunk_mb: int) -> MethodConfig:
    """The clean preset (``conf/method/morphoquant.yaml``)."""
    return MethodConfig(
        name="morphoquant",
        weight=WeightConfig(format="nf4", fallback_format="int"),
        activation=ActivationConfig(
            format="int",
            granularity="per_channel",
            mode="static",
            range=RangeConfig(name="mdqfo", chunk_mb=chunk_mb),
        ),
        compensation=CompensationConfig(name="dabc"),
    )


def peak_mb() -> float:
    """The process's largest resident size so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def embedded(repeats: int, chunk_mb: int, cache: Path) -> None:
    """The shipped model and its calibration data."""
    from morphoquant.embedded.benchmarks import build

    calibration = load_samples(
        CalibrationConfig(
            name="mini", sources=tuple(CalibrationSource(reader=r, path=p) for r, p in SOURCES)
        ),
        build(cache / "mini"),
    )
    adapter = embedded_model()

    def encoded(samples: Any) -> list[Any]:
        return [adapter.encode([s.messages for s in group]) for group in batches(samples, 8)]

    sets = {STATISTICS: encoded(calibration.samples), SEARCH: encoded(calibration.search)}
    plain = fastest(
        lambda: [adapter.logits(b) for group in sets.values() for b in group], lambda: None, repeats
    )
    originals = {b.name: linears(b) for b in _all(adapter)}

    def restore() -> None:
        for block in _all(adapter):
            for name, module in originals[block.name].items():
                block.replace(name, module)

    method = morphoquant(chunk_mb)
    modules = [m for found in originals.values() for m in found.values()]
    weights = fastest(
        lambda: [quantize_weight(m.weight, method.weight, 4) for m in modules],
        lambda: None,
        repeats,
    )

    def quantize(**more: Any) -> None:
        quantizer = BlockQuantizer(method, BITS, **more)
        walk(adapter, ("decoder",), sets, quantizer)

    def with_atlas() -> None:
        quantizer = BlockQuantizer(method, BITS, histograms=True)
        probes = sets[STATISTICS][:4]
        walk(
            adapter,
            ("decoder",),
            {**sets, PROBE: probes, PROBE_QUANTIZED: probes},
            quantizer,
            early=(PROBE,),
        )

    bare = fastest(lambda: quantize(observe=False), restore, repeats)
    atlas = fastest(with_atlas, restore, repeats)
    report("embedded model, float64, 1 thread, 128 + 32 prompts", plain, weights, bare, atlas)


def _all(adapter: Any) -> tuple[Block, ...]:
    found: tuple[Block, ...] = adapter.blocks("decoder")
    return found


def block_3b(repeats: int, chunk_mb: int, tokens: int) -> None:
    """One decoder block of Qwen2.5-Omni-3B's shapes, random weights, float32."""
    adapter = one_block_model(SHAPES["3b"])
    block = _all(adapter)[0]
    rotary = text_model(adapter.model).rotary_emb
    originals = linears(block)
    length = 256

    def segments(count: int) -> list[Segment]:
        found = []
        for _ in range(max(1, count // (4 * length))):
            hidden = torch.randn(4, length, 2048)
            hidden[..., ::200] *= 30
            at = torch.arange(length).expand(3, 4, -1)
            keywords = {"position_embeddings": rotary(hidden, at), "attention_mask": None}
            labels = torch.full((4, length), int(Modality.TEXT), dtype=torch.int8)
            labels[:, : length // 2] = int(Modality.IMAGE)
            found.append(Segment(hidden, labels, [((), keywords)]))
        return found

    drawn = {STATISTICS: segments(tokens), SEARCH: segments(tokens // 4)}
    kept = {name: [s.hidden for s in group] for name, group in drawn.items()}

    def restore() -> None:
        for name, module in originals.items():
            block.replace(name, module)
        for name, group in drawn.items():
            for segment, hidden in zip(group, kept[name], strict=True):
                segment.hidden = hidden

    method = morphoquant(chunk_mb)
    with torch.no_grad():
        plain = fastest(
            lambda: [run_block(block, 0, s) for group in drawn.values() for s in group],
            lambda: None,
            repeats,
        )
        weights = fastest(
            lambda: [quantize_weight(m.weight, method.weight, 4) for m in originals.values()],
            lambda: None,
            1,
        )
        before = peak_mb()

        def quantize(**more: Any) -> None:
            BlockQuantizer(method, BITS, **more).visit(0, block, dict(drawn))

        bare = fastest(lambda: quantize(observe=False), restore, repeats)
        memory = peak_mb() - before
        atlas = fastest(lambda: quantize(histograms=True), restore, repeats)
    count = sum(s.labels.numel() for group in drawn.values() for s in group)
    threads = torch.get_num_threads()
    title = f"one 3B block, float32, {threads} threads, {count} tokens"
    report(title, plain, weights, bare, atlas)
    print(f"  memory above a forward pass's peak: {memory:.0f} MiB (search chunk {chunk_mb} MiB,")
    print("  the rounded copy of the block's weights included)")


def report(title: str, plain: float, weights: float, bare: float, atlas: float) -> None:
    """Print one size's figures; ratios come from this run alone."""
    search = bare - weights
    print(f"{title}")
    print(f"  plain forward            {plain:8.3f} s")
    print(f"  calibration + search     {search:8.3f} s   {search / plain:5.2f} x the forward")
    print(
        f"  ... with the atlas       {atlas - weights:8.3f} s   {(atlas - weights) / plain:5.2f} x"
    )
    print(f"  rounding the weights     {weights:8.3f} s   {weights / plain:5.2f} x")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=["embedded", "3b", "both"], default="both")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--tokens", type=int, default=4096, help="statistics tokens of the 3b block"
    )
    parser.add_argument("--chunk-mb", type=int, default=256)
    parser.add_argument("--cache", type=Path, default=Path(".cache/morphoquant"))
    chosen = parser.parse_args()
    if chosen.size in ("3b", "both"):
        block_3b(chosen.repeats, chosen.chunk_mb, chosen.tokens)
    if chosen.size in ("embedded", "both"):
        embedded(chosen.repeats, chosen.chunk_mb, chosen.cache)


if __name__ == "__main__":
    main()
