"""Why a method lost its answers: what a run's own files say of scope, clipping, parsing and format.

    python -m experiments.collapse runs/tiny_omni-rtn-w4a4-mini-*

Of every run it prints what became of the answers by modality (``samples.parquet``), where the error
enters (``errors.parquet``, means over layers and modalities of the SQNR in dB), how much of it is
clipping, the share of channels that a shared step silences (``channels.parquet``), and what the
manifest says was quantized.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pandas as pd


def answers(run: Path) -> pd.DataFrame:
    """Per modality: questions, right in %, empty, without a choice, and the tokens of an answer.

    ``bare`` answers name a choice in words that the stock parser does not take for one.
    """
    found = pd.read_parquet(run / "samples.parquet")
    found["bare"] = found["unparsed"] & ~found["empty"] & (found["output_tokens"] <= 4)
    grouped = found.groupby("modality")
    rows = grouped[["empty", "unparsed", "bare"]].sum()
    rows.insert(0, "questions", grouped.size())
    rows.insert(1, "right %", (100 * grouped["correct"].mean()).round(1))
    rows["tokens"] = grouped["output_tokens"].mean().round(1)
    return rows.reset_index()


def errors(run: Path) -> pd.DataFrame:
    """Per input group: SQNR of its input and of its outputs, from activations and from weights."""
    columns = {
        "activation_sqnr_db": "input dB",
        "output_sqnr_db": "output dB",
        "output_sqnr_activation_db": "of activations dB",
        "output_sqnr_weight_db": "of weights dB",
        "clip_energy_share": "clipped share",
    }
    found = pd.read_parquet(run / "errors.parquet")
    rows = found.groupby("group")[list(columns)].mean().rename(columns=columns).round(2)
    rows["silenced %"] = silenced(run)
    return rows.reset_index()


def silenced(run: Path) -> pd.Series:
    """Per input group: channels in % that a step shared by all channels rounds to zero.

    A channel is silenced where its largest value is below half the step that the layer's largest
    value asks for. It is what a range per token does to tokens that hold that value.
    """
    manifest = json.loads((run / "manifest.json").read_text())
    bits = manifest["linears"][0]["activation"]["bits"]
    columns = ["layer", "group", "channel", "absmax"]
    found = pd.read_parquet(run / "channels.parquet", columns=columns)
    largest = found.groupby(columns[:3])["absmax"].max()
    step = largest.groupby(["layer", "group"]).transform("max") / (2 ** (bits - 1) - 1)
    return (100 * (largest < step / 2).groupby("group").mean()).round(1)


def markdown(rows: pd.DataFrame) -> str:
    """A table whose first column holds names and all others numbers."""
    lines = [list(rows.columns), ["---", *["---:"] * (rows.shape[1] - 1)]]
    lines += [[f"{value}" for value in row] for row in rows.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    for run in parser.parse_args().runs:
        if not (run / "errors.parquet").exists():
            parser.error(f"{run} has no errors.parquet: a finished run with statistics is needed")
        scope = json.loads((run / "result.json").read_text())["scope"]
        print(f"\n{run.name}: {scope['linears']} linears, scope {scope['hash'][:12]}\n")
        for rows in (answers(run), errors(run)):
            print(markdown(rows) + "\n")


if __name__ == "__main__":
    main()
