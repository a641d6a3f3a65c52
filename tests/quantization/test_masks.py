"""Which channels are outliers: rules, cap, views, named layers (M8 - M10)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from morphoquant.calibration.statistics import ChannelStatistics, ModalityStatistics
from morphoquant.config.schema import MaskConfig
from morphoquant.quantization.masks import (
    POOLED,
    ScoreMoments,
    group_mask,
    outlier_mask,
    score_moments,
    views,
)

CHANNELS = 40


def activations(seed: int = 0, rows: int = 60) -> torch.Tensor:
    x = torch.randn(rows, CHANNELS, generator=torch.Generator().manual_seed(seed))
    x[0, 3], x[1, 17], x[2, 8] = 60.0, -70.0, 65.0
    return x


def seen(x: torch.Tensor) -> ChannelStatistics:
    found = ChannelStatistics(x.shape[1])
    found.update(x)
    return found


def test_mask_marks_the_long_tails() -> None:
    for score in ("log1p", "mean"):
        mask = outlier_mask(seen(activations()), MaskConfig(score=score, max_share=1.0))
        assert mask.nonzero().flatten().tolist() == [3, 8, 17]
        assert mask.dtype == torch.bool


def test_mask_threshold_is_mean_plus_std() -> None:
    statistics = seen(activations())
    score = statistics.dispersion("log1p").numpy()
    for threshold in (-1.0, 0.5, 2.0):
        expected = score >= score.mean() + threshold * score.std(ddof=1)
        mask = outlier_mask(statistics, MaskConfig(std_threshold=threshold, max_share=1.0))
        assert mask.tolist() == expected.tolist()


@given(low=st.floats(-3, 4), extra=st.floats(0, 4), share=st.floats(0, 1), seed=st.integers(0, 20))
def test_mask_is_monotone_and_capped(low: float, extra: float, share: float, seed: int) -> None:
    """M10: a higher threshold, or a smaller cap, only ever takes channels away."""
    statistics = seen(activations(seed))

    def mask(threshold: float, share: float) -> torch.Tensor:
        return outlier_mask(statistics, MaskConfig(std_threshold=threshold, max_share=share))

    wide, narrow = mask(low, share), mask(low + extra, share)
    assert not (narrow & ~wide).any()
    assert int(wide.sum()) <= share * CHANNELS
    assert not (mask(low, share / 2) & ~wide).any()
    uncapped = mask(low, 1.0)
    assert not (wide & ~uncapped).any()
    if wide.any() and (uncapped & ~wide).any():
        score = statistics.dispersion("log1p")
        assert score[wide].min() >= score[uncapped & ~wide].max()


def test_cap_of_zero_masks_nothing() -> None:
    assert not outlier_mask(seen(activations()), MaskConfig(max_share=0.0)).any()


def test_equal_scores_are_capped_by_channel_number() -> None:
    """Deterministic on every device: the lower channels stay."""
    x = torch.zeros(4, CHANNELS)
    x[0, 10:20] = 5.0
    mask = outlier_mask(seen(x), MaskConfig(std_threshold=1.0, max_share=0.1))
    assert mask.nonzero().flatten().tolist() == [10, 11, 12, 13]


@given(power=st.integers(-6, 6), times=st.integers(1, 4))
def test_mean_score_mask_is_free_of_scale_and_repetition(power: int, times: int) -> None:
    """M8, M9."""
    x = activations()
    config = MaskConfig(score="mean", max_share=0.2)
    assert torch.equal(
        outlier_mask(seen(x), config), outlier_mask(seen(x.repeat(times, 1) * 2.0**power), config)
    )


def test_channels_that_are_all_alike_have_no_outlier() -> None:
    rows = activations()[:, :1].repeat(1, 24)
    assert not outlier_mask(seen(rows), MaskConfig(max_share=1.0)).any()


# ----------------------------------------------------------------------------- other rules


def loose(**changes: Any) -> MaskConfig:
    return MaskConfig(**({"max_share": 1.0} | changes))


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
def test_top_share_takes_the_highest_scores(share: float) -> None:
    statistics = seen(activations())
    mask = outlier_mask(statistics, loose(rules=("top_share",), top_share=share))
    assert int(mask.sum()) == round(share * CHANNELS)
    score = statistics.dispersion("log1p")
    if mask.any() and not mask.all():
        assert score[mask].min() >= score[~mask].max()


@pytest.mark.parametrize("pooling", ["channels", "layers"])
def test_global_moments_count_linears(pooling: str) -> None:
    """Both readings: wide layers weigh more in one, and every linear counts by itself."""
    wide, narrow = torch.arange(8.0), torch.tensor([10.0, 30.0])
    found = score_moments([(wide, 3), (narrow, 1)], MaskConfig(pooling=pooling))
    if pooling == "channels":
        joined = torch.cat([wide, wide, wide, narrow])
        assert found.mean == pytest.approx(float(joined.mean()))
        assert found.std == pytest.approx(float(joined.std()))
    else:
        assert found.mean == pytest.approx((3 * 3.5 + 20) / 4)
        assert found.std == pytest.approx((3 * float(wide.std()) + float(narrow.std())) / 4)


@given(mean=st.floats(0, 60), std=st.floats(0, 20), seed=st.integers(0, 20))
def test_local_or_global_is_their_union(mean: float, std: float, seed: int) -> None:
    """M10: OR with the global rule only ever adds channels; it is the lower threshold."""
    statistics = seen(activations(seed))
    moments = ScoreMoments(mean, std)
    local = outlier_mask(statistics, loose())
    both = outlier_mask(statistics, loose(rules=("local", "global")), moments)
    alone = outlier_mask(statistics, loose(rules=("global",)), moments)
    assert not (local & ~both).any()
    assert torch.equal(both, local | alone)
    score = statistics.dispersion("log1p")
    assert torch.equal(alone, score >= mean + 2 * std)


def modalities(text: torch.Tensor, image: torch.Tensor) -> ModalityStatistics:
    found = ModalityStatistics(CHANNELS)
    labels = torch.cat([torch.zeros(len(text)), torch.ones(len(image))]).to(torch.int8)
    found.update(torch.cat([text, image]), labels)
    return found


def test_a_quiet_modality_is_heard_in_the_union_only() -> None:
    """An outlier among small activations drowns in the pooled scores."""
    text = activations(1).clamp(-3, 3) * 0.01
    text[5, 30] = 0.5
    image = activations(2)
    found = modalities(text, image)
    pooled = group_mask(found, ["a"], loose())
    union = group_mask(found, ["a"], loose(modalities="union"))
    assert not pooled[30]
    assert union[30]
    each = [outlier_mask(part, loose()) for part in found.present.values()]
    assert torch.equal(union, each[0] | each[1])
    assert list(views(found, loose())) == [POOLED]
    assert list(views(found, loose(modalities="union"))) == ["text", "image"]


def test_the_cap_holds_for_the_union() -> None:
    found = modalities(activations(3) * 100, activations(4))
    capped = group_mask(found, ["a"], MaskConfig(modalities="union", max_share=0.05))
    free = group_mask(found, ["a"], loose(modalities="union"))
    assert int(capped.sum()) == 2 < int(free.sum())
    assert not (capped & ~free).any()


def test_named_layers_are_masked_whole() -> None:
    found = modalities(activations(), activations())
    config = MaskConfig(all_channels=("*.mlp.down_proj",))
    assert group_mask(found, ["layers.3.mlp.down_proj"], config).all()
    others = group_mask(found, ["layers.3.mlp.up_proj", "layers.3.mlp.gate_proj"], config)
    assert int(others.sum()) <= 0.03 * CHANNELS
    assert group_mask(found, ["x"], MaskConfig(all_channels=("*",))).all()


def test_global_thresholds_are_per_view() -> None:
    found = modalities(activations(), activations(1))
    config = loose(modalities="union", rules=("global",))
    low, high = ScoreMoments(-1.0, 0.0), ScoreMoments(1e9, 0.0)
    assert group_mask(found, ["a"], config, {"text": low, "image": high}).all()
    assert not group_mask(found, ["a"], config, {"text": high, "image": high}).any()


@pytest.mark.parametrize("score", ["log1p", "mean", "log_l1", "log_mean", "absmax"])
def test_every_score_gives_a_mask_on_adversarial_channels(score: str) -> None:
    """M17: constant signs, silence, a single outlier, all at once."""
    x = activations()
    x[:, 0] = 0.0
    x[:, 1] = x[:, 1].abs() + 5
    x[:, 2] = 1e-12
    mask = outlier_mask(seen(x), loose(score=score))
    assert mask.dtype == torch.bool
    assert not mask.all()
    assert not mask[0]


def test_the_blind_control_has_the_same_size_and_other_channels() -> None:
    """Drawn by layer and seed: the same twice, another for another layer or seed."""
    found = modalities(activations(), activations(1))
    real = group_mask(found, ["a"], loose())

    def drawn(name: str, seed: int = 0) -> torch.Tensor:
        return group_mask(found, [name], loose(score="random", seed=seed))

    assert int(drawn("a").sum()) == int(real.sum()) > 0
    assert torch.equal(drawn("a"), drawn("a"))
    others = [drawn("b"), drawn("c"), drawn("a", seed=1), drawn("a", seed=2)]
    assert any(not torch.equal(drawn("a"), other) for other in others)
    assert any(not torch.equal(real, other) for other in [drawn("a"), *others])
