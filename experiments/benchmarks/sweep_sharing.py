"""What the runs of a sweep save by sharing encoded prompts, statistics and the reference.

    python -m experiments.benchmarks.sweep_sharing
    python -m experiments.benchmarks.sweep_sharing --variants 3 --limit 4

The same variants of MorphoQuant (one weight quantizer, other masks, searches and compensations)
run twice on the embedded model: each for itself, with a reference of its own, and then as a sweep
that shares. Counted are calls of a block on calibration prompts, encoded batches and questions
asked; the seconds are of this process, one variant after the other, the model's imports before the
first of them. A last line is the sweep started again when everything is finished.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

from morphoquant import pipeline
from morphoquant.config import RunConfig, load
from morphoquant.config.store import register

ROOT = Path(__file__).parents[2]
VARIANTS = (
    "base",
    "compensation_none",
    "search_off",
    "mask_uncapped",
    "loss_p3",
    "compensation_element_g10",
)
COUNTED = ("block calls", "batches encoded", "questions asked")


def configure(variant: str, folder: Path, cache: Path, given: argparse.Namespace) -> RunConfig:
    """One run of the sweep, as the command line composes it."""
    words = [
        "method=morphoquant",
        f"ablation={variant}",
        f"limit={given.limit}",
        f"calibration.samples={given.samples}",
        f"calibration.search_samples={given.search_samples}",
        "statistics.figures=false",
        "tracker=none",
        f"paths.runs={folder}",
        f"paths.cache={cache}",
    ]
    with initialize_config_dir(config_dir=str(ROOT / "conf"), version_base="1.3"):
        return load(compose("config", overrides=words))


@contextmanager
def counting(counts: Counter[str]) -> Iterator[None]:
    """Count block calls of calibration and encoded batches while the context is open."""
    from morphoquant.models.adapter import OmniAdapter
    from morphoquant.quantization import engine, measure, survey
    from morphoquant.sharing.prompts import Prompts

    run_block, encode_batch, encode = engine.run_block, Prompts.encode_batch, OmniAdapter.encode
    inside: list[bool] = []

    def count_block(*arguments: Any) -> Any:
        counts["block calls"] += 1
        return run_block(*arguments)

    def mark(self: Any, samples: Any) -> Any:
        inside.append(True)
        try:
            return encode_batch(self, samples)
        finally:
            inside.pop()

    def count_encoding(self: Any, conversations: Any) -> Any:
        counts["batches encoded"] += bool(inside)  # questions are encoded too, and not counted
        return encode(self, conversations)

    rooms: tuple[Any, ...] = (engine, measure, survey)
    for room in rooms:
        room.run_block = count_block
    Prompts.encode_batch, OmniAdapter.encode = mark, count_encoding  # type: ignore[method-assign]
    try:
        yield
    finally:
        for room in rooms:
            room.run_block = run_block
        Prompts.encode_batch, OmniAdapter.encode = encode_batch, encode  # type: ignore[method-assign]


def answers(folder: Path) -> int:
    """Questions asked by all runs below a folder."""
    files = folder.glob("**/answers/*.jsonl")
    return sum(len(path.read_text().splitlines()) for path in files)


def numbers(result: dict[str, Any]) -> str:
    """What must not depend on sharing."""
    keys = ("accuracy", "modality", "bits", "logits", "statistics", "compensation")
    return json.dumps({key: result[key] for key in keys}, sort_keys=True)


def sweep(
    configs: list[RunConfig], folder: Path
) -> tuple[Counter[str], tuple[float, float], list[str]]:
    """Run everything; returns counts, seconds (wall, CPU) and the numbers of every run."""
    counts: Counter[str] = Counter()
    start, busy = time.perf_counter(), time.process_time()
    with counting(counts):
        found = [numbers(pipeline.run(config)) for config in configs]
    seconds = time.perf_counter() - start, time.process_time() - busy
    counts["questions asked"] = answers(folder)
    return counts, seconds, found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--variants", type=int, default=len(VARIANTS), help="how many of the six")
    parser.add_argument("--limit", type=int, default=8, help="questions of every task")
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--search-samples", type=int, default=10)
    parser.add_argument("--cache", type=Path, default=Path(".cache/morphoquant"))
    given = parser.parse_args()
    logging.getLogger("morphoquant").setLevel(logging.WARNING)
    register()
    from morphoquant.embedded.benchmarks import build

    mini = build(given.cache / "mini").resolve()
    chosen = VARIANTS[: given.variants]
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for part in ("apart", "together"):
            (root / part).mkdir()
            (root / part / "mini").symlink_to(mini)
        warm = configure(chosen[0], root / "warm", root / "apart", given)
        pipeline.run(pipeline.reference_config(_apart(warm)))  # imports, and the files' cache
        apart = [
            _apart(configure(variant, root / "apart" / variant, root / "apart", given))
            for variant in chosen
        ]
        together = [
            configure(variant, root / "together" / "runs", root / "together", given)
            for variant in chosen
        ]
        first, slow, one = sweep(apart, root / "apart")
        second, fast, other = sweep(together, root / "together")
        _, again, third = sweep(together, root / "together")
    assert one == other == third, "sharing changed a number"
    prompts = f"{given.samples} + {given.search_samples} calibration prompts"
    print(f"{len(chosen)} variants of morphoquant w4a4, {prompts}, {given.limit} questions a task;")
    print("accuracies, logits and statistics of every run are the same to the last digit")
    print(f"{'':18}{'apart':>10}{'together':>10}{'ratio':>8}")
    for name in COUNTED:
        ratio = first[name] / max(second[name], 1)
        print(f"{name:18}{first[name]:10}{second[name]:10}{ratio:8.2f}")
    for name, a, b in zip(("seconds", "CPU seconds"), slow, fast, strict=True):
        print(f"{name:18}{a:10.1f}{b:10.1f}{a / b:8.2f}")
    print(f"started again, all finished: {again[1]:.2f} CPU seconds, nothing evaluated")


def _apart(config: RunConfig) -> RunConfig:
    """The run for itself: nothing is read that another run has left."""
    return config.model_copy(
        update={"paths": config.paths.model_copy(update={"share_artifacts": False})}
    )


if __name__ == "__main__":
    main()
