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
from morphoquant.errors import HarnessError
from morphoquant.record import describe_slots, flat, record_statistics
from morphoquant.tracking.clock import Clock
from morphoquant.tracking.fingerprint import code_hash, fingerprint, package_versions
from morphoquant.tracking.progress import progress, progress_callback
from morphoquant.tracking.rundir import NAME_DIGITS, RunDirectory, write_atomic
from morphoquant.tracking.wandb_mirror import Tracker, open_tracker

if TYPE_CHECKING:
    import torch

    from morphoquant.calibration.samples import Calibration
    from morphoquant.models.adapter import Batch, OmniAdapter
    from morphoquant.quantization.engine import BlockQuantizer
    from morphoquant.quantization.manifest import Manifest

log = logging.getLogger(__name__)

PROBES_PER_MODALITY = 2
MIN_COSINE = 0.999  # of probe logits after a transform, in 16-bit arithmetic (SPEC 5)


class InvariantError(HarnessError):
    """Something that must be true of every run was not; the numbers would mean nothing."""


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
    prepared = _prepare(config)
    directory = RunDirectory.open(Path(config.paths.runs), _name(config), prepared.identity)
    with directory.lock():
        if directory.finished:
            log.info("reused: %s is finished", directory.path)
            return directory.result()
        tracker = _tracker(config, directory)
        try:
            result = _execute(config, prepared, directory, tracker)
            result["reference"] = reference["fingerprint"] if reference else None
            tracker.summary(flat(result))
            directory.finish(result)
        finally:
            tracker.finish()
    return result


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
    if not _reads_calibration(config):
        left_out |= {"calibration": True, "statistics": True}
    described = config.model_dump(exclude=left_out, mode="json")
    identity = {
        "config": described,
        "code": code_hash(),
        "versions": package_versions(),
        "model": model_hash(config.model),
        "calibration_ids": calibration.ids_hash if _reads_calibration(config) else None,
        "calibration_data": calibration.content_hash if _reads_calibration(config) else None,
        "question_ids": fingerprint({"ids": sorted(questions)})[:16],
        "question_data": evaluation.data_hash(config.benchmark, config.paths),
    }
    return Prepared(calibration, identity, leaked)


def _reads_calibration(config: RunConfig) -> bool:
    """Whether the run's results can depend on calibration prompts."""
    changes = config.method.quantizes or config.method.transform.name != "none"
    return changes or (config.statistics.enabled and config.statistics.unquantized)


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
    settings: TrackerConfig = config.tracker
    described = config.model_dump(mode="json")
    return open_tracker(settings, described, directory.path.name, settings.group, directory.path)


# ----------------------------------------------------------------------------- execution


def _execute(
    config: RunConfig, prepared: Prepared, directory: RunDirectory, tracker: Tracker
) -> dict[str, Any]:
    from morphoquant.models.adapter import OmniAdapter
    from morphoquant.quantization.manifest import complete, describe_scope, reset_counters
    from morphoquant.quantization.serialize import save_quantizers

    clock, started = Clock(), time.perf_counter()
    with clock.phase("load"):
        adapter = OmniAdapter.load(config.model)
    asked = _probe_samples(prepared.calibration, PROBES_PER_MODALITY)
    probe = adapter.encode([sample.messages for sample in asked])
    towers = [t for t in ("vision", "audio", "decoder") if getattr(config.model.scope, t)]
    with clock.phase("quantize"):
        before = adapter.logits(probe)
        drift = _transform(config, adapter, probe, before)
        # Compared with the rewritten network: its own rounding must not pass for quantization.
        plain = before if drift is None else adapter.logits(probe)
        quantizer = _walk(config, adapter, towers, prepared.calibration)
        after = adapter.logits(probe)
        agreement = _agreement(config, plain, after, [sample.modality for sample in asked])
    blocks = [b for tower in towers for b in adapter.blocks(tower)]  # type: ignore[arg-type]
    manifest = quantizer.manifest if quantizer.records else describe_scope(blocks)
    directory.write_json("manifest.json", manifest.to_dict())
    scalars = record_statistics(config, quantizer, directory, tracker)
    if quantizer.is_static:
        kept = directory.path / "quantizers.safetensors"
        write_atomic(kept, lambda path: save_quantizers(blocks, path))
    reset_counters(blocks)
    with clock.phase("evaluate"):
        title = f"Evaluating {config.method.name} {config.bits.scheme}"
        with progress_callback(title) as report:
            found = evaluation.evaluate(
                adapter, config.benchmark, config.paths, directory.answers, report
            )
    _count_on_probe(manifest, adapter, prepared.calibration, blocks)
    complete(manifest, blocks, config.method, config.bits)
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
        "transform_drift": drift,
        "logits": agreement,
        "statistics": scalars,
        "versions": prepared.identity["versions"],
    }


def _probe_samples(calibration: Calibration, per_modality: int) -> list[Any]:
    """A few calibration samples of every modality."""
    chosen: dict[str, list[Any]] = {}
    for sample in calibration.samples:
        group = chosen.setdefault(sample.modality, [])
        if len(group) < per_modality:
            group.append(sample)
    return [sample for _, group in sorted(chosen.items()) for sample in group]


def _transform(
    config: RunConfig, adapter: OmniAdapter, probe: Batch, before: torch.Tensor
) -> float | None:
    """Slot 1, with the check that the unquantized outputs did not move.

    Raises:
        InvariantError: they did.
    """
    import torch

    from morphoquant.quantization.transforms import apply_transform
    from morphoquant.quantization.transforms.check import largest_relative_change

    settings = config.method.transform
    if settings.name == "none":
        return None
    adapter.untie_head()
    with torch.no_grad():
        apply_transform(adapter.residual_stream(), settings)
    after = adapter.logits(probe)
    drift = largest_relative_change(before, after)
    if adapter.model.dtype in (torch.float32, torch.float64):
        if not drift <= settings.tolerance:
            raise InvariantError(
                f"transform {settings.name!r} moved the unquantized logits by {drift:.2e} "
                f"(relative), allowed method.transform.tolerance={settings.tolerance:g}"
            )
    else:
        cosine = torch.cosine_similarity(before, after, dim=-1).min().item()
        if not cosine >= MIN_COSINE:
            raise InvariantError(
                f"transform {settings.name!r} turned the unquantized logits (cosine {cosine:.5f}, "
                f"needed {MIN_COSINE}); try model.dtype=float32"
            )
    return drift


def _walk(
    config: RunConfig, adapter: OmniAdapter, towers: list[Any], calibration: Calibration
) -> BlockQuantizer:
    """Slots 2 to 4, block by block."""
    from morphoquant.calibration.samples import batches
    from morphoquant.calibration.walk import walk
    from morphoquant.quantization import engine
    from morphoquant.quantization.survey import survey

    settings = config.statistics
    quantizer = engine.BlockQuantizer(
        config.method, config.bits, observe=settings.enabled, histograms=settings.histograms
    )
    if not _reads_calibration(config):
        return quantizer
    size = config.calibration.batch_size

    def encoded(samples: Any) -> list[Any]:
        return [adapter.encode([s.messages for s in group]) for group in batches(samples, size)]

    sets = {engine.STATISTICS: encoded(calibration.samples)}
    if quantizer.searches and calibration.search:
        sets[engine.SEARCH] = encoded(calibration.search)
    early: tuple[str, ...] = ()
    if config.method.quantizes and settings.enabled and settings.probes:
        probes = encoded(_probe_samples(calibration, settings.probes))
        sets |= {engine.PROBE: probes, engine.PROBE_QUANTIZED: probes}
        early = (engine.PROBE,)
    quantizer.moments = survey(adapter, towers, sets[engine.STATISTICS], config.method, config.bits)
    count = sum(len(adapter.blocks(tower)) for tower in towers)
    title = f"Quantizing {config.method.name} {config.bits.scheme}"
    if not config.method.quantizes:
        title = f"Observing {config.method.name}"
    with progress(title, count, unit="blocks") as step:
        walk(adapter, towers, sets, quantizer, step, early)
    if quantizer.needs_labels:
        adapter.follow_labels(quantizer.labels)
    return quantizer


def _agreement(
    config: RunConfig, before: torch.Tensor, after: torch.Tensor, modalities: list[str]
) -> dict[str, Any] | None:
    """How far quantization moved the probe logits: KL divergence and agreement of the best token.

    Raises:
        InvariantError: not at all (nothing was quantized), or to NaN.
    """
    import torch

    method, bits = config.method, config.bits
    weight = method.weight.format != "none" and bits.weight < 16
    activation = method.activation.format != "none" and bits.activation < 16
    if not torch.isfinite(after).all():
        raise InvariantError(
            "the quantized model's logits hold NaN or infinite values on calibration prompts"
        )
    if not (weight or activation):
        return None
    if torch.equal(before, after):
        raise InvariantError(
            f"method {method.name!r} at {bits.scheme} left the logits exactly as they were: "
            f"nothing was quantized"
        )
    p, q = before.log_softmax(-1), after.log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum(-1)
    agree = (before.argmax(-1) == after.argmax(-1)).double()
    found: dict[str, Any] = {"kl": float(divergence.mean()), "top1_agreement": float(agree.mean())}
    for name in sorted(set(modalities)):
        rows = torch.tensor([m == name for m in modalities], device=divergence.device)
        found[f"kl/{name}"] = float(divergence[rows].mean())
        found[f"top1_agreement/{name}"] = float(agree[rows].mean())
    return found


def _count_on_probe(
    manifest: Manifest, adapter: OmniAdapter, calibration: Calibration, blocks: list[Any]
) -> None:
    """Where every answer was already on disk, let the quantizers run on calibration prompts."""
    from morphoquant.quantization.linear import QuantizedLinear

    modules = [b.linear(g.linears[0]) for b in blocks for g in b.groups]
    if any(isinstance(m, QuantizedLinear) and m.calls == 0 for m in modules):
        manifest.counted_on = "calibration"
        samples = _probe_samples(calibration, 1)
        adapter.generate([s.messages for s in samples], max_new_tokens=2)
