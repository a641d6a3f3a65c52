"""What the engine chooses: ranges and masks, and what they must not depend on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from morphoquant.calibration.statistics import ModalityStatistics
from morphoquant.config.schema import BitsConfig, MethodConfig, RangeConfig
from morphoquant.quantization.activation import StaticQuantizer, static_range
from morphoquant.quantization.engine import SEARCH, STATISTICS
from morphoquant.quantization.manifest import complete, reset_counters
from morphoquant.quantization.masks import outlier_mask
from morphoquant.quantization.mdqfo import RangeSearch

TOWERS = ("vision", "audio", "decoder")
W4A4 = BitsConfig(weight=4, activation=4)


def blocks_of(adapter: Any, towers: Any = TOWERS) -> list[Any]:
    return [b for t in towers for b in adapter.blocks(t)]


def sources(adapter: Any, towers: Any = TOWERS) -> dict[tuple[str, str], Any]:
    return {
        (b.name, g.name): b.linear(g.linears[0]).source
        for b in blocks_of(adapter, towers)
        for g in b.groups
    }


def recorded_inputs(adapter: Any, found: list[Any]) -> dict[tuple[str, str], Any]:
    """What reaches every decoder group in ordinary forwards: [tokens, channels] and labels."""
    seen: dict[tuple[str, str], list[Any]] = {}
    labels: list[torch.Tensor] = []
    for key, source in sources(adapter, ["decoder"]).items():

        def show(x: torch.Tensor, key: tuple[str, str] = key) -> None:
            seen.setdefault(key, []).append((x.flatten(0, -2), labels[-1].flatten()))

        source.observer = show
    for batch in found:
        labels.append(adapter.modality_map(batch))
        adapter.logits(batch)
    for source in sources(adapter, ["decoder"]).values():
        source.observer = None
    return {
        key: (torch.cat([x for x, _ in parts]), torch.cat([kind for _, kind in parts]))
        for key, parts in seen.items()
    }


@pytest.mark.parametrize("name", ["static", "morphoquant", "element"])
def test_ranges_and_masks_from_first_principles(
    methods: Any, omni: Any, quantize: Any, encode: Any, name: str
) -> None:
    """Masks, ranges and limits are those of the weight-quantized model's own activations.

    The reference runs the whole model in the ordinary way, with 4-bit weights and unquantized
    activations, and gives its real tokens to the slots' functions in one piece.
    """
    method = methods[name]
    adapter, quantizer = quantize(method, towers=["decoder"])
    reference, _ = quantize(MethodConfig(name="w4a16", weight=method.weight), towers=["decoder"])
    statistics_inputs = recorded_inputs(reference, encode("samples"))
    search_inputs = recorded_inputs(reference, encode("search"))
    masked = agreed = channels = 0
    for key, source in sources(adapter, ["decoder"]).items():
        rows, labels = statistics_inputs[key]
        expected = ModalityStatistics(rows.shape[1])
        expected.update(rows, labels)
        pooled = expected.pooled()
        for modality, part in expected.present.items():
            found = quantizer.collected[key].parts[modality]
            assert found.n == part.n
            torch.testing.assert_close(found.hi, part.hi, rtol=1e-4, atol=1e-5)
        mask = None
        if method.compensation.name == "dabc":
            mask = outlier_mask(pooled, method.compensation.mask)
            assert torch.equal(source.compensation.mask, mask)
            masked += int(mask.sum())
        else:
            assert source.compensation is None
        start = static_range(method.activation, pooled, mask)
        chosen = start
        if quantizer.searches:
            rows, labels = search_inputs[key]
            search = RangeSearch(start, 4, method.activation.range, mask, method.compensation)
            search.update(rows[labels >= 0])
            chosen = search.result()
        step = StaticQuantizer(chosen, 4).step
        close = (source.quantizer.step - step).abs() <= 1e-4 * step
        agreed, channels = agreed + int(close.sum()), channels + len(close)
        if name == "element":
            limit = 0.8 * 7 * source.quantizer.step
            torch.testing.assert_close(source.compensation.limit, limit)
    assert agreed >= 0.995 * channels  # float32 noise may turn a near tie between two ratios
    assert (masked > 0) == (method.compensation.name == "dabc")


def assert_same_choices(a: Any, b: Any, share: float = 1.0) -> None:
    """The same masks everywhere; the same ranges (to 1e-4) on ``share`` of all channels."""
    agreed = total = 0
    for key, source in sources(a).items():
        other = sources(b)[key]
        if source.compensation is not None:
            assert torch.equal(source.compensation.mask, other.compensation.mask), key
        step = source.quantizer.step
        agreed += int(((step - other.quantizer.step).abs() <= 1e-4 * step).sum())
        total += step.numel()
    assert agreed >= share * total


@pytest.mark.parametrize("name", ["morphoquant", "element"])
def test_order_of_batches_does_not_matter(
    quantize: Any, encode: Any, probe: Any, name: str
) -> None:
    """M7: bitwise, because nothing that is chosen feeds back into what is searched later."""
    found = []
    for turn in (1, -1):
        sets = {STATISTICS: encode("samples")[::turn], SEARCH: encode("search")[::turn]}
        found.append(quantize(name, sets=sets)[0])
    assert_same_choices(*found)
    assert torch.equal(found[0].logits(probe), found[1].logits(probe))


def test_size_of_batches_does_not_matter(omni: Any, quantize: Any, calibration: Any) -> None:
    """M7: singles against one batch of everything, with all its padding."""
    found = []
    for size in (1, 100):

        def encoded(samples: Any, size: int = size) -> list[Any]:
            groups = [samples[i : i + size] for i in range(0, len(samples), size)]
            return [omni.encode([s.messages for s in g]) for g in groups]

        sets = {STATISTICS: encoded(calibration.samples), SEARCH: encoded(calibration.search)}
        found.append(quantize("morphoquant", sets=sets)[0])
    assert_same_choices(*found, share=0.99)


def test_without_search_samples_the_statistics_samples_serve(
    quantize: Any, encode: Any, probe: Any
) -> None:
    """Searching on the statistics samples is the same as naming them twice."""
    samples = encode("samples")
    alone, _ = quantize("morphoquant", sets={STATISTICS: samples})
    named, _ = quantize("morphoquant", sets={STATISTICS: samples, SEARCH: samples})
    assert_same_choices(alone, named)
    assert torch.equal(alone.logits(probe), named.logits(probe))


def test_search_shrinks_and_is_recorded(methods: Any, quantize: Any) -> None:
    adapter, quantizer = quantize("morphoquant", towers=["decoder"])
    searched = methods["morphoquant"].activation
    off = searched.model_copy(update={"range": RangeConfig(name="mdqfo", search=False)})
    unsearched, _ = quantize(
        methods["morphoquant"].model_copy(update={"activation": off}), towers=["decoder"]
    )
    plain = sources(unsearched, ["decoder"])
    smaller = total = 0
    for key, source in sources(adapter, ["decoder"]).items():
        ratio = source.quantizer.step / plain[key].quantizer.step
        assert (ratio <= 1 + 1e-6).all()
        assert (ratio >= 0.6 - 1e-6).all()
        smaller, total = smaller + int((ratio < 0.99).sum()), total + ratio.numel()
    assert smaller > 0.2 * total
    shares = [
        (r.activation["share_at_floor"], r.activation["share_unshrunk"]) for r in quantizer.records
    ]
    assert all(0 <= a <= 1 and 0 <= b <= 1 and a + b <= 1 for a, b in shares)
    unshrunk = sum(b * r.in_features for (_, b), r in zip(shares, quantizer.records, strict=True))
    assert unshrunk < 0.9 * sum(r.in_features for r in quantizer.records)


def test_linears_of_a_group_share_range_and_mask(quantize: Any) -> None:
    adapter, quantizer = quantize("morphoquant")
    for block in blocks_of(adapter):
        for group in block.groups:
            modules: list[Any] = [block.linear(name) for name in group.linears]
            assert len({id(m.source) for m in modules}) == 1
            assert modules[0].source.readers == len(modules)
    records = {r.name: r for r in quantizer.records}
    q, k = (records[f"{adapter.blocks('decoder')[0].name}.self_attn.{n}_proj"] for n in "qk")
    assert q.activation == k.activation
    assert q.activation is not k.activation
    assert q.compensation["masked_channels"] == k.compensation["masked_channels"] > 0
    assert q.compensation["extra_flops_share"] == k.compensation["extra_flops_share"]


@pytest.mark.parametrize("name", ["morphoquant", "element"])
def test_bits_audit(methods: Any, quantize: Any, mixed: Any, name: str) -> None:
    """F2: 4 + 12 * bypass, with the bypass counted by hand."""
    adapter, quantizer = quantize(name)
    blocks = blocks_of(adapter)
    reset_counters(blocks)
    counted: dict[Any, list[int]] = {}
    for key, source in sources(adapter).items():

        def show(x: torch.Tensor, key: Any = key, source: Any = source) -> None:
            gate = source.compensation.gate(x).expand_as(x)
            total = counted.setdefault(key, [0, 0])
            total[0] += int(gate.sum())
            total[1] += x.numel()

        source.observer = show
    adapter.generate(mixed, max_new_tokens=2)
    manifest = quantizer.manifest
    complete(manifest, blocks, methods[name], W4A4)
    for block in blocks:
        for group in block.groups:
            passed, total = counted[block.name, group.name]
            for record in manifest.linears:
                if record.name in {f"{block.name}.{n}" for n in group.linears}:
                    bits = record.activation["effective_bits"]
                    assert bits == pytest.approx(4 + 12 * passed / total)
    passed = sum(p for p, _ in counted.values())
    total = sum(t for _, t in counted.values())
    assert manifest.activation_bits == pytest.approx(4 + 12 * passed / total)
    assert 4 < manifest.activation_bits < 4 + 12 * 0.05 + 1e-9
    assert 4.1 < manifest.weight_bits < 4.2


@pytest.mark.parametrize("name", ["rtn", "morphoquant"])
def test_cached_decoding_equals_prefill(quantize: Any, omni: Any, mixed: Any, name: str) -> None:
    """M15 on the model: a token read with the cache is quantized as inside its prompt.

    In float64, where the two orders of summation hardly ever round to different levels.
    """
    adapter, _ = quantize(name, BitsConfig(weight=4, activation=8), towers=["decoder"])
    adapter.model.double()
    ids = adapter.encode(mixed[:1])["input_ids"]
    at = torch.arange(ids.shape[1]).expand(3, 1, -1)
    model = adapter.model
    with torch.no_grad():
        whole = model(input_ids=ids, position_ids=at, use_cache=False).logits[:, -1]
        cache = model(
            input_ids=ids[:, :-1], position_ids=at[..., :-1], use_cache=True
        ).past_key_values
        last = model(
            input_ids=ids[:, -1:], position_ids=at[..., -1:], past_key_values=cache, use_cache=True
        ).logits[:, -1]
    assert (whole - last).abs().max() <= 1e-4 * whole.abs().max()
