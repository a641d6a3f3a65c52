"""Which choices go together. Each rule says which fields clash, why, and what to set instead."""

from __future__ import annotations

from collections.abc import Iterator

from morphoquant.config.messages import ConfigError
from morphoquant.config.method import FIXED_WIDTH
from morphoquant.config.partial import partial
from morphoquant.config.rows import TABLE1
from morphoquant.config.rules_channels import by_channel
from morphoquant.config.rules_modality import by_modality
from morphoquant.config.rules_placement import placement
from morphoquant.config.schema import RunConfig


def check(cfg: RunConfig) -> None:
    """Refuse combinations that cannot be computed, or would mean something else than they say.

    Raises:
        ConfigError: all broken rules, one per line.
    """
    broken = [
        *_transform(cfg),
        *_weight(cfg),
        *_activation(cfg),
        *_search(cfg),
        *_compensation(cfg),
        *by_channel(cfg),
        *by_modality(cfg),
        *_model(cfg),
        *_data(cfg),
        *_report(cfg),
        *_objective(cfg),
        *partial(cfg),
    ]
    if broken:
        raise ConfigError("\n".join(broken))


def _transform(cfg: RunConfig) -> Iterator[str]:
    transform, activation, bits = cfg.method.transform, cfg.method.activation, cfg.bits
    rounds = activation.format != "none" and bits.activation < 16
    learns = transform.name == "spin" and transform.steps > 0
    if learns and (not rounds or activation.format == "nvfp4"):
        yield (
            f"method.transform.name='spin' with {_activation_words(cfg)}, bits.activation="
            f"{bits.activation}: rotations are learned from rounded activations (and NVFP4 "
            "needs a scale of activations that do not exist yet). Set bits.activation=4 with "
            "method/activation=per_token, or method.transform.steps=0."
        )
    if transform.name == "smooth":
        if (
            transform.search
            and not rounds
            and (cfg.method.weight.format == "none" or bits.weight >= 16)
        ):
            yield (
                "method.transform.search=true where neither weights nor activations are rounded: "
                "every exponent would do. Set bits=w4a16 (or w4a4), or "
                "method.transform.search=false."
            )
        if transform.balance == "gradient" and not transform.search:
            yield (
                "method.transform.balance='gradient' with method.transform.search=false: gradients "
                "weigh the loss of a search. Set method.transform.search=true, or balance=none."
            )
    if transform.r3 and transform.name not in ("rotate", "spin"):
        yield (
            f"method.transform.r3=true with method.transform.name={transform.name!r}: R3 belongs "
            "to rotations. Set method/transform=rotate, or method.transform.r3=false."
        )
    attention = cfg.model.attention
    if (bits.kv < 16 or transform.r3) and attention == "flash_attention_2":
        yield (
            f"bits.kv={bits.kv}, method.transform.r3={transform.r3} with model.attention="
            f"{attention!r}: its kernel cannot be given other keys and values. Set "
            "model.attention=sdpa."
        )


def _weight(cfg: RunConfig) -> Iterator[str]:
    weight, bits = cfg.method.weight, cfg.bits.weight
    width = FIXED_WIDTH.get(weight.format)
    if width is not None and bits not in (width, 16) and weight.fallback_format is None:
        yield (
            f"bits.weight={bits} with method.weight.format={weight.format!r}: it exists at {width} "
            "bits only. Set method.weight.fallback_format=int to use integers at other widths, or "
            f"bits.weight={width}."
        )
    if weight.algorithm == "gptq" and (weight.format != "int" or weight.fold):
        yield (
            f"method.weight.algorithm='gptq' with method.weight.format={weight.format!r}, fold="
            f"{weight.fold}: it rounds to integers that are not folded. Set method/weight=gptq."
        )
    if weight.clip == "awq" and (
        weight.format != "int" or weight.algorithm != "rtn" or weight.granularity != "per_group"
    ):
        yield (
            f"method.weight.clip='awq' with method.weight.format={weight.format!r}, algorithm="
            f"{weight.algorithm!r}, granularity={weight.granularity!r}: its search is over groups "
            "of integers that are rounded to nearest. Set method/weight=int_awq."
        )
    if not weight.fold:
        return
    if weight.format != "int" or weight.granularity == "per_tensor" or not weight.symmetric:
        yield (
            f"method.weight.fold=true with method.weight.format={weight.format!r}, granularity="
            f"{weight.granularity!r}, symmetric={weight.symmetric}: scales are folded into "
            "symmetric integers per output channel or per group. Set method/weight=int_folded."
        )
    if not _is_static_per_channel(cfg):
        yield (
            f"method.weight.fold=true with {_activation_words(cfg)}: only static scales per "
            "channel can be folded into the weight. Set method/activation=per_channel_static (or "
            "per_channel_mdqfo), or method.weight.fold=false."
        )


def _is_static_per_channel(cfg: RunConfig) -> bool:
    activation = cfg.method.activation
    return (
        activation.format != "none"
        and activation.granularity == "per_channel"
        and activation.mode == "static"
    )


def _activation_words(cfg: RunConfig) -> str:
    activation = cfg.method.activation
    return (
        f"method.activation.format={activation.format!r}, granularity="
        f"{activation.granularity!r}, mode={activation.mode!r}"
    )


def _activation(cfg: RunConfig) -> Iterator[str]:
    activation = cfg.method.activation
    if activation.format == "none":
        return
    width = FIXED_WIDTH.get(activation.format)
    if width is not None:
        if cfg.bits.activation not in (width, 16):
            yield (
                f"bits.activation={cfg.bits.activation} with method.activation.format="
                f"{activation.format!r}: it exists at {width} bits only. Set bits.activation="
                f"{width}, or method.activation.format=int."
            )
        if activation.granularity != "per_group" or activation.mode != "dynamic":
            yield (
                f"method.activation.format={activation.format!r} with granularity="
                f"{activation.granularity!r}, mode={activation.mode!r}: its blocks and scales are "
                f"its own. Set method/activation={activation.format}."
            )
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
        if activation.granularity == "per_modality":
            yield (
                f"{where} with method.activation.mode='dynamic': a modality's scale is fixed in "
                "calibration. Set method.activation.mode=static."
            )
    elif activation.granularity in ("per_token", "per_group"):
        yield (
            f"{where} with method.activation.mode='static': tokens are not known in calibration. "
            "Set method.activation.mode=dynamic, or method.activation.granularity=per_channel."
        )
    found = activation.range
    if found.name == "percentile" and (
        activation.granularity not in ("per_tensor", "per_modality") or not activation.symmetric
    ):
        yield (
            f"method.activation.range.name='percentile' with {where}, symmetric="
            f"{activation.symmetric}: percentiles are of |x| over all channels. Set method/"
            "activation=per_tensor_static or per_modality_static, or range.name=mse."
        )
    if found.name == "mse" and activation.mode != "static":
        yield (
            f"method.activation.range.name='mse' with method.activation.mode={activation.mode!r}: "
            "the search is over static ranges. Set method.activation.mode=static, or "
            "method.activation.range.name=minmax."
        )
    if activation.grid != "restricted" and not activation.symmetric:
        yield (
            f"method.activation.grid={activation.grid!r} with method.activation.symmetric=false: "
            "the grids differ for symmetric ranges only. Set method.activation.symmetric=true, or "
            "method.activation.grid=restricted."
        )


def _search(cfg: RunConfig) -> Iterator[str]:
    found = cfg.method.activation.range
    if found.name != "mdqfo":
        return
    where = "method.activation.range"
    if not _is_static_per_channel(cfg):
        yield (
            f"{where}.name='mdqfo' with {_activation_words(cfg)}: the "
            "search is over static channel ranges. Set method/activation=per_channel_mdqfo, or "
            f"{where}.name=minmax."
        )
    if found.clip_ratio != 1.0:
        yield (
            f"{where}.clip_ratio={found.clip_ratio} with {where}.name='mdqfo': the "
            f"search already shrinks every range. Set {where}.clip_ratio=1.0."
        )
    joint = found.cosine == "token" and found.cosine_weight > 0
    if joint and found.ratio_per == "channel" and found.optimizer == "grid":
        yield (
            f"{where}.cosine='token' with {where}.ratio_per='channel': a token's direction depends "
            "on all channels at once, so a grid of ratios per channel cannot be searched one by "
            f"one. Set {where}.ratio_per=mask_group, or {where}.optimizer=gradient."
        )
    if found.output_weighting and found.ratio_per == "channel" and not joint:
        yield (
            f"{where}.output_weighting=true with {where}.ratio_per='channel': every channel "
            f"chooses for itself, so weights between channels change nothing. Set "
            f"{where}.ratio_per=mask_group, or output_weighting=false."
        )
    if found.upstream == "quantized" and cfg.calibration.search_samples == 0:
        yield (
            f"{where}.upstream='quantized' with calibration.search_samples=0: the search would "
            "hand quantized activations to the statistics of the next block. Set "
            f"calibration.search_samples=32, or {where}.upstream=unquantized."
        )
    if found.optimizer == "gradient":
        if found.ratio_per != "channel":
            yield (
                f"{where}.optimizer='gradient' with {where}.ratio_per={found.ratio_per!r}: it "
                f"learns a ratio per channel. Set {where}.ratio_per=channel, or optimizer=grid."
            )
        if found.accumulate != "sum" or found.upstream != "unquantized":
            yield (
                f"{where}.optimizer='gradient' with {where}.accumulate={found.accumulate!r}, "
                f"upstream={found.upstream!r}: both belong to the grid. Set accumulate=sum and "
                "upstream=unquantized, or optimizer=grid."
            )


def _compensation(cfg: RunConfig) -> Iterator[str]:
    compensation, activation = cfg.method.compensation, cfg.method.activation
    if compensation.name == "none":
        return
    static = _is_static_per_channel(cfg)
    if compensation.name == "static_bias" and not static:
        yield (
            f"method.compensation.name='static_bias' with {_activation_words(cfg)}: the mean "
            "residual is known for static ranges per channel only. Set method/activation="
            "per_channel_static (or per_channel_mdqfo), or method/compensation=none."
        )
    dynamic = activation.format != "none" and activation.mode == "dynamic"
    by_element = compensation.name == "dabc" and compensation.reading == "element"
    if compensation.name == "dabc" and not static and (by_element or not dynamic):
        yield (
            f"method.compensation.name='dabc', reading={compensation.reading!r} with "
            f"{_activation_words(cfg)}: elements pass the edge of static ranges per channel, whole "
            "channels those or dynamic ranges. Set method/activation=per_channel_static (or "
            "per_channel_mdqfo), or method/compensation=none."
        )
    if compensation.name == "low_rank" and (
        cfg.method.weight.format == "none" or cfg.method.weight.fold
    ):
        yield (
            f"method.compensation.name='low_rank' with method.weight.format="
            f"{cfg.method.weight.format!r}, fold={cfg.method.weight.fold}: the branch makes up for "
            "rounded weights, not for folded ones. Set method/weight=int_group, or method/"
            "compensation=none."
        )
    if compensation.name == "low_rank":
        return
    if compensation.per_modality and compensation.name != "static_bias":
        yield (
            f"method.compensation.per_modality=true with name={compensation.name!r}: what is "
            "returned per token needs no modality. Set method/compensation="
            "static_bias_per_modality, or per_modality=false."
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
    yield from placement(cfg)
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
    if cfg.calibration.allow_leakage and "leak" not in cfg.calibration.name:
        yield (
            f"calibration.allow_leakage=true with calibration.name={cfg.calibration.name!r}: a "
            "calibration that is also evaluated has to say so. Give it a name with 'leak' in it, "
            "or set calibration.allow_leakage=false."
        )
    repeated = {t for t in cfg.benchmark.tasks if cfg.benchmark.tasks.count(t) > 1}
    if repeated:
        yield f"benchmark.tasks: named twice: {', '.join(sorted(repeated))}. Name each once."


def _report(cfg: RunConfig) -> Iterator[str]:
    row = cfg.bits.scheme, cfg.method.name
    if cfg.report == "table1" and row not in TABLE1:
        rows = ", ".join(f"{bits}_{method}" for bits, method in TABLE1)
        yield (
            f"report='table1' with method={row[1]} at {row[0]}: Table 1 has no such row. Choose "
            f"row=<one of {rows}> and leave method and bits to it, or set report=comparison."
        )


def _objective(cfg: RunConfig) -> Iterator[str]:
    tasks, held_out = cfg.benchmark.tasks, cfg.benchmark.held_out
    if not tasks and cfg.benchmark.name != "none":
        yield (
            f"benchmark.tasks=[] with benchmark.name={cfg.benchmark.name!r}: nothing would be "
            "asked. Name at least 1 task, or set benchmark=none to quantize and measure only."
        )
    if not tasks and cfg.report in ("ablation", "table3"):
        yield (
            f"report={cfg.report!r} with benchmark={cfg.benchmark.name}: it compares answers. Set "
            "benchmark=mini, or report=comparison."
        )
    if cfg.objective == "kl" and cfg.calibration.held_out_samples == 0:
        yield (
            "objective='kl' with calibration.held_out_samples=0: it is measured on prompts that "
            "neither statistics nor the search have seen. Set calibration.held_out_samples=64."
        )
    if cfg.objective == "held_out_accuracy" and not held_out:
        yield (
            f"objective='held_out_accuracy' with benchmark={cfg.benchmark.name}: what is tuned on "
            "a benchmark cannot be reported on it. Set benchmark=mini_held_out (or, for a real "
            "model, scienceqa_validation)."
        )
    if cfg.report == "trials" and cfg.objective is None:
        yield "report='trials' with objective=null: nothing to sort by. Set objective=kl."
