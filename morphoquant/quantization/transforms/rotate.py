"""Rotation of the network without changing its function (QuaRot, arXiv 2404.00456; SPEC 4.5).

With row vectors, orthogonal R1 = diag(signs) H / sqrt(n), and Hadamard matrices for R2 and R4:

- R1 rotates the residual stream. Whatever writes into it is multiplied by R1 from the right, its
  *bias included* (the projectors of pictures and sound have one); whatever reads from it absorbs
  R1 and the gain of the RMSNorm in between, which then commutes with the rotation. Nothing is
  centred: that step belongs to LayerNorm and would change an RMSNorm model.
- R2 rotates the values of every head, weight and bias, and is undone by the attention output
  projection. All heads share one matrix, so grouped-query attention may repeat values freely.
- R4 rotates the input of the down projection. The gated product before it is no linear map, so
  the activation is rotated while the model runs.

Arithmetic is float64, rounded once to the parameter's own dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from morphoquant.config.schema import TransformConfig
from morphoquant.models.structure import DecoderLayer, ResidualStream
from morphoquant.quantization.hadamard import HadamardTransform
from morphoquant.quantization.transforms.report import TransformReport

CHUNK = 1 << 24  # float64 elements rotated at a time: 128 MiB, whatever the vocabulary
Rewrite = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class RotationReport(TransformReport):
    """What :func:`rotate` did.

    Attributes:
        r1, r2, r4: the matrix that was used, or None where the rotation is off.
        seed: of R1's signs.
        untied: lm_head shared the embedding's storage and was given its own.
    """

    r1: str | None
    r2: str | None
    r4: str | None
    seed: int
    untied: bool


class RotatedInputLinear(nn.Module):
    """A linear whose weight expects a rotated input: ``linear(transform(x))``.

    Attributes:
        linear: the linear, its weight [out, in] already rotated.
        transform: [..., in] -> [..., in], the online rotation.
    """

    def __init__(self, linear: nn.Linear, transform: nn.Module) -> None:
        super().__init__()
        self.linear = linear
        self.transform = transform

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        return self.linear(self.transform(x))

    @contextmanager
    def observe_input(self, show: Callable[[torch.Tensor], None]) -> Iterator[None]:
        """Show the activation behind the rotation, which is what a quantizer will read."""
        handle = self.register_forward_pre_hook(lambda _m, args: show(self.transform(args[0])))
        try:
            yield
        finally:
            handle.remove()


class _ResidualRotation:
    """R1 = diag(signs) H / sqrt(n) applied to rows from the right, optionally after a gain."""

    def __init__(self, n: int, seed: int, block_diagonal: bool) -> None:
        self.hadamard = HadamardTransform(n, block_diagonal)
        generator = torch.Generator().manual_seed(seed)  # on the CPU: the same on every device
        self.signs = 1.0 - 2.0 * torch.randint(0, 2, (n,), generator=generator).double()

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """float64 [..., n] -> rows R1."""
        return self.hadamard(rows * self.signs.to(rows.device))


def _rewrite_rows(tensor: torch.Tensor, rewrite: Rewrite) -> None:
    """Replace the rows of [rows, n] (or the one row [n]) in place, a bounded chunk at a time."""
    rows = tensor.data if tensor.ndim == 2 else tensor.data.unsqueeze(0)
    for part in rows.split(max(1, CHUNK // rows.shape[1])):
        part.copy_(rewrite(part.double()))


def _rewrite_outputs(linear: nn.Linear, rewrite: Rewrite) -> None:
    """Apply ``rewrite`` to what a linear puts out: the columns of its weight, and its bias."""
    _rewrite_rows(linear.weight.data.T, rewrite)
    if linear.bias is not None:
        _rewrite_rows(linear.bias, rewrite)


def _untie(stream: ResidualStream) -> bool:
    """Give lm_head storage of its own: embedding and head change in different ways."""
    head, embedding = stream.lm_head, stream.embedding
    if head.weight.data_ptr() != embedding.weight.data_ptr():
        return False
    head.weight = nn.Parameter(
        head.weight.detach().clone(), requires_grad=head.weight.requires_grad
    )
    return True


def _rotate_residual(stream: ResidualStream, r1: _ResidualRotation) -> None:
    """Steps 0 and 1: norm gains and R1 into consumers, R1 into producers."""
    for norm, linears in stream.consumers():
        gain = norm.weight.detach().double()  # type: ignore[operator, union-attr]
        for linear in linears:
            on = gain.to(linear.weight.device)  # the last norm and lm_head may lie on two GPUs
            _rewrite_rows(linear.weight, lambda w, g=on: r1(w * g))  # type: ignore[misc]
        norm.weight.data.fill_(1.0)  # type: ignore[operator, union-attr]
    for embedding in (stream.embedding, *stream.extra_embeddings):
        _rewrite_rows(embedding.weight, r1)
    for producer in stream.producers():
        _rewrite_outputs(producer, r1)


def _by_head(hadamard: HadamardTransform) -> Rewrite:
    """[..., heads * head_dim] -> the same, every head multiplied by H / sqrt(head_dim)."""

    def rewrite(rows: torch.Tensor) -> torch.Tensor:
        return hadamard(rows.unflatten(-1, (-1, hadamard.n))).flatten(-2)

    return rewrite


def _rotate_values(layer: DecoderLayer, r2: HadamardTransform) -> None:
    """Step 2: values out of v, undone at the inputs of o."""
    rewrite = _by_head(r2)
    _rewrite_outputs(layer.v, rewrite)
    _rewrite_rows(layer.o.weight, rewrite)


def _rotate_down(layer: DecoderLayer, r4: HadamardTransform) -> None:
    """Step 4: the weight of the down projection, and the rotation of its input online."""
    _rewrite_rows(layer.down.weight, r4)
    layer.block.replace("mlp.down_proj", RotatedInputLinear(layer.down, r4))


@torch.no_grad()
def rotate(
    stream: ResidualStream, config: TransformConfig, block_diagonal: bool = False
) -> RotationReport:
    """Rotate a decoder in place; its outputs stay what they were.

    Args:
        stream: the live modules. ``mlp.down_proj`` of every layer becomes a
            :class:`RotatedInputLinear` if R4 is on.
        config: which of R1, R2, R4, and the seed of R1's signs.
        block_diagonal: use blocks of the largest power of two where a width has no known
            Hadamard matrix.

    Raises:
        ValueError: a width has no known Hadamard matrix, or the decoder is rotated already.
            Nothing has been changed then.
    """
    block_diagonal = block_diagonal or config.block_diagonal
    if any(not isinstance(layer.down, nn.Linear) for layer in stream.layers):
        raise ValueError("the decoder is rotated already: a down_proj is no plain nn.Linear")
    r1 = _ResidualRotation(stream.hidden_size, config.seed, block_diagonal) if config.r1 else None
    r2 = HadamardTransform(stream.head_dim, block_diagonal) if config.r2 else None
    r4 = HadamardTransform(stream.intermediate_size, block_diagonal) if config.r4 else None
    untied = False
    if r1 is not None:
        untied = _untie(stream)
        _rotate_residual(stream, r1)
    for layer in stream.layers:
        if r2 is not None:
            _rotate_values(layer, r2)
        if r4 is not None:
            _rotate_down(layer, r4)
    return RotationReport(
        name="rotate",
        r1=None if r1 is None else f"random-sign {r1.hadamard.description}",
        r2=None if r2 is None else r2.description,
        r4=None if r4 is None else r4.description,
        seed=config.seed,
        untied=untied,
    )
