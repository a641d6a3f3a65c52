"""What was gathered, as one HTML page."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from morphoquant import __version__
from morphoquant.analysis import paired
from morphoquant.analysis.cells import p_value, questions
from morphoquant.analysis.figures.style import MODALITIES, ordered
from morphoquant.analysis.page import compare, provenance, summaries
from morphoquant.analysis.page.gather import Gathered, Run
from morphoquant.analysis.page.pictures import Picture, atlas, bits_picture, depth_picture
from morphoquant.analysis.page.questions import Disagreements, disagreements
from morphoquant.analysis.page.sweeps import sweep_tables
from morphoquant.analysis.sweeps import TABLES, read_tables
from morphoquant.tracking.progress import progress

MOST_ATLASES = 8
"""Runs whose figures are drawn by default: about a megabyte and ten seconds each."""
STATISTICS = tuple(name for name in TABLES if name != "samples")


@dataclass(frozen=True)
class GroupPage:
    """A group with everything that is drawn of it."""

    group: compare.Group
    bits: Picture | None
    depth: Picture | None
    sqnr: list[summaries.Summary]
    outliers: list[summaries.Summary]
    atlases: list[Atlas]
    undrawn: list[str]
    """Labels of runs whose figures were left out because there are too many."""
    disagreements: Disagreements

    @property
    def measured(self) -> list[str]:
        """Modalities in the tables of statistics."""
        return ordered((m for row in [*self.sqnr, *self.outliers] for m in row.values), MODALITIES)


@dataclass(frozen=True)
class Atlas:
    """Figures of one run, and the numbers behind them."""

    label: str
    key: str
    pictures: list[Picture]
    errors: list[dict[str, str]]


@dataclass(frozen=True)
class RunPage:
    """One run's provenance."""

    label: str
    run: Run
    checks: list[provenance.Check]
    facts: dict[str, str]
    hashes: dict[str, str]
    config: str
    linears: list[provenance.Linear]


def render(gathered: Gathered, most_atlases: int = MOST_ATLASES) -> str:
    """The page: a whole HTML document that refers to nothing outside itself.

    Args:
        gathered: what ``gather`` read.
        most_atlases: for so many runs, in order, figures are drawn; the page names the others.

    Raises:
        HarnessError: runs of one group that cannot be compared.
    """
    pages: list[GroupPage] = []
    left = most_atlases
    groups = compare.groups(gathered.runs)
    with progress("Report", len(gathered.runs), "runs") as step:
        for group in groups:
            page = _group_page(group, left, step)
            left -= len(page.atlases)
            pages.append(page)
    runs = [_run_page(group, run) for group in groups for run in group.runs]
    environment = Environment(
        loader=PackageLoader("morphoquant.analysis.page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= FILTERS
    script, style = (Markup(_source(environment, f"report.{kind}")) for kind in ("js", "css"))
    return environment.get_template("report.html").render(
        gathered=gathered,
        pages=pages,
        runs=runs,
        sweeps=sweep_tables(gathered.sweeps),
        failing=[page for page in runs if not all(check.holds for check in page.checks)],
        script=script,
        style=style,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        version=__version__,
        error_headings=[heading for heading, _, _ in summaries.ERRORS],
        mean=compare.MEAN,
        confidence=f"{100 * paired.CONFIDENCE:g}",
    )


def _source(environment: Environment, name: str) -> str:
    """A file beside the template, as it is."""
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def _group_page(group: compare.Group, most: int, step: Callable[[int], None]) -> GroupPage:
    """Everything that is shown of a group; ``most`` runs get their figures."""
    sqnr: list[summaries.Summary | None] = []
    outliers: list[summaries.Summary | None] = []
    atlases: list[Atlas] = []
    undrawn: list[str] = []
    depths: dict[str, pd.DataFrame] = {}
    for run in group.runs:
        label, tables = group.label(run), read_tables(run.path, STATISTICS)
        errors, found = tables.get("errors"), tables.get("outliers")
        if errors is not None:
            sqnr.append(summaries.sqnr_row(label, errors))
        if found is not None:
            outliers.append(summaries.outlier_row(label, found))
        if tables and len(atlases) < most:
            if "depth" in tables:
                depths[label] = tables["depth"]
            rows = [] if errors is None else summaries.error_rows(errors)
            atlases.append(Atlas(label, run.key, atlas(run, tables), rows))
        elif tables:
            undrawn.append(label)
        step(1)
    return GroupPage(
        group=group,
        bits=bits_picture(group),
        depth=depth_picture(depths),
        sqnr=[row for row in sqnr if row is not None],
        outliers=[row for row in outliers if row is not None],
        atlases=atlases,
        undrawn=undrawn,
        disagreements=disagreements(group),
    )


def _run_page(group: compare.Group, run: Run) -> RunPage:
    return RunPage(
        label=group.label(run),
        run=run,
        checks=provenance.checks(run),
        facts=provenance.facts(run),
        hashes=provenance.hashes(run),
        config=provenance.config_text(run),
        linears=provenance.linears(run),
    )


# ----------------------------------------------------------------------------- filters


def fixed(value: float | None, digits: int = 1) -> str:
    """``12.3``; a dash for what is not known."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def signed(value: float, digits: int = 1) -> str:
    """``+0.4``, ``−19.1`` with a minus as wide as the plus, ``0.0``; a dash for NaN."""
    if math.isnan(value):
        return "–"
    rounded = round(value, digits) + 0.0  # no negative zero
    return f"{rounded:+.{digits}f}".replace("-", "−") if rounded else f"{0:.{digits}f}"


def mark(verdict: str) -> str:
    """The sign that stands for a verdict, beside its words."""
    return MARKS.get(verdict, "")


def kind(verdict: str) -> str:
    """CSS class of a verdict."""
    if verdict in (paired.NOTHING, paired.UNKNOWN):
        return "covers"
    return "weak" if verdict.endswith(paired.UNCORRECTED) else verdict


MARKS = {
    paired.LOWER: "▼",
    paired.HIGHER: "▲",
    paired.LOWER + paired.UNCORRECTED: "▽",
    paired.HIGHER + paired.UNCORRECTED: "△",
    paired.NOTHING: "≈",
    paired.UNKNOWN: "?",
}
FILTERS: dict[str, Callable[..., str]] = {
    "fixed": fixed,
    "signed": signed,
    "p_value": p_value,
    "questions": questions,
    "mark": mark,
    "kind": kind,
}
