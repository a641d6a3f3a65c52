"""Learned rotations of the network (SpinQuant, arXiv 2405.16406; SPEC 4.6).

The rotations are those of :mod:`morphoquant.quantization.transforms.rotate`, but R1 and one R2 per
layer are learned: from Hadamard matrices on, gradient descent over orthogonal matrices lowers the
cross entropy of the answers while activations are rounded (straight-through) and weights are not.
R4 stays a Hadamard matrix. Prompts are of all modalities; the loss is taken on the answer's own
tokens, not on the end of the turn: a model may well go on ("C. autumn") after the right letter.

No rotated weights exist while learning. A linear W that reads a rounded, rotated input computes
``Q(x R) (W R)^T = (Q(x R) R^T) W^T``, and the rotations of the residual stream cancel everywhere
else. So the original network runs, and only the input of every group is rotated, rounded and
rotated back: two products of tokens by width^2, instead of one with every weight. The learned
matrices are then written into the weights as ``rotate`` writes its own: in float64, once.

Inputs are rounded dynamically while learning, also for methods with static ranges: a static range
is a property of the rotated activation, which does not exist yet.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, cast

import torch
from torch import nn
from torch.nn import functional as F

from morphoquant.calibration.readers import Sample
from morphoquant.calibration.samples import CalibrationError
from morphoquant.config.schema import ActivationConfig, TransformConfig
from morphoquant.errors import ActivationError
from morphoquant.models.adapter import Batch, OmniAdapter
from morphoquant.models.structure import ResidualStream
from morphoquant.quantization.activation import DynamicQuantizer, dynamic_quantizer
from morphoquant.quantization.hadamard import HadamardTransform
from morphoquant.quantization.transforms.cayley import LearnedRotation, cosine_rate
from morphoquant.quantization.transforms.rotate import (
    RotationReport,
    _ResidualRotation,
    _rotate_residual,
    _rotate_values,
    _untie,
    rotate,
)

IGNORED = -100  # target of positions behind a short answer


@dataclass(frozen=True)
class SpinSettings:
    """How rotations are learned.

    Attributes:
        r1, r2, r4: which rotations there are; R4 is never learned.
        block_diagonal: start from (and for R4 use) blocks of the largest power of two where a
            width has no known Hadamard matrix.
        seed: of R1's signs, of the batches and of their order.
        steps: gradient steps, one batch each; 0 leaves everything as ``rotate`` does it.
        learning_rate: of the first step; it falls to zero as half a cosine.
        batch_size: samples per step, of all modalities together.
        iterations: rounds of the fixed-point iteration in a Cayley step.
        project_every: steps between re-orthonormalizations.
    """

    r1: bool = True
    r2: bool = True
    r4: bool = True
    block_diagonal: bool = False
    seed: int = 0
    steps: int = 100
    learning_rate: float = 1.5
    batch_size: int = 8
    iterations: int = 5
    project_every: int = 5

    @property
    def learns(self) -> bool:
        return self.steps > 0 and (self.r1 or self.r2)

    def fixed(self, learned: bool) -> TransformConfig:
        """What ``rotate`` is asked for: everything, or all but what was ``learned`` instead."""
        return TransformConfig(
            name="rotate",
            r1=self.r1 and not learned,
            r2=self.r2 and not learned,
            r4=self.r4,
            block_diagonal=self.block_diagonal,
            seed=self.seed,
        )


@dataclass(frozen=True)
class Learning:
    """How the learning of rotations went.

    Attributes:
        loss_before, loss_after: mean cross entropy (nats) of the answer tokens of all samples with
            rounded activations, at the Hadamard start and at the learned rotations.
        losses: of the batch of every step, before the step.
        orthogonality_error: max |R^T R - I| over the learned matrices as they are written.
        drift: the same, the largest that was met before a re-orthonormalization.
        steps: taken.
        seconds: spent, with both measurements of the loss.
    """

    loss_before: float
    loss_after: float
    losses: tuple[float, ...]
    orthogonality_error: float
    drift: float
    steps: int
    seconds: float


@dataclass(frozen=True)
class SpinReport(RotationReport):
    """What :func:`spin` did; ``learning`` is None where nothing was to be learned."""

    learning: Learning | None


Rotation: TypeAlias = LearnedRotation | HadamardTransform


@dataclass(frozen=True)
class Rotations:
    """Those of a whole decoder; None (or no R2 at all) where one is off.

    Attributes:
        r1, r2, r4: of the residual stream; of the values, by layer; of the down projections.
    """

    r1: LearnedRotation | None
    r2: tuple[LearnedRotation, ...]
    r4: HadamardTransform | None

    @property
    def learned(self) -> tuple[LearnedRotation, ...]:
        return self.r2 if self.r1 is None else (self.r1, *self.r2)

    @classmethod
    def at_start(cls, stream: ResidualStream, settings: SpinSettings) -> Rotations:
        """The Hadamard matrices of ``rotate``.

        Raises:
            ValueError: a width has no known Hadamard matrix.
        """
        device, blocks = stream.embedding.weight.device, settings.block_diagonal

        def dense(rotation: Callable[[torch.Tensor], torch.Tensor], n: int) -> LearnedRotation:
            return LearnedRotation(rotation(torch.eye(n, dtype=torch.float64)).to(device))

        hidden, head = stream.hidden_size, stream.head_dim
        signed = _ResidualRotation(hidden, settings.seed, blocks) if settings.r1 else None
        values = HadamardTransform(head, blocks) if settings.r2 else None
        return cls(
            r1=None if signed is None else dense(signed, hidden),
            r2=() if values is None else tuple(dense(values, head) for _ in stream.layers),
            r4=HadamardTransform(stream.intermediate_size, blocks) if settings.r4 else None,
        )


def learning_quantizer(activation: ActivationConfig, bits: int) -> nn.Module:
    """The quantizer of the learning phase: as configured if dynamic, else one range per token.

    Raises:
        ValueError: activations are not quantized, so no rotation is better than another; or with
            NVFP4, whose scale per tensor is a property of the rotated activation.
    """
    if activation.format in ("none", "nvfp4") or bits >= 16:
        raise ValueError(
            f"rotations are learned for rounded activations, which method.activation.format="
            f"{activation.format!r} at {bits} bits does not offer; take steps=0, or rotate"
        )
    if activation.mode == "dynamic":
        return dynamic_quantizer(activation, bits)
    return DynamicQuantizer(bits, activation.symmetric, 1.0, None, activation.grid)


def round_rotated(x: torch.Tensor, rotation: Rotation | None, quantizer: nn.Module) -> torch.Tensor:
    """``Q(x R) R^T``: [..., blocks * n] -> the same shape and dtype, every block rotated by R.

    The quantizer sees whole rows; gradients pass it unchanged.
    """
    work = x if x.dtype == torch.float64 else x.float()
    if rotation is not None:
        work = rotation(work.unflatten(-1, (-1, rotation.n))).flatten(-2)
    with torch.no_grad():
        error = quantizer(work) - work
    work = work + error
    if rotation is not None:
        work = rotation.inverse(work.unflatten(-1, (-1, rotation.n))).flatten(-2)
    return work.to(x.dtype)


@contextmanager
def rounded_inputs(
    stream: ResidualStream, rotations: Rotations, quantizer: nn.Module
) -> Iterator[None]:
    """Round the input of every decoder group in its rotated basis, for the time being.

    With R1, norm gains belong to the weights (that is where ``rotate`` puts them): the norms run
    without, and the gain comes after the rounding.
    """

    def behind_norm(gain: torch.Tensor | float) -> Callable[..., torch.Tensor]:
        return lambda _module, _args, out: round_rotated(out, rotations.r1, quantizer) * gain

    def before_linear(rotation: Rotation | None) -> Callable[..., torch.Tensor]:
        return lambda _module, args: round_rotated(args[0], rotation, quantizer)

    with ExitStack() as undo:
        for i, layer in enumerate(stream.layers):
            for norm in (layer.input_norm, layer.post_norm):
                gain: torch.Tensor | float = 1.0
                if rotations.r1 is not None:
                    weight = cast("nn.Parameter", norm.weight)
                    gain = weight.data
                    weight.data = torch.ones_like(gain)
                    undo.callback(setattr, weight, "data", gain)
                undo.callback(norm.register_forward_hook(behind_norm(gain)).remove)
            r2 = rotations.r2[i] if rotations.r2 else None
            for linear, rotation in ((layer.o, r2), (layer.down, rotations.r4)):
                undo.callback(linear.register_forward_pre_hook(before_linear(rotation)).remove)
        yield


@dataclass(frozen=True)
class Lesson:
    """Prompts with their answers behind them.

    Attributes:
        inputs: model inputs; prompts are padded on the left, answers on the right.
        targets: int64 [batch, longest answer], :data:`IGNORED` behind a short one.
    """

    inputs: Batch
    targets: torch.Tensor

    @property
    def tokens(self) -> int:
        """How many the loss is taken on."""
        return int((self.targets != IGNORED).sum())


def make_lesson(adapter: OmniAdapter, samples: Sequence[Sample]) -> Lesson:
    """Teacher forcing: the answer's tokens follow the encoded prompt.

    They are what the model would have to generate token by token, so they are appended as tokens
    and not as text, which could merge with the prompt.
    """
    tokenizer = adapter.processor.tokenizer
    inputs = adapter.encode([sample.messages for sample in samples])
    answers = [tokenizer(s.answer, add_special_tokens=False)["input_ids"] for s in samples]
    width = max(map(len, answers))
    targets = torch.tensor([ids + [IGNORED] * (width - len(ids)) for ids in answers])
    targets = targets.to(inputs["input_ids"].device)
    given = targets != IGNORED
    appended = torch.where(given, targets, tokenizer.pad_token_id)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], appended], dim=1)
    mask = inputs["attention_mask"]
    inputs["attention_mask"] = torch.cat([mask, given.to(mask)], dim=1)
    return Lesson(inputs, targets)


def make_lessons(
    adapter: OmniAdapter, samples: Sequence[Sample], size: int, seed: int
) -> list[Lesson]:
    """All samples with an answer in seeded, mixed batches of at most ``size``.

    Raises:
        CalibrationError: there are none.
    """
    order = [sample for sample in samples if sample.answer]
    if not order:
        raise CalibrationError("rotations are learned from answers, and no sample has one")
    random.Random(seed).shuffle(order)
    return [make_lesson(adapter, order[i : i + size]) for i in range(0, len(order), size)]


def answer_loss(adapter: OmniAdapter, stream: ResidualStream, lesson: Lesson) -> torch.Tensor:
    """Mean cross entropy (nats) of a lesson's answer tokens: a scalar."""
    kept = lesson.targets.shape[1] + 1
    # The vocabulary is wide: logits of the prompt, which nobody reads, are not computed.
    hook = stream.lm_head.register_forward_pre_hook(lambda _module, args: args[0][:, -kept:])
    try:
        logits = adapter.model(**lesson.inputs, use_cache=False).logits[:, :-1]
    finally:
        hook.remove()
    return F.cross_entropy(
        logits.flatten(0, 1).float(), lesson.targets.flatten(), ignore_index=IGNORED
    )


@torch.no_grad()
def _mean_loss(adapter: OmniAdapter, stream: ResidualStream, lessons: Sequence[Lesson]) -> float:
    total = sum(float(answer_loss(adapter, stream, lesson)) * lesson.tokens for lesson in lessons)
    return total / sum(lesson.tokens for lesson in lessons)


def _learn(
    adapter: OmniAdapter,
    stream: ResidualStream,
    rotations: Rotations,
    lessons: Sequence[Lesson],
    settings: SpinSettings,
    progress: Callable[[int], object] | None,
) -> Learning:
    """Gradient steps on all rotations; every round takes each lesson once, in another order."""
    started, order = time.perf_counter(), random.Random(settings.seed)
    before, drift = _mean_loss(adapter, stream, lessons), 0.0
    losses: list[float] = []
    waiting: list[Lesson] = []
    for step in range(settings.steps):
        waiting = waiting or order.sample(lessons, len(lessons))
        loss = answer_loss(adapter, stream, waiting.pop())
        if not torch.isfinite(loss):
            raise ActivationError(
                f"a NaN or infinite loss at step {step} of learning rotations; check the samples"
            )
        loss.backward()
        losses.append(float(loss.detach()))
        rate = cosine_rate(settings.learning_rate, step, settings.steps)
        due = (step + 1) % settings.project_every == 0 or step + 1 == settings.steps
        for rotation in rotations.learned:
            rotation.descend(rate, settings.iterations)
            if due:
                drift = max(drift, rotation.project())
        if progress is not None:
            progress(1)
    return Learning(
        loss_before=before,
        loss_after=_mean_loss(adapter, stream, lessons),
        losses=tuple(losses),
        orthogonality_error=max(r.error for r in rotations.learned),
        drift=drift,
        steps=settings.steps,
        seconds=time.perf_counter() - started,
    )


@torch.no_grad()
def _write(stream: ResidualStream, rotations: Rotations, settings: SpinSettings) -> RotationReport:
    """Put the learned matrices, and R4, into the weights."""
    report = rotate(stream, settings.fixed(learned=True), settings.block_diagonal)
    r1 = r2 = None
    untied = False
    if rotations.r1 is not None:
        untied = _untie(stream)
        _rotate_residual(stream, cast("Any", rotations.r1))
        r1 = f"learned {rotations.r1.n} from random-sign hadamard"
    for layer, rotation in zip(stream.layers, rotations.r2, strict=False):
        _rotate_values(layer, cast("Any", rotation))
        r2 = f"learned {rotation.n} from hadamard, one per layer"
    return replace(report, name="spin", r1=r1, r2=r2, untied=untied)


def spin(
    adapter: OmniAdapter,
    samples: Sequence[Sample],
    settings: SpinSettings,
    activation: ActivationConfig,
    bits: int,
    progress: Callable[[int], object] | None = None,
) -> SpinReport:
    """Learn R1 and R2, then rotate the decoder in place; its outputs stay what they were.

    Args:
        adapter: the loaded model. ``mlp.down_proj`` of every layer becomes a
            :class:`~morphoquant.quantization.transforms.rotate.RotatedInputLinear` if R4 is on.
        samples: calibration prompts with their answers.
        settings: what to learn, and how.
        activation, bits: how activations will be rounded (see :func:`learning_quantizer`).
        progress: called with 1 after every step.

    Raises:
        ValueError: a width has no known Hadamard matrix, activations are not quantized, or the
            decoder is rotated already. Nothing has been changed then.
        CalibrationError: no samples.
        ActivationError: the loss became NaN or infinite; the network is as it was.
    """
    stream = adapter.residual_stream()
    if not settings.learns:
        plain = rotate(stream, settings.fixed(learned=False), settings.block_diagonal)
        return SpinReport(**vars(replace(plain, name="spin")), learning=None)
    if any(not isinstance(layer.down, nn.Linear) for layer in stream.layers):
        raise ValueError("the decoder is rotated already: a down_proj is no plain nn.Linear")
    quantizer = learning_quantizer(activation, bits)
    with torch.inference_mode(False), torch.enable_grad():
        rotations = Rotations.at_start(stream, settings)
        lessons = make_lessons(adapter, samples, settings.batch_size, settings.seed)
        with rounded_inputs(stream, rotations, quantizer):
            learning = _learn(adapter, stream, rotations, lessons, settings, progress)
    return SpinReport(**vars(_write(stream, rotations, settings)), learning=learning)
