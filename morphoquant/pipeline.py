"""One run, from a validated config to a finished run directory.

It reads top to bottom: check -> identify -> load -> calibrate -> transform -> walk -> evaluate ->
manifest -> record. Everything that can be refused is refused before a weight is loaded.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morphoquant import evaluation
from morphoquant.config.schema import BitsConfig, MethodConfig, RunConfig, TrackerConfig
from morphoquant.quantize import (
    InvariantError,
    agreement,
    count_on_probe,
    probe_samples,
    quantize_cache,
    reads_calibration,
    transform,
    walk_blocks,
)
from morphoquant.ranks import Ranks
from morphoquant.record import describe_slots, flat, record_statistics
from morphoquant.tracking.clock import Clock
from morphoquant.tracking.fingerprint import code_hash, fingerprint, package_versions
from morphoquant.tracking.progress import progress_callback
from morphoquant.tracking.rundir import NAME_DIGITS, RunDirectory
from morphoquant.tracking.wandb_mirror import Tracker, open_tracker

if TYPE_CHECKING:
    from morphoquant.calibration.samples import Calibration

log = logging.getLogger(__name__)

PROBES_PER_MODALITY = 2


def reference_config(config: RunConfig) -> RunConfig:
    """The same run with nothing quantized: what every table compares with."""
    return config.model_copy(
        update={"method": MethodConfig(), "bits": BitsConfig(), "reference": False}
    )


def run(config: RunConfig) -> dict[str, Any]:
    """Do (or finish, or look up) one run and return its ``result.json``.

    With ``config.reference`` the unquantized model is measured first, unless it already was.

    Raises:
        HarnessError: bad input (model, data, calibration), a full disk, a violated invariant.
    """
    reference = None
    if config.reference and config.method.quantizes:
        reference = run(reference_config(config))
    ranks = Ranks.of_process()
    with ranks.together(_name(config)):
        prepared = _prepare(config)
        runs = Path(config.paths.runs)
        directory = RunDirectory.open(runs, _name(config), prepared.identity, ranks.leads)
        ranks.agree("fingerprint of the run", directory.fingerprint)
        with directory.lock():
            if ranks.leader_says("finished", directory.finished, patient=True):
                log.info("reused: %s is finished", directory.path)
                return directory.result()
            tracker = _tracker(config, directory)
            try:
                result = _execute(config, prepared, directory, tracker, ranks)
                result["reference"] = reference["fingerprint"] if reference else None
                tracker.summary(flat(result))
                directory.finish(result)
            finally:
                tracker.finish()
    return result if ranks.leads else directory.result()


# ----------------------------------------------------------------------------- preparation


@dataclass(frozen=True)
class Prepared:
    """What is known before anything is loaded."""

    calibration: Calibration
    identity: dict[str, Any]
    leaked: int
    """Calibration samples that are evaluated too; 0 unless the calibration's name says so."""


def _prepare(config: RunConfig) -> Prepared:
    """All cheap checks, and the identity of the run."""
    from morphoquant.calibration.samples import check_disjoint, load_samples
    from morphoquant.models.loading import check, model_hash

    check(config.model)
    evaluation.check(config.benchmark, config.paths)
    calibration = load_samples(config.calibration, _mini_root(config))
    questions = evaluation.question_ids(config.benchmark, config.paths)
    leaked = len(set(calibration.ids) & questions)
    if not config.calibration.allow_leakage:
        check_disjoint(calibration.ids, questions)
    left_out: dict[str, Any] = {"tracker": True, "paths": True, "reference": True, "report": True}
    left_out["statistics"] = {"figures"}
    if not reads_calibration(config):
        left_out |= {"calibration": True, "statistics": True}
    described = config.model_dump(exclude=left_out, mode="json")
    identity = {
        "config": described,
        "code": code_hash(),
        "versions": package_versions(),
        "model": model_hash(config.model),
        "calibration_ids": calibration.ids_hash if reads_calibration(config) else None,
        "calibration_data": calibration.content_hash if reads_calibration(config) else None,
        "question_ids": fingerprint({"ids": sorted(questions)})[:16],
        "question_data": evaluation.data_hash(config.benchmark, config.paths),
    }
    return Prepared(calibration, identity, leaked)


def _mini_root(config: RunConfig) -> Path | None:
    """The built embedded sets, where a calibration source asks for them."""
    from morphoquant.calibration.samples import MINI

    if not any(source.path.startswith(MINI) for source in config.calibration.sources):
        return None
    from morphoquant.embedded.benchmarks import build

    return build(Path(config.paths.cache) / "mini")


def run_path(config: RunConfig, result: dict[str, Any]) -> Path:
    """The directory of a finished run."""
    return Path(config.paths.runs) / f"{_name(config)}-{result['fingerprint'][:NAME_DIGITS]}"


def _name(config: RunConfig) -> str:
    return f"{config.model.name}-{config.method.name}-{config.bits.scheme}-{config.benchmark.name}"


def _tracker(config: RunConfig, directory: RunDirectory) -> Tracker:
    settings = config.tracker if directory.writes else TrackerConfig(name="none")
    described = config.model_dump(mode="json")
    return open_tracker(settings, described, directory.path.name, settings.group, directory.path)


# ----------------------------------------------------------------------------- execution


def _execute(
    config: RunConfig, prepared: Prepared, directory: RunDirectory, tracker: Tracker, ranks: Ranks
) -> dict[str, Any]:
    from morphoquant.models.adapter import OmniAdapter
    from morphoquant.quantization.counters import add_up, model_identity
    from morphoquant.quantization.manifest import complete, describe_scope, reset_counters
    from morphoquant.quantization.serialize import save_quantizers

    clock, started = Clock(), time.perf_counter()
    with clock.phase("load"):
        adapter = OmniAdapter.load(config.model)
    asked = probe_samples(prepared.calibration, PROBES_PER_MODALITY)
    probe = adapter.encode([sample.messages for sample in asked])
    towers = [t for t in ("vision", "audio", "decoder") if getattr(config.model.scope, t)]
    with clock.phase("quantize"):
        before = adapter.logits(probe)
        drift = transform(config, adapter, prepared.calibration, probe, before, directory)
        # Compared with the rewritten network: its own rounding must not pass for quantization.
        plain = before if drift is None else adapter.logits(probe)
        quantizer = walk_blocks(config, adapter, towers, prepared.calibration)
        cache = quantize_cache(config, adapter)
        after = adapter.logits(probe)
        moved = agreement(config, plain, after, [sample.modality for sample in asked])
    blocks = [b for tower in towers for b in adapter.blocks(tower)]  # type: ignore[arg-type]
    manifest = quantizer.manifest if quantizer.records else describe_scope(blocks)
    directory.write_json("manifest.json", manifest.to_dict())
    scalars = record_statistics(config, quantizer, directory, tracker)
    if quantizer.is_static:
        directory.write("quantizers.safetensors", lambda path: save_quantizers(blocks, path))
    if ranks.size > 1:
        ranks.agree("the quantized model", model_identity(adapter.model, manifest))
    reset_counters(blocks)
    if cache is not None:
        cache.reset()
    with clock.phase("evaluate"):
        title = f"Evaluating {config.method.name} {config.bits.scheme}"
        with progress_callback(title) as report:
            found = evaluation.evaluate(
                adapter, config.benchmark, config.paths, directory.answers, report, ranks
            )
    add_up(ranks, blocks, cache)
    count_on_probe(manifest, adapter, prepared.calibration, blocks)
    complete(manifest, blocks, config.method, config.bits)
    if cache is not None:
        if cache.idle():
            raise InvariantError(f"the cache's quantizers never ran in {', '.join(cache.idle())}")
        manifest.cache = cache.describe()
    directory.write_json("manifest.json", manifest.to_dict())
    directory.write_table("samples", found.samples)
    tracker.table("samples", found.samples)
    clock.seconds["total"] = time.perf_counter() - started
    accuracy = found.by_benchmark()
    tracker.log({f"accuracy/{name}": row["value"] for name, row in accuracy.items()})
    return {
        "fingerprint": directory.fingerprint,
        "name": _name(config),
        "method": config.method.name,
        "scheme": config.bits.scheme,
        "model": config.model.name,
        "benchmark": config.benchmark.name,
        "limit": config.benchmark.limit,
        "slots": describe_slots(config.method),
        "scope": {
            "towers": towers,
            "linears": len(manifest.linears),
            "hash": manifest.scope_hash,
        },
        "calibration": {
            "samples": config.calibration.samples,
            "search_samples": config.calibration.search_samples,
            "ids_hash": prepared.identity["calibration_ids"],
            "name": config.calibration.name,
            "leaked": prepared.leaked,
        },
        "question_ids": prepared.identity["question_ids"],
        "accuracy": accuracy,
        "modality": found.by_modality(),
        "mean": sum(row["value"] for row in accuracy.values()) / len(accuracy),
        "bits": {"weight": manifest.weight_bits, "activation": manifest.activation_bits},
        "compensation": manifest.compensation_cost(),
        "seconds": {name: round(value, 3) for name, value in clock.seconds.items()},
        "peak_memory_mb": clock.peak_memory_mb,
        "ranks": ranks.size,
        "transform_drift": drift,
        "logits": moved,
        "statistics": scalars,
        "versions": prepared.identity["versions"],
    }
