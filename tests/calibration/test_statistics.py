"""Statistics per modality: what they must not depend on, and where histograms come in."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from morphoquant.calibration.statistics import ChannelStatistics, ModalityStatistics
from morphoquant.errors import ActivationError
from morphoquant.models.structure import MODALITIES, Modality


def activations(rows: int, channels: int, seed: int = 0) -> torch.Tensor:
    """Heavy-tailed float32 with channels of very different scale and mean."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, channels, generator=draw) ** 3
    scale = torch.logspace(-3, 3, channels)
    return x * scale + torch.randn(channels, generator=draw) * scale


def seen(x: torch.Tensor) -> ChannelStatistics:
    found = ChannelStatistics(x.shape[1])
    found.update(x)
    return found


def assert_same(a: ChannelStatistics, b: ChannelStatistics) -> None:
    """Ranges bitwise; every central sum close relative to its natural size."""
    assert a.n == b.n
    assert torch.equal(a.lo, b.lo)
    assert torch.equal(a.hi, b.hi)
    size = a.n * b.absmax.clamp_min(1e-300)
    for power, name in enumerate(("abs_sum", "m2", "m3", "m4"), start=1):
        difference = getattr(a, name) - getattr(b, name)
        assert (difference.abs() <= 1e-9 * size * b.absmax ** (power - 1)).all(), name
    assert ((a.mean - b.mean).abs() <= 1e-12 * b.absmax).all()


@given(
    seed=st.integers(0, 100),
    padding=st.integers(0, 30),
    batches=st.integers(1, 4),
)
def test_modalities_partition_and_padding_is_skipped(seed: int, padding: int, batches: int) -> None:
    """M7 and M11: per modality as if it were alone; pooled is the sum; padding, whatever it
    holds, is not there."""
    draw = torch.Generator().manual_seed(seed)
    x = activations(80, 5, seed)
    labels = torch.randint(0, 4, (80,), generator=draw, dtype=torch.int8)
    padded = torch.cat([x, torch.full((padding, 5), 1e30)])
    padded_labels = torch.cat([labels, torch.full((padding,), -1, dtype=torch.int8)])
    shuffle = torch.randperm(80 + padding, generator=draw)
    found = ModalityStatistics(5)
    for rows in shuffle.chunk(batches):
        found.update(padded[rows], padded_labels[rows])
    assert sum(part.n for part in found.parts.values()) == 80
    for modality in MODALITIES:
        chosen = x[labels == int(modality)]
        if len(chosen):
            assert_same(found.present[modality], seen(chosen))
        else:
            assert modality not in found.present
    assert_same(found.pooled(), seen(x))


def test_non_finite_padding_is_no_error() -> None:
    """Fully masked rows of an attention may well be NaN."""
    x = activations(4, 3)
    x[0] = torch.nan
    found = ModalityStatistics(3)
    found.update(x, torch.tensor([-1, 0, 0, 1]))
    assert_same(found.pooled(), seen(x[1:]))


def test_batched_activations_are_flattened() -> None:
    x = activations(12, 3)
    labels = torch.tensor([0, 1, 2, 3, -1, 0, 1, 1, 1, 2, 2, -1])
    flat, shaped = ModalityStatistics(3), ModalityStatistics(3)
    flat.update(x, labels)
    shaped.update(x.reshape(3, 4, 3), labels.reshape(3, 4))
    assert_same(flat.pooled(), shaped.pooled())


def test_merge_of_modalities() -> None:
    x, labels = activations(40, 3), torch.arange(40) % 5 - 1
    whole, first, second = (ModalityStatistics(3) for _ in range(3))
    whole.update(x, labels)
    first.update(x[:17], labels[:17])
    second.update(x[17:], labels[17:])
    first.merge(second)
    for modality in MODALITIES:
        assert_same(first.parts[modality], whole.parts[modality])
    assert list(first.present) == list(Modality)[1:]


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Three prompts, padded left, right and not at all; the second starts with an image."""
    labels = torch.tensor([[-1, -1, 0, 1, 0], [1, 0, 0, -1, -1], [0, 3, 3, 0, 2]])
    x = activations(15, 4).reshape(3, 5, 4)
    x[labels < 0] = torch.nan
    return x, labels.to(torch.int8)


def test_first_tokens_of_prompts() -> None:
    """By hand: tokens 2 and 0 of prompts 0 and 2 are text, token 0 of prompt 1 is an image."""
    x, labels = prompts()
    found = ModalityStatistics(4)
    for one in range(3):
        found.update(x[one : one + 1], labels[one : one + 1])
    energy = x.double().square().sum(-1)
    text = energy[labels == 0].sum()
    shares = {m: d.tokens.first_share for m, d in found.distributions.items()}
    assert shares[Modality.TEXT] == pytest.approx(float((energy[0, 2] + energy[2, 0]) / text))
    assert shares[Modality.IMAGE] == pytest.approx(float(energy[1, 0] / energy[labels == 1].sum()))
    assert shares[Modality.AUDIO] == 0.0
    pooled = found.pooled_distribution()
    assert pooled is not None
    assert pooled.tokens.first_share == pytest.approx(
        float((energy[0, 2] + energy[2, 0] + energy[1, 0]) / energy[labels >= 0].sum())
    )


def test_prompts_of_padding_only_have_no_first_token() -> None:
    x, labels = prompts()
    whole, padded = ModalityStatistics(4), ModalityStatistics(4)
    whole.update(x, labels)
    nothing = torch.full_like(labels[:1], -1)
    padded.update(torch.cat([x[:1] * torch.nan, x]), torch.cat([nothing, labels]))
    for modality, one in whole.distributions.items():
        assert padded.distributions[modality].tokens.first_share == one.tokens.first_share
    assert_same(padded.pooled(), whole.pooled())


def test_rows_without_prompts_have_no_first_token() -> None:
    x, labels = prompts()
    found = ModalityStatistics(4)
    found.update(x.reshape(-1, 4), labels.reshape(-1))
    assert all(math.isnan(d.tokens.first_share) for d in found.distributions.values())


def test_histograms_see_what_the_moments_see() -> None:
    x, labels = prompts()
    found = ModalityStatistics(4)
    found.update(x, labels)
    assert set(found.distributions) == set(found.present)
    for modality, part in found.present.items():
        layer = found.distributions[modality]
        assert int(layer.magnitudes.counts.sum()) == 4 * part.n
        assert int(layer.tokens.counts.sum()) == part.n
        assert layer.magnitudes.quantile(1.0) == pytest.approx(float(part.absmax.max()), rel=2**-8)
        energy = (part.m2 + part.n * part.mean**2).sum()
        assert float(layer.tokens.energy.sum()) == pytest.approx(float(energy))


def test_histograms_are_optional() -> None:
    """Moments and ranges are bitwise the same without them."""
    x, labels = prompts()
    with_them, without = ModalityStatistics(4), ModalityStatistics(4, histograms=False)
    with_them.update(x, labels)
    without.update(x, labels)
    assert without.distributions == {}
    assert without.pooled_distribution() is None
    for modality in MODALITIES:
        assert torch.equal(without.parts[modality].m4, with_them.parts[modality].m4)


@given(cut=st.integers(0, 3))
def test_merge_of_histograms(cut: int) -> None:
    x, labels = prompts()
    whole, first, second = (ModalityStatistics(4) for _ in range(3))
    whole.update(x, labels)
    first.update(x[:cut], labels[:cut])
    second.update(x[cut:], labels[cut:])
    first.merge(second)
    assert set(first.distributions) == set(whole.distributions)
    for modality, layer in whole.distributions.items():
        merged = first.distributions[modality]
        assert torch.equal(merged.magnitudes.counts, layer.magnitudes.counts)
        assert torch.equal(merged.tokens.counts, layer.tokens.counts)
        assert merged.tokens.first_share == pytest.approx(layer.tokens.first_share)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_is_refused(bad: float) -> None:
    x, labels = activations(6, 3), torch.arange(6) % 4
    x[4, 1] = bad
    with pytest.raises(ActivationError, match="NaN or infinite"):
        ModalityStatistics(3).update(x, labels)


@pytest.mark.parametrize("kind", [-1, 0, 3])
def test_one_label_for_all(kind: int) -> None:
    """Towers: nothing is gathered, and a batch of padding alone is nothing."""
    x = activations(50, 3)
    found = ModalityStatistics(3)
    found.update(x, torch.full((50,), kind, dtype=torch.int8))
    assert list(found.present) == ([] if kind < 0 else [Modality(kind)])
    if kind >= 0:
        assert_same(found.parts[Modality(kind)], seen(x))


def test_no_rows() -> None:
    found = ModalityStatistics(3)
    found.update(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int8))
    found.update(torch.zeros(0, 5, 3), torch.zeros(0, 5, dtype=torch.int8))
    assert found.present == {}


def test_cpu_returns_itself() -> None:
    x, labels = prompts()
    found = ModalityStatistics(4)
    found.update(x, labels)
    before = found.pooled().m4
    assert found.cpu() is found
    assert torch.equal(found.pooled().m4, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_agrees_with_cpu() -> None:
    """Ranges and counts exactly; ``cpu`` brings every tensor back."""
    x, labels = activations(600, 40).reshape(6, 100, 40), torch.randint(-1, 4, (6, 100))
    there, here = ModalityStatistics(40, "cuda"), ModalityStatistics(40)
    there.update(x.cuda(), labels.cuda())
    here.update(x, labels)
    there.cpu()
    for modality, part in here.present.items():
        assert_same(there.parts[modality], part)
        a, b = there.distributions[modality], here.distributions[modality]
        assert torch.equal(a.magnitudes.counts, b.magnitudes.counts)
        assert torch.equal(a.tokens.counts, b.tokens.counts)
        assert a.tokens.first_share == pytest.approx(b.tokens.first_share)
