"""Figures of a report: drawn from the runs' tables, inlined as SVG, each with words for it."""

from __future__ import annotations

import logging
import re
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from urllib.parse import quote

import matplotlib
import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from morphoquant.analysis.figures import (
    TableError,
    accuracy_over_bits,
    draw_standard,
    error_over_depth,
)
from morphoquant.analysis.page.compare import MEAN, Group
from morphoquant.analysis.page.gather import Run

log = logging.getLogger(__name__)

SVG = {"svg.fonttype": "path", "svg.hashsalt": "morphoquant"}
"""Letters as paths look the same on every machine; a fixed salt gives the same ids every time."""
UNTOLD = {"Date": None, "Creator": None, "Format": None, "Type": None}
DPI = 144
"""Of pictures in 256 colours, which channel distributions become: hundreds of bars and steps are no
smaller for being drawn one by one."""
KEPT = " !$'()*+,-./:;<=>?@[]^_`{|}~"
"""What stands as it is in a data URI between double quotes; all else is percent-encoded."""
COORDINATES = re.compile(r'(?<=\s)(?:d|x|y)="[^"]*"')
REFERENCES = re.compile(r'((?:href="|url\()#)([^")]+)')

CAPTIONS = {
    "outliers_max_over_median": "Largest channel over the median channel: how far the outlier "
    "channels of an input group stand out, by modality.",
    "outliers_kurtosis_p99": "Excess kurtosis of the channels (99th percentile): how heavy the "
    "tails are; a Gaussian has 0.",
    "outliers_massive_share": "Share of the activations' energy in the 0.1 % most energetic "
    "tokens.",
    "overlap_jaccard": "Do modalities share their outlier channels? 1: the same set; above each "
    "matrix what independent sets would give.",
    "overlap_scale": "Ranges of two modalities in the same channels, in bits apart.",
    "ratios": "Shrink ratios that the range search chose; 1 is the range as observed.",
    "output_sqnr": "Output SQNR of the linears, by layer, input group and modality.",
    "sqnr": "SQNR by layer: of the activations, and of the outputs with the errors of activations "
    "and weights apart. 6 dB are one bit.",
    "clipping": "What the activations' error is made of: clipping, rounding; and what "
    "bypassed both.",
    "depth": "Error of block outputs, as it grows from block to block.",
}
DISTRIBUTION = (
    "Channels of one of the input groups with the largest outliers: what each carries, "
    "and the clipping range where it is static."
)


@dataclass(frozen=True)
class Picture:
    """One figure, ready for an ``img`` element."""

    name: str
    uri: str
    width: int
    height: int
    """CSS pixels."""
    alt: str
    caption: str


def picture(
    name: str, drawn: Figure, caption: str, alt: str = "", *, pixels: bool = False
) -> Picture:
    """A figure as a data URI, of SVG or of ``pixels``; the same figure gives the same bytes."""
    if pixels:
        uri = f"data:image/png;base64,{b64encode(_png(drawn)).decode()}"
    else:
        uri = f"data:image/svg+xml,{quote(compact(_svg(drawn)), safe=KEPT)}"
    width, height = (round(96 * inches) for inches in drawn.get_size_inches())
    told = drawn.get_suptitle().replace("\n", ", ")
    return Picture(name, Markup(uri), width, height, f"{told}. {alt}".strip(), caption)


def _svg(drawn: Figure) -> str:
    stream = BytesIO()
    with matplotlib.rc_context(SVG):
        drawn.savefig(stream, format="svg", metadata=UNTOLD)
    return stream.getvalue().decode()


def _png(drawn: Figure) -> bytes:
    full, small = BytesIO(), BytesIO()
    drawn.savefig(full, format="png", dpi=DPI, metadata={"Software": None})
    Image.open(full).convert("RGB").quantize(256).save(small, format="PNG", optimize=True)
    return small.getvalue()


def compact(svg: str) -> str:
    """The same picture in two thirds of the bytes.

    Coordinates to a hundredth of a point, short ids and none that nothing refers to, no prolog,
    comments or indentation; single quotes, so that it may stand in an attribute.
    """
    svg = re.sub(r"<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = COORDINATES.sub(lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]), svg)
    referred = dict.fromkeys(name for _, name in REFERENCES.findall(svg))
    short = {name: f"i{number:x}" for number, name in enumerate(referred)}
    svg = re.sub(
        r' id="([^"]*)"',
        lambda found: f' id="{short[found[1]]}"' if found[1] in short else "",
        svg,
    )
    svg = REFERENCES.sub(lambda found: found[1] + short[found[2]], svg)
    svg = svg.replace("xlink:href=", "href=")
    return re.sub(r"\s+", " ", re.sub(r">\s+<", "><", svg)).replace('"', "'")


def bits_picture(group: Group) -> Picture | None:
    """Effective bits against the difference to the unquantized model; None without differences."""
    told = [
        (row.label, row.run, row.cells[MEAN].difference)
        for row in group.rows
        if MEAN in row.cells and row.cells[MEAN].difference is not None
    ]
    if not told:
        return None
    table = pd.DataFrame(
        [
            {
                "label": label,
                "A bits": run.result["bits"]["activation"],
                "W bits": run.result["bits"]["weight"],
                "difference": found.delta,
                "low": found.low,
                "high": found.high,
            }
            for label, run, found in told
            if found is not None
        ]
    )
    bases = {run.result["reference"]: found.base for _, run, found in told if found is not None}
    base = next(iter(bases.values())) if len(bases) == 1 else None
    alt = "; ".join(
        f"{r['label']}: {r['A bits']:.2f} activation bits, {r['W bits']:.2f} weight bits, "
        f"{r['difference']:+.1f} points"
        for r in table.to_dict("records")
    )
    caption = (
        "Effective bits count scales, and what a compensation keeps in 16 bits. Bars: 95 % paired "
        "bootstrap intervals of the difference; a hollow point's interval covers zero. Rows with "
        "the same bits are drawn side by side."
    )
    drawn = accuracy_over_bits(table, base)
    return picture("bits", drawn, caption, alt)


def depth_picture(tables: Mapping[str, pd.DataFrame]) -> Picture | None:
    """Error over depth of several runs, one panel each; None where there is nothing to draw.

    Args:
        tables: label of the run -> its table ``depth``.
    """
    if not tables:
        return None
    try:
        drawn = error_over_depth(tables)
    except TableError as reason:
        log.info("figure depth is left out: %s", reason)
        return None
    alt = f"One panel per run: {', '.join(tables)}. The numbers are in the runs' depth.parquet."
    return picture("depth", drawn, CAPTIONS["depth"], alt)


def atlas(run: Run, tables: Mapping[str, pd.DataFrame]) -> list[Picture]:
    """The standard figures of one run; its error over depth stands beside the others'."""
    told = {name: table for name, table in tables.items() if name != "depth"}
    about = f"Run {run.path.name}."
    return [
        picture(name, drawn, CAPTIONS[name], about)
        if name in CAPTIONS
        else picture(name, drawn, DISTRIBUTION, about, pixels=True)
        for name, drawn in draw_standard(told)
    ]
