"""The gradient variant: it goes downhill, stays in bounds, and is never the last word."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from morphoquant.calibration.statistics import ChannelStatistics
from morphoquant.config.schema import CompensationConfig, RangeConfig
from morphoquant.errors import ActivationError
from morphoquant.quantization import mdqfo
from morphoquant.quantization.mdqfo import RangeSearch
from morphoquant.quantization.mdqfo_gradient import GradientSearch
from morphoquant.quantization.ranges import initial_range

CHANNELS = 8


def activations(rows: int = 400, seed: int = 0) -> torch.Tensor:
    """Normal channels, one with a single huge value, one silent, one of one sign."""
    x = torch.randn(rows, CHANNELS, generator=torch.Generator().manual_seed(seed))
    x[0, 2], x[:, 4], x[:, 6] = 60.0, 0.0, x[:, 6].abs() + 2
    return x


def learn(
    x: torch.Tensor, mask: torch.Tensor | None = None, gate: float | None = None, **changes: Any
) -> GradientSearch:
    settings = RangeConfig(
        **(
            {"name": "mdqfo", "optimizer": "gradient", "min_ratio": 0.05, "steps": 60}
            | {"learning_rate": 0.05}
            | changes
        )
    )
    statistics = ChannelStatistics(CHANNELS)
    statistics.update(x)
    compensation = CompensationConfig(
        name="dabc", reading="channel" if gate is None else "element", gate=gate or 1.0
    )
    start = initial_range(statistics, None, affine_when_sign_constant=True)
    return GradientSearch(start, 4, settings, mask, compensation)


def exact_loss(search: GradientSearch, x: torch.Tensor, ratios: torch.Tensor) -> torch.Tensor:
    found = RangeSearch(
        search.initial, 4, search.config, search.mask, search.compensation, ratios[None]
    )
    found.update(x)
    return found.losses()[0]


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("cosine", [0.0, 0.75])
def test_goes_downhill(p: float, cosine: float) -> None:
    """The normal channels gain by clipping; every channel's exact loss is taken."""
    x = activations()
    search = learn(x, p=p, cosine_weight=cosine)
    search.update(x)
    ratios = search.best_ratios()
    before = exact_loss(search, x, torch.ones(CHANNELS))
    after = exact_loss(search, x, ratios)
    assert after.sum() < before.sum()
    normal = [0, 1, 3, 5, 7]
    assert (after[normal] <= before[normal] * 1.02).all()
    assert ((ratios >= 0.05 - 1e-6) & (ratios <= 1)).all()
    assert torch.isfinite(ratios).all()


def test_low_powers_clip_the_lonely_outlier() -> None:
    """M17: one value of 60 among 400 of size one. Half powers drop it, cubes keep it."""
    x = activations()
    ratios = []
    for p in (0.5, 3.0):
        search = learn(x, p=p, steps=200)
        search.update(x)
        ratios.append(float(search.best_ratios()[2]))
    assert ratios[0] < 0.2 < ratios[1]


def test_token_cosine_couples_the_channels() -> None:
    """Its loss on whole tokens falls."""
    x = activations()

    def turned(search: GradientSearch) -> float:
        value = search.result().grid(4)(x)
        return float((1 - torch.cosine_similarity(x, value, dim=1)).mean())

    search = learn(x, cosine="token", cosine_weight=5.0, p=0.5)
    before = turned(search)
    search.update(x)
    assert turned(search) < before


def test_parts_do_not_change_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded by working in parts; the sums over parts are the whole."""
    x = activations()
    found = []
    for size in (1 << 20, 1 << 11):
        monkeypatch.setattr(mdqfo, "CACHE_BYTES", size)
        for cosine in ("channel", "token"):
            search = learn(x, cosine=cosine, cosine_weight=0.5, steps=5)
            search.update(x)
            found.append(search.best_ratios())
    torch.testing.assert_close(found[0], found[2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], found[3], rtol=1e-4, atol=1e-5)


def test_returned_channels_do_not_learn() -> None:
    mask = torch.zeros(CHANNELS, dtype=torch.bool)
    mask[[0, 2]] = True
    search = learn(activations(), mask=mask)
    search.update(activations())
    assert (search.best_ratios()[mask] == 1).all()
    gated = learn(activations(), mask=mask, gate=0.8)
    gated.update(activations())
    assert torch.isfinite(gated.best_ratios()).all()


def test_works_inside_inference_mode() -> None:
    """The walk runs without gradients; the learner turns them on for itself."""
    with torch.inference_mode():
        x = activations()
        search = learn(x)
        search.update(x)
    assert (search.best_ratios() < 1).any()


def test_non_finite_is_refused() -> None:
    search = learn(activations())
    x = activations()
    x[5, 1] = torch.inf
    with pytest.raises(ActivationError):
        search.update(x)
