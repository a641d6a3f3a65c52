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

import torch

from experiments.benchmarks.rivals import Rounded, activations, their_gptq
from morphoquant.formats.weights import fake_quantize_weight
from morphoquant.quantization.gptq import Hessian, gptq


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
        "llm-compressor": their_gptq(weight, hessian, chosen.bits, symmetric, group),
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
