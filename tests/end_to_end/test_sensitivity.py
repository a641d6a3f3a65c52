"""A real sweep over units, and its suggestion as a run of its own."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

BUDGET = 6.5
SWEEP = [
    "experiment=sensitivity",
    "unit_kind=block",
    "model.scope.only=[model.layers.0.*,model.layers.3.*]",
    "bits.weight=3",
    "bits.activation=3",
    f"sensitivity.budget={BUDGET}",
    "sensitivity.widths=[3,8]",
    "benchmark=mini_scienceqa",
    "limit=4",
    "calibration.samples=5",
    "statistics.kl_probes=1",
    "tracker=none",
]


def result_of(runs: Path, scheme: str) -> dict[str, Any]:
    (path,) = runs.glob(f"tiny_omni-rtn-{scheme}-mini_scienceqa-*/result.json")
    return {**json.loads(path.read_text()), "path": path.parent}


def test_a_sweep_over_units_and_its_suggestion(
    command_line: Callable[..., Any], tmp_path: Path
) -> None:
    def run(folder: Path, arguments: list[str]) -> str:
        found = command_line(folder, *arguments)
        assert found.returncode == 0, found.stderr
        return str(found.stdout)

    runs = tmp_path / "runs"
    paths = [f"paths.runs={runs}", f"paths.cache={tmp_path / 'cache'}"]
    said = run(tmp_path, [*SWEEP, *paths])

    (sweep,) = runs.glob("sweeps/*")
    frame = pd.read_csv(sweep / "table.csv")
    assert frame["unit"].iloc[0] == "all"
    assert set(frame["unit"]) == {"all", "decoder.0", "decoder.3"}
    assert (frame["KL"] > 0).all()
    assert list(frame["weights"]) == pytest.approx([100, 50, 50])
    assert (sweep / "sensitivity.png").stat().st_size > 5000
    assert len(list(runs.glob("tiny_omni-fp16-*"))) == 1, "one reference for all units"

    command = next(line for line in said.splitlines() if line.startswith("Run the first: "))
    arguments = shlex.split(command.removeprefix("Run the first: python run.py "))
    run(tmp_path, arguments)
    mixed = result_of(runs, "w*mix-*")
    assert mixed["bits"]["weight"] <= BUDGET
    assert mixed["bits"]["activation"] <= BUDGET
    head = (sweep / "bits" / "suggestion.yaml").read_text().splitlines()[2]
    assert f"{mixed['bits']['weight']:.2f} weight" in head
    assert f"{mixed['bits']['activation']:.2f} activation" in head
    manifest = json.loads((mixed["path"] / "manifest.json").read_text())
    dear = frame.set_index("unit")["KL"].drop("all").idxmax().removeprefix("decoder.")
    widths = {
        (record["name"].split(".")[2], record["weight"]["bits"], record["activation"]["bits"])
        for record in manifest["linears"]
    }
    cheap = ({"0", "3"} - {dear}).pop()
    assert widths == {(dear, 8, 8), (cheap, 3, 3)}
    assert mixed["logits"]["kl"] < float(frame.set_index("unit").loc["all", "KL"])
