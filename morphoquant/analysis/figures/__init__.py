"""Figures from the tables of run directories.

Every function takes tables as they are read from a run's parquet files and returns a
``matplotlib.figure.Figure`` that belongs to no global state: nothing has to be closed, and no
display is needed. In a notebook, ``%matplotlib inline`` shows such a figure as the cell's value.
A table that cannot be drawn raises :class:`TableError`, which says what it lacks.

One colour and one marker belong to each modality, in all figures.
"""

from morphoquant.analysis.figures.ablation import ablation_plot
from morphoquant.analysis.figures.activations import channel_distribution, overlap_matrix
from morphoquant.analysis.figures.bits import accuracy_over_bits
from morphoquant.analysis.figures.heatmap import layer_modality_heatmap
from morphoquant.analysis.figures.losses import (
    clip_and_rounding,
    error_over_depth,
    ratio_histogram,
    sqnr_by_group,
)
from morphoquant.analysis.figures.sensitivity import cell_heatmap, sensitivity_plot
from morphoquant.analysis.figures.standard import draw_standard, save_figures
from morphoquant.analysis.figures.style import COLOURS, TableError

__all__ = [
    "COLOURS",
    "TableError",
    "ablation_plot",
    "accuracy_over_bits",
    "cell_heatmap",
    "channel_distribution",
    "clip_and_rounding",
    "draw_standard",
    "error_over_depth",
    "layer_modality_heatmap",
    "overlap_matrix",
    "ratio_histogram",
    "save_figures",
    "sensitivity_plot",
    "sqnr_by_group",
]
