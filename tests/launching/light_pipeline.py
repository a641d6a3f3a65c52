"""Takes the place of ``morphoquant.pipeline`` in every process of a sweep, without a model.

Its runs are real run directories, their numbers follow from the config alone, and some methods come
to a bad end: what a sweep has to cope with, wherever its jobs run.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from morphoquant.errors import HarnessError
from morphoquant.tracking.rundir import RunDirectory, write_atomic

STEPS, STEP_S = 8, 0.25


def right(config: Any) -> float:
    """Accuracy in percent, of 100 questions; 85 to 97."""
    return float(98 - 24 // config.bits.weight - (config.method.weight.format == "int"))


def divergence(config: Any) -> float:
    found = config.method.activation.range
    return (found.p - 2.5) ** 2 + 0.1 * found.cosine_weight


def run_path(config: Any, found: dict[str, Any]) -> Path:
    return Path(config.paths.runs) / f"{config.method.name}-{found['fingerprint'][:10]}"


def run(config: Any) -> dict[str, Any]:
    if config.method.name == "rtn_static":
        raise HarnessError("no room for rtn_static")
    if config.method.name == "quarot":
        os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when memory runs out
    reference = None
    if config.reference and config.method.name != "fp16":
        from morphoquant.config.schema import BitsConfig, MethodConfig

        plain = {"method": MethodConfig(), "bits": BitsConfig(), "reference": False}
        reference = run(config.model_copy(update=plain))["fingerprint"]
    left_out = {"tracker", "paths", "objective", "report", "reference"}
    identity = {"config": config.model_dump(mode="json", exclude=left_out)}
    directory = RunDirectory.open(Path(config.paths.runs), config.method.name, identity)
    with directory.lock():
        if directory.finished:
            return directory.result()
        answer(directory)
        found = result(config, directory, reference)
        if found["accuracy"]:
            made = Path(__file__).with_name(samples_name(int(found["mean"])))
            directory.write("samples.parquet", lambda path: path.write_bytes(made.read_bytes()))
        directory.finish(found)
    return found


def answer(directory: RunDirectory) -> None:
    """Questions one by one; those that an earlier process answered are not asked again."""
    directory.answers.mkdir(exist_ok=True)
    with (directory.answers / "began.txt").open("a") as began:
        began.write(f"{os.getpid()}\n")
    for number in range(STEPS):
        path = directory.answers / f"{number}.txt"
        if not path.is_file():
            time.sleep(STEP_S)
            write_atomic(path, lambda p: p.write_text(str(os.getpid())) and None)


def samples_name(right: int) -> str:
    return f"samples-{right}.parquet"


def samples(right: int) -> Any:
    """Answers to 100 questions, the first of them right.

    Written before any job runs: what writes them takes longer to import than a job to run.
    """
    import pandas as pd

    columns: dict[str, Any] = {"doc_id": range(100), "id": [str(i) for i in range(100)]}
    columns |= {"correct": [1.0] * right + [0.0] * (100 - right)}
    columns |= dict.fromkeys(("benchmark", "task"), "mmmu") | {"modality": "image"}
    columns |= dict.fromkeys(("target", "answer", "parsed"), "A")
    return pd.DataFrame(columns | {"empty": False, "unparsed": False, "output_tokens": 1})


def result(config: Any, directory: RunDirectory, reference: str | None) -> dict[str, Any]:
    asked = bool(config.benchmark.tasks)
    held_out = config.calibration.held_out_samples
    return {
        "fingerprint": directory.fingerprint,
        "method": config.method.name,
        "scheme": config.bits.scheme,
        "model": config.model.name,
        "reference": reference,
        "slots": dict.fromkeys(("transform", "weight", "activation", "compensation"), "none"),
        "scope": {"hash": "s", "towers": ["decoder"]},
        "question_ids": "q",
        "calibration": {"ids_hash": "c", "name": "mini", "samples": 8, "leaked": 0},
        "accuracy": {"mmmu": {"value": right(config), "n": 100, "empty": 0, "unparsed": 0}}
        if asked
        else {},
        "mean": right(config) if asked else None,
        "held_out": {"samples": held_out, "kl": divergence(config), "top1_agreement": 0.75}
        if held_out
        else None,
        "bits": {"weight": float(config.bits.weight), "activation": 4.0},
        "versions": {},
        "seconds": {"quantize": 1.0, "evaluate": 2.0},
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "folder": os.getcwd(),
    }
