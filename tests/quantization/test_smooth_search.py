"""The search for exponents: its losses, what they do not depend on, and what smoothing is for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from morphoquant.calibration.samples import CalibrationError
from morphoquant.calibration.walk import enter, walk
from morphoquant.config.schema import ActivationConfig, BitsConfig, MethodConfig, WeightConfig
from morphoquant.errors import ActivationError
from morphoquant.formats import fake_quantize_activation, fake_quantize_weight
from morphoquant.quantization.engine import STATISTICS, BlockQuantizer
from morphoquant.quantization.transforms.smooth import SmoothSettings, smooth
from morphoquant.quantization.transforms.smooth_search import Losses, rounded, search_losses

INT4 = WeightConfig(format="int")
W4A4 = BitsConfig(weight=4, activation=4)
W4A16 = BitsConfig(weight=4, activation=16)
SHORT = (0.0, 0.25, 0.5, 0.75)


def by_place(report: Any) -> dict[tuple[str, str], Any]:
    return {(g.layer, g.group): g for g in report.groups}


# --------------------------------------------------------------------------- losses


def test_losses_are_means_over_real_tokens() -> None:
    exact = torch.zeros(1, 4, 2)
    rough = torch.tensor([[[100.0, 100.0], [1.0, -3.0], [2.0, 2.0], [0.0, 4.0]]])
    kinds = torch.tensor([[-1, 0, 1, 1]])
    found = {}
    for loss in ("mse", "mae"):
        losses = Losses(1, loss)  # type: ignore[arg-type]
        losses.add(0, exact, rough, kinds)
        found[loss] = losses
    assert found["mae"].result() == [(4 + 4 + 4) / 6]
    assert found["mse"].result() == [(10 + 8 + 16) / 6]
    assert found["mae"].result(by_modality=True) == [(4 / 2 + 8 / 4) / 2]
    # MBQ: (sum over answers + R sum over media) / (all elements)
    weights = torch.tensor([1.0, 0.25, 9.0, 9.0], dtype=torch.float64)
    assert found["mae"].result(weights) == [(4 + 0.25 * 8) / 6]


def test_losses_without_tokens_or_numbers_are_refused() -> None:
    losses = Losses(2, "mse")
    losses.add(0, torch.ones(1, 2), torch.zeros(1, 2), torch.tensor([-1]))
    with pytest.raises(ActivationError, match="no token"):
        losses.result()
    for i in range(2):
        losses.add(i, torch.full((1, 2), torch.nan), torch.zeros(1, 2), torch.tensor([0]))
    with pytest.raises(ActivationError, match="NaN"):
        losses.result()


@pytest.mark.parametrize("activations", [False, True], ids=["w4a16", "w4a4"])
@pytest.mark.parametrize("group", ["attn_in", "mlp_in", "mlp_out"])
def test_losses_are_those_of_a_direct_computation(
    omni: Any, copied: Any, encode: Any, group: str, activations: bool
) -> None:
    """First layer, one prompt without padding; the part is run by hand with rounded weights."""
    batch = encode("samples", 1)[0]
    layer = omni.residual_stream().layers[0]
    module = layer.block.module
    part, names = {
        "attn_in": (module.self_attn, "qkv"),
        "mlp_in": (module.mlp, ("gate", "up")),
        "mlp_out": (layer.down, ("down",)),
    }[group]
    caught: list[Any] = []
    hook = part.register_forward_hook(lambda *a: caught.append(a[1:]), with_kwargs=True)
    with torch.no_grad():
        omni.model(**batch, use_cache=False)
    hook.remove()
    args, kwargs, out = caught[0]
    exact = out[0] if isinstance(out, tuple) else out
    x = args[0] if args else kwargs["hidden_states"]
    settings = SmoothSettings.awq(groups=(group,), quantize_activations=activations, grid=SHORT)
    report = smooth(copied(omni), [batch], settings, INT4, W4A4)
    reported = dict(report.groups[0].losses)
    for exponent in SHORT:
        scale = x.abs().reshape(-1, x.shape[-1]).double().mean(0) ** exponent
        scale = (scale / (scale.max() * scale.min()).sqrt()).float()
        other = copied(omni).residual_stream().layers[0]
        for name in names:
            weight = getattr(other, name).weight
            rough = fake_quantize_weight(weight * scale, 4).dequantized / scale
            weight.data.copy_(rough)
        seen = x
        if activations:
            seen = scale * fake_quantize_activation(x / scale, 4, "per_token", x.shape[-1])
        inspected = {"attn_in": other.block.module.self_attn, "mlp_in": other.block.module.mlp}
        run = inspected.get(group, other.down)
        with torch.no_grad():
            if args:
                found = run(seen, *args[1:], **kwargs)
            else:
                found = run(**(kwargs | {"hidden_states": seen}))
        found = found[0] if isinstance(found, tuple) else found
        expected = float((found - exact).double().square().mean())
        assert reported[exponent] == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("loss", ["mse", "mae"])
def test_never_worse_than_no_smoothing(omni: Any, copied: Any, encode: Any, loss: Any) -> None:
    settings = SmoothSettings.awq(loss=loss, skip_grouped_attn_out=False, grid=(*SHORT, 0.95))
    report = smooth(copied(omni), encode("samples"), settings, INT4, W4A16)
    assert report.skipped == ()
    for found in report.groups:
        losses = dict(found.losses)
        assert list(losses) == [*SHORT, 0.95]
        assert losses[found.exponent] == min(losses.values()) <= losses[0.0]
    assert any(found.exponent > 0 for found in report.groups)


def test_default_grids() -> None:
    assert SmoothSettings(search=True).exponents == pytest.approx(
        [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9]
    )
    assert SmoothSettings.awq().exponents == pytest.approx([i / 20 for i in range(20)])
    assert SmoothSettings.smoothquant(0.7).exponents == (0.7,)


# --------------------------------------------------------------------------- invariances


@pytest.mark.parametrize("balance", ["none", "mean"])
def test_batches_order_and_padding_do_not_matter(
    omni: Any, copied: Any, encode: Any, balance: Any
) -> None:
    """M7: four prompts to a batch, padded, against one at a time in the other order."""
    settings = SmoothSettings.awq(
        balance=balance, quantize_activations=True, skip_grouped_attn_out=False, grid=(0.2, 0.6)
    )
    networks, reports = [], []
    for batches in (encode("samples", 4), encode("samples", 1)[::-1]):
        networks.append(copied(omni))
        reports.append(smooth(networks[-1], batches, settings, INT4, W4A4))
    padded = any(bool((b["attention_mask"] == 0).any()) for b in encode("samples", 4))
    assert padded
    first, second = (by_place(report) for report in reports)
    for place, found in first.items():
        assert found.exponent == second[place].exponent
        for (_, a), (_, b) in zip(found.losses, second[place].losses, strict=True):
            assert a == pytest.approx(b, rel=0.02)  # a rounding to 4 bits may fall the other way
    for a, b in zip(*(n.residual_stream().layers for n in networks), strict=True):
        for name in ("q", "v", "o", "up", "down"):
            one, two = getattr(a, name).weight, getattr(b, name).weight
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_the_memory_bound_changes_no_loss(omni: Any, encode: Any) -> None:
    layer = omni.residual_stream().layers[0]
    block = layer.block
    before = {n: block.linear(n) for g in block.groups for n in g.linears}
    generator = torch.Generator().manual_seed(0)
    widths = {"attn_in": 256, "attn_out": 256, "mlp_in": 256, "mlp_out": 512}
    candidates = {
        name: [torch.rand(width, generator=generator).double() + 0.5 for _ in range(2)]
        for name, width in widths.items()
    }
    made: list[str] = []

    def rounding(group: Any, scale: torch.Tensor) -> Any:
        made.append(group.name)
        return rounded(block, group, scale, INT4, W4A4, True)

    found, hidden = [], []
    for memory in (0, 1 << 10):
        with torch.no_grad():
            segments = enter(omni, "decoder", encode("samples"))
        kinds = [segment.labels for segment in segments]
        losses = search_losses(block, 0, segments, kinds, candidates, "mae", rounding, memory)
        found.append({name: sums.error for name, sums in losses.items()})
        hidden.append([segment.hidden for segment in segments])
        made, count = [], len(made)
        # A candidate is rounded once for all prompts that fit; without memory, for each.
        assert count == 8 * (1 if memory else len(segments))
    assert all(torch.equal(found[0][name], found[1][name]) for name in widths)
    assert all(torch.equal(a, b) for a, b in zip(*hidden, strict=True))
    assert all(block.linear(name) is module for name, module in before.items())


# --------------------------------------------------------------------------- usefulness


def first_block(adapter: Any, batches: Any) -> torch.Tensor:
    """What the first block adds to the residual stream at real tokens."""
    caught: list[torch.Tensor] = []
    block = adapter.residual_stream().layers[0].block.module
    hook = block.register_forward_hook(lambda _m, args, out: caught.append(out - args[0]))
    for batch in batches:
        adapter.logits(batch)
    hook.remove()
    real = [batch["attention_mask"].bool() for batch in batches]
    return torch.cat([out[keep] for out, keep in zip(caught, real, strict=True)]).double()


def test_smoothing_helps_where_channels_stand_out(omni: Any, copied: Any, encode: Any) -> None:
    """Outlier channels behind both norms, W4A4: SQNR of a block on prompts that were not used.

    Of one block: through four layers of random weights 4-bit errors grow past the signal.
    """
    loud = copied(omni)
    for layer in loud.residual_stream().layers:
        for norm in (layer.input_norm, layer.post_norm):
            norm.weight.data[7::61] *= 25.0
        for linear in (layer.q, layer.k, layer.v, layer.gate, layer.up):
            linear.weight.data[:, 7::61] /= 25.0
    method = MethodConfig(name="rtn", weight=INT4, activation=ActivationConfig(format="int"))
    exact = first_block(loud, encode("search"))
    batches = encode("samples")
    found = {}
    for name, settings in {
        "none": None,
        "smoothquant": SmoothSettings.smoothquant(0.7),
        "searched": SmoothSettings.smoothquant(search=True, quantize_activations=True),
        "awq": SmoothSettings.awq(quantize_activations=True),
    }.items():
        adapter = copied(loud)
        if settings is not None:
            smooth(adapter, batches, settings, INT4, W4A4)
        walk(adapter, ["decoder"], {STATISTICS: batches}, BlockQuantizer(method, W4A4))
        error = (first_block(adapter, encode("search")) - exact).square().sum()
        found[name] = float(10 * torch.log10(exact.square().sum() / error))
    for name in ("smoothquant", "searched", "awq"):
        assert found[name] > found["none"] + 3  # decibels


# --------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"formula": "awk"}, "formula='awk'"),
        ({"loss": "l3"}, "loss='l3'"),
        ({"balance": "median"}, "balance='median'"),
        ({"alpha": 1.5}, "between 0 and 1"),
        ({"grid": (0.5, -0.1)}, "between 0 and 1"),
        ({"groups": ("attn_in", "lm_head")}, "lm_head"),
        ({"groups": ()}, "choose some"),
        ({"memory_mb": 0}, "positive"),
        ({"balance": "gradient"}, "set search=True"),
    ],
)
def test_settings_are_checked(changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SmoothSettings(**changes)


def test_a_search_that_rounds_nothing_is_refused(omni: Any, encode: Any) -> None:
    for weight, bits in (
        (WeightConfig(), W4A4),
        (INT4, BitsConfig(weight=16, activation=4)),
    ):
        with pytest.raises(ValueError, match="rounds nothing"):
            smooth(omni, encode("samples"), SmoothSettings.awq(), weight, bits)


def test_no_prompts_are_refused(omni: Any) -> None:
    with pytest.raises(CalibrationError, match="prompts, there are none"):
        smooth(omni, [], SmoothSettings(), INT4, W4A4)
    with pytest.raises(CalibrationError, match="answers, there are none"):
        smooth(omni, [], SmoothSettings.mbq(), INT4, W4A4)


def test_grouped_attention_is_skipped_only_if_asked(omni: Any, copied: Any, encode: Any) -> None:
    batch = encode("samples", 1)[:1]
    report = smooth(copied(omni), batch, SmoothSettings(), INT4, W4A4)
    assert report.skipped == ("attn_out",)
    assert "attn_out" not in {g.group for g in report.groups}
    adapter = copied(omni)
    report = smooth(adapter, batch, SmoothSettings(skip_grouped_attn_out=False), INT4, W4A4)
    found = [g for g in report.groups if g.group == "attn_out"]
    assert len(found) == len(adapter.residual_stream().layers)
