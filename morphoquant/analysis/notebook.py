"""What the notebooks share: jobs of a sweep with their tables, their differences, their figures."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import stats

from morphoquant.analysis.figures.style import (
    COLOURS,
    GREY,
    GROUPS,
    MODALITIES,
    figure,
    modality_line,
    ordered,
    plain,
    shared_legend,
)
from morphoquant.analysis.paired import PairedDifference, paired_difference
from morphoquant.analysis.sweeps import ABOUT, Sweep, find_sweep, read_sweep, read_tables
from morphoquant.analysis.table import load_runs
from morphoquant.errors import HarnessError
from morphoquant.tracking.rundir import read_result

PLACE = ["layer", "group", "modality"]
MACHINE = ("paths.", "tracker")
"""Overrides that say where results go, and nothing about them."""


@dataclass(frozen=True)
class Job:
    """One finished job of a sweep."""

    label: str
    """The overrides in which it differs from the sweep's other jobs."""
    run: dict[str, Any]
    """Its ``result.json``, with its ``path``."""
    reference: dict[str, Any] | None
    """The unquantized model's."""

    @property
    def value(self) -> float | str:
        """What stands behind the last ``=`` of the label; a number where it is one."""
        text = self.label.rpartition("=")[2]
        try:
            return float(text)
        except ValueError:
            return text

    @cached_property
    def tables(self) -> dict[str, pd.DataFrame]:
        """Parquet tables of the run directory."""
        return read_tables(Path(self.run["path"]))

    @cached_property
    def lost(self) -> PairedDifference | None:
        """Against the unquantized model, question by question."""
        return paired_difference(self.run, self.reference) if self.reference else None


def load_schemes(runs: Path, *overrides: str) -> dict[str, Sweep]:
    """Scheme (``w4a4``) -> its latest finished sweep whose command had all of ``overrides``.

    The runs are looked for below ``runs``, wherever they lay when the sweep was made. Widest
    activations first.

    Raises:
        HarnessError: there is no such sweep, or its runs are gone; names the command.
    """
    find_sweep(runs, *overrides)
    found: dict[str, Sweep] = {}
    for about in sorted((Path(runs) / "sweeps").glob(f"*/{ABOUT}"), reverse=True):
        sweep = read_sweep(about.parent)
        if not set(overrides) <= set(sweep.overrides):
            continue
        notes = [
            {**note, "run": str(Path(runs) / Path(note["run"]).name)} if "run" in note else note
            for note in sweep.notes
        ]
        sweep = replace(sweep, notes=notes)
        result = next(filter(None, map(read_result, sweep.runs)), None)
        if result is not None:
            found.setdefault(result["scheme"], sweep)
    if not found:
        raise HarnessError(
            f"{runs}: the runs of the sweeps with {' '.join(overrides)} are gone. Make them again: "
            f"python run.py {' '.join(overrides)} paths.runs={runs}"
        )
    return dict(sorted(found.items(), key=lambda item: activation_bits(item[0]), reverse=True))


def load(runs: Path, *overrides: str, scheme: str) -> Sweep:
    """The latest finished sweep at ``scheme`` whose command had all of ``overrides``.

    Raises:
        HarnessError: there is none; says what to run.
    """
    found = load_schemes(runs, *overrides)
    if scheme not in found:
        raise HarnessError(
            f"{runs}: no finished sweep with {' '.join(overrides)} at {scheme} (there is "
            f"{', '.join(found)}). "
            f"Make one: python run.py {' '.join(overrides)} bits={scheme} paths.runs={runs}"
        )
    return found[scheme]


def command(sweep: Sweep) -> str:
    """The command that made it, without the folders of the machine it ran on."""
    told = tuple(o for o in sweep.overrides if not o.startswith(MACHINE))
    return replace(sweep, overrides=told).command


def load_jobs(sweep: Sweep) -> dict[str, Job]:
    """Label -> finished job, in the sweep's order. Failed jobs are left out.

    Raises:
        HarnessError: a job's directory holds no finished run.
    """
    done = [note for note in sweep.notes if "run" in note]
    split = [note["overrides"].split() for note in done]
    jobs = {}
    for note, overrides in zip(done, split, strict=True):
        own = [o for o in overrides if any(o not in other for other in split)]
        label = " ".join(own) or note["overrides"]
        path = Path(note["run"])
        loaded = load_runs([path])
        run = next(r for r in loaded if Path(r["path"]) == path)
        reference = next((r for r in loaded if r["fingerprint"] == run["reference"]), None)
        jobs[label] = Job(label, run, reference)
    return jobs


def activation_bits(scheme: str) -> int:
    """Nominal bits of the activations: 4 of ``w4a4``.

    Raises:
        HarnessError: not a scheme.
    """
    found = re.fullmatch(r"w\d+a(\d+)", scheme)
    if found is None:
        raise HarnessError(f"{scheme!r} is no scheme like w4a4")
    return int(found[1])


def mean_sqnr(decibels: pd.Series) -> float:
    """dB of the mean ratio of noise to signal; places without noise (infinite) add none to it.

    The mean of decibels would let one place without noise hide all others.
    """
    return float(-10 * np.log10(np.mean(10 ** (-decibels.to_numpy(float) / 10))))


def summary(jobs: Mapping[str, Job]) -> pd.DataFrame:
    """One row per job, index label.

    Columns: ``value``; ``mean`` accuracy (percent) and its difference to the unquantized model
    ``delta`` with interval ``low``, ``high`` (points); effective ``W bits``, ``A bits``; what the
    compensation costs (``masked_share``, ``bypass_rate``, ``extra_flops_share``,
    ``stored_numbers``; zero without one); ``activation``, ``output`` and ``output_activation``
    SQNR over all places (dB, ``mean_sqnr``; the last without the weights' error); ``final``, the
    mean over modalities of the last decoder block's relative error.
    """
    rows = []
    for label, job in jobs.items():
        costs = job.run["compensation"] or {}
        lost = job.lost.mean if job.lost else None
        errors = job.tables["errors"]
        rows.append(
            {
                "job": label,
                "value": job.value,
                "mean": job.run["mean"],
                **{k: getattr(lost, k, np.nan) for k in ("delta", "low", "high")},
                "W bits": job.run["bits"]["weight"],
                "A bits": job.run["bits"]["activation"],
                **{k: costs.get(k, 0) for k in COSTS},
                "activation": mean_sqnr(errors["activation_sqnr_db"]),
                "output": mean_sqnr(errors["output_sqnr_db"]),
                "output_activation": mean_sqnr(errors["output_sqnr_activation_db"]),
                "final": float(final_errors(job).mean()),
            }
        )
    return pd.DataFrame(rows).set_index("job")


COSTS = ("masked_share", "bypass_rate", "extra_flops_share", "stored_numbers")


def final_errors(job: Job) -> pd.Series:
    """Relative error of the last decoder block's output, by modality."""
    depth = job.tables["depth"]
    decoder = depth[depth["tower"] == "decoder"]
    last = decoder[decoder["block"] == decoder["block"].max()]
    return last.set_index("modality")["relative_error"]


def sqnr_change(job: Job, base: Job, column: str = "output_sqnr_db") -> pd.Series:
    """dB that a job gains over another, index (layer, group, modality).

    Raises:
        HarnessError: the two were calibrated on other samples: their errors were measured on
            other tokens.
    """
    if job.run["calibration"]["ids_hash"] != base.run["calibration"]["ids_hash"]:
        raise HarnessError(
            f"{job.label} and {base.label}: other calibration samples, so their errors were "
            f"measured on other tokens"
        )
    own, other = (j.tables["errors"].set_index(PLACE)[column] for j in (job, base))
    return (own - other).dropna()


def compare(jobs: Mapping[str, Job], base: str | None = None) -> pd.DataFrame:
    """Paired differences of the mean accuracy: to ``base``, or of all pairs.

    Returns:
        ``job``, ``base``; ``delta``, ``low``, ``high`` (points, 95 % bootstrap); ``p`` (exact
        McNemar) and ``p_adjusted`` (Benjamini-Hochberg over the rows); ``found``: the interval
        leaves out zero.
    """
    if base is None:
        pairs = [(b, a) for a, b in itertools.combinations(jobs, 2)]
    else:
        pairs = [(label, base) for label in jobs if label != base]
    rows = []
    for label, other in pairs:
        found = paired_difference(jobs[label].run, jobs[other].run).mean
        row = {k: getattr(found, k) for k in ("delta", "low", "high", "p", "found")}
        rows.append({"job": label, "base": other, **row})
    columns = ["job", "base", "delta", "low", "high", "p", "found"]
    frame = pd.DataFrame(rows, columns=columns)
    frame["p_adjusted"] = stats.false_discovery_control(frame["p"]) if len(frame) else []
    return frame


def setting_lines(
    frame: pd.DataFrame,
    x: str,
    panels: Mapping[str, str],
    title: str,
    unit: str,
    log: bool = False,
    least: Mapping[str, float] | None = None,
) -> Figure:
    """Measured quantities over a numeric setting, one panel each.

    Args:
        frame: columns ``x`` and those of ``panels``; for ``delta`` also ``low`` and ``high``.
        x: the setting's column.
        panels: column -> label of its axis (with the unit).
        title: of the figure.
        unit: label of the horizontal axis.
        log: whether that axis is logarithmic.
        least: column -> smallest extent of its vertical axis, so that nothing looks like much.
    """
    rows = frame.sort_values(x)
    made = figure(title, 1.0 + 2.6 * len(panels), 2.7)
    axes = made.subplots(1, len(panels), squeeze=False)[0]
    for panel, (column, label) in zip(axes, panels.items(), strict=True):
        plain(panel, label, x=unit)
        style = {**modality_line("all"), "marker": "o", "label": None}
        panel.plot(rows[x], rows[column], **style)
        if column == "delta":
            panel.fill_between(rows[x], rows["low"], rows["high"], alpha=0.2, color=style["color"])
            panel.axhline(0, color="black", linewidth=0.8)
        panel.ticklabel_format(axis="y", useOffset=False)
        low, high = panel.get_ylim()
        missing = max(0.0, (least or {}).get(column, 0.0) - (high - low)) / 2
        panel.set_ylim(low - missing, high + missing)
        if log:
            panel.set_xscale("log")
            panel.set_xticks(list(rows[x]), [f"{value:g}" for value in rows[x]])
            panel.minorticks_off()
    return made


def variant_dots(changes: pd.DataFrame, title: str, unit: str) -> Figure:
    """One row per variant, one dot per modality, zero marked.

    Args:
        changes: index variant, columns modalities.
        title: of the figure.
        unit: label of the horizontal axis.
    """
    made = figure(title, 7.0, 1.3 + 0.22 * len(changes))
    axes = made.subplots()
    plain(axes, x=unit)
    axes.axvline(0, color="black", linewidth=1.0)
    for modality in changes:
        style = {**modality_line(str(modality)), "linewidth": 0, "markersize": 5, "alpha": 0.85}
        axes.plot(changes[modality], range(len(changes)), **style)
    axes.set_yticks(range(len(changes)), list(changes.index))
    axes.invert_yaxis()
    shared_legend(made, [axes])
    return made


def scatter_groups(
    places: pd.DataFrame, panels: Mapping[str, str], y: str, label: str, title: str
) -> Figure:
    """One point per place: a statistic against an error; colour: modality, shape: input group.

    Args:
        places: columns ``group``, ``modality``, ``y`` and those of ``panels``.
        panels: column -> label of its axis; positive ones over more than a factor of 30 get a
            logarithmic axis.
        y: the vertical column.
        label: of the vertical axis.
        title: of the figure.
    """
    made = figure(title, 1.0 + 2.9 * len(panels), 3.4)
    axes = made.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    groups = ordered(places["group"], GROUPS)
    for panel, (column, name) in zip(axes, panels.items(), strict=True):
        plain(panel, x=name, y=label if panel is axes[0] else "")
        for group, shape in zip(groups, itertools.cycle("os^Dvx")):
            here = places[places["group"] == group]
            colours = [COLOURS.get(modality, GREY) for modality in here["modality"]]
            panel.scatter(here[column], here[y], c=colours, marker=shape, s=26, alpha=0.8)
            panel.scatter([], [], c=GREY, marker=shape, s=26, label=group)
        for modality in ordered(places["modality"], MODALITIES):
            panel.plot([], [], **{**modality_line(modality), "marker": "", "linewidth": 4})
        values = places[column]
        if values.min() > 0 and values.max() > 30 * values.min():
            panel.set_xscale("log")
    shared_legend(made, axes)
    return made
