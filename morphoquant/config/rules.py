"""Which choices go together. Each rule says which fields clash, why, and what to set instead."""

from __future__ import annotations

from collections.abc import Iterator

from morphoquant.config.messages import ConfigError
from morphoquant.config.schema import RunConfig


def check(cfg: RunConfig) -> None:
    """Refuse combinations that cannot be computed, or would mean something else than they say.

    Raises:
        ConfigError: all broken rules, one per line.
    """
    broken = [*_weight(cfg), *_activation(cfg), *_compensation(cfg), *_model(cfg), *_data(cfg)]
    if broken:
        raise ConfigError("\n".join(broken))


def _weight(cfg: RunConfig) -> Iterator[str]:
    weight, bits = cfg.method.weight, cfg.bits.weight
    if weight.format == "nf4" and bits not in (4, 16) and weight.fallback_format is None:
        yield (
            f"bits.weight={bits} with method.weight.format='nf4': NF4 exists at 4 bits only. "
            "Set method.weight.fallback_format=int to use integers at other widths, or "
            "bits.weight=4."
        )


def _activation(cfg: RunConfig) -> Iterator[str]:
    activation = cfg.method.activation
    if activation.format == "none":
        return
    where = f"method.activation.granularity={activation.granularity!r}"
    if activation.mode == "dynamic":
        if activation.granularity == "per_tensor":
            yield (
                f"{where} with method.activation.mode='dynamic': the scale would depend on what "
                "else is in the batch. Set method.activation.mode=static, or "
                "method.activation.granularity=per_token."
            )
        if activation.granularity == "per_channel":
            yield (
                f"{where} with method.activation.mode='dynamic': a channel's range over tokens is "
                "not known while tokens are generated. Set method.activation.mode=static."
            )
    elif activation.granularity in ("per_token", "per_group"):
        yield (
            f"{where} with method.activation.mode='static': tokens are not known in calibration. "
            "Set method.activation.mode=dynamic, or method.activation.granularity=per_channel."
        )
    found = activation.range
    searchable = activation.granularity == "per_channel" and activation.mode == "static"
    if found.name == "mdqfo" and not searchable:
        yield (
            f"method.activation.range.name='mdqfo' with {where}, mode={activation.mode!r}: the "
            "search is over static channel ranges. Set method/activation=per_channel_mdqfo, or "
            "method.activation.range.name=minmax."
        )
    if found.name == "mdqfo" and found.clip_ratio != 1.0:
        yield (
            f"method.activation.range.clip_ratio={found.clip_ratio} with range.name='mdqfo': the "
            "search already shrinks every range. Set method.activation.range.clip_ratio=1.0."
        )


def _compensation(cfg: RunConfig) -> Iterator[str]:
    compensation, activation = cfg.method.compensation, cfg.method.activation
    if compensation.name != "dabc":
        return
    static = activation.granularity == "per_channel" and activation.mode == "static"
    if activation.format == "none" or not static:
        yield (
            f"method.compensation.name='dabc' with method.activation.format={activation.format!r}, "
            f"granularity={activation.granularity!r}, mode={activation.mode!r}: it returns the "
            "residual of static channel ranges. Set method/activation=per_channel_static (or "
            "per_channel_mdqfo), or method/compensation=none."
        )


def _model(cfg: RunConfig) -> Iterator[str]:
    model = cfg.model
    if model.attention == "flash_attention_2":
        if model.device == "cpu":
            yield (
                "model.attention='flash_attention_2' with model.device='cpu': it needs a CUDA "
                "device. Set model.attention=sdpa."
            )
        if model.dtype == "float32":
            yield (
                "model.attention='flash_attention_2' with model.dtype='float32': it computes in 16 "
                "bits only. Set model.dtype=bfloat16, or model.attention=sdpa."
            )
    scope = model.scope
    if cfg.method.quantizes and not (scope.decoder or scope.vision or scope.audio):
        yield "model.scope: nothing is in scope. Set model.scope.decoder=true."
    if model.path.startswith("embedded:") and model.revision is not None:
        yield (
            f"model.revision={model.revision!r} with model.path={model.path!r}: embedded weights "
            "have no revisions. Set model.revision=null."
        )
    media = model.media
    for kind in ("image", "video"):
        low = getattr(media, f"{kind}_min_pixels")
        high = getattr(media, f"{kind}_max_pixels")
        if low is not None and high is not None and low > high:
            yield (
                f"model.media.{kind}_min_pixels={low} is more than model.media.{kind}_max_pixels="
                f"{high}. Swap them, or set one to null."
            )


def _data(cfg: RunConfig) -> Iterator[str]:
    for number, source in enumerate(cfg.calibration.sources):
        if source.videos is not None and source.reader != "videomme":
            yield (
                f"calibration.sources.{number}.videos={source.videos!r} with reader="
                f"{source.reader!r}: only videomme reads clips. Set videos=null."
            )
    if not cfg.calibration.sources:
        yield "calibration.sources: empty. Choose a group, e.g. calibration=mini."
    repeated = {t for t in cfg.benchmark.tasks if cfg.benchmark.tasks.count(t) > 1}
    if repeated:
        yield f"benchmark.tasks: named twice: {', '.join(sorted(repeated))}. Name each once."
