"""Scales and branches of every kind of token, on tensors (SPEC 4.13)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from morphoquant.config.schema import (
    ActivationConfig,
    BitsConfig,
    CompensationConfig,
    MethodConfig,
    WeightConfig,
)
from morphoquant.models.structure import Modality, TokenLabels
from morphoquant.quantization.compensation import describe_branch
from morphoquant.quantization.linear import GroupInput, QuantizedLinear
from morphoquant.quantization.low_rank import LowRank, has_branch, rank_of, truncated, whitened
from morphoquant.quantization.modality import (
    ModalityBranches,
    ModalityScale,
    RescaledInputLinear,
    kinds_of,
)
from morphoquant.quantization.rounding import GroupData, RoundedWeight, method_of, round_weight

W4A16 = BitsConfig(weight=4, activation=16)
K, N = 12, 9
ALL = torch.tensor([0, 1, 2, 3, -1, 0, 1, 3]).to(torch.int8)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def masquant(**changes: Any) -> MethodConfig:
    compensation = CompensationConfig(name="low_rank", per_modality=True, **changes)
    return MethodConfig(weight=WeightConfig(format="int"), compensation=compensation)


def scales(joint: bool = True) -> ModalityScale:
    names = [name for name in kinds_of(joint) if name != "text"]
    return ModalityScale({n: (0.5 * draw(K, seed=i)).exp() for i, n in enumerate(names)}, joint)


# --------------------------------------------------------------------------- scales


@pytest.mark.parametrize("joint", [True, False])
def test_every_token_gets_the_scales_of_its_kind(joint: bool) -> None:
    scale, x = scales(joint), draw(2, 4, K)
    found = scale(x, ALL.view(2, 4)).view(-1, K)
    owner = (
        {1: "vision", 2: "vision", 3: "audio"} if joint else {1: "image", 2: "video", 3: "audio"}
    )
    for row, original, label in zip(found, x.view(-1, K), ALL.tolist(), strict=True):
        if label in owner:
            torch.testing.assert_close(row, original / scale.ratio_of(owner[label]))
        else:
            assert torch.equal(row, original), "text and padding pass bit for bit"
    torch.testing.assert_close(scale.undo(scale(x, ALL.view(2, 4)), ALL.view(2, 4)), x)
    assert torch.equal(scale(x), x), "without labels all tokens are text"
    assert torch.equal(scale(x[0], torch.zeros(4)), x[0])
    assert scale.ratio_of("nothing") is None


def test_half_precision_is_divided_in_single() -> None:
    scale, x = scales(), draw(8, K).to(torch.bfloat16)
    found = scale(x, ALL)
    assert found.dtype == torch.bfloat16
    ratio = scale.ratio_of("audio").float()
    assert torch.equal(found[3], (x[3].float() / ratio).to(torch.bfloat16))


def test_the_unquantized_linear_is_unchanged_and_shows_the_scaled_input() -> None:
    linear, labels, scale = nn.Linear(K, N).double(), TokenLabels(), scales()
    module = RescaledInputLinear(linear, scale, labels)
    x, seen = draw(8, K), []
    labels.current = ALL
    with module.observe_input(seen.append):
        torch.testing.assert_close(module(x), linear(x))
    module(x)
    (shown,) = seen
    torch.testing.assert_close(shown, scale(x, ALL))
    assert not torch.allclose(shown, x)


def test_scales_cost_what_they_store() -> None:
    weights = [draw(n, K) for n in (9, 4, 4)]
    bits = sum(scales().storage_bits(w, 3) * w.numel() for w in weights)
    assert bits == pytest.approx(16 * 2 * K)


# --------------------------------------------------------------------------- branches


def branches(names: tuple[str, ...] = ("vision", "audio"), rank: int = 3) -> ModalityBranches:
    found = {n: truncated(draw(N, K, seed=7 + i), rank) for i, n in enumerate(names)}
    return ModalityBranches(found, joint_vision=True)


def test_a_token_goes_through_the_branch_of_its_kind() -> None:
    module, x = branches(), draw(2, 4, K)
    found = module(x, ALL.view(2, 4)).view(-1, N)
    owner = {1: "vision", 2: "vision", 3: "audio"}
    for row, original, label in zip(found, x.view(-1, K), ALL.tolist(), strict=True):
        if label in owner:
            torch.testing.assert_close(row, module.branch(owner[label])(original))
        else:
            assert not row.any(), "text has no branch, and padding is text"
    assert not module(x).any()
    with_text = branches(("text", "vision"))
    torch.testing.assert_close(with_text(x)[0], with_text.branch("text")(x[0]))
    assert with_text(x, ALL.view(2, 4)).view(-1, N)[4].any(), "padding takes text's"
    assert not with_text(x, torch.full((2, 4), 3)).any(), "a kind that calibration lacked"


@given(order=st.permutations(range(8)), cut=st.integers(1, 7))
def test_tokens_do_not_meet_in_branches_or_scales(order: list[int], cut: int) -> None:
    x = draw(8, K)
    for module in (branches(), scales()):
        whole = module(x, ALL)
        torch.testing.assert_close(module(x[order], ALL[order]), whole[order])
        parts = [module(x[:cut], ALL[:cut]), module(x[cut:], ALL[cut:])]
        torch.testing.assert_close(torch.cat(parts), whole)


def test_costs_count_every_branch_once_and_a_token_one() -> None:
    module = branches(rank=3)
    assert module.storage_bits() == pytest.approx(2 * 16 * 3 * (K + N) / (K * N))
    described = describe_branch(module)
    assert described["stored_numbers"] == 2 * 3 * (K + N)
    assert described["extra_flops_per_token"] == 2 * 3 * (K + N)
    assert described["branches"] == ["vision", "audio"]
    assert "branches" not in describe_branch(truncated(draw(N, K), 3))


# --------------------------------------------------------------------------- rounding


def tokens(seed: int) -> torch.Tensor:
    """With strong directions of their own."""
    spread = torch.logspace(-1, 1, K, dtype=torch.float64)[torch.randperm(K, generator=rng(seed))]
    return draw(300, K, seed=seed) @ draw(K, K, seed=seed + 50) * spread


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rounded(method: MethodConfig, scale: ModalityScale | None = None) -> tuple[Any, RoundedWeight]:
    x = {"vision": tokens(1), "audio": tokens(2)}
    if method.compensation.text_branch:
        x = {"text": tokens(3), **x}
    moments = {name: rows.T @ rows for name, rows in x.items()}
    data = GroupData(moments_by_kind=moments, scale=scale)
    return x, round_weight(draw(N, K, seed=9), method, W4A16, data)


def test_the_branch_makes_up_for_scales_and_rounding() -> None:
    """At full rank ``Q(W S_t) x' + L_m x' = W S_m x'``, whatever the grid."""
    scale = scales()
    _, found = rounded(masquant(rank_share=1.0, whitened=True), scale)
    assert isinstance(found.branch, ModalityBranches)
    weight = draw(N, K, seed=9)
    assert not torch.allclose(found.weight, weight, atol=1e-3)
    source, labels = GroupInput(1, scale), TokenLabels()
    source.labels, labels.current = labels, ALL
    linear = QuantizedLinear(found.weight, draw(N), source)
    x = draw(8, K)
    # Without branches the scales are undone: the function of the rounded weight.
    torch.testing.assert_close(linear(x), F.linear(x, found.weight, linear.bias))
    linear.set_branch(found.branch)
    exact = F.linear(x, weight, linear.bias)
    media = ALL > 0
    torch.testing.assert_close(linear(x)[media], exact[media], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(linear(x)[~media], F.linear(x, found.weight, linear.bias)[~media])
    labels.current = None
    torch.testing.assert_close(linear(x), F.linear(x, found.weight, linear.bias))


@pytest.mark.parametrize("rank", [1, 4])
def test_whitened_branches_lose_least_on_their_own_tokens(rank: int) -> None:
    scale = scales()
    x, found = rounded(masquant(rank=rank, whitened=True), scale)
    _, plain = rounded(masquant(rank=rank), scale)
    assert isinstance(found.branch, ModalityBranches)
    assert isinstance(plain.branch, ModalityBranches)
    pooled = torch.cat(list(x.values()))
    for kind, rows in x.items():
        missing = draw(N, K, seed=9) * scale.ratio_of(kind) - found.weight

        def lost(
            branch: LowRank, rows: torch.Tensor = rows, missing: torch.Tensor = missing
        ) -> float:
            return float((rows @ (missing - branch.product).T).square().sum())

        best = found.branch.branch(kind)
        assert best.rank == rank
        together = whitened(missing, pooled.T @ pooled, rank)
        assert lost(best) < 0.999 * lost(plain.branch.branch(kind))
        assert lost(best) <= lost(together) * (1 + 1e-3)
        for seed in range(5):
            step = 1e-2 * draw(N, rank, seed=seed), 1e-2 * draw(rank, K, seed=seed)
            assert lost(best) <= lost(LowRank(best.up + step[0], best.down + step[1])) * (1 + 1e-3)


def test_one_scale_and_no_whitening_is_one_branch() -> None:
    """Then every kind has the branch that tokens of all kinds would share."""
    _, found = rounded(masquant(rank=4, text_branch=True))
    shared = masquant(rank=4).compensation.model_copy(update={"per_modality": False})
    method = masquant().model_copy(update={"compensation": shared})
    one = round_weight(draw(N, K, seed=9), method, W4A16, GroupData())
    assert isinstance(found.branch, ModalityBranches)
    assert isinstance(one.branch, LowRank)
    assert torch.equal(found.weight, one.weight)
    assert found.branch.names == ("text", "vision", "audio")
    for kind in found.branch.names:
        torch.testing.assert_close(found.branch.branch(kind).product, one.branch.product)
    single = one.description["effective_bits"] - 4
    assert found.description["effective_bits"] > 4 + 2 * single


def test_which_linears_get_a_branch() -> None:
    config = masquant(groups=("mlp_in",)).compensation
    assert has_branch(config, "decoder", "mlp_in")
    assert not has_branch(config, "decoder", "mlp_out")
    assert not has_branch(config, "vision", "mlp_in"), "towers are of one modality"
    shared = config.model_copy(update={"per_modality": False})
    assert has_branch(shared, "audio", "attn_in")
    assert not has_branch(CompensationConfig(), "decoder", "mlp_in")
    bare = method_of(masquant(groups=("mlp_in",)), "decoder", "mlp_out")
    assert bare.compensation.name == "none"
    rtn = MethodConfig(activation=ActivationConfig(format="int"))
    assert method_of(rtn, "vision", "attn_in") is rtn


@pytest.mark.parametrize(("share", "expected"), [(None, 32), (0.25, 2), (1.0, 9), (0.001, 1)])
def test_rank_as_a_share(share: float | None, expected: int) -> None:
    assert rank_of(masquant(rank_share=share).compensation, draw(N, K)) == expected


def test_kinds_cover_every_modality() -> None:
    for joint in (True, False):
        members = [m for part in kinds_of(joint).values() for m in part]
        assert sorted(members) == [Modality.TEXT, Modality.IMAGE, Modality.VIDEO, Modality.AUDIO]
        assert next(iter(kinds_of(joint))) == "text"
