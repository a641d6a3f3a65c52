"""The knapsack is exact: no choice within the budget is better, and more budget never hurts."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from morphoquant.analysis.allocation import Candidate, Option, allocate, average
from morphoquant.errors import HarnessError


def option(width: int, loss: float, overhead: float = 0.06) -> Option:
    extra = overhead if width < 16 else 0.0
    return Option(width, width, width + extra, width + extra / 2, loss)


@st.composite
def problems(draw: st.DrawFn) -> list[Candidate]:
    """Up to five units of three widths; losses over many orders of magnitude, not all falling."""
    found = []
    for number in range(draw(st.integers(1, 5))):
        exponents = [draw(st.floats(-9, 1)) for _ in range(2)]
        options = (option(4, 10 ** exponents[0]), option(8, 10 ** exponents[1]), option(16, 0.0))
        weights, elements = draw(st.integers(1, 1000)), draw(st.integers(1, 1000))
        found.append(Candidate(f"u{number}", weights, elements, options))
    return found


def best_by_trying(candidates: list[Candidate], budget: float) -> float:
    losses = []
    for chosen in itertools.product(*(c.options for c in candidates)):
        if max(average(candidates, chosen)) <= budget:
            losses.append(sum(o.loss for o in chosen))
    return min(losses)


@given(problems(), st.floats(4.1, 16.0))
def test_no_choice_is_better_and_none_exceeds_the_budget(
    candidates: list[Candidate], budget: float
) -> None:
    found = allocate(candidates, budget)
    assert found.weight_bits <= budget * (1 + 1e-9)
    assert found.activation_bits <= budget * (1 + 1e-9)
    chosen = [found.chosen[c.name] for c in candidates]
    assert (found.weight_bits, found.activation_bits) == average(candidates, chosen)
    best = best_by_trying(candidates, budget)
    worst = sum(max(o.loss for o in c.options) for c in candidates)
    assert found.loss == pytest.approx(best, rel=1e-6, abs=1e-9 * worst)


@given(problems(), st.lists(st.floats(4.1, 16.0), min_size=2, max_size=5))
def test_more_budget_is_never_predicted_worse(
    candidates: list[Candidate], budgets: list[float]
) -> None:
    losses = [allocate(candidates, budget).loss for budget in sorted(budgets)]
    worst = sum(max(o.loss for o in c.options) for c in candidates)
    assert all(b <= a + 1e-9 * worst for a, b in itertools.pairwise(losses))


def test_the_sensitive_unit_gets_the_bits() -> None:
    options = {"a": 1.0, "b": 0.01, "c": 0.02}
    candidates = [
        Candidate(name, 10, 10, (option(4, loss), option(8, loss / 256), option(16, 0.0)))
        for name, loss in options.items()
    ]
    widths = {n: o.weight for n, o in allocate(candidates, 5.5).chosen.items()}
    assert widths == {"a": 8, "b": 4, "c": 4}
    assert allocate(candidates, 16).loss == 0
    assert {o.weight for o in allocate(candidates, 4.07).chosen.values()} == {4}


def test_each_side_has_the_budget() -> None:
    """A unit with few weights and many activations may not buy its bits with the weights'."""
    cheap = Candidate("cheap", 1, 99, (option(4, 1.0), option(16, 0.0)))
    other = Candidate("other", 99, 1, (option(4, 0.5), option(16, 0.0)))
    assert allocate([cheap, other], 8).loss == 1.5
    weights = [Option(4, 16, 4.0, 16.0, 1.0), Option(16, 16, 16.0, 16.0, 0.0)]
    found = allocate([Candidate("w", 1, 1, tuple(weights))], 5)
    assert found.loss == 1.0, "a side that is never quantized has no budget"


def test_a_budget_that_nothing_fits() -> None:
    candidates = [Candidate("a", 1, 1, (option(4, 1.0), option(8, 0.1)))]
    with pytest.raises(HarnessError, match=r"budget=3.*weights need 4\.06"):
        allocate(candidates, 3.0)
