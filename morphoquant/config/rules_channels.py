"""Which choices go with channels that are treated apart: masks, and columns at a higher width."""

from __future__ import annotations

from collections.abc import Iterator

from morphoquant.config.schema import RunConfig

MASKING = ("dabc", "static_bias", "mixed_precision")


def by_channel(cfg: RunConfig) -> Iterator[str]:
    """Broken rules: which fields clash, why, and what to set instead."""
    if cfg.method.compensation.name in MASKING:
        yield from _mask(cfg)
    if cfg.method.compensation.name == "mixed_precision":
        yield from _mixed_precision(cfg)


def _mask(cfg: RunConfig) -> Iterator[str]:
    mask, transform = cfg.method.compensation.mask, cfg.method.transform
    if not mask.rules and not mask.all_channels:
        yield (
            "method.compensation.mask.rules=[] with mask.all_channels=[]: nothing would be "
            "compensated. Set mask.rules=[local], or method/compensation=none."
        )
    if mask.score == "log_l1" and mask.modalities == "union":
        yield (
            "method.compensation.mask.score='log_l1' with mask.modalities='union': this score "
            "grows with the number of tokens, which differs between modalities. Set mask.score="
            "log1p, or mask.modalities=pooled."
        )
    if "rotated_mean" in mask.rules and not (transform.name in ("rotate", "spin") and transform.r4):
        yield (
            f"method.compensation.mask.rules={list(mask.rules)} with method.transform.name="
            f"{transform.name!r}, r4={transform.r4}: without an online Hadamard no channel gathers "
            "the mean. Set method/transform=rotate, or method/compensation=none."
        )


def _mixed_precision(cfg: RunConfig) -> Iterator[str]:
    compensation, activation = cfg.method.compensation, cfg.method.activation
    where = "method.compensation.name='mixed_precision'"
    words = (
        f"method.activation.format={activation.format!r}, granularity="
        f"{activation.granularity!r}, mode={activation.mode!r}"
    )
    if activation.format == "none" and not compensation.mask.by_weights:
        yield (
            f"{where} with {words}: which channels are outliers is seen in activations that are "
            "rounded. Set method/activation=per_token, or method/compensation=none."
        )
    static = activation.format != "none" and activation.mode == "static"
    if static and compensation.outlier_bits == 8:
        yield (
            f"{where}, outlier_bits=8 with {words}: outlier channels share one dynamic range per "
            "token. Set method/activation=per_token (or per_group), method.compensation."
            "outlier_bits=16, or method/compensation=dabc."
        )
    if static and activation.range.name == "percentile":
        yield (
            f"{where} with method.activation.range.name='percentile': percentiles are over all "
            "channels, those kept apart among them. Set method.activation.range.name=mse, or "
            "method/compensation=none."
        )
    if compensation.reading == "element":
        yield (
            f"{where} with method.compensation.reading='element': a channel at a higher width is "
            "there as a whole. Set method.compensation.reading=channel."
        )
    if cfg.method.weight.fold:
        yield (
            f"{where} with method.weight.fold=true: folded weights keep the columns of dabc's "
            "channels in 16 bits. Set method/compensation=dabc, or method.weight.fold=false."
        )
