"""Figures carry the table's own numbers, refuse what they cannot draw and leave no state."""

from __future__ import annotations

import logging
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import LogNorm, to_hex
from PIL import Image

from morphoquant.analysis import figures
from morphoquant.analysis.figures import losses, standard, style
from morphoquant.analysis.figures.style import TableError
from morphoquant.errors import HarnessError

GROUPS = ("attn_in", "attn_out", "mlp_in", "mlp_out")
MODALITIES = ("text", "image", "video", "audio")
LAYER = "model.language_model.layers.3"
PLACES = [(f"model.language_model.layers.{i}", g) for i in range(12) for g in GROUPS]
KEYS = ["layer", "group", "modality"]


def outliers(layers: int = 4, seed: int = 0) -> pd.DataFrame:
    rows = [(*place, m) for place in PLACES[: 4 * layers] for m in (*MODALITIES, "all")]
    values = np.exp(np.random.default_rng(seed).normal(2, 1.5, (3, len(rows))))
    names = ("max_over_median", "kurtosis_p99", "massive_share")
    return pd.DataFrame(rows, columns=KEYS).assign(**dict(zip(names, values, strict=True)))


def channels(count: int = 64, layers: int = 4) -> pd.DataFrame:
    draw, parts = np.random.default_rng(0), []
    for layer, group in PLACES[: 4 * layers]:
        for modality in (*MODALITIES, "all"):
            own = np.exp(draw.normal(0, 0.8, count))
            names = {"layer": layer, "group": group, "modality": modality, "channel": range(count)}
            numbers = {"lo": -4 * own, "hi": 5 * own, "mean": 0.1 * own, "std": own}
            parts.append(pd.DataFrame(names | numbers))
    return pd.concat(parts, ignore_index=True)


def ranges(count: int = 64) -> pd.DataFrame:
    rows = [(*place, channel) for place in PLACES[:16] for channel in range(count)]
    table = pd.DataFrame(rows, columns=["layer", "group", "channel"])
    ratio = np.random.default_rng(0).choice(np.linspace(0.6, 1, 9), len(rows))
    return table.assign(lo=-ratio, hi=4 * ratio, ratio=ratio, masked=table["channel"] % 16 == 5)


def overlap() -> pd.DataFrame:
    rows = [(*place, *pair) for place in PLACES[:16] for pair in combinations(MODALITIES, 2)]
    table = pd.DataFrame(rows, columns=["layer", "group", "modality_a", "modality_b"])
    shared, scale = np.random.default_rng(0).uniform(0, 0.6, (2, len(rows)))
    table = table.assign(jaccard=shared, expected=0.0123, log2_scale_median=scale - 0.2)
    return table.assign(log2_scale_p05=scale - 1, log2_scale_p95=scale + 2)


def errors(layers: int = 4) -> pd.DataFrame:
    rows = [(*place, m) for place in PLACES[: 4 * layers] for m in MODALITIES]
    columns = [column for column, _ in (*losses.SQNR_ROWS, *losses.CLIP_ROWS)]
    values = np.random.default_rng(0).uniform(0, 1, (len(columns), len(rows)))
    return pd.DataFrame(rows, columns=KEYS).assign(**dict(zip(columns, values, strict=True)))


def depth(blocks: int = 4, towers: tuple[str, ...] = ("decoder",), seed: int = 0) -> pd.DataFrame:
    rows = [(b, t, m) for t in towers for b in range(blocks) for m in MODALITIES]
    values = np.exp(np.random.default_rng(seed).normal(-3, 0.5, len(rows)))
    table = pd.DataFrame(rows, columns=["block", "tower", "modality"])
    return table.assign(relative_error=values).sample(frac=1, random_state=seed)


def panels(made: Any) -> list[Any]:
    """Axes that carry data; a colour bar is the last of a figure's axes."""
    return [axes for axes in made.axes if axes.get_label() != "<colorbar>"]


def lines(axes: Any) -> dict[str, np.ndarray]:
    """Label -> [points, 2]."""
    return {line.get_label(): np.column_stack(line.get_data()) for line in axes.lines}


def texts(labels: Any) -> list[str]:
    return [label.get_text() for label in labels]


def titles(made: Any) -> list[str]:
    return [axes.get_title(loc="left") for axes in panels(made)]


def at(table: pd.DataFrame, **place: str) -> pd.DataFrame:
    for name, value in place.items():
        table = table[table[name] == value]
    return table


def test_layers_are_ordered_by_tower_and_number_and_named_in_short() -> None:
    layers = ["visual.merger", "visual.blocks.1", "model.layers.10", "audio.layers.0", "h.layers.9"]
    found = style.short_names(layers)
    assert list(found.values()) == ["L9", "L10", "V1", "V merger", "A0"]
    alike = style.short_names(["a.layers.1", "b.layers.1", "b.layers.2"])
    assert list(alike.values()) == ["a.layers.1", "b.layers.1", "L2"]


@settings(max_examples=15, deadline=None)
@given(layers=st.integers(1, 11), seed=st.integers(0, 9))
def test_heatmap_shows_the_table(layers: int, seed: int) -> None:
    """Whichever way it is laid out, whatever the order of the rows."""
    table = outliers(layers, seed)
    shuffled = table.sample(frac=1, random_state=seed)
    made = figures.layer_modality_heatmap(shuffled, "max_over_median")
    wanted = table["max_over_median"].to_numpy()
    shown = np.stack([axes.images[0].get_array() for axes in panels(made)], axis=1)
    np.testing.assert_array_equal(shown.ravel(), wanted)
    if layers * len(GROUPS) <= 32:
        rows = texts(panels(made)[0].get_yticklabels())
        assert rows == [f"L{i} {group}" for i in range(layers) for group in GROUPS]
        assert len(panels(made)[0].texts) == wanted.size
    else:
        assert [axes.get_title() for axes in panels(made)] == list(GROUPS)
        assert len({axes.images[0].get_clim() for axes in panels(made)}) == 1
    assert texts(panels(made)[0].get_xticklabels()) == [*MODALITIES, "all"]


def test_heatmap_uses_a_log_scale_only_over_decades_and_never_for_decibels() -> None:
    table, loud = outliers(), errors()
    wide = figures.layer_modality_heatmap(table, "max_over_median")
    assert isinstance(wide.axes[0].images[0].norm, LogNorm)
    assert wide.axes[-1].get_ylabel() == "ratio of max |x|, log scale"
    loud["output_sqnr_db"] = np.geomspace(0.1, 60, len(loud))
    table["max_over_median"] = np.linspace(1, 29, len(table))
    for narrow, column in ((table, "max_over_median"), (loud, "output_sqnr_db")):
        made = figures.layer_modality_heatmap(narrow, column)
        assert not isinstance(panels(made)[0].images[0].norm, LogNorm)
    assert made.axes[-1].get_ylabel() == "dB"


def test_heatmap_leaves_what_was_not_observed_grey_and_says_so() -> None:
    table = outliers()
    table.loc[[3, 9], "max_over_median"] = [np.nan, np.inf]
    made = figures.layer_modality_heatmap(table.drop(index=16), "max_over_median")
    hidden = np.ma.getmaskarray(panels(made)[0].images[0].get_array())
    assert sorted(zip(*np.nonzero(hidden), strict=True)) == [(0, 3), (1, 4), (3, 1)]
    assert made.axes[-1].get_ylabel().endswith("(grey: no value)")


def test_channels_are_sorted_and_their_ranges_go_with_them() -> None:
    table, final = channels(), ranges()
    made = figures.channel_distribution(table, final, LAYER, "mlp_out")
    assert [title.split()[0] for title in titles(made)] == list(MODALITIES)
    here = at(table, layer=LAYER, group="mlp_out")
    largest = here[["lo", "hi"]].abs().max(axis=1)
    order = largest.groupby(here["channel"]).max().sort_values()[::-1].index
    chosen = at(final, layer=LAYER, group="mlp_out").set_index("channel")
    for axes, modality in zip(panels(made), MODALITIES, strict=True):
        own = at(here, modality=modality).set_index("channel").loc[order]
        extent, spread, high, low = (patch.get_data() for patch in axes.patches)
        np.testing.assert_array_equal(extent.values, own["hi"])
        np.testing.assert_array_equal(extent.baseline, own["lo"])
        np.testing.assert_allclose(spread.values, own["mean"] + own["std"])
        np.testing.assert_array_equal(high.values, chosen.loc[order, "hi"])
        np.testing.assert_array_equal(low.values, chosen.loc[order, "lo"])
        marked = next(iter(lines(axes).values()))[:, 0] - 0.5
        assert {order[int(i)] for i in marked} == {5, 21, 37, 53}
        assert axes.get_yscale() == "symlog"
        assert to_hex(axes.patches[0].get_facecolor()).upper() == figures.COLOURS[modality]
    assert {"clipping range", "compensated (4 of 64)"} <= set(texts(made.legends[0].get_texts()))


def test_an_outlier_channel_survives_where_many_share_a_step() -> None:
    table = channels(count=3584, layers=1)
    spike = (table["channel"] == 1789) & (table["modality"] == "audio")
    table.loc[spike, "hi"] = 1e5
    made = figures.channel_distribution(table, None, *PLACES[0], sort="channel")
    extent = panels(made)[3].patches[0].get_data()
    step = int(np.argmax(extent.values))
    assert (extent.values.size, extent.values[step], extent.edges[-1]) == (600, 1e5, 3584)
    assert extent.edges[step] <= 1789 < extent.edges[step + 1]
    assert "up to 6 channels" in panels(made)[-1].get_xlabel()
    assert len(panels(made)[3].patches) == 2


def test_one_range_for_the_whole_tensor_is_drawn_over_all_channels() -> None:
    final = ranges(count=1)
    made = figures.channel_distribution(channels(), final, LAYER, "mlp_in", sort="channel")
    high = panels(made)[0].patches[2].get_data().values
    np.testing.assert_array_equal(high, [at(final, layer=LAYER, group="mlp_in")["hi"].item()] * 64)


def test_channels_without_a_match_are_refused() -> None:
    with pytest.raises(TableError, match=r"\(32\) and 'channels' \(64\).*mlp_in"):
        figures.channel_distribution(channels(), ranges(count=32), LAYER, "mlp_in")
    with pytest.raises(TableError, match="no rows for layer 'nowhere', group 'mlp_in'"):
        figures.channel_distribution(channels(), None, "nowhere", "mlp_in")


def test_overlap_is_symmetric_and_averages_over_layers() -> None:
    table = overlap()
    made = figures.overlap_matrix(table)
    for axes, group in zip(panels(made), GROUPS, strict=True):
        array = axes.images[0].get_array()
        np.testing.assert_array_equal(array, array.T)
        assert np.ma.getmaskarray(array)[np.diag_indices(4)].all()
        pair = at(table, group=group, modality_a="text", modality_b="video")
        assert array[0, 2] == pytest.approx(pair["jaccard"].mean())
        assert axes.get_title() == f"{group}\nindependent: 0.012"
        assert axes.images[0].get_clim() == (0, 1)
    (single,) = panels(figures.overlap_matrix(table, layer=LAYER, group="mlp_in"))
    assert LAYER in single.figure.get_suptitle()


def test_a_ratio_of_scales_changes_sign_when_the_pair_is_turned() -> None:
    """And the 5 % quantile of b / a is minus the 95 % quantile of a / b."""
    for value, other in (("median", "median"), ("p05", "p95")):
        made = (figures.overlap_matrix(overlap(), f"log2_scale_{n}") for n in (value, other))
        one, two = (panels(matrix)[1].images[0] for matrix in made)
        np.testing.assert_allclose(one.get_array(), -two.get_array().T)
        assert sum(one.get_clim()) == 0


def test_depth_draws_one_line_per_modality_in_block_order() -> None:
    table = depth(blocks=6, towers=("vision", "decoder"))
    made = figures.error_over_depth(table)
    assert titles(made) == ["decoder", "vision"]
    for axes, tower in zip(panels(made), ("decoder", "vision"), strict=True):
        assert axes.get_yscale() == "log"
        assert list(lines(axes)) == list(MODALITIES)
        for modality, points in lines(axes).items():
            wanted = at(table, tower=tower, modality=modality).sort_values("block")
            np.testing.assert_array_equal(points, wanted[["block", "relative_error"]])
        assert [n.get_color() for n in axes.lines] == [figures.COLOURS[m] for m in MODALITIES]


def test_depth_compares_runs_on_one_axis_and_leaves_out_zero() -> None:
    runs = {f"run {i}": depth(seed=i) for i in range(5)}
    runs["run 0"].loc[runs["run 0"]["block"] == 0, "relative_error"] = 0.0
    made = figures.error_over_depth(runs)
    assert titles(made) == list(runs)
    assert len({axes.get_ylim() for axes in panels(made)}) == 1
    assert np.isnan(lines(panels(made)[0])["text"][0, 1])
    assert texts(made.legends[0].get_texts()) == list(MODALITIES)
    with pytest.raises(TableError, match="every relative error is zero"):
        figures.error_over_depth({"fp16": depth().assign(relative_error=0.0)})


def test_sqnr_and_clipping_show_every_column_for_every_group() -> None:
    table = errors(layers=12)
    for draw, factor in ((figures.sqnr_by_group, 1), (figures.clip_and_rounding, 100)):
        made, rows = draw(table), losses.SQNR_ROWS if factor == 1 else losses.CLIP_ROWS
        for (i, j), axes in np.ndenumerate(np.array(panels(made)).reshape(len(rows), 4)):
            here = at(table, group=GROUPS[j], modality="video")
            np.testing.assert_allclose(lines(axes)["video"][:, 1], factor * here[rows[i][0]])
        assert titles(made)[:4] == list(GROUPS)
        labels = texts(panels(made)[-1].get_xticklabels())
        assert labels == ["L0", "L2", "L4", "L6", "L8", "L10"]


def test_infinite_sqnr_is_no_error_to_show() -> None:
    drawn = panels(figures.sqnr_by_group(errors().assign(activation_sqnr_db=np.inf)))
    assert [texts(axes.texts) for axes in drawn] == [["no error to show"]] * 4 + [[]] * 12


@settings(max_examples=15, deadline=None)
@given(ratios=st.lists(st.sampled_from([0.6, 0.7, 0.85, 1.0]), min_size=1, max_size=40))
def test_ratio_shares_add_up_and_the_ends_are_told(ratios: list[float]) -> None:
    """Also in float32, whose 0.6 is not that of float64."""
    table = pd.DataFrame({"ratio": np.float32(ratios), "group": "g"}).eval("masked = ratio < 0.8")
    floor = 0.6 if len(ratios) % 2 else float(np.float32(0.6))
    (axes,) = panels(figures.ratio_histogram(table, floor=floor))
    top = axes.patches[-1].get_data()
    assert len(top.values) == len({0.6, 1.0, *ratios})
    assert top.values.sum() == pytest.approx(100)
    at = 100 * np.mean([r == 0.6 for r in ratios]), 100 * np.mean([r == 1.0 for r in ratios])
    assert (top.values[0], top.values[-1]) == pytest.approx(at)
    assert f"{at[0]:.1f} % at 0.6, {at[1]:.1f} % at 1" in axes.get_title(loc="left")


def ablation(*rows: tuple[str, str, float, float, float]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["factor", "choice", "difference", "low", "high"])


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(*[st.floats(0, 8)] * 3), min_size=1, max_size=6))
def test_an_interval_is_hollow_exactly_where_it_covers_zero(found: list[Any]) -> None:
    rows = [("f", f"c{i}", d - 4, d - 4 - a, d - 4 + b) for i, (d, a, b) in enumerate(found)]
    (axes,) = panels(figures.ablation_plot(ablation(*rows)))
    sorted_rows = sorted(rows, key=lambda row: -row[2])
    for bar, (_, _, difference, low, high) in zip(axes.containers, sorted_rows, strict=True):
        marker, _, (interval,) = bar.lines
        assert marker.get_xdata()[0] == difference
        np.testing.assert_allclose(interval.get_segments()[0][:, 0], [low, high], atol=1e-12)
        assert (marker.get_markerfacecolor() == "white") == (low <= 0 <= high)


def test_choices_stand_under_their_factor_best_first() -> None:
    last, first = ("range", "mse", -1, -2, 0.5), ("range", "mdqfo", 1, 0.5, 2)
    made = figures.ablation_plot(ablation(last, ("bits", "a8", 3, 2, 4), first))
    (axes,) = panels(made)
    assert texts(axes.get_yticklabels()) == ["bits", "a8", "range", "mdqfo", "mse"]
    assert axes.lines[0].get_xdata() == [0.0, 0.0]
    told = sorted(texts(made.legends[0].get_texts()))
    assert told == ["interval covers zero: no effect shown", "interval off zero"]


@pytest.mark.parametrize("numbers", [(np.nan, 0, 1), (0.5, -np.inf, 1), (2, 0, 1)])
def test_an_ablation_without_a_proper_interval_is_refused(numbers: tuple[float, ...]) -> None:
    with pytest.raises(TableError, match="range=mse"):
        figures.ablation_plot(ablation(("bits", "a8", 3, 2, 4), ("range", "mse", *numbers)))


DRAWN = [
    (lambda t: figures.layer_modality_heatmap(t, "max_over_median"), outliers, "max_over_median"),
    (lambda t: figures.channel_distribution(t, None, LAYER, "mlp_in"), channels, "std"),
    (lambda t: figures.channel_distribution(channels(), t, LAYER, "mlp_in"), ranges, "masked"),
    (figures.overlap_matrix, overlap, "jaccard"),
    (figures.error_over_depth, depth, "relative_error"),
    (figures.sqnr_by_group, errors, "output_sqnr_weight_db"),
    (figures.clip_and_rounding, errors, "bypass_rate"),
    (figures.ratio_histogram, ranges, "ratio"),
    (figures.ablation_plot, lambda: ablation(("range", "mse", 1, 0, 2)), "low"),
]


@pytest.mark.parametrize(("draw", "make", "column"), DRAWN)
def test_a_table_that_lacks_something_is_refused(draw: Any, make: Any, column: str) -> None:
    """A column, its rows, or one row per place (two runs in one table)."""
    with pytest.raises(ValueError, match=f"no column .*'{column}'") as caught:
        draw(make().drop(columns=column))
    assert isinstance(caught.value, HarnessError)
    if column != "masked":  # without ranges the activations are drawn alone
        with pytest.raises(TableError, match="is empty"):
            draw(make().iloc[:0])
    if column not in ("ratio", "low"):
        with pytest.raises(TableError, match=r"two rows for .*give the table of one run"):
            draw(pd.concat([make(), make()], ignore_index=True))


@pytest.mark.parametrize(("draw", "make", "column"), [DRAWN[i] for i in (0, 3, 4, 7)])
def test_a_column_without_numbers_is_named(draw: Any, make: Any, column: str) -> None:
    with pytest.raises(TableError, match=f"'{column}' .* no finite value"):
        draw(make().assign(**{column: np.nan}))


def test_the_standard_set_is_written_as_small_images(tmp_path: Path) -> None:
    tables = {"outliers": outliers(), "channels": channels(), "ranges": ranges()}
    tables |= {"overlap": overlap(), "errors": errors(), "depth": depth()}
    written = figures.save_figures(tmp_path, tables)
    names = "outliers_max_over_median outliers_kurtosis_p99 outliers_massive_share channels_1 "
    names += "channels_2 channels_3 overlap_jaccard overlap_scale ratios output_sqnr sqnr "
    assert [path.stem for path in written] == (names + "clipping depth").split()
    assert sorted((tmp_path / "figures").iterdir()) == sorted(written)
    for path in written:
        assert path.stat().st_size < 200_000
        with Image.open(path) as image:
            assert 250 < min(image.size) <= max(image.size) < 1400


def test_what_cannot_be_drawn_is_left_out_and_told(tmp_path: Path, caplog: Any) -> None:
    tables = {
        "outliers": outliers().drop(columns="kurtosis_p99").assign(massive_share=np.nan),
        "ranges": ranges().assign(ratio=1.0),
        "errors": errors().iloc[:0],
    }
    caplog.set_level(logging.INFO)
    written = figures.save_figures(tmp_path, tables)
    assert [path.stem for path in written] == ["outliers_max_over_median"]
    assert "outliers_kurtosis_p99 is left out: table 'outliers' has no column" in caplog.text
    assert "ratios is left out: no range was shrunk" in caplog.text
    assert figures.save_figures(tmp_path / "empty", {}) == []


def test_channel_distributions_are_of_the_layers_with_the_largest_outliers() -> None:
    table = outliers().assign(max_over_median=1.0)
    first, _, third = (PLACES[4 * i][0] for i in range(3))
    for layer, group, value in [(third, "mlp_out", 9), (third, "mlp_in", 8), (first, "mlp_in", 7)]:
        here = at(table, layer=layer, group=group, modality="audio").index
        table.loc[here, "max_over_median"] = value
    table.loc[table["layer"].str.endswith(".1"), "max_over_median"] = np.nan
    find = standard.largest_outliers
    assert find(table, channels(count=4))[:2] == [(third, "mlp_out"), (first, "mlp_in")]
    assert find(table, channels(count=4, layers=2)) == [(first, "mlp_in")]


def test_no_pyplot_and_a_cheap_analysis_package() -> None:
    """In a process of its own: other tests may have imported what must not be imported."""
    code = (
        "import sys, morphoquant.analysis; assert 'matplotlib' not in sys.modules;"
        "import tempfile, pandas as pd; from morphoquant.analysis import figures;"
        "rows = dict(factor=['a'], choice=['b'], difference=[1], low=[0], high=[2]);"
        "figures.ablation_plot(pd.DataFrame(rows)).savefig(tempfile.TemporaryFile());"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
