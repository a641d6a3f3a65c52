"""The walk: running block by block is running the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from morphoquant.calibration.samples import Calibration, batches
from morphoquant.calibration.statistics import ModalityStatistics
from morphoquant.calibration.walk import labels_for, observing, run_block, walk
from morphoquant.models.structure import Block, InputGroup, Modality


class Forward:
    """A visitor that only moves hidden states on, and keeps what it saw."""

    def __init__(self) -> None:
        self.visited: list[str] = []
        self.final: dict[str, list[torch.Tensor]] = {}
        self.labels: dict[str, list[torch.Tensor]] = {}

    def visit(self, index: int, block: Block, segments: dict[str, list[Any]]) -> None:
        self.visited.append(block.name)
        for found in segments.values():
            for segment in found:
                segment.hidden = run_block(block, index, segment)
        if "statistics" in segments:
            self.final[block.tower] = [s.hidden for s in segments["statistics"]]
            self.labels[block.tower] = [s.labels for s in segments["statistics"]]


class Observe(Forward):
    """Collects statistics of every group input too."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[tuple[str, str], ModalityStatistics] = {}

    def visit(self, index: int, block: Block, segments: dict[str, list[Any]]) -> None:
        def see(group: InputGroup, x: torch.Tensor, labels: torch.Tensor) -> None:
            key = (block.name, group.name)
            self.found.setdefault(key, ModalityStatistics(x.shape[-1])).update(x, labels)

        for segment in segments["statistics"]:
            with observing(block, lambda s=segment: s.labels, see):
                segment.hidden = run_block(block, index, segment)


def outputs_of(adapter: Any, tower: Any, run: Callable[[], Any]) -> list[torch.Tensor]:
    """What the last block of a tower returns while ``run`` runs."""
    caught: list[torch.Tensor] = []
    handle = adapter.blocks(tower)[-1].module.register_forward_hook(
        lambda _m, _a, out: caught.append(out[0] if isinstance(out, tuple) else out)
    )
    try:
        with torch.no_grad():
            run()
    finally:
        handle.remove()
    return caught


def go(adapter: Any, towers: Sequence[Any], found: Any, visitor: Any) -> Any:
    walk(adapter, towers, {"statistics": found}, visitor)
    return visitor


def test_decoder_equals_the_model(omni: Any, mixed: Any) -> None:
    found = [omni.encode(mixed), omni.encode(mixed[:1])]
    visitor = go(omni, ["decoder"], found, Forward())
    assert visitor.visited == [b.name for b in omni.blocks("decoder")]
    for batch, hidden, labels in zip(
        found, visitor.final["decoder"], visitor.labels["decoder"], strict=True
    ):
        expected = outputs_of(omni, "decoder", lambda b=batch: omni.logits(b))
        real = batch["attention_mask"].bool()
        torch.testing.assert_close(hidden[real], expected[0][real], rtol=0, atol=0)
        assert torch.equal(labels, omni.modality_map(batch))


def test_decoder_output_gives_the_models_logits(omni: Any, mixed: Any) -> None:
    batch = omni.encode(mixed)
    hidden = go(omni, ["decoder"], [batch], Forward()).final["decoder"][0]
    stream = omni.residual_stream()
    with torch.no_grad():
        logits = stream.lm_head(stream.final_norm(hidden))[:, -1]
    assert torch.equal(logits, omni.logits(batch))


def test_vision_equals_the_towers_own_run(omni: Any, mixed: Any) -> None:
    batch = omni.encode(mixed)
    visitor = go(omni, ["vision"], [batch], Forward())
    model = omni.model
    still, moving = (
        outputs_of(
            omni,
            "vision",
            lambda: model.get_image_features(batch["pixel_values"], batch["image_grid_thw"]),
        ),
        outputs_of(
            omni,
            "vision",
            lambda: model.get_video_features(batch["pixel_values_videos"], batch["video_grid_thw"]),
        ),
    )
    assert len(visitor.final["vision"]) == 2
    for hidden, expected in zip(visitor.final["vision"], (still, moving), strict=True):
        assert torch.equal(hidden, expected[0])
    kinds = [set(labels.tolist()) for labels in visitor.labels["vision"]]
    assert kinds == [{int(Modality.IMAGE)}, {int(Modality.VIDEO)}]
    assert visitor.visited == [b.name for b in omni.blocks("vision")]


def test_vision_output_is_what_the_decoder_reads(omni: Any, mixed: Any) -> None:
    """The merger's rows, as a set, are the embeddings that ``get_image_features`` returns."""
    batch = omni.encode(mixed[1:2])
    hidden = go(omni, ["vision"], [batch], Forward()).final["vision"][0]
    with torch.no_grad():
        features = omni.model.get_image_features(batch["pixel_values"], batch["image_grid_thw"])
    rows = torch.cat(list(features.pooler_output))
    assert hidden.shape == rows.shape
    order, other = hidden.sum(1).argsort(), rows.sum(1).argsort()
    torch.testing.assert_close(hidden[order], rows[other])


def test_audio_equals_the_towers_own_run(omni: Any, mixed: Any) -> None:
    batch = omni.encode(mixed)
    visitor = go(omni, ["audio"], [batch], Forward())
    expected = outputs_of(
        omni,
        "audio",
        lambda: omni.model.get_audio_features(
            batch["input_features"], batch["feature_attention_mask"]
        ),
    )
    assert torch.equal(visitor.final["audio"][0], expected[0])
    assert set(visitor.labels["audio"][0].tolist()) == {int(Modality.AUDIO)}


def test_towers_run_in_the_order_of_data(omni: Any, mixed: Any) -> None:
    """Whatever the order in which they are named; text-only batches pass the towers by."""
    visitor = Forward()
    steps: list[int] = []
    found = {"statistics": [omni.encode(mixed[:1]), omni.encode(mixed[4:])]}
    walk(omni, ["decoder", "audio", "vision"], found, visitor, steps.append)
    names = [b.name for t in ("vision", "audio", "decoder") for b in omni.blocks(t)]
    assert visitor.visited == names
    assert sum(steps) == len(names)
    assert [len(visitor.final[t]) for t in ("vision", "audio", "decoder")] == [2, 1, 2]


def test_walk_leaves_no_hooks(fresh_omni: Any, mixed: Any) -> None:
    go(fresh_omni, ["vision", "audio", "decoder"], [fresh_omni.encode(mixed[4:])], Observe())
    for module in fresh_omni.model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("size", [1, 3])
def test_statistics_do_not_depend_on_batches(
    omni: Any, calibration: Calibration, size: int
) -> None:
    """M7 through the real model: batch size, batch order and padding."""

    def collected(groups: list[Any]) -> dict[Any, ModalityStatistics]:
        encoded = [omni.encode([s.messages for s in g]) for g in groups]
        return go(omni, ["vision", "audio", "decoder"], encoded, Observe()).found

    samples = list(calibration.samples)
    reference = collected([samples])  # all modalities in one batch: much padding
    found = collected(list(reversed(batches(samples, size))))
    assert found.keys() == reference.keys()
    for key, statistics in reference.items():
        assert list(found[key].present) == list(statistics.present)
        for modality, part in statistics.present.items():
            other = found[key].parts[modality]
            assert other.n == part.n
            for name in ("lo", "hi", "abs_mean", "std"):
                assert relative(getattr(other, name), getattr(part, name)) < 1e-4, (key, name)


def test_statistics_count_every_token_once(omni: Any, mixed: Any) -> None:
    batch = omni.encode(mixed)
    visitor = go(omni, ["vision", "audio", "decoder"], [batch], Observe())
    labels = omni.modality_map(batch)
    merge = omni.model.config.vision_config.spatial_merge_size**2
    for block in omni.blocks("decoder"):
        for group in block.groups:
            for modality, part in visitor.found[block.name, group.name].parts.items():
                assert part.n == int((labels == int(modality)).sum())
    tokens = {m: int((labels == int(m)).sum()) for m in Modality}
    for block in omni.blocks("vision"):
        for group in block.groups:
            parts = visitor.found[block.name, group.name].parts
            factor = 1 if group.name.startswith("merger") else merge
            assert parts[Modality.IMAGE].n == factor * tokens[Modality.IMAGE]
            assert parts[Modality.VIDEO].n == factor * tokens[Modality.VIDEO]
            assert parts[Modality.TEXT].n == 0


def test_labels_for_merged_rows() -> None:
    same = torch.full((8,), 2, dtype=torch.int8)
    assert labels_for(same, torch.zeros(8, 5)) is same
    assert labels_for(same, torch.zeros(2, 20)).tolist() == [2, 2]
    assert labels_for(same, torch.zeros(2, 4, 5)).shape == (2, 4)
    with pytest.raises(ValueError, match="cannot label"):
        labels_for(torch.tensor([1, 2, 1, 2]), torch.zeros(2, 20))
    with pytest.raises(ValueError, match="cannot label"):
        labels_for(same, torch.zeros(9, 5))
