"""AIFS: the permutation, and that the decoder does not notice it (T5)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from morphoquant.calibration.walk import Segment, enter, run_block
from morphoquant.models.qwen_omni import text_model
from morphoquant.models.structure import Modality
from morphoquant.quantization.arrange import RUNS, Arrangement
from morphoquant.quantization.transforms.check import largest_relative_change

TOLERANCE = 1e-10


@st.composite
def labelled(draw: st.DrawFn) -> torch.Tensor:
    """int8 [batch, tokens], any mixture."""
    batch, tokens = draw(st.integers(1, 4)), draw(st.integers(1, 30))
    kinds = st.sampled_from([int(kind) for kind in RUNS])
    row = st.lists(kinds, min_size=tokens, max_size=tokens)
    rows = draw(st.lists(row, min_size=batch, max_size=batch))
    return torch.tensor(rows, dtype=torch.int8)


@given(labels=labelled())
def test_a_permutation_with_one_run_per_modality(labels: torch.Tensor) -> None:
    found = Arrangement.of(labels)
    tokens = labels.shape[1]
    for row, order, inverse, runs in zip(
        labels, found.order, found.inverse, found.runs(), strict=True
    ):
        assert sorted(order.tolist()) == list(range(tokens))
        assert torch.equal(order[inverse], torch.arange(tokens))
        assert set(runs) == {Modality(kind) for kind in row.tolist()}
        places = [i for run in runs.values() for i in range(run.start, run.stop)]
        assert places == list(range(tokens)), "every place is in one run"
        for kind, run in runs.items():
            assert (row[order[run]] == int(kind)).all()
            assert (order[run].diff() > 0).all(), "in the order in which they came"


@given(labels=labelled(), axis=st.integers(1, 3), shared=st.booleans())
def test_undoing_restores(labels: torch.Tensor, axis: int, shared: bool) -> None:
    """Along any axis; a batch axis of length 1 stands for all prompts."""
    found = Arrangement.of(labels)
    shape = [2] * (axis - 1) + [1 if shared else len(labels), labels.shape[1], 3]
    x = torch.arange(float(torch.Size(shape).numel())).view(shape)
    moved = found.apply(x, axis)
    assert torch.equal(found.undo(moved, axis), x.expand(moved.shape))
    for b, order in enumerate(found.order):
        source = x.select(axis - 1, 0 if shared else b)
        expected = source.index_select(axis - 1, order)
        assert torch.equal(moved.select(axis - 1, b), expected)


@given(labels=labelled(), seed=st.integers(0, 99))
def test_a_mask_moves_with_its_tokens(labels: torch.Tensor, seed: int) -> None:
    found = Arrangement.of(labels)
    batch, tokens = labels.shape
    causal = torch.ones(tokens, tokens).tril().bool()
    assert torch.equal(found.mask(causal.expand(batch, 1, -1, -1)), found.mask(None))
    assert torch.equal(found.mask(causal[None, None]), found.mask(None))
    draw = torch.Generator().manual_seed(seed)
    mask = torch.randn(batch, 2, tokens, tokens, generator=draw)
    moved = found.mask(mask)
    for b, order in enumerate(found.order):
        assert torch.equal(moved[b], mask[b][:, order][:, :, order])


def test_what_is_no_batch_of_tokens_is_refused() -> None:
    found = Arrangement.of(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"\[batch, tokens\]"):
        Arrangement.of(torch.zeros(5))
    for shape in ((2, 5), (2, 1, 1, 5), (2, 1, 4, 4)):
        with pytest.raises(ValueError, match="expected a mask"):
            found.mask(torch.ones(shape))


# ------------------------------------------------------------------------ T5


@pytest.fixture(scope="module")
def exact(omni: Any, copied: Any, in_float64: Any) -> Any:
    adapter = copied(omni)
    in_float64(adapter.model)
    return adapter


def moved(segment: Segment, arrangement: Arrangement) -> Segment:
    """A prompt on its way into the first block, its tokens arranged."""
    arguments = []
    for positional, keywords in segment.arguments:
        changed = dict(keywords)
        changed["attention_mask"] = arrangement.mask(keywords["attention_mask"])
        # Cosines and sines follow from the position ids token by token.
        rotary = keywords["position_embeddings"]
        changed["position_embeddings"] = tuple(
            arrangement.apply(part, axis=part.ndim - 2) for part in rotary
        )
        arguments.append((positional, changed))
    return Segment(arrangement.apply(segment.hidden), arrangement.apply(segment.labels), arguments)


@torch.no_grad()
def decoded(adapter: Any, segment: Segment) -> torch.Tensor:
    """Through all blocks and the final norm, [batch, tokens, channels]."""
    for index, block in enumerate(adapter.blocks("decoder")):
        segment.hidden = run_block(block, index, segment)
    return text_model(adapter.model).norm(segment.hidden)


@pytest.mark.parametrize("padded", [False, True], ids=["alone", "padded"])
def test_the_decoder_does_not_notice(exact: Any, mixed: Any, padded: bool) -> None:
    """T5, on text, image, video, audio and mixed prompts; alone they come without a mask.

    By sdpa: the eager function of transformers has its softmax in float32.
    """
    batches = [exact.encode(mixed)] if padded else [exact.encode([one]) for one in mixed]
    interleaved = False
    for batch in batches:
        with torch.no_grad():
            (segment,) = enter(exact, "decoder", [batch])
        arrangement = Arrangement.of(segment.labels)
        assert len(segment.labels) == (5 if padded else 1)
        real = segment.labels >= 0
        assert bool((~real).any()) == padded
        interleaved |= bool((arrangement.order.diff(dim=1) < 0).any())
        other = moved(segment, arrangement)
        mask = segment.arguments[0][1]["attention_mask"]
        assert (mask is None) == (not padded)
        expected, found = decoded(exact, segment), arrangement.undo(decoded(exact, other))
        for then, now, of in zip(expected, found, real, strict=True):
            assert largest_relative_change(then[of], now[of]) <= TOLERANCE
    assert interleaved, "no prompt had to be reordered"


@pytest.mark.parametrize("forgotten", ["attention_mask", "position_embeddings"])
def test_mask_and_positions_have_to_move_too(exact: Any, mixed: Any, forgotten: str) -> None:
    with torch.no_grad():
        (segment,) = enter(exact, "decoder", [exact.encode(mixed[-1:])])
    arrangement = Arrangement.of(segment.labels)
    other = moved(segment, arrangement)
    for (_, changed), (_, before) in zip(other.arguments, segment.arguments, strict=True):
        changed[forgotten] = before[forgotten]
    expected, found = decoded(exact, segment), arrangement.undo(decoded(exact, other))
    assert largest_relative_change(expected, found) > 1e-3
