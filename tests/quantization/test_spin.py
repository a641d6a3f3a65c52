"""T2 and T10 for learned rotations: orthogonal, function unchanged, and the loss goes down.

What learning sees has to be the network that is written afterwards, so the two are compared
directly: the loss in rotated bases against the loss of the rotated weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from morphoquant.calibration.readers import Sample
from morphoquant.calibration.samples import Calibration, CalibrationError
from morphoquant.config.schema import ActivationConfig, ScopeConfig, TransformConfig
from morphoquant.errors import ActivationError
from morphoquant.formats import fake_quantize_activation
from morphoquant.quantization.transforms import RotatedInputLinear, rotate
from morphoquant.quantization.transforms.check import largest_relative_change
from morphoquant.quantization.transforms.spin import (
    IGNORED,
    Rotations,
    SpinReport,
    SpinSettings,
    answer_loss,
    learning_quantizer,
    make_lesson,
    rounded_inputs,
    spin,
)

ACTIVATION = ActivationConfig(format="int")
BITS = 3
SHORT = SpinSettings(steps=3, batch_size=4, seed=1)
TOLERANCE = 1e-10


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def precise(request: pytest.FixtureRequest, build_adapter: Any, in_float64: Any) -> Any:
    """The random thinker in float64, shared: copy it before a change."""
    scope = ScopeConfig(decoder=True, vision=True, audio=True)
    adapter = build_adapter(scope, tie=request.param)
    in_float64(adapter.model)
    return adapter


@pytest.fixture(scope="module")
def samples(one_of_each: dict[str, Sample]) -> list[Sample]:
    return [one_of_each[name] for name in ("text", "image", "video", "audio")]


def logits(adapter: Any, conversations: Any) -> torch.Tensor:
    with torch.no_grad():
        return adapter.model(**adapter.encode(conversations), use_cache=False).logits


class Taken:
    """Keeps the arguments of every call."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, count: int) -> None:
        self.calls.append(count)


@pytest.fixture(scope="module")
def spun(precise: Any, copied: Any, samples: list[Sample]) -> tuple[Any, SpinReport, Taken]:
    """A float64 copy after a few steps."""
    adapter, taken = copied(precise), Taken()
    return adapter, spin(adapter, samples, SHORT, ACTIVATION, BITS, taken), taken


# ------------------------------------------------------------------------- the written network


def test_logits_do_not_move(precise: Any, spun: Any, mixed: Any) -> None:
    before, after = logits(precise, mixed), logits(spun[0], mixed)
    assert largest_relative_change(before, after) <= TOLERANCE


def test_rotations_are_orthogonal_and_learned(precise: Any, spun: Any, copied: Any) -> None:
    adapter, report, _ = spun
    assert report.learning.orthogonality_error <= TOLERANCE
    fixed = copied(precise)
    plain = rotate(fixed.residual_stream(), TransformConfig(name="rotate", seed=SHORT.seed))
    assert (report.untied, report.seed, report.r4) == (plain.untied, plain.seed, plain.r4)
    learned, start = adapter.residual_stream(), fixed.residual_stream()
    moved = learned.lm_head.weight - start.lm_head.weight
    assert float(moved.abs().max()) > 1e-3  # R1
    moved = learned.layers[1].v.bias - start.layers[1].v.bias
    assert float(moved.abs().max()) > 1e-3  # R2
    for layer in learned.layers:
        assert isinstance(layer.block.linear("mlp.down_proj"), RotatedInputLinear)


def test_what_learning_saw_is_what_was_written(spun: Any, samples: list[Sample]) -> None:
    """The loss of the rotated weights, rounded where the engine rounds, is the reported one."""
    adapter, report, _ = spun
    stream, quantizer = adapter.residual_stream(), learning_quantizer(ACTIVATION, BITS)
    hooks = []
    for layer in stream.layers:
        down = layer.block.linear("mlp.down_proj")
        read = (layer.q, layer.k, layer.v, layer.o, layer.gate, layer.up, down.linear)
        for linear in read:
            hooks.append(
                linear.register_forward_pre_hook(lambda _module, args: (quantizer(args[0]),))
            )
    with torch.no_grad():
        found = float(answer_loss(adapter, stream, make_lesson(adapter, samples)))
    for hook in hooks:
        hook.remove()
    assert found == pytest.approx(report.learning.loss_after, rel=1e-6)
    with torch.no_grad():
        unrounded = float(answer_loss(adapter, stream, make_lesson(adapter, samples)))
    assert found != pytest.approx(unrounded, rel=1e-3)


def test_without_steps_it_is_rotate(precise: Any, copied: Any, samples: list[Sample]) -> None:
    adapter, fixed = copied(precise), copied(precise)
    settings = SpinSettings(steps=0, seed=4)
    report = spin(adapter, samples, settings, ActivationConfig(), 16)
    plain = rotate(fixed.residual_stream(), TransformConfig(name="rotate", seed=4))
    assert report.learning is None
    assert (report.r1, report.r2, report.r4) == (plain.r1, plain.r2, plain.r4)
    now, then = dict(adapter.model.named_parameters()), dict(fixed.model.named_parameters())
    assert now.keys() == then.keys()
    assert all(torch.equal(now[name], then[name]) for name in now)


@pytest.mark.parametrize("chosen", [("r1",), ("r2",), ("r2", "r4")], ids="+".join)
def test_rotations_can_be_chosen(
    precise: Any, copied: Any, samples: list[Sample], mixed: Any, chosen: tuple[str, ...]
) -> None:
    adapter = copied(precise)
    switches = {name: name in chosen for name in ("r1", "r2", "r4")}
    settings = SpinSettings(steps=1, batch_size=2, **switches)
    report = spin(adapter, samples[:2], settings, ACTIVATION, BITS)
    assert {name for name in switches if getattr(report, name)} == set(chosen)
    assert largest_relative_change(logits(precise, mixed), logits(adapter, mixed)) <= TOLERANCE
    same = torch.equal(
        adapter.residual_stream().embedding.weight, precise.residual_stream().embedding.weight
    )
    assert same == ("r1" not in chosen)


# ------------------------------------------------------------------------- learning


def test_the_loss_goes_down(copied: Any, omni: Any, calibration: Calibration) -> None:
    adapter = copied(omni)
    settings = SpinSettings(steps=8, batch_size=3, seed=0)
    report = spin(adapter, calibration.samples[:6], settings, ACTIVATION, BITS)
    learning = report.learning
    assert learning is not None
    assert learning.loss_after < learning.loss_before
    assert len(learning.losses) == learning.steps == 8
    assert all(loss > 0 for loss in learning.losses)
    assert learning.drift < 1e-2


def test_one_seed_one_result(copied: Any, omni: Any, samples: list[Sample]) -> None:
    def run(seed: int) -> tuple[torch.Tensor, tuple[float, ...]]:
        adapter = copied(omni)
        settings = SpinSettings(steps=3, batch_size=2, seed=seed)
        report = spin(adapter, samples, settings, ACTIVATION, BITS)
        assert report.learning is not None
        return adapter.residual_stream().lm_head.weight, report.learning.losses

    first, again, other = run(0), run(0), run(1)
    assert torch.equal(first[0], again[0])
    assert first[1] == again[1]
    assert not torch.equal(first[0], other[0])


def test_every_round_takes_every_lesson_once(copied: Any, omni: Any, samples: list[Sample]) -> None:
    """At rate zero a step's loss is its lesson's: it tells which lesson was taken."""
    settings = SpinSettings(steps=12, batch_size=1, learning_rate=0.0)
    learning = spin(copied(omni), samples, settings, ACTIVATION, BITS).learning
    assert learning is not None
    rounds = [learning.losses[i : i + 4] for i in (0, 4, 8)]
    assert len(set(rounds[0])) == 4
    for taken in rounds:
        assert sorted(taken) == pytest.approx(sorted(rounds[0]), rel=1e-5)
        assert sum(taken) / 4 == pytest.approx(learning.loss_before, rel=1e-5)
    assert any(taken != pytest.approx(rounds[0], rel=1e-5) for taken in rounds[1:])
    assert learning.loss_after == pytest.approx(learning.loss_before, rel=1e-5)


def test_progress_is_told_of_every_step(spun: Any) -> None:
    assert spun[2].calls == [1] * SHORT.steps


# ------------------------------------------------------------------------- rotated bases


class Exactly(nn.Module):
    """A quantizer that rounds nothing."""

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        return x


def state(adapter: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in adapter.model.state_dict().items()}


def hooks(adapter: Any) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks)
        for module in adapter.model.modules()
    )


@pytest.mark.parametrize("chosen", ["r1", "r2", "r4"])
def test_a_rotated_basis_alone_changes_nothing(precise: Any, mixed: Any, chosen: str) -> None:
    stream = precise.residual_stream()
    switches = {name: name == chosen for name in ("r1", "r2", "r4")}
    rotations = Rotations.at_start(stream, SpinSettings(**switches))
    before, kept = logits(precise, mixed), state(precise)
    with rounded_inputs(stream, rotations, Exactly()):
        assert largest_relative_change(before, logits(precise, mixed)) <= TOLERANCE
    with rounded_inputs(stream, rotations, learning_quantizer(ACTIVATION, BITS)):
        assert largest_relative_change(before, logits(precise, mixed)) > 1e-2
    now = state(precise)
    assert all(torch.equal(kept[name], now[name]) for name in kept)


def test_a_failure_leaves_the_network_as_it_was(
    copied: Any, omni: Any, samples: list[Sample]
) -> None:
    adapter = copied(omni)
    adapter.model.lm_head.weight.data[0, 0] = torch.nan
    kept, before = state(adapter), hooks(adapter)
    with pytest.raises(ActivationError, match="step 0"):
        spin(adapter, samples, SHORT, ACTIVATION, BITS)
    assert hooks(adapter) == before
    now = state(adapter)
    assert all(torch.equal(kept[name].nan_to_num(), now[name].nan_to_num()) for name in kept)


# ------------------------------------------------------------------------- lessons


def answered(sample: Sample, answer: str) -> Sample:
    return Sample(sample.id, sample.messages, answer, sample.modality)


def test_lessons_end_with_the_answers(omni: Any, samples: list[Sample]) -> None:
    answers = ["B", "a red circle", "C. autumn", "7"]
    given = [answered(*pair) for pair in zip(samples, answers, strict=True)]
    lesson = make_lesson(omni, given)
    prompt = omni.encode([sample.messages for sample in given])
    width = prompt["input_ids"].shape[1]
    assert torch.equal(lesson.inputs["input_ids"][:, :width], prompt["input_ids"])
    for row, mask, ids, answer in zip(
        lesson.targets,
        lesson.inputs["attention_mask"][:, width:],
        lesson.inputs["input_ids"][:, width:],
        answers,
        strict=True,
    ):
        real = row != IGNORED
        assert omni.processor.tokenizer.decode(row[real]) == answer
        assert torch.equal(real, mask.bool())
        assert torch.equal(ids[real], row[real])
    assert lesson.tokens == int((lesson.targets != IGNORED).sum()) > 4


def test_the_loss_does_not_depend_on_padding(precise: Any, samples: list[Sample]) -> None:
    """A batch of answers of unequal length is the mean of its tokens, one sample at a time."""
    stream = precise.residual_stream()
    answers = ["B", "a red circle", "C. autumn", "7"]
    given = [answered(*pair) for pair in zip(samples, answers, strict=True)]
    with torch.no_grad():
        together = make_lesson(precise, given)
        loss = float(answer_loss(precise, stream, together))
        total = 0.0
        for sample in given:
            lesson = make_lesson(precise, [sample])
            total += float(answer_loss(precise, stream, lesson)) * lesson.tokens
    assert loss == pytest.approx(total / together.tokens, rel=1e-5)


def test_the_loss_is_of_the_answer_alone(omni: Any, samples: list[Sample]) -> None:
    lesson = make_lesson(omni, [answered(samples[1], "a red circle")])
    with torch.no_grad():
        found = answer_loss(omni, omni.residual_stream(), lesson)
        everything = omni.model(**lesson.inputs, use_cache=False).logits[0]
    first = everything.shape[0] - lesson.tokens
    expected = F.cross_entropy(everything[first - 1 : -1], lesson.inputs["input_ids"][0, first:])
    torch.testing.assert_close(found, expected)


# ------------------------------------------------------------------------- refusals


def test_quantizer_of_the_learning_phase() -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    grouped = ActivationConfig(format="int", granularity="per_group", group_size=16)
    expected = fake_quantize_activation(x, 4, "per_group", 16)
    assert torch.equal(learning_quantizer(grouped, 4)(x), expected)
    static = ActivationConfig(
        format="int", granularity="per_channel", mode="static", symmetric=False
    )
    expected = fake_quantize_activation(x, 4, "per_token", symmetric=False)
    assert torch.equal(learning_quantizer(static, 4)(x), expected)


def test_what_cannot_be_learned_is_refused(copied: Any, omni: Any, samples: list[Sample]) -> None:
    adapter = copied(omni)
    kept = state(adapter)
    refused: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (ValueError, "16 bits", lambda: spin(adapter, samples, SHORT, ACTIVATION, 16)),
        (ValueError, "'none'", lambda: spin(adapter, samples, SHORT, ActivationConfig(), 4)),
        (CalibrationError, "answers", lambda: spin(adapter, [], SHORT, ACTIVATION, 4)),
        (
            CalibrationError,
            "answers",
            lambda: spin(adapter, [answered(samples[0], "")], SHORT, ACTIVATION, 4),
        ),
    ]
    for error, words, attempt in refused:
        with pytest.raises(error, match=words):
            attempt()
    now = state(adapter)
    assert all(torch.equal(kept[name], now[name]) for name in kept)
    rotated = copy.copy(adapter)
    rotate(rotated.residual_stream(), TransformConfig(name="rotate"))
    with pytest.raises(ValueError, match="rotated already"):
        spin(rotated, samples, SHORT, ACTIVATION, 4)
