"""Table 2, latency: what this machine measures beside what the paper prints.

    python -m experiments.table2                       # a layer of Qwen2.5-Omni-3B
    python -m experiments.table2 --size 7b --tokens 512 --threads 16
    python -m experiments.table2 --device cuda --size 8192 --tokens 8192

A latency comes from a path that computes in low precision, with device, shape, batch and phase
beside it (``experiments/latency.py`` says what each row does). What needs a GPU is measured where
there is one; elsewhere the table says that it is missing. Files: ``table2.csv`` and ``table2.md``
below ``--output``.
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from experiments.latency import SHAPES, Group, make_group, time_layer
from morphoquant.analysis.published import published_table
from morphoquant.analysis.table import Report
from morphoquant.tracking.progress import progress

TITLE = "Table 2: latency, measured beside published"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PROTOCOL = (
    "Measured: the linears of one decoder layer (or the one linear named by its width), static "
    "ranges per channel folded into the weight, every hundredth channel compensated in a 16-bit "
    "panel; 4-bit codes lie in int8 containers, so weights take 8 bits of memory and no 4-bit "
    "instruction is used. Random weights and activations: no accuracy follows from this table.",
    "'integer' includes rounding the activations, scales and the panel; 'integer product' leaves "
    "all of that out. Only the former can be compared with the reference.",
    "Published: one latency per GPU, unit not printed, no shape, batch or phase. The 16-bit "
    "numbers equal 2 x 8192^3 operations at 72 and 112 TFLOP/s, the shape of a stand-alone script "
    "of the public implementation that multiplies 8-bit random integers, with rounding and gather "
    "outside the timed region: neither 4-bit nor a layer of Qwen2.5-Omni (SPEC 2.14, D-20).",
    "The public implementation's own 4-bit kernel is slower than 16 bits by its authors' log "
    "(SPEC 2.14, D-19).",
)


def device_name(device: torch.device) -> str:
    """What the rows are called after."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    count = torch.get_num_threads()
    found = Path("/proc/cpuinfo")
    model = platform.processor() or platform.machine()
    if found.is_file():
        names = [
            r.split(":", 1)[1].strip() for r in found.read_text().splitlines() if "model name" in r
        ]
        model = names[0] if names else model
    return f"{model}, {count} thread{'s' if count > 1 else ''}"


def measure(
    size: str,
    phases: dict[str, int],
    dtype: str,
    device: torch.device,
    rounds: int,
    bits: int,
    seconds: float = 0.5,
) -> pd.DataFrame:
    """One row per phase and execution.

    Args:
        size: one of ``SHAPES``.
        phases: name -> rows of the activation.
        dtype: of the reference, one of ``DTYPES``.
        device: where to measure.
        rounds: measurements of every execution, taking turns.
        bits: of weights and activations.
        seconds: of one measurement, about.

    Returns:
        Columns ``device``, ``shape``, ``phase``, ``tokens``, ``execution``, ``latency_ms``
        (median of the rounds), ``low_ms`` and ``high_ms`` (fastest and slowest round),
        ``speedup`` over the reference, ``panel`` (share of channels in 16 bits).
    """
    shapes = SHAPES[size].groups()
    groups: dict[str, Group] = {}
    with progress("Making the layer", len(shapes), unit="input groups") as step:
        for seed, (name, (outputs, channels)) in enumerate(shapes.items()):
            groups[name] = make_group(outputs, channels, DTYPES[dtype], device, bits, seed)
            step(1)
    panel = sum(g.kappa for g in groups.values()) / sum(g.channels for g in groups.values())
    rows: list[dict[str, Any]] = []
    with progress("Timing", len(phases), unit="phases") as step:
        for phase, tokens in phases.items():
            times = time_layer(groups, tokens, device, rounds, seconds)
            base = pd.Series(times["reference"]).median()
            for name, found in times.items():
                values = pd.Series(found)
                rows.append(
                    {
                        "device": device_name(device),
                        "shape": size,
                        "phase": phase,
                        "tokens": tokens,
                        "execution": dtype if name == "reference" else name,
                        "latency_ms": values.median(),
                        "low_ms": values.min(),
                        "high_ms": values.max(),
                        "speedup": base / values.median(),
                        "panel": panel,
                    }
                )
            step(1)
    return pd.DataFrame(rows)


def published() -> pd.DataFrame:
    """The paper's rows in the columns of :func:`measure`, as far as it gives them."""
    printed = published_table("table2")
    return pd.DataFrame(
        {
            "device": printed["gpu"],
            "execution": printed["execution"],
            "latency_ms": printed["layer_latency_ms"],
            "speedup": printed["speedup_over_fp16"],
        }
    )


def table2(measured: pd.DataFrame, bits: int) -> Report:
    """Measured and published rows under each other, told apart by ``source``."""
    frame = pd.concat(
        [measured.assign(source="measured"), published().assign(source="published")],
        ignore_index=True,
    )
    frame = frame[["source", *(c for c in frame.columns if c != "source")]]
    cells = pd.DataFrame(
        {
            "source": frame["source"],
            "device": frame["device"],
            "shape": frame["shape"].fillna("–"),
            "phase": frame["phase"].fillna("–"),
            "tokens": ["–" if pd.isna(n) else str(int(n)) for n in frame["tokens"]],
            "execution": frame["execution"],
            "latency ms": [
                f"{m:.3g}" if pd.isna(low) else f"{m:.3g} ({low:.3g} to {high:.3g})"
                for m, low, high in zip(
                    frame["latency_ms"], frame["low_ms"], frame["high_ms"], strict=True
                )
            ],
            "speed-up": [f"{s:.2f}×" for s in frame["speedup"]],
        }
    )
    notes = [f"W{bits}A{bits}; median (fastest to slowest round); executions take turns."]
    notes += PROTOCOL
    if not torch.cuda.is_available():
        notes.append("No GPU here: its rows are missing. The same command measures them on one.")
    if "integer" not in set(measured["execution"]):
        notes.append("This device has no 8-bit integer product: no integer row was measured.")
    return Report(TITLE, frame, cells, notes)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=list(SHAPES), default="3b")
    parser.add_argument("--tokens", type=int, default=256, help="rows in prefill (batch 1)")
    parser.add_argument("--batch", type=int, default=1, help="rows in decoding")
    parser.add_argument("--bits", type=int, choices=range(2, 9), default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default=None, help="of the reference")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("runs/table2"))
    chosen = parser.parse_args()
    for name in ("tokens", "batch", "rounds"):
        if getattr(chosen, name) < 1:
            parser.error(f"--{name} {getattr(chosen, name)}: at least 1")
    if chosen.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; leave it out to measure the CPU")
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    device = torch.device(chosen.device)
    dtype = chosen.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    phases = {"prefill": chosen.tokens, "decode": chosen.batch}
    with torch.inference_mode():
        found = measure(chosen.size, phases, dtype, device, chosen.rounds, chosen.bits)
    report = table2(found, chosen.bits)
    report.show()
    chosen.output.mkdir(parents=True, exist_ok=True)
    report.frame.to_csv(chosen.output / "table2.csv", index=False)
    (chosen.output / "table2.md").write_text(report.markdown(), encoding="utf-8")
    print(f"Table: {chosen.output / 'table2.md'} and table2.csv")


if __name__ == "__main__":
    main()
