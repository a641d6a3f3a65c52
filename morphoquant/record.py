"""What a run says of itself: statistics to tables, slots in words, scalars for the tracker."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from morphoquant.config.schema import MethodConfig, RunConfig
from morphoquant.tracking.rundir import RunDirectory
from morphoquant.tracking.wandb_mirror import Tracker

if TYPE_CHECKING:
    from morphoquant.quantization.engine import BlockQuantizer


def record_statistics(
    config: RunConfig, quantizer: BlockQuantizer, directory: RunDirectory, tracker: Tracker
) -> dict[str, float]:
    """Outlier statistics to parquet and the tracker; a few scalars for the result."""
    if not quantizer.collected:
        return {}
    import pandas as pd

    from morphoquant.calibration.outliers import channel_columns, outlier_rows, overlap_rows

    outliers = pd.DataFrame(outlier_rows(quantizer.collected))
    overlap = pd.DataFrame(overlap_rows(quantizer.collected, config.statistics.outlier_share))
    directory.write_table("outliers", outliers)
    directory.write_table("overlap", overlap)
    directory.write_table("channels", pd.DataFrame(channel_columns(quantizer.collected)))
    tracker.table("outliers", outliers)
    tracker.table("overlap", overlap)
    scalars = {}
    for name in ("max_over_median", "kurtosis_p99", "dispersion_log1p_max"):
        for modality, value in outliers.groupby("modality")[name].median().items():
            scalars[f"{name}/{modality}"] = float(value)
    if not overlap.empty:
        named = overlap.assign(pair=overlap["modality_a"] + "-" + overlap["modality_b"])
        for pair, value in named.groupby("pair")["jaccard"].mean().items():
            scalars[f"outlier_overlap/{pair}"] = float(value)
    tracker.log({f"outliers/{name}": value for name, value in scalars.items()})
    return scalars


def describe_slots(method: MethodConfig) -> dict[str, str]:
    """Each slot in a few words, for tables and footnotes."""
    transform, weight = method.transform, method.weight
    activation, compensation = method.activation, method.compensation
    parts = [p for p in ("r1", "r2", "r4") if getattr(transform, p)]
    described = {
        "transform": "none" if transform.name == "none" else f"{transform.name} {'+'.join(parts)}",
        "weight": "none",
        "activation": "none",
        "compensation": "none",
    }
    if weight.format == "int":
        granularity = weight.granularity.replace("_", "-")
        group = f" {weight.group_size}" if weight.granularity == "per_group" else ""
        described["weight"] = f"int {granularity}{group} {weight.algorithm}, {weight.clip}"
    elif weight.format != "none":
        double = " + double quantization" if weight.double_quantization else ""
        described["weight"] = f"{weight.format}{double}"
    if activation.format != "none":
        described["activation"] = (
            f"{activation.format} {activation.granularity.replace('_', '-')} {activation.mode}, "
            f"{activation.range.name}"
        )
    if compensation.name != "none":
        described["compensation"] = f"{compensation.name}, {compensation.reading} reading"
    return described


def flat(result: dict[str, Any]) -> dict[str, Any]:
    """Scalars of the result, for the tracker's summary."""
    flat: dict[str, Any] = {"mean_accuracy": result["mean"]}
    for name, row in result["accuracy"].items():
        flat |= {f"{name}/{key}": value for key, value in row.items()}
    for name, row in result["modality"].items():
        flat[f"modality/{name}"] = row["value"]
    flat |= {f"bits/{name}": value for name, value in result["bits"].items()}
    flat |= {f"seconds/{name}": value for name, value in result["seconds"].items()}
    return flat
