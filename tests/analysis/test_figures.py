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
from morphoquant.analysis.figures import standard, style
from morphoquant.analysis.figures.style import TableError
from morphoquant.errors import HarnessError

GROUPS = ("attn_in", "attn_out", "mlp_in", "mlp_out")
MODALITIES = ("text", "image", "video", "audio")
LAYER = "model.language_model.layers.3"


def places(layers: int) -> list[tuple[str, str]]:
    return [(f"model.language_model.layers.{i}", g) for i in range(layers) for g in GROUPS]


def outliers(layers: int = 4, seed: int = 0) -> pd.DataFrame:
    draw = np.random.default_rng(seed)
    rows = [(*place, m) for place in places(layers) for m in (*MODALITIES, "all")]
    table = pd.DataFrame(rows, columns=["layer", "group", "modality"])
    table["max_over_median"] = np.exp(draw.normal(2, 1.5, len(rows)))
    table["kurtosis_p99"] = np.exp(draw.normal(2, 1.5, len(rows)))
    table["massive_share"] = draw.uniform(0, 0.3, len(rows))
    return table


def channels(count: int = 64, layers: int = 4, seed: int = 0) -> pd.DataFrame:
    draw = np.random.default_rng(seed)
    parts = []
    for layer, group in places(layers):
        scale = np.exp(draw.normal(0, 0.4, count))
        scale[draw.integers(count)] *= 50
        for modality in (*MODALITIES, "all"):
            own = scale * np.exp(draw.normal(0, 0.3, count))
            numbers = {"channel": range(count), "lo": -4 * own, "hi": 5 * own}
            names = {"layer": layer, "group": group, "modality": modality}
            parts.append(pd.DataFrame({**names, **numbers, "mean": 0.1 * own, "std": own}))
    return pd.concat(parts, ignore_index=True)


def ranges(count: int = 64, layers: int = 4, seed: int = 0) -> pd.DataFrame:
    draw = np.random.default_rng(seed)
    parts = []
    for layer, group in places(layers):
        ratio = draw.choice(np.linspace(0.6, 1, 9), count)
        numbers = {"channel": range(count), "lo": -4 * ratio, "hi": 4 * ratio, "ratio": ratio}
        masked = np.arange(count) % 16 == 5
        parts.append(pd.DataFrame({"layer": layer, "group": group, **numbers, "masked": masked}))
    return pd.concat(parts, ignore_index=True)


def overlap(layers: int = 4, seed: int = 0) -> pd.DataFrame:
    draw = np.random.default_rng(seed)
    pairs = list(combinations(MODALITIES, 2))
    rows = [(*place, *pair) for place in places(layers) for pair in pairs]
    table = pd.DataFrame(rows, columns=["layer", "group", "modality_a", "modality_b"])
    table["jaccard"] = draw.uniform(0, 0.6, len(rows))
    table["expected"] = 0.0123
    table["log2_scale_median"] = draw.normal(0, 1, len(rows))
    table["log2_scale_p05"] = table["log2_scale_median"] - 1
    table["log2_scale_p95"] = table["log2_scale_median"] + 2
    return table


def errors(layers: int = 4, seed: int = 0) -> pd.DataFrame:
    draw = np.random.default_rng(seed)
    rows = [(*place, m) for place in places(layers) for m in MODALITIES]
    table = pd.DataFrame(rows, columns=["layer", "group", "modality"])
    for name in ("activation_sqnr_db", "output_sqnr_activation_db", "output_sqnr_weight_db"):
        table[name] = draw.normal(20, 3, len(rows))
    table["output_sqnr_db"] = table["output_sqnr_weight_db"] - 3
    table["clip_energy_share"] = draw.uniform(0, 0.5, len(rows))
    table["rounding_energy_share"] = 1 - table["clip_energy_share"]
    table["bypass_rate"] = draw.uniform(0, 0.03, len(rows))
    return table


def depth(blocks: int = 4, towers: tuple[str, ...] = ("decoder",), seed: int = 0) -> pd.DataFrame:
    draw = np.random.default_rng(seed)
    rows = [(b, t, m) for t in towers for b in range(blocks) for m in MODALITIES]
    table = pd.DataFrame(rows, columns=["block", "tower", "modality"])
    table["relative_error"] = np.exp(draw.normal(-3, 0.5, len(rows)))
    return table.sample(frac=1, random_state=seed)


def everything(layers: int = 4) -> dict[str, pd.DataFrame]:
    made = {"outliers": outliers(layers), "channels": channels(layers=layers)}
    made |= {"ranges": ranges(layers=layers), "overlap": overlap(layers)}
    return made | {"errors": errors(layers), "depth": depth(layers)}


def panels(made: Any) -> list[Any]:
    """Axes that carry data: not the colour bar, not what was removed."""
    return [axes for axes in made.axes if axes.get_label() != "<colorbar>"]


def colour_bar(made: Any) -> Any:
    return next(axes for axes in made.axes if axes.get_label() == "<colorbar>")


def lines(axes: Any) -> dict[str, np.ndarray]:
    """Label -> [points, 2]."""
    return {line.get_label(): np.column_stack(line.get_data()) for line in axes.lines}


def legend(made: Any) -> list[str]:
    return [text.get_text() for text in made.legends[0].get_texts()]


# ------------------------------------------------------------------------- names


def test_layers_are_ordered_by_tower_and_number_and_named_in_short() -> None:
    layers = ["visual.blocks.1", "model.layers.10", "audio_tower.layers.0", "model.layers.9"]
    layers += ["visual.merger"]
    found = style.short_names(layers)
    assert list(found) == style.layer_order(layers)
    assert list(found.values()) == ["L9", "L10", "V1", "V merger", "A0"]


def test_names_that_would_be_alike_stay_whole() -> None:
    assert style.short_names(["a.layers.1", "b.layers.1", "b.layers.2"]) == {
        "a.layers.1": "a.layers.1",
        "b.layers.1": "b.layers.1",
        "b.layers.2": "L2",
    }


# ----------------------------------------------------------------------- heatmap


@settings(max_examples=15, deadline=None)
@given(layers=st.integers(1, 11), seed=st.integers(0, 9))
def test_heatmap_shows_the_table(layers: int, seed: int) -> None:
    """Whichever way it is laid out, whatever the order of the rows."""
    table = outliers(layers, seed)
    shuffled = table.sample(frac=1, random_state=seed)
    made = figures.layer_modality_heatmap(shuffled, "max_over_median")
    wanted = table["max_over_median"].to_numpy().reshape(layers, len(GROUPS), -1)
    shown = [axes.images[0].get_array() for axes in panels(made)]
    if layers * len(GROUPS) <= 32:
        (array,) = shown
        np.testing.assert_array_equal(array, wanted.reshape(layers * len(GROUPS), -1))
        rows = [label.get_text() for label in panels(made)[0].get_yticklabels()]
        assert rows == [f"L{i} {group}" for i in range(layers) for group in GROUPS]
        assert len(panels(made)[0].texts) == array.size
    else:
        np.testing.assert_array_equal(np.stack(shown, axis=1), wanted)
        assert [axes.get_title() for axes in panels(made)] == list(GROUPS)
        limits = {axes.images[0].get_clim() for axes in panels(made)}
        assert len(limits) == 1
    ticks = [label.get_text() for label in panels(made)[0].get_xticklabels()]
    assert ticks == [*MODALITIES, "all"]


def test_heatmap_uses_a_log_scale_only_over_decades_and_never_for_decibels() -> None:
    table = outliers()
    wide = figures.layer_modality_heatmap(table, "max_over_median")
    assert isinstance(panels(wide)[0].images[0].norm, LogNorm)
    assert colour_bar(wide).get_ylabel() == "ratio of max |x|, log scale"
    for narrow in (table.assign(max_over_median=np.linspace(1, 29, len(table))), -table[[]]):
        if narrow.columns.size:
            made = figures.layer_modality_heatmap(narrow, "max_over_median")
            assert not isinstance(panels(made)[0].images[0].norm, LogNorm)
    loud = errors().assign(output_sqnr_db=lambda t: np.geomspace(0.1, 60, len(t)))
    made = figures.layer_modality_heatmap(loud, "output_sqnr_db")
    assert not isinstance(panels(made)[0].images[0].norm, LogNorm)
    assert colour_bar(made).get_ylabel() == "dB"


def test_heatmap_leaves_what_was_not_observed_grey_and_says_so() -> None:
    table = outliers()
    table.loc[3, "max_over_median"] = np.nan
    table.loc[9, "max_over_median"] = np.inf
    made = figures.layer_modality_heatmap(table.drop(index=16), "max_over_median")
    hidden = np.ma.getmaskarray(panels(made)[0].images[0].get_array())
    assert sorted(zip(*np.nonzero(hidden), strict=True)) == [(0, 3), (1, 4), (3, 1)]
    assert colour_bar(made).get_ylabel().endswith("(grey: not observed)")


# --------------------------------------------------------- channels and their ranges


def test_channels_are_sorted_and_their_ranges_go_with_them() -> None:
    table, final = channels(), ranges()
    made = figures.channel_distribution(table, final, LAYER, "mlp_out")
    assert [axes.get_title(loc="left").split()[0] for axes in panels(made)] == list(MODALITIES)
    here = table[(table["layer"] == LAYER) & (table["group"] == "mlp_out")]
    by_channel = here.groupby("channel")
    order = np.maximum(by_channel["hi"].max(), -by_channel["lo"].min()).sort_values()[::-1].index
    chosen = final[(final["layer"] == LAYER) & (final["group"] == "mlp_out")].set_index("channel")
    for axes, modality in zip(panels(made), MODALITIES, strict=True):
        own = here[here["modality"] == modality].set_index("channel").loc[order]
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
    assert {"clipping range", "compensated (4 of 64)"} <= set(legend(made))


def test_an_outlier_channel_survives_where_many_share_a_step() -> None:
    table = channels(count=3584, layers=1)
    layer = table["layer"].iloc[0]
    spike = (table["channel"] == 1789) & (table["modality"] == "audio")
    table.loc[spike, "hi"] = 1e5
    made = figures.channel_distribution(table, None, layer, "attn_in", sort="channel")
    extent = panels(made)[3].patches[0].get_data()
    assert extent.values.size == 600
    step = int(np.argmax(extent.values))
    assert extent.values[step] == 1e5
    assert extent.edges[step] <= 1789 < extent.edges[step + 1]
    assert extent.edges[-1] == 3584
    assert "up to 6 channels" in panels(made)[-1].get_xlabel()
    assert len(panels(made)[3].patches) == 2


def test_one_range_for_the_whole_tensor_is_drawn_over_all_channels() -> None:
    final = ranges(count=1)
    made = figures.channel_distribution(channels(), final, LAYER, "mlp_in", sort="channel")
    high = panels(made)[0].patches[2].get_data().values
    here = final[(final["layer"] == LAYER) & (final["group"] == "mlp_in")]
    np.testing.assert_array_equal(high, np.full(64, here["hi"].item()))


def test_ranges_of_other_channels_are_refused() -> None:
    with pytest.raises(TableError, match=r"\(32\) and 'channels' \(64\).*mlp_in"):
        figures.channel_distribution(channels(), ranges(count=32), LAYER, "mlp_in")
    with pytest.raises(TableError, match="no rows for layer 'nowhere', group 'mlp_in'"):
        figures.channel_distribution(channels(), None, "nowhere", "mlp_in")


# ----------------------------------------------------------------------- overlap


def test_overlap_is_symmetric_and_averages_over_layers() -> None:
    table = overlap()
    made = figures.overlap_matrix(table)
    for axes, group in zip(panels(made), GROUPS, strict=True):
        array = axes.images[0].get_array()
        np.testing.assert_array_equal(array, array.T)
        assert np.ma.getmaskarray(array)[np.diag_indices(4)].all()
        here = table[table["group"] == group]
        pair = here[(here["modality_a"] == "text") & (here["modality_b"] == "video")]
        assert array[0, 2] == pytest.approx(pair["jaccard"].mean())
        assert axes.get_title() == f"{group}\nindependent: 0.012"
        assert axes.images[0].get_clim() == (0, 1)
    single = figures.overlap_matrix(table, layer=LAYER, group="mlp_in")
    assert len(panels(single)) == 1
    assert LAYER in single.get_suptitle()


@pytest.mark.parametrize(
    ("value", "other"),
    [("log2_scale_median", "log2_scale_median"), ("log2_scale_p05", "log2_scale_p95")],
)
def test_a_ratio_of_scales_changes_sign_when_the_pair_is_turned(value: str, other: str) -> None:
    """And the 5 % quantile of b / a is minus the 95 % quantile of a / b."""
    one = panels(figures.overlap_matrix(overlap(), value))[1].images[0]
    two = panels(figures.overlap_matrix(overlap(), other))[1].images[0]
    np.testing.assert_allclose(one.get_array(), -two.get_array().T)
    low, high = one.get_clim()
    assert low == -high


# ------------------------------------------------------------------------- losses


def test_depth_draws_one_line_per_modality_in_block_order() -> None:
    table = depth(blocks=6, towers=("vision", "decoder"))
    made = figures.error_over_depth(table)
    assert [axes.get_title(loc="left") for axes in panels(made)] == ["decoder", "vision"]
    for axes, tower in zip(panels(made), ("decoder", "vision"), strict=True):
        assert axes.get_yscale() == "log"
        assert list(lines(axes)) == list(MODALITIES)
        for modality, points in lines(axes).items():
            wanted = table[(table["tower"] == tower) & (table["modality"] == modality)]
            wanted = wanted.sort_values("block")[["block", "relative_error"]]
            np.testing.assert_array_equal(points, wanted)
    assert [line.get_color() for line in panels(made)[0].lines] == [
        figures.COLOURS[m] for m in MODALITIES
    ]


def test_depth_compares_runs_on_one_axis_and_leaves_out_zero() -> None:
    runs = {f"run {i}": depth(seed=i) for i in range(5)}
    runs["run 0"].loc[runs["run 0"]["block"] == 0, "relative_error"] = 0.0
    made = figures.error_over_depth(runs)
    assert [axes.get_title(loc="left") for axes in panels(made)] == list(runs)
    assert len({axes.get_ylim() for axes in panels(made)}) == 1
    assert np.isnan(lines(panels(made)[0])["text"][0, 1])
    assert legend(made) == list(MODALITIES)
    with pytest.raises(TableError, match="every relative error is zero"):
        figures.error_over_depth({"fp16": depth().assign(relative_error=0.0)})


def test_sqnr_and_clipping_show_every_column_for_every_group() -> None:
    table = errors(layers=12)
    for draw, rows, factor in (
        (figures.sqnr_by_group, 4, 1),
        (figures.clip_and_rounding, 3, 100),
    ):
        made = draw(table)
        grid = np.array(panels(made)).reshape(rows, 4)
        module = sys.modules["morphoquant.analysis.figures.losses"]
        columns = [c for c, _ in (module.SQNR_ROWS if rows == 4 else module.CLIP_ROWS)]
        for (i, j), axes in np.ndenumerate(grid):
            here = table[(table["group"] == GROUPS[j]) & (table["modality"] == "video")]
            shown = lines(axes)["video"][:, 1]
            np.testing.assert_allclose(shown, factor * here[columns[i]])
        assert [axes.get_title(loc="left") for axes in grid[0]] == list(GROUPS)
        labels = [label.get_text() for label in grid[-1, 0].get_xticklabels()]
        assert labels == ["L0", "L2", "L4", "L6", "L8", "L10"]


def test_infinite_sqnr_is_no_error_to_show() -> None:
    made = figures.sqnr_by_group(errors().assign(activation_sqnr_db=np.inf))
    grid = np.array(panels(made)).reshape(4, 4)
    assert all(axes.texts[0].get_text() == "no error to show" for axes in grid[0])
    assert not any(axes.texts for axes in grid[1:].flat)


@settings(max_examples=15, deadline=None)
@given(ratios=st.lists(st.sampled_from([0.6, 0.7, 0.85, 1.0]), min_size=1, max_size=40))
def test_ratio_shares_add_up_and_the_ends_are_told(ratios: list[float]) -> None:
    table = pd.DataFrame({"group": "mlp_in", "ratio": ratios, "masked": [r < 0.8 for r in ratios]})
    made = figures.ratio_histogram(table, floor=0.6)
    (axes,) = panels(made)
    top = axes.patches[-1].get_data()
    assert top.values.sum() == pytest.approx(100)
    at = 100 * np.mean([r == 0.6 for r in ratios]), 100 * np.mean([r == 1.0 for r in ratios])
    assert (top.values[0], top.values[-1]) == pytest.approx(at)
    assert f"{at[0]:.1f} % at 0.6, {at[1]:.1f} % at 1" in axes.get_title(loc="left")


# ----------------------------------------------------------------------- ablation


def ablation(*rows: tuple[str, str, float, float, float]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["factor", "choice", "difference", "low", "high"])


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-5, 5), st.floats(0, 4), st.floats(0, 4)), min_size=1, max_size=6)
)
def test_an_interval_is_hollow_exactly_where_it_covers_zero(
    found: list[tuple[float, float, float]],
) -> None:
    rows = [("f", f"c{i}", d, d - a, d + b) for i, (d, a, b) in enumerate(found)]
    (axes,) = panels(figures.ablation_plot(ablation(*rows)))
    sorted_rows = sorted(rows, key=lambda row: -row[2])
    for bar, (_, _, difference, low, high) in zip(axes.containers, sorted_rows, strict=True):
        marker, _, (interval,) = bar.lines
        assert marker.get_xdata()[0] == difference
        np.testing.assert_allclose(interval.get_segments()[0][:, 0], [low, high], atol=1e-12)
        assert (marker.get_markerfacecolor() == "white") == (low <= 0 <= high)


def test_choices_stand_under_their_factor_best_first() -> None:
    made = figures.ablation_plot(
        ablation(
            ("range", "mse", -1, -2, 0.5), ("bits", "a8", 3, 2, 4), ("range", "mdqfo", 1, 0.5, 2)
        )
    )
    (axes,) = panels(made)
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["bits", "a8", "range", "mdqfo", "mse"]
    assert axes.lines[0].get_xdata() == [0.0, 0.0]
    assert set(legend(made)) == {"interval covers zero: no effect shown", "interval off zero"}


@pytest.mark.parametrize("numbers", [(np.nan, 0, 1), (0.5, -np.inf, 1), (2, 0, 1)])
def test_an_ablation_without_a_proper_interval_is_refused(numbers: tuple[float, ...]) -> None:
    with pytest.raises(TableError, match="range=mse"):
        figures.ablation_plot(ablation(("bits", "a8", 3, 2, 4), ("range", "mse", *numbers)))


# ---------------------------------------------------------------- tables that lack something

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
def test_a_missing_column_is_named(draw: Any, make: Any, column: str) -> None:
    with pytest.raises(ValueError, match=f"no column .*'{column}'") as caught:
        draw(make().drop(columns=column))
    assert isinstance(caught.value, HarnessError)


@pytest.mark.parametrize(("draw", "make", "column"), [DRAWN[i] for i in (0, 3, 4, 7)])
def test_a_column_without_numbers_is_named(draw: Any, make: Any, column: str) -> None:
    with pytest.raises(TableError, match=f"'{column}' .* no finite value"):
        draw(make().assign(**{column: np.nan}))


@pytest.mark.parametrize(("draw", "make"), [(d, m) for i, (d, m, _) in enumerate(DRAWN) if i != 2])
def test_an_empty_table_is_refused(draw: Any, make: Any) -> None:
    with pytest.raises(TableError, match=r"is empty"):
        draw(make().iloc[:0])


@pytest.mark.parametrize(("draw", "make"), [(d, m) for i, (d, m, _) in enumerate(DRAWN) if i < 7])
def test_two_runs_in_one_table_are_refused(draw: Any, make: Any) -> None:
    with pytest.raises(TableError, match=r"two rows for .*give the table of one run"):
        draw(pd.concat([make(), make()], ignore_index=True))


# ------------------------------------------------------------------- the standard set

STANDARD = ["outliers_max_over_median", "outliers_kurtosis_p99", "outliers_massive_share"]
STANDARD += ["channels_1", "channels_2", "channels_3", "overlap_jaccard", "overlap_scale"]
STANDARD += ["ratios", "output_sqnr", "sqnr", "clipping", "depth"]


def test_the_standard_set_is_written_as_small_images(tmp_path: Path) -> None:
    written = figures.save_figures(tmp_path, everything())
    assert [path.stem for path in written] == STANDARD
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == sorted(
        f"{name}.png" for name in STANDARD
    )
    for path in written:
        assert path.parent == tmp_path / "figures"
        assert path.stat().st_size < 200_000
        with Image.open(path) as image:
            assert min(image.size) > 250
            assert max(image.size) < 1400


def test_what_cannot_be_drawn_is_left_out_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tables = {
        "outliers": outliers().drop(columns="kurtosis_p99").assign(massive_share=np.nan),
        "ranges": ranges().assign(ratio=1.0),
        "errors": errors().iloc[:0],
    }
    with caplog.at_level(logging.INFO):
        written = figures.save_figures(tmp_path, tables)
    assert [path.stem for path in written] == ["outliers_max_over_median"]
    assert "outliers_kurtosis_p99 is left out: table 'outliers' has no column" in caplog.text
    assert "ratios is left out: no range was shrunk" in caplog.text
    assert figures.save_figures(tmp_path / "empty", {}) == []


def test_channel_distributions_are_of_the_layers_with_the_largest_outliers() -> None:
    table = outliers().assign(max_over_median=1.0)
    for layer, group, value in ((2, "mlp_out", 90), (2, "mlp_in", 80), (0, "attn_in", 70)):
        here = (table["layer"] == f"model.language_model.layers.{layer}") & (
            table["group"] == group
        )
        table.loc[here & (table["modality"] == "audio"), "max_over_median"] = value
    table.loc[table["layer"].str.endswith(".1"), "max_over_median"] = np.nan
    found = standard.largest_outliers(table, channels(count=4, layers=2))
    assert found == [("model.language_model.layers.0", "attn_in")]
    found = standard.largest_outliers(table, channels(count=4))
    assert found[:2] == [
        ("model.language_model.layers.2", "mlp_out"),
        ("model.language_model.layers.0", "attn_in"),
    ]


def test_no_pyplot_and_a_cheap_analysis_package() -> None:
    """In a process of its own: other tests may have imported what must not be imported."""
    code = (
        "import sys, morphoquant.analysis; assert 'matplotlib' not in sys.modules;"
        "import pathlib, tempfile, pandas as pd; from morphoquant.analysis import figures;"
        "rows = dict(factor=['a'], choice=['b'], difference=[1], low=[0], high=[2]);"
        "figures.ablation_plot(pd.DataFrame(rows)).savefig(tempfile.TemporaryFile());"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
