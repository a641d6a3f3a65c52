"""What a run says of itself: statistics to tables, slots in words, scalars for the tracker."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from morphoquant.config.schema import BitsConfig, MethodConfig, RunConfig
from morphoquant.tracking.rundir import RunDirectory
from morphoquant.tracking.wandb_mirror import Tracker

if TYPE_CHECKING:
    import pandas as pd

    from morphoquant.quantization.engine import BlockQuantizer


def record_statistics(
    config: RunConfig, quantizer: BlockQuantizer, directory: RunDirectory, tracker: Tracker
) -> dict[str, float]:
    """The atlas of one run: tables to parquet and the tracker, figures, scalars for the result."""
    tables = statistics_tables(config, quantizer) if directory.writes else {}
    if not tables:
        return {}
    for name, frame in tables.items():
        directory.write_table(name, frame)
        if name not in PER_CHANNEL:
            tracker.table(name, frame)
    scalars = _scalars(tables)
    tracker.log({f"statistics/{name}": value for name, value in scalars.items()})
    if config.statistics.figures:
        from morphoquant.analysis.figures import save_figures

        for path in save_figures(directory.path, tables):
            tracker.figure(path.stem, path)
    return scalars


PER_CHANNEL = ("channels", "ranges")
"""Tables with a row per channel: too long for a tracker."""


def statistics_tables(config: RunConfig, quantizer: BlockQuantizer) -> dict[str, pd.DataFrame]:
    """Name -> table; tables that this run has nothing for are left out.

    ``outliers``, ``overlap`` and ``channels`` describe the activations, ``ranges`` the static
    choices per channel, ``errors`` what was lost per layer, group and modality, ``depth`` how the
    error grows from block to block.
    """
    import pandas as pd

    from morphoquant.calibration.outliers import channel_columns, outlier_rows, overlap_rows

    collected = quantizer.collected
    found = {}
    if collected:
        share = config.statistics.outlier_share
        found["outliers"] = pd.DataFrame(outlier_rows(collected))
        found["overlap"] = pd.DataFrame(overlap_rows(collected, share))
        found["channels"] = pd.DataFrame(channel_columns(collected))
        found["ranges"] = pd.DataFrame(range_columns(quantizer))
    found["errors"] = pd.DataFrame(quantizer.meter.errors)
    found["depth"] = pd.DataFrame(quantizer.meter.depth)
    return {name: frame for name, frame in found.items() if not frame.empty}


def range_columns(quantizer: BlockQuantizer) -> dict[str, list[Any]]:
    """Per channel of every statically quantized group: start, final range, ratio, mask."""
    columns: dict[str, list[Any]] = {}
    if quantizer.method.activation.granularity != "per_channel":
        return columns  # one range for all channels: the manifest has it
    for (layer, group), choice in quantizer.choices.items():
        count = choice.final.lo.numel()
        ratios = [1.0] * count if choice.ratios is None else choice.ratios.tolist()
        masked = [False] * count if choice.mask is None else choice.mask.tolist()
        values: dict[str, list[Any]] = {
            "layer": [layer] * count,
            "group": [group] * count,
            "channel": list(range(count)),
            "lo": choice.final.lo.tolist(),
            "hi": choice.final.hi.tolist(),
            "start_lo": choice.start.lo.tolist(),
            "start_hi": choice.start.hi.tolist(),
            "ratio": ratios,
            "masked": masked,
        }
        for name, value in values.items():
            columns.setdefault(name, []).extend(value)
    return columns


def _scalars(tables: dict[str, pd.DataFrame]) -> dict[str, float]:
    """Medians over layers, by modality: what a sweep's plots compare."""
    scalars: dict[str, float] = {}

    def medians(table: str, columns: tuple[str, ...]) -> None:
        for name in columns if table in tables else ():
            for modality, value in tables[table].groupby("modality")[name].median().items():
                scalars[f"{name}/{modality}"] = float(value)

    medians("outliers", ("max_over_median", "kurtosis_p99", "dispersion_log1p_max"))
    medians("errors", ("activation_sqnr_db", "output_sqnr_db"))
    if "overlap" in tables:
        overlap = tables["overlap"]
        named = overlap.assign(pair=overlap["modality_a"] + "-" + overlap["modality_b"])
        for pair, value in named.groupby("pair")["jaccard"].mean().items():
            scalars[f"outlier_overlap/{pair}"] = float(value)
    if "depth" in tables:
        depth = tables["depth"]
        decoder = depth[depth["tower"] == "decoder"]
        last = decoder[decoder["block"] == decoder["block"].max()]
        for _, row in last.iterrows():
            scalars[f"final_relative_error/{row['modality']}"] = float(row["relative_error"])
    return scalars


def describe_slots(method: MethodConfig, bits: BitsConfig) -> dict[str, str]:
    """Each slot in a few words, for tables and footnotes: what it comes to at these widths."""
    from morphoquant.quantization.weights import format_at

    transform, weight = method.transform, method.weight
    activation, compensation = method.activation, method.compensation
    rotates = transform.name in ("rotate", "spin")
    parts = [p for p in ("r1", "r2", "r4") if rotates and getattr(transform, p)]
    described = {
        "transform": "none"
        if transform.name == "none"
        else f"{transform.name} {'+'.join(parts)}".strip(),
        "weight": "none",
        "activation": "none",
        "compensation": "none",
    }
    grid = format_at(weight, bits.weight)
    if grid == "int":
        granularity = weight.granularity.replace("_", "-")
        group = f" {weight.group_size}" if weight.granularity == "per_group" else ""
        folded = ", activation scales folded in" if weight.fold else ""
        uneven = "" if weight.symmetric else " asymmetric"
        by = f"{weight.algorithm}, {weight.clip}"
        described["weight"] = f"int {granularity}{group}{uneven} {by}{folded}"
    elif grid in ("nf4", "fp4"):
        double = " + double quantization" if weight.double_quantization else ""
        described["weight"] = f"{grid}{double}"
    elif grid != "none":
        described["weight"] = grid
    if bits.activation >= 16:
        pass
    elif activation.format not in ("none", "int"):
        described["activation"] = activation.format
    elif activation.format == "int":
        described["activation"] = (
            f"{activation.format} {activation.granularity.replace('_', '-')} {activation.mode}, "
            f"{activation.range.name}"
        )
    if compensation.name == "dabc":
        described["compensation"] = f"{compensation.name}, {compensation.reading} reading"
    elif compensation.name == "mixed_precision":
        which = "rotated mean" if compensation.mask.by_weights else "outlier channels"
        described["compensation"] = f"{which} at {compensation.outlier_bits} bits"
    elif compensation.name == "low_rank":
        fitted = ", whitened" if compensation.whitened else ""
        order = f"{compensation.order} rounding"
        share = compensation.rank_share
        rank = f"rank {compensation.rank}" if share is None else f"rank {share:.0%} of the weight's"
        per = " per modality" if compensation.per_modality else ""
        described["compensation"] = f"{rank}{per} {order}{fitted}"
    elif compensation.name != "none":
        per = " per modality" if compensation.per_modality else ""
        described["compensation"] = f"{compensation.name}{per}"
    return described


def flat(result: dict[str, Any]) -> dict[str, Any]:
    """Scalars of the result, for the tracker's summary."""
    flat: dict[str, Any] = {}
    if result["mean"] is not None:
        flat["mean_accuracy"] = result["mean"]
    flat |= {f"held_out/{name}": value for name, value in (result.get("held_out") or {}).items()}
    for name, row in result["accuracy"].items():
        flat |= {f"{name}/{key}": value for key, value in row.items()}
    for name, row in result["modality"].items():
        flat[f"modality/{name}"] = row["value"]
    flat |= {f"bits/{name}": value for name, value in result["bits"].items()}
    flat |= {f"seconds/{name}": value for name, value in result["seconds"].items()}
    return flat
