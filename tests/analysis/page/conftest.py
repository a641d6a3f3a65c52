"""Run directories as a run leaves them, with answers and tables of a few kilobytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from morphoquant.analysis.page import gather, render
from morphoquant.tracking.fingerprint import fingerprint

GROUPS = ("attn_in", "attn_out", "mlp_in", "mlp_out")
MODALITIES = ("text", "image", "video", "audio")
LAYERS = [f"model.layers.{i}" for i in range(3)]
QUESTIONS = 24
Answer = Callable[[int], str]


def questions() -> pd.DataFrame:
    """Twelve of MMMU (text, image), then four clips of three questions each."""
    rows = [
        {"benchmark": "mmmu", "task": "mini_mmmu", "doc_id": i, "id": f"mmmu/q{i}"}
        | {"modality": ("text", "image")[i % 2], "target": "ABCD"[i % 4]}
        for i in range(12)
    ]
    rows += [
        {"benchmark": "videomme", "task": "mini_videomme", "doc_id": i}
        | {"id": f"videomme/clip{i // 3}-{i % 3 + 1}", "modality": "video", "target": "A"}
        for i in range(QUESTIONS - 12)
    ]
    return pd.DataFrame(rows)


def answered(says: Answer, limit: int) -> pd.DataFrame:
    """Answers ``A. word``; an empty one is unparsed and wrong."""
    frame = questions().iloc[:limit].copy()
    texts = [says(i) for i in range(limit)]
    frame["answer"] = texts
    frame["parsed"] = [text[:1] for text in texts]
    frame["correct"] = (frame["parsed"] == frame["target"]).astype(float)
    frame["empty"] = frame["unparsed"] = [not text for text in texts]
    frame["output_tokens"] = 4
    return frame


def right(i: int) -> str:
    return f"{questions()['target'][i]}. right"


def scores(samples: pd.DataFrame, column: str) -> dict[str, dict[str, Any]]:
    return {
        str(name): {
            "value": 100 * float(rows["correct"].mean()),
            "n": len(rows),
            "stderr": 1.0,
            "empty": int(rows["empty"].sum()),
            "unparsed": int(rows["unparsed"].sum()),
        }
        for name, rows in samples.groupby(column, sort=False)
    }


def linears(quantizes: bool) -> list[dict[str, Any]]:
    bits, effective = (4, 4.25) if quantizes else (16, 16.0)
    told = {"format": "int" if quantizes else "none", "bits": bits, "effective_bits": effective}
    return [
        {"name": f"{layer}.{group}_proj", "tower": "decoder", "group": group}
        | {"in_features": 8 * (1 + i), "out_features": 16, "weight": told}
        | {"activation": told | {"granularity": "per_token"}, "compensation": {}}
        | {"online_transform": None, "calls": 3 * quantizes, "tokens": 90 * quantizes}
        for layer in LAYERS
        for i, group in enumerate(GROUPS)
    ]


def statistics(folder: Path, names: tuple[str, ...]) -> None:
    """Some of the parquet tables that figures are drawn from."""
    draw = np.random.default_rng(0)
    places = [(layer, group, m) for layer in LAYERS for group in GROUPS for m in MODALITIES]
    keys = ["layer", "group", "modality"]

    def numbers(names: tuple[str, ...], low: float, high: float) -> dict[str, Any]:
        return {name: draw.uniform(low, high, len(places)) for name in names}

    frame = pd.DataFrame(places, columns=keys)
    decibels = ("activation_sqnr_db", "output_sqnr_db")
    decibels += ("output_sqnr_activation_db", "output_sqnr_weight_db")
    shares = ("clip_energy_share", "rounding_energy_share", "bypass_rate")
    extremes = ("max_over_median", "kurtosis_p99", "massive_share")
    depth = [(b, "decoder", m) for b in range(len(LAYERS)) for m in MODALITIES]
    made = {
        "errors": frame.assign(**numbers(decibels, 5, 20), **numbers(shares, 0, 1)),
        "outliers": frame.assign(**numbers(extremes, 1, 40)),
        "depth": pd.DataFrame(depth, columns=["block", "tower", "modality"]).assign(
            relative_error=draw.uniform(0.1, 0.5, len(depth))
        ),
    }
    for name in names:
        made[name].to_parquet(folder / f"{name}.parquet")


class Runs:
    """A runs folder that a test fills."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def add(
        self,
        method: str = "rtn",
        says: Answer = right,
        *,
        reference: Path | None = None,
        limit: int = QUESTIONS,
        tables: tuple[str, ...] = (),
        finished: bool = True,
        **changes: Any,
    ) -> Path:
        """A run directory whose parts agree; ``changes`` are written over the result."""
        quantizes = method != "fp16"
        scheme = "w4a4" if quantizes else "w16a16"
        samples = answered(says, limit)
        bits = {"weight": 4, "activation": 4} if quantizes else {"weight": 16, "activation": 16}
        identity = {
            "config": {"method": {"name": method}, "bits": bits, "benchmark": {"limit": limit}},
            "code": "c" * 64,
            "versions": {"torch": "2"},
            "model": "m" * 64,
            "calibration_ids": "calibrated" if quantizes else None,
            "question_ids": fingerprint({"ids": sorted(set(samples["id"]))})[:16],
            "question_data": "data",
        }
        name = fingerprint(identity)
        folder = self.root / f"tiny-{method}-{scheme}-mini-{name[:10]}"
        (folder / "answers").mkdir(parents=True)
        about = {"git": {"commit": "f00d", "changed": True}, "files": {}}
        (folder / "identity.json").write_text(json.dumps(identity | {"about": about}))
        lines = [json.dumps({"doc_id": i}) for i in range(5)]
        (folder / "answers" / "mini_mmmu.jsonl").write_text("\n".join([*lines, '{"doc_i']))
        if not finished:
            return folder
        rows = linears(quantizes)
        manifest = {"scope_hash": "s", "counted_on": "evaluation", "kv_cache": None}
        (folder / "manifest.json").write_text(json.dumps(manifest | {"linears": rows}))
        samples.to_parquet(folder / "samples.parquet")
        statistics(folder, tables)
        told = scores(samples, "benchmark")
        effective = 4.25 if quantizes else 16.0
        base = json.loads((reference / "result.json").read_text()) if reference else None
        result = {
            "fingerprint": name,
            "method": method,
            "scheme": scheme,
            "model": "tiny_omni",
            "benchmark": "mini",
            "limit": limit,
            "slots": {"transform": "none", "weight": "int" if quantizes else "none"},
            "scope": {"towers": ["decoder"], "linears": len(rows), "hash": "s"},
            "calibration": {"samples": 8, "search_samples": 2, "name": "mini", "leaked": 0}
            | {"ids_hash": identity["calibration_ids"]},
            "question_ids": identity["question_ids"],
            "accuracy": told,
            "modality": scores(samples, "modality"),
            "mean": sum(row["value"] for row in told.values()) / len(told) if told else None,
            "bits": {"weight": effective, "activation": effective},
            "compensation": None,
            "seconds": {"quantize": 1.0, "evaluate": 2.0},
            "peak_memory_mb": {"evaluate": 900.0},
            "versions": identity["versions"],
            "reference": base["fingerprint"] if base else None,
        }
        (folder / "result.json").write_text(json.dumps(result | changes))
        return folder

    def sweep(self, name: str, jobs: list[dict[str, str]], report: str = "comparison") -> Path:
        """A sweep's folder with its notes."""
        folder = self.root / "sweeps" / name
        (folder / "jobs").mkdir(parents=True)
        overrides = ["method=rtn,quarot", f"paths.runs={self.root}", "tracker=none"]
        about = {"report": report, "overrides": overrides}
        (folder / "sweep.json").write_text(json.dumps(about))
        for i, job in enumerate(jobs):
            (folder / "jobs" / f"{i:04d}.json").write_text(json.dumps(job))
        return folder


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    """An empty runs folder."""
    return Runs(tmp_path / "runs")


@pytest.fixture(scope="session")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """fp16 without a mistake, one method that is wrong on every clip, one that is as good.

    The first says something that looks like a script; a job failed, a run is unfinished.
    """
    made = Runs(tmp_path_factory.mktemp("compared") / "runs")
    base = made.add("fp16")
    bad = made.add("rtn", lambda i: right(i) if i < 12 else SCRIPT, reference=base, tables=ALL)
    good = made.add("quarot", reference=base, tables=("depth",))
    made.add("awq", finished=False)
    jobs = [{"overrides": f"method=rtn paths.runs={made.root}", "run": str(bad)}]
    jobs += [{"overrides": "method=quarot", "run": str(good)}]
    jobs += [{"overrides": "method=gptq", "error": "no <b>room</b>", "method": "gptq"}]
    made.sweep("2026-01-01", jobs)
    return made


@pytest.fixture(scope="session")
def page(compared: Runs) -> str:
    """The report of ``compared``; drawing its figures takes seconds."""
    return render(gather([compared.root]))


ALL = ("outliers", "errors", "depth")
SCRIPT = "<script>document.title = 'broken'</script><img src=x>"
