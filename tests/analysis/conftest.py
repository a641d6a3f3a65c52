"""Finished run directories with chosen answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

Finish = Callable[..., dict[str, str]]


def answered(verdicts: Mapping[str, Sequence[int]]) -> pd.DataFrame:
    """Answers of a run; Video-MME asks three questions about every clip."""
    rows = [
        {"benchmark": name, "task": f"mini_{name}", "doc_id": i, "modality": "image"}
        | {"id": f"{name}/{i // 3:03d}-{i % 3 + 1}", "target": "A", "correct": float(verdict)}
        for name, correct in verdicts.items()
        for i, verdict in enumerate(correct)
    ]
    return pd.DataFrame(rows)


@pytest.fixture
def finish(tmp_path: Path) -> Finish:
    """``finish(method, scheme, verdicts)`` writes a run below ``tmp_path / "runs"``.

    Fields of its result are given by name. Returns the note that its job leaves.
    """

    def make(
        method: str, scheme: str, verdicts: Mapping[str, Sequence[int]], **changes: Any
    ) -> dict[str, str]:
        name = f"{method}{scheme}".ljust(64, "0")
        folder = tmp_path / "runs" / f"{method}-{scheme}-{name[:10]}"
        folder.mkdir(parents=True)
        answered(verdicts).to_parquet(folder / "samples.parquet")
        accuracy = {
            b: {"value": 100 * float(np.mean(v)), "n": len(v), "empty": 0, "unparsed": 0}
            for b, v in verdicts.items()
        }
        result: dict[str, Any] = {
            "fingerprint": name,
            "method": method,
            "scheme": scheme,
            "model": "tiny_omni",
            "reference": None if method == "fp16" else "fp16w16a16".ljust(64, "0"),
            "slots": {"weight": "none" if method == "fp16" else "int"},
            "scope": {"hash": "s", "towers": ["decoder"]},
            "calibration": {"ids_hash": "c", "samples": 128, "leaked": 0},
            "question_ids": "q",
            "accuracy": accuracy,
            "mean": float(np.mean([a["value"] for a in accuracy.values()])),
            "bits": {"weight": 4.1, "activation": 4.25},
            "versions": {},
            "seconds": {"load": 1.0, "quantize": 2.0, "evaluate": 3.0},
            "peak_memory_mb": {"evaluate": 800.0},
        }
        (folder / "result.json").write_text(json.dumps(result | changes))
        return {"overrides": f"method={method} bits={scheme}", "run": str(folder)}

    return make
