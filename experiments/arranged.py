"""What it is worth to arrange tokens by modality (MQuant's AIFS, its table 10), on this machine.

    python -m experiments.arranged                     # a layer of Qwen2.5-Omni-3B
    python -m experiments.arranged --size 7b --tokens 2048 --threads 16

The linears of one decoder layer in integers, with one static activation scale per modality, on a
prompt of pictures between text. Executions of the same sums:

- ``one scale``: all tokens share one, as if they were of one modality;
- ``in place``: tokens lie as in the prompt; every linear gathers those of a modality, multiplies
  and puts the outputs back;
- ``arranged``: tokens were brought into runs before the first layer (not timed: once per prompt),
  and every product reads a slice.

Random weights and activations: no accuracy follows. Files: ``arranged.csv`` and ``arranged.md``
below ``--output``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import torch

from experiments.latency import SHAPES, Group, activations, agree, time_layer
from experiments.table2 import device_name
from morphoquant.analysis.table import Report
from morphoquant.formats import fake_quantize_weight
from morphoquant.models.structure import MODALITIES, Modality
from morphoquant.quantization.arrange import Arrangement
from morphoquant.quantization.integer_modality import ModalityIntegerLinear
from morphoquant.quantization.ranges import StaticRange

TITLE = "AIFS: integer products per modality, arranged and not"
PICTURE, BETWEEN = 96, 16  # tokens of a picture, and of the text before it


def interleaved(tokens: int) -> torch.Tensor:
    """int8 [1, tokens]: text, a picture, text, a picture, ..."""
    places = torch.arange(tokens) % (PICTURE + BETWEEN)
    kinds = torch.where(places < BETWEEN, int(Modality.TEXT), int(Modality.IMAGE))
    return kinds.to(torch.int8)[None]


def make_group(
    outputs: int, channels: int, tokens: int, device: torch.device, bits: int, seed: int
) -> Group:
    """The executions of one input group.

    Args:
        outputs, channels: of the linears that read it, together.
        tokens: of the prompt.
        device: where everything lives.
        bits: of weights and activations.
        seed: of weights and activations.

    Raises:
        RuntimeError: the device has no product on 8-bit integers that takes these widths, or
            executions disagree.
    """
    draw = torch.Generator().manual_seed(seed)
    weight = (torch.randn(outputs, channels, generator=draw) / channels**0.5).to(device)
    x = activations(tokens, channels, device, seed)
    edge = x.abs().max() * torch.linspace(1.0, 0.2, 1 + len(MODALITIES), device=device)[:, None]
    grid = StaticRange(-edge, edge, torch.zeros_like(edge, dtype=torch.bool)).grid(bits)
    linear = ModalityIntegerLinear(fake_quantize_weight(weight, bits), grid).to(device)
    if not linear.pack():
        raise RuntimeError(f"{device} has no 8-bit integer product for codes of {bits} bits")
    labels = interleaved(tokens).to(device)
    mixed, single = Arrangement.of(labels), Arrangement.of(torch.zeros_like(labels))

    def in_place(x: torch.Tensor) -> torch.Tensor:
        return mixed.undo(linear(mixed.apply(x[None]), mixed))[0]

    def arranged(x: torch.Tensor) -> torch.Tensor:
        return linear(x[None], mixed)[0]

    agree(in_place(x), mixed.undo(arranged(mixed.apply(x[None])[0])[None])[0])
    executions = {
        "one scale": lambda x: linear(x[None], single)[0],
        "in place": in_place,
        "arranged": arranged,
    }
    return Group(executions, channels, 0)


def measure(
    size: str, tokens: int, device: torch.device, rounds: int, bits: int, seconds: float = 0.5
) -> pd.DataFrame:
    """One row per execution: ``latency_ms`` (median), ``low_ms``, ``high_ms``, ``over_one``.

    Args:
        size: one of ``SHAPES``.
        tokens: of the prompt (batch 1).
        device: where to measure.
        rounds: measurements of every execution, taking turns.
        bits: of weights and activations.
        seconds: of one measurement, about.
    """
    shapes = SHAPES[size].groups()
    groups = {
        name: make_group(outputs, channels, tokens, device, bits, seed)
        for seed, (name, (outputs, channels)) in enumerate(shapes.items())
    }
    times = pd.DataFrame(time_layer(groups, tokens, device, rounds, seconds))
    frame = pd.DataFrame(
        {"latency_ms": times.median(), "low_ms": times.min(), "high_ms": times.max()}
    )
    frame["over_one"] = frame["latency_ms"] / frame["latency_ms"]["one scale"]
    frame.insert(0, "tokens", tokens)
    frame.insert(0, "shape", size)
    frame.insert(0, "device", device_name(device))
    return frame.rename_axis("execution").reset_index()


def table(frame: pd.DataFrame, bits: int) -> Report:
    """The rows of :func:`measure` as they are read."""
    cells = frame[["device", "shape", "tokens", "execution"]].astype(str)
    cells["latency ms"] = [
        f"{row.latency_ms:.3g} ({row.low_ms:.3g} to {row.high_ms:.3g})"
        for row in frame.itertuples()
    ]
    cells["over one scale"] = [f"{ratio:.2f}×" for ratio in frame["over_one"]]
    notes = [
        f"W{bits}A{bits}; median (fastest to slowest round); executions take turns. The linears of "
        f"one decoder layer in prefill, batch 1: {BETWEEN} tokens of text before every {PICTURE} "
        "of a picture.",
        "Published (MQuant, table 10; Qwen2-VL, another GPU, shape and weights of 4 bits): 1.016 s "
        "with one scale, 1.085 s with MSQ alone, 1.017 s with AIFS.",
    ]
    return Report(TITLE, frame, cells, notes)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=list(SHAPES), default="3b")
    parser.add_argument("--tokens", type=int, default=1024, help="of the prompt (batch 1)")
    parser.add_argument("--bits", type=int, choices=range(2, 9), default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("runs/arranged"))
    chosen = parser.parse_args()
    for name in ("tokens", "rounds"):
        if getattr(chosen, name) < 1:
            parser.error(f"--{name} {getattr(chosen, name)}: at least 1")
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    with torch.inference_mode():
        device = torch.device(chosen.device)
        found = measure(chosen.size, chosen.tokens, device, chosen.rounds, chosen.bits)
    report = table(found, chosen.bits)
    report.show()
    chosen.output.mkdir(parents=True, exist_ok=True)
    report.frame.to_csv(chosen.output / "arranged.csv", index=False)
    (chosen.output / "arranged.md").write_text(report.markdown(), encoding="utf-8")
    print(f"Table: {chosen.output / 'arranged.md'} and arranged.csv")


if __name__ == "__main__":
    main()
