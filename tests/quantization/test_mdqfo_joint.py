"""The search with one ratio per mask group, against a loop over all pairs of ratios."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from morphoquant.calibration.statistics import ChannelStatistics
from morphoquant.config.schema import CompensationConfig, RangeConfig
from morphoquant.errors import ActivationError
from morphoquant.quantization.mdqfo_joint import JointSearch
from morphoquant.quantization.ranges import initial_range

CHANNELS = 10
MASK = torch.zeros(CHANNELS, dtype=torch.bool)
MASK[[2, 7]] = True


def activations(rows: int = 120, seed: int = 0) -> torch.Tensor:
    x = torch.randn(rows, CHANNELS, generator=torch.Generator().manual_seed(seed))
    x[0, 2], x[:, 7], x[:, 5] = 90.0, x[:, 7] ** 3, 0.0
    x[9] = 0.0
    return x


def search(x: torch.Tensor, reading: str | None, **changes: Any) -> JointSearch:
    weights = changes.pop("importance", None)
    settings = RangeConfig(
        **(
            {"name": "mdqfo", "ratio_per": "mask_group", "candidates": 5, "cosine": "token"}
            | changes
        )
    )
    statistics = ChannelStatistics(CHANNELS)
    statistics.update(x)
    mask = None if reading is None else MASK
    compensation = CompensationConfig(name="dabc", reading=reading or "channel", gate=0.8)
    start = initial_range(statistics, mask if reading == "element" else None)
    return JointSearch(start, 4, settings, mask, compensation, weights)


def reference(x: torch.Tensor, found: JointSearch, reading: str | None) -> torch.Tensor:
    """[ratio of other channels, ratio of masked channels], each pair by itself."""
    config, exact = found.config, x.double()
    weights = found.weights
    out = torch.zeros(len(found.ratios), len(found.ratios), dtype=torch.float64)
    for i, other in enumerate(found.ratios):
        for j, masked in enumerate(found.ratios):
            ratio = torch.where(MASK if reading else torch.zeros_like(MASK), masked, other)
            chosen = found.initial.shrunk(ratio.float())
            value = chosen.grid(4)(exact)
            if reading is not None:
                gate = MASK.expand_as(x)
                if reading == "element":
                    gate = MASK & (exact.abs() > 0.8 * chosen.edge)
                value = torch.where(gate, exact, value)
            error = ((value - exact).abs() ** config.p * weights).sum()
            size = (exact.abs() ** config.p * weights).sum() if config.normalize else x.numel()
            out[i, j] = error / size
            if config.cosine == "token":
                cosine = torch.cosine_similarity(exact, value, dim=1, eps=1e-300)
                turned = torch.where(exact.norm(dim=1) > 0, 1 - cosine, 0.0).mean()
            else:
                cosine = torch.cosine_similarity(exact, value, dim=0, eps=1e-300)
                turned = torch.where(exact.norm(dim=0) > 0, 1 - cosine, 0.0).mean()
            out[i, j] += config.cosine_weight * turned
    return out


@pytest.mark.parametrize("reading", [None, "channel", "element"])
@pytest.mark.parametrize("cosine", ["token", "channel"])
@pytest.mark.parametrize("p", [0.5, 2.0])
@pytest.mark.parametrize("normalize", [True, False])
def test_all_pairs(reading: str | None, cosine: str, p: float, normalize: bool) -> None:
    x = activations()
    found = search(x, reading, cosine=cosine, cosine_weight=0.75, p=p, normalize=normalize)
    found.update(x)
    expected = reference(x, found, reading)
    torch.testing.assert_close(found.losses(), expected, rtol=1e-6, atol=1e-9)
    chosen = found.best_ratios()
    i = found.ratios.index(min(found.ratios, key=lambda r: abs(r - float(chosen[0]))))
    j = found.ratios.index(min(found.ratios, key=lambda r: abs(r - float(chosen[2]))))
    if reading is None:
        assert len(set(chosen.tolist())) == 1
        assert expected[i].min() <= expected.min() * (1 + 1e-6)
    else:
        assert len(set(chosen[MASK].tolist())) == 1
        assert len(set(chosen[~MASK].tolist())) == 1
        assert expected[i, j] <= expected.min() * (1 + 1e-6) + 1e-12
    if reading == "channel":
        assert (chosen[MASK] == 1).all(), "the range of a returned channel does not matter"


def test_output_weighting_changes_who_matters() -> None:
    """All weight on one heavy-tailed channel: its own best ratio wins for its whole group."""
    x = activations()
    importance = torch.zeros(CHANNELS)
    importance[7] = 1.0
    plain = search(x, None, candidates=15, cosine_weight=0.0)
    weighted = search(x, None, candidates=15, cosine_weight=0.0, importance=importance)
    plain.update(x)
    weighted.update(x)
    alone = search(x[:, [7] * CHANNELS], None, candidates=15, cosine_weight=0.0)
    alone.update(x[:, [7] * CHANNELS])
    assert torch.equal(weighted.best_ratios(), alone.best_ratios())
    assert not torch.equal(weighted.best_ratios(), plain.best_ratios())


@given(cut=st.integers(1, 119), seed=st.integers(0, 5))
def test_batches_do_not_matter(cut: int, seed: int) -> None:
    """M7: sums over tokens, whatever the batches."""
    x = activations(seed=seed)
    whole, split = (search(x, "element", cosine_weight=1.0) for _ in range(2))
    whole.update(x)
    split.update(x[cut:])
    split.update(x[:cut])
    torch.testing.assert_close(whole.losses(), split.losses(), rtol=1e-9, atol=1e-12)
    assert torch.equal(whole.best_ratios(), split.best_ratios())


def test_moving_average_depends_on_order() -> None:
    """The defect that sums avoid, kept as a choice."""
    x = activations()
    parts = [x[:40], x[40:80] * 2, x[80:] * 3]
    losses = []
    for order in (parts, parts[::-1]):
        found = search(x, None, accumulate="ema", cosine_weight=0.5)
        for part in order:
            found.update(part)
        losses.append(found.losses())
    assert not torch.allclose(losses[0], losses[1], rtol=1e-3)


def test_non_finite_is_refused() -> None:
    x = activations()
    found = search(x, None)
    x[3, 3] = torch.nan
    found.update(x)
    with pytest.raises(ActivationError):
        found.losses()
