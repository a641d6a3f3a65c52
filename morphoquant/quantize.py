"""The quantization phase of a run: transform, walk, cache, and the checks around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from morphoquant.config.schema import RunConfig
from morphoquant.errors import HarnessError
from morphoquant.sharing.prompts import Prompts
from morphoquant.tracking.progress import progress
from morphoquant.tracking.rundir import RunDirectory

if TYPE_CHECKING:
    import torch

    from morphoquant.calibration.samples import Calibration
    from morphoquant.models.adapter import Batch, OmniAdapter
    from morphoquant.quantization.attention import KVReport
    from morphoquant.quantization.engine import BlockQuantizer
    from morphoquant.quantization.manifest import Manifest

MIN_COSINE = 0.999  # of probe logits after a transform, in 16-bit arithmetic (SPEC 5)


class InvariantError(HarnessError):
    """Something that must be true of every run was not; the numbers would mean nothing."""


def reads_calibration(config: RunConfig) -> bool:
    """Whether the run's results can depend on calibration prompts."""
    changes = config.method.quantizes or config.method.transform.name != "none"
    return changes or (config.statistics.enabled and config.statistics.unquantized)


def probe_samples(calibration: Calibration, per_modality: int) -> list[Any]:
    """A few calibration samples of every modality."""
    chosen: dict[str, list[Any]] = {}
    for sample in calibration.samples:
        group = chosen.setdefault(sample.modality, [])
        if len(group) < per_modality:
            group.append(sample)
    return [sample for _, group in sorted(chosen.items()) for sample in group]


def probe_logits(adapter: OmniAdapter, probe: Sequence[Batch]) -> torch.Tensor:
    """float32 [prompts, vocabulary]: logits of the token after each prompt of some batches."""
    import torch

    return torch.cat([adapter.logits(batch) for batch in probe])


def transform(
    config: RunConfig,
    adapter: OmniAdapter,
    calibration: Calibration,
    probe: Sequence[Batch],
    before: torch.Tensor,
    directory: RunDirectory,
    prompts: Prompts | None = None,
) -> float | None:
    """Slot 1, with the check that the unquantized outputs did not move.

    Raises:
        InvariantError: they did.
    """
    import torch

    from morphoquant.quantization.attention import install_kv_cache
    from morphoquant.quantization.kv_cache import KVSettings
    from morphoquant.quantization.transforms import TransformInput, apply_transform
    from morphoquant.quantization.transforms.check import largest_relative_change

    settings = config.method.transform
    if settings.name == "none":
        return None
    adapter.untie_head()
    encoded: list[Batch] = []
    if settings.name in ("smooth", "modality_smooth"):  # rotations read none, or encode their own
        encoded = (prompts or Prompts(config, adapter)).encode(calibration.samples)
    steps = {"spin": settings.steps, "modality_smooth": len(adapter.blocks("decoder"))}
    with progress(
        f"Transforming: {settings.name}", steps.get(settings.name, 1), unit="steps"
    ) as step:
        given = TransformInput(
            adapter, config.method, config.bits, encoded, calibration.samples, step
        )
        report = apply_transform(given)
    if report is not None:
        directory.write_json("transform.json", asdict(report))
    if settings.r3:
        install_kv_cache(adapter, KVSettings(rotate=True))
    after = probe_logits(adapter, probe)
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


def walk_blocks(
    config: RunConfig,
    adapter: OmniAdapter,
    towers: list[Any],
    calibration: Calibration,
    prompts: Prompts | None = None,
) -> BlockQuantizer:
    """Slots 2 to 4, block by block; what other runs have encoded and observed is read."""
    from morphoquant.calibration.walk import walk
    from morphoquant.quantization import engine

    settings = config.statistics
    quantizer = engine.BlockQuantizer(
        config.method, config.bits, observe=settings.enabled, histograms=settings.histograms
    )
    if not reads_calibration(config):
        return quantizer
    prompts = prompts or Prompts(config, adapter)
    sets: dict[str, list[Any]] = {}
    early: tuple[str, ...] = ()
    if quantizer.searches and calibration.search:
        sets[engine.SEARCH] = prompts.encode(calibration.search)
    if config.method.quantizes and settings.enabled and settings.probes:
        probes = prompts.encode(probe_samples(calibration, settings.probes))
        sets |= {engine.PROBE: probes, engine.PROBE_QUANTIZED: probes}
        early = (engine.PROBE,)
    count = sum(len(adapter.blocks(tower)) for tower in towers)
    title = f"Quantizing {config.method.name} {config.bits.scheme}"
    if not config.method.quantizes:
        title = f"Observing {config.method.name}"
    with prompts.statistics(calibration, towers, quantizer) as shared:
        quantizer.moments = shared.moments()
        sets = {engine.STATISTICS: shared.passing(), **sets}
        prompts.say()
        with progress(title, count, unit="blocks") as step:
            walk(adapter, towers, sets, quantizer, step, early)
        shared.keep()
    if quantizer.needs_labels:
        adapter.follow_labels(quantizer.labels)
    return quantizer


def quantize_cache(config: RunConfig, adapter: OmniAdapter) -> KVReport | None:
    """Keys and values on their grid, once everything else is in place."""
    from morphoquant.quantization.attention import install_kv_cache
    from morphoquant.quantization.kv_cache import KVSettings

    rotates = config.method.transform.name in ("rotate", "spin") and config.method.transform.r3
    if config.bits.kv >= 16 and not rotates:
        return None
    activation = config.method.activation
    settings = KVSettings(
        bits=config.bits.kv,
        group_size=activation.kv_group_size,
        symmetric=activation.kv_symmetric,
        rotate=rotates,
    )
    return install_kv_cache(adapter, settings)


def agreement(
    config: RunConfig, before: torch.Tensor, after: torch.Tensor, modalities: list[str]
) -> dict[str, Any] | None:
    """How far quantization moved the probe logits: KL divergence and agreement of the best token.

    Raises:
        InvariantError: not at all (nothing was quantized), or to NaN.
    """
    import torch

    method, bits = config.method, config.bits
    weight = method.weight.format != "none" and bits.lowest.weight < 16
    activation = method.activation.format != "none" and bits.lowest.activation < 16
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


def count_on_probe(
    manifest: Manifest, adapter: OmniAdapter, calibration: Calibration, blocks: list[Any]
) -> None:
    """Where every answer was already on disk, let the quantizers run on calibration prompts."""
    from morphoquant.quantization.linear import QuantizedLinear

    modules = [b.linear(g.linears[0]) for b in blocks for g in b.groups]
    if any(isinstance(m, QuantizedLinear) and m.calls == 0 for m in modules):
        manifest.counted_on = "calibration"
        samples = probe_samples(calibration, 1)
        adapter.generate([s.messages for s in samples], max_new_tokens=2)
