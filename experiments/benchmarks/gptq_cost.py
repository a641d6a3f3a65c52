"""What GPTQ costs on one layer, beside llm-compressor's implementation where that is installed.

    python -m experiments.benchmarks.gptq_cost                                # 2048 x 11008
    python -m experiments.benchmarks.gptq_cost --outputs 1024 --inputs 4096 --granularity per_group

The default is ``down_proj`` of Qwen2.5-Omni-3B. Weights and activations are random, the latter
correlated with a few outlier channels. Both implementations get the same second moments and
static scales from minima and maxima; each keeps its own symmetric grid (15 and 16 levels), so
errors of ``--asymmetric`` runs are the ones to compare. Errors are relative to rounding to
nearest.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from morphoquant.compat import prepare_torchvision
from morphoquant.formats.weights import fake_quantize_weight
from morphoquant.quantization.gptq import Hessian, gptq

Rounded = Callable[[], torch.Tensor]


def activations(tokens: int, channels: int, draw: torch.Generator) -> torch.Tensor:
    """[tokens, channels], float32: 64 shared directions, noise, every 200th channel 30 times."""
    shared = torch.randn(64, channels, generator=draw) / 8
    x = torch.randn(tokens, 64, generator=draw) @ shared
    x += torch.randn(tokens, channels, generator=draw) / 2
    x[:, ::200] *= 30
    return x


def reference(
    weight: torch.Tensor, hessian: torch.Tensor, bits: int, symmetric: bool, group: int | None
) -> Rounded | None:
    """llm-compressor's GPTQ with its own scales, or None where it is not installed."""
    prepare_torchvision()
    try:
        from compressed_tensors.quantization import QuantizationArgs
        from compressed_tensors.quantization.utils import calculate_qparams
        from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
    except ImportError:
        return None
    arguments = QuantizationArgs(
        num_bits=bits,
        symmetric=symmetric,
        strategy="channel" if group is None else "group",
        group_size=group,
    )

    def run() -> torch.Tensor:
        parts = weight.reshape(len(weight), -1, group or weight.shape[1])
        scale, zero = calculate_qparams(parts.amin(-1), parts.amax(-1), arguments)
        found, _, fallback = quantize_weight(  # it works in place
            weight[None].clone(), hessian[None].clone(), scale[None], zero[None], None, arguments
        )
        if fallback.any():
            raise RuntimeError("llm-compressor fell back to rounding to nearest")
        rounded: torch.Tensor = found[0]
        return rounded

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--outputs", type=int, default=2048)
    parser.add_argument("--inputs", type=int, default=11008)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument(
        "--granularity", choices=["per_channel", "per_group"], default="per_channel"
    )
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    group = chosen.group_size if chosen.granularity == "per_group" else None
    if group is not None and chosen.inputs % group:
        parser.error("llm-compressor needs --inputs to be a multiple of --group-size")
    symmetric = not chosen.asymmetric
    draw = torch.Generator().manual_seed(chosen.seed)
    weight = 0.02 * torch.randn(chosen.outputs, chosen.inputs, generator=draw)
    moments = Hessian(chosen.inputs)
    seconds = 0.0
    for start in range(0, chosen.tokens, 1024):
        x = activations(min(1024, chosen.tokens - start), chosen.inputs, draw)
        begin = time.perf_counter()
        moments.update(x)
        seconds += time.perf_counter() - begin
    hessian = moments.value()
    del moments

    def nearest() -> torch.Tensor:
        return fake_quantize_weight(
            weight, chosen.bits, chosen.granularity, chosen.group_size, symmetric
        ).dequantized

    def rounded(**options: bool) -> Rounded:
        return lambda: (
            gptq(
                weight,
                hessian,
                chosen.bits,
                chosen.granularity,
                chosen.group_size,
                symmetric,
                **options,
            ).dequantized
        )

    def error(found: torch.Tensor) -> float:
        lost = found - weight
        return float(torch.einsum("nk,nk->", lost @ hessian, lost))

    rows: dict[str, Rounded | None] = {
        "gptq": rounded(static_groups=True),
        "gptq, refreshed groups": None if group is None else rounded(),
        "gptq, act order": rounded(act_order=True),
        "llm-compressor": reference(weight, hessian, chosen.bits, symmetric, group),
    }
    plain = error(nearest())
    kind = "symmetric" if symmetric else "asymmetric"
    print(
        f"[{chosen.outputs}, {chosen.inputs}], {chosen.bits} bits, {chosen.granularity}, {kind}, "
        f"{torch.get_num_threads()} threads, {chosen.tokens} tokens"
    )
    print(f"  {'second moments':24s} {seconds:8.2f} s")
    for name, work in rows.items():
        if work is None:
            if name == "llm-compressor":
                print(f"  {name:24s} not installed")
            continue
        best = float("inf")
        for _ in range(chosen.repeats):
            begin = time.perf_counter()
            found = work()
            best = min(best, time.perf_counter() - begin)
        print(f"  {name:24s} {best:8.2f} s   output error {error(found) / plain:6.4f} x nearest")


if __name__ == "__main__":
    main()
