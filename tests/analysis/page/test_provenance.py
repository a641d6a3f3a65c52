"""A run that agrees with itself passes every check, and each check fails on what it is for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from morphoquant.analysis.page import provenance
from morphoquant.analysis.page.gather import Run, gather


def read(runs: Any, method: str = "rtn") -> Run:
    return next(run for run in gather([runs.root]).runs if run.result["method"] == method)


def edit(folder: Path, file: str, change: Any) -> None:
    found = json.loads((folder / file).read_text())
    change(found)
    (folder / file).write_text(json.dumps(found))


def failing(run: Run) -> list[str]:
    return [check.claim for check in provenance.checks(run) if not check.holds]


def answers(folder: Path) -> None:
    frame = pd.read_parquet(folder / "samples.parquet")
    frame.loc[0, "correct"] = 0.0
    frame.to_parquet(folder / "samples.parquet")


def ids(folder: Path) -> None:
    frame = pd.read_parquet(folder / "samples.parquet")
    frame.loc[0, "id"] = "mmmu/another"
    frame.to_parquet(folder / "samples.parquet")


DAMAGES = {
    "fingerprint": lambda f: edit(f, "identity.json", lambda i: i["config"].update(seed=1)),
    "question hash": ids,
    "accuracy by benchmark": answers,
    "accuracy by modality": answers,
    "the mean": lambda f: edit(f, "result.json", lambda r: r.update(mean=99.0)),
    "unparsed": lambda f: edit(
        f, "result.json", lambda r: r["accuracy"]["mmmu"].update(unparsed=3)
    ),
    "weight bits": lambda f: edit(f, "result.json", lambda r: r["bits"].update(weight=4.0)),
    "activation bits": lambda f: edit(
        f, "manifest.json", lambda m: m["linears"][0]["activation"].update(effective_bits=16.0)
    ),
    "every linear": lambda f: edit(f, "manifest.json", lambda m: m["linears"][2].update(calls=0)),
    "disjoint": lambda f: edit(f, "result.json", lambda r: r["calibration"].update(leaked=2)),
}


def test_a_whole_run_holds_and_so_does_the_unquantized(compared: Any) -> None:
    for method in ("fp16", "rtn"):
        assert failing(read(compared, method)) == []
    claims = " ".join(check.claim for check in provenance.checks(read(compared)))
    assert all(words in claims for words in DAMAGES), "every check is tried below"


@pytest.mark.parametrize("words", DAMAGES)
def test_every_check_fails_on_its_own_damage(runs: Any, words: str) -> None:
    DAMAGES[words](runs.add("rtn"))
    found = failing(read(runs))
    assert any(words in claim for claim in found), found
    assert len(found) <= 2


def test_activation_bits_count_every_input_once_by_its_traffic() -> None:
    def row(name: str, group: str, width: int, tokens: int, bits: float) -> dict[str, Any]:
        return {"name": name, "group": group, "in_features": width, "out_features": 10} | {
            "tokens": tokens,
            "activation": {"effective_bits": bits},
            "weight": {"effective_bits": bits},
        }

    rows = [row("a.q", "attn_in", 8, 100, 4.0), row("a.k", "attn_in", 8, 100, 4.0)]
    rows.append(row("a.down", "mlp_out", 24, 100, 8.0))
    assert provenance.activation_bits(rows) == pytest.approx((8 * 4 + 24 * 8) / 32)
    assert provenance.weight_bits(rows) == pytest.approx((8 * 4 * 2 + 24 * 8) / 40)


def test_the_manifest_reads_as_words() -> None:
    words = provenance._words
    assert words({"format": "none", "bits": 16, "effective_bits": 16.0}) == "16-bit float"
    weight = {"format": "nf4", "bits": 4, "granularity": "per_group", "group_size": 64}
    assert words({**weight, "double_quantization": True}) == "nf4 per-group 64, double quantization"
    activation = {"format": "int", "bits": 4, "granularity": "per_token", "mode": "dynamic"}
    shown = words({**activation, "range": "mdqfo", "ratio_min": 0.6000000238, "symmetric": False})
    assert shown == "int4 per-token dynamic, mdqfo, ratio min 0.6"
