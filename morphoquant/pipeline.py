"""One run, from a validated config to a finished run directory.

It reads top to bottom: check -> identify -> load -> calibrate -> transform -> walk -> evaluate ->
manifest -> record. Everything that can be refused is refused before a weight is loaded.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morphoquant import evaluation
from morphoquant.config import ConfigError, normalise
from morphoquant.config.partial import misnamed
from morphoquant.config.schema import BitsConfig, MethodConfig, RunConfig, TrackerConfig
from morphoquant.objective import HeldOut
from morphoquant.quantize import (
    InvariantError,
    agreement,
    count_on_probe,
    probe_logits,
    probe_samples,
    quantize_cache,
    reads_calibration,
    transform,
    walk_blocks,
)
from morphoquant.ranks import Ranks
from morphoquant.record import describe_slots, flat, record_statistics
from morphoquant.sharing.content import checkpoint_hash, content_of, load_calibration
from morphoquant.sharing.prompts import Prompts, open_store
from morphoquant.tracking.clock import Clock
from morphoquant.tracking.fingerprint import (
    code_files,
    code_hash,
    git_state,
    package_versions,
)
from morphoquant.tracking.progress import progress_callback
from morphoquant.tracking.rundir import NAME_DIGITS, RunDirectory
from morphoquant.tracking.wandb_mirror import Tracker, open_tracker, waits_for_result

if TYPE_CHECKING:
    from morphoquant.calibration.samples import Calibration

log = logging.getLogger(__name__)


def reference_config(config: RunConfig) -> RunConfig:
    """The same run with nothing quantized: what every table compares with."""
    return normalise(
        config.model_copy(
            update={
                "method": MethodConfig(),
                "bits": BitsConfig(),
                "reference": False,
                "objective": None,
                "tracker": TrackerConfig(name="none") if waits_for_result() else config.tracker,
            }
        )
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
        directory = RunDirectory.open(
            Path(config.paths.runs),
            _name(config),
            prepared.identity,
            lambda: {"git": git_state(), "files": code_files()},
            writes=ranks.leads,
        )
        ranks.agree("fingerprint of the run", directory.fingerprint)
        with directory.lock():
            if ranks.leader_says("finished", directory.finished, patient=True):
                word = "reused" if config.method.quantizes else "reference: reused"
                log.info("%s: %s is finished", word, directory.path)
                if ranks.leads and waits_for_result():
                    tracker = _tracker(config, directory)
                    tracker.summary(flat(directory.result()))
                    tracker.finish()
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

    config: RunConfig
    identity: dict[str, Any]
    leaked: int
    """Calibration samples that are evaluated too; 0 unless the calibration's name says so."""
    loaded: Calibration | None = None

    @cached_property
    def calibration(self) -> Calibration:
        """The prompts; loaded here where they were not yet."""
        return self.loaded or load_calibration(self.config)


def _prepare(config: RunConfig) -> Prepared:
    """All cheap checks, and the identity of the run."""
    from morphoquant.models.loading import check

    check(config.model)
    store = open_store(config.paths)
    content, calibration = content_of(config, store)
    left_out: dict[str, Any] = {"tracker": True, "paths": True, "reference": True, "report": True}
    left_out["sensitivity"] = True  # what a report makes of runs
    left_out["objective"] = True  # which of the result's numbers is handed on
    left_out["statistics"] = {"figures"}
    if not reads_calibration(config):
        left_out |= {"calibration": True, "statistics": True}
    described = config.model_dump(exclude=left_out, mode="json")
    identity = {
        "config": described,
        "code": code_hash(),
        "versions": package_versions(),
        "model": checkpoint_hash(config.model, store),
        "calibration_ids": content.calibration_ids if reads_calibration(config) else None,
        "calibration_data": content.calibration_data if reads_calibration(config) else None,
        "question_ids": content.question_ids,
        "question_data": content.question_data,
    }
    return Prepared(config, identity, content.leaked, calibration)


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
    if wrong := misnamed(config, adapter.input_groups()):
        raise ConfigError("\n".join(wrong))
    asked = probe_samples(prepared.calibration, config.statistics.kl_probes)
    prompts = Prompts(config, adapter, open_store(config.paths, directory.path.name))
    probe = prompts.encode(asked)
    towers = [t for t in ("vision", "audio", "decoder") if getattr(config.model.scope, t)]
    with clock.phase("quantize"):
        before = probe_logits(adapter, probe)
        held_out = HeldOut(adapter, prepared.calibration, config.calibration.batch_size)
        drift = transform(config, adapter, prepared.calibration, probe, before, directory, prompts)
        # Compared with the rewritten network: its own rounding must not pass for quantization.
        plain = before if drift is None else probe_logits(adapter, probe)
        quantizer = walk_blocks(config, adapter, towers, prepared.calibration, prompts)
        cache = quantize_cache(config, adapter)
        quantized = bool(quantizer.records) or cache is not None
        after = probe_logits(adapter, probe) if quantized else plain
        moved = agreement(config, plain, after, [sample.modality for sample in asked])
        measured = held_out.measure(adapter)
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
    tracker.log({f"held_out/{name}": number for name, number in (measured or {}).items()})
    return {
        "fingerprint": directory.fingerprint,
        "name": _name(config),
        "method": config.method.name,
        "scheme": config.bits.scheme,
        "model": config.model.name,
        "benchmark": config.benchmark.name,
        "limit": config.benchmark.limit,
        "slots": describe_slots(config.method, config.bits),
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
        "mean": sum(row["value"] for row in accuracy.values()) / len(accuracy)
        if accuracy
        else None,
        "held_out": measured,
        "bits": {"weight": manifest.weight_bits, "activation": manifest.activation_bits},
        "compensation": manifest.compensation_cost(),
        "seconds": {name: round(value, 3) for name, value in clock.seconds.items()},
        "peak_memory_mb": clock.peak_memory_mb,
        "reused": prompts.describe(),
        "ranks": ranks.size,
        "transform_drift": drift,
        "logits": moved,
        "statistics": scalars,
        "versions": prepared.identity["versions"],
    }
