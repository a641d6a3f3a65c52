"""How much a media token counts against an answer token: gradients of the answer (SPEC 4.7).

MBQ (arXiv 2412.19509) weighs the error of a vision token by how much more, or less, the loss of
the answer depends on it than on an answer token. At the outputs of the attention and the MLP of
every layer, with the mean magnitude g of the loss' gradient over the tokens of a kind::

    r_l = g_kind / g_answer,    R_l = max(r_l, median over layers of r)

The median matters: behind the last attention no media token is read any more, and r is zero.

Weights are frozen and the backward pass goes block by block over stored hidden states, so memory
is one block's graph and one hidden state per layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from torch.nn import functional as F

from morphoquant.calibration.readers import Sample
from morphoquant.calibration.samples import CalibrationError
from morphoquant.calibration.walk import Segment, enter, run_block
from morphoquant.models.adapter import Batch, OmniAdapter
from morphoquant.models.structure import DecoderLayer, Modality
from morphoquant.quantization.transforms.smooth_settings import LayerBalance

KINDS: dict[str, tuple[Modality, ...]] = {
    "vision": (Modality.IMAGE, Modality.VIDEO),
    "audio": (Modality.AUDIO,),
}
PARTS = ("attn", "mlp")


def with_answers(adapter: OmniAdapter, samples: Sequence[Sample]) -> tuple[Batch, torch.Tensor]:
    """Prompts with their answers behind them, as the model would have written them.

    The answer is tokenized by itself, ends with the token that ends a turn, and follows the
    tokens of the prompt (which end where the model's turn begins).

    Returns:
        The batch, left-padded, and a bool tensor [batch, tokens] that marks the answers.

    Raises:
        MediaError: a picture, clip or sound that cannot be decoded.
    """
    tokenizer = adapter.processor.tokenizer
    batch = dict(adapter.encode([sample.messages for sample in samples]))
    rows, marks = [], []
    for sample, ids, mask in zip(samples, batch["input_ids"], batch["attention_mask"], strict=True):
        written = tokenizer(sample.answer, add_special_tokens=False)["input_ids"]
        answer = ids.new_tensor([*written, tokenizer.eos_token_id])
        rows.append(torch.cat([ids[mask.bool()], answer]))
        marks.append(len(answer))
    longest = max(len(row) for row in rows)
    batch["input_ids"] = torch.stack(
        [F.pad(row, (longest - len(row), 0), value=tokenizer.pad_token_id) for row in rows]
    )
    place = torch.arange(longest, device=batch["input_ids"].device)
    lengths = place.new_tensor([len(row) for row in rows])
    batch["attention_mask"] = (place >= longest - lengths[:, None]).to(rows[0].dtype)
    return batch, place >= longest - place.new_tensor(marks)[:, None]


def counted_kinds(labels: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Modality labels [...] in which text other than the answer is none (-1), as padding is."""
    prompt = (labels == int(Modality.TEXT)) & ~answers
    return labels.masked_fill(prompt, int(Modality.PADDING))


@dataclass
class GradientBalance:
    """Sums of the ratio's two sides over samples, per layer, part and kind of media.

    Both sides of a kind are taken from the samples that hold it.

    Attributes:
        media, answer: ``[layer][part, kind]`` -> sum over samples of mean |dL/dY|.
    """

    media: list[dict[tuple[str, str], float]] = field(default_factory=list)
    answer: list[dict[tuple[str, str], float]] = field(default_factory=list)

    def add(self, layer: int, part: str, gradient: torch.Tensor, kinds: torch.Tensor) -> None:
        """Count one sample: gradient [1, tokens, channels], labels of ``counted_kinds``."""
        while len(self.media) <= layer:
            self.media.append({})
            self.answer.append({})
        size = gradient.abs().mean(-1, dtype=torch.float64)
        kinds = kinds.to(size.device)
        own = float(size[kinds == int(Modality.TEXT)].mean())
        for kind, members in KINDS.items():
            chosen = torch.isin(kinds, kinds.new_tensor([int(m) for m in members]))
            if not bool(chosen.any()):
                continue
            at = (part, kind)
            found = float(size[chosen].mean())
            self.media[layer][at] = self.media[layer].get(at, 0.0) + found
            self.answer[layer][at] = self.answer[layer].get(at, 0.0) + own

    def ratios(self, part: str, kind: str) -> list[float]:
        """``r_l`` of every layer; empty where no sample holds the kind.

        Raises:
            CalibrationError: the loss does not depend on the answer's own tokens.
        """
        found = []
        for media, answer in zip(self.media, self.answer, strict=True):
            if (part, kind) not in media:
                return []
            if not answer[part, kind] > 0 or not media[part, kind] < float("inf"):
                raise CalibrationError(
                    "gradients of the answers vanish or overflow; use model.dtype=bfloat16 or "
                    "float32 to balance modalities"
                )
            found.append(media[part, kind] / answer[part, kind])
        return found

    def result(self, names: Sequence[str]) -> tuple[LayerBalance, ...]:
        """``R_l`` of every layer, under the layers' ``names``.

        Raises:
            CalibrationError: see :meth:`ratios`.
        """
        weights: list[dict[str, dict[str, float]]] = [{p: {} for p in PARTS} for _ in names]
        for part in PARTS:
            for kind in KINDS:
                found = self.ratios(part, kind)
                for row, ratio in zip(weights, found, strict=False):
                    row[part][kind] = max(ratio, median(found))
        return tuple(
            LayerBalance(name, row["attn"], row["mlp"])
            for name, row in zip(names, weights, strict=True)
        )


def _block_gradients(
    layer: DecoderLayer, index: int, segment: Segment, gradient: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Gradients at the outputs of o and of down, and at the block's input.

    Args:
        layer: the block.
        index: its number.
        segment: hidden states in front of it, [1, tokens, channels].
        gradient: of the loss at its output, same shape.
    """
    caught: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda _m, _i, out, name=name: caught.update({name: out}))
        for name, module in (("attn", layer.o), ("mlp", layer.down))
    ]
    try:
        with torch.enable_grad():
            segment.hidden = segment.hidden.detach().requires_grad_()
            out = run_block(layer.block, index, segment)
            return torch.autograd.grad(
                out, [caught["attn"], caught["mlp"], segment.hidden], gradient
            )
    finally:
        for hook in hooks:
            hook.remove()


def gradient_balance(adapter: OmniAdapter, samples: Sequence[Sample]) -> GradientBalance:
    """One backward pass of the answer's mean cross entropy per sample.

    Args:
        adapter: the model, unquantized; unchanged.
        samples: prompts with answers.

    Raises:
        MediaError: a picture, clip or sound that cannot be decoded.
    """
    stream, found = adapter.residual_stream(), GradientBalance()
    for sample in samples:
        batch, answers = with_answers(adapter, [sample])
        with torch.no_grad():
            segment = enter(adapter, "decoder", [batch])[0]
            inputs = []
            for index, layer in enumerate(stream.layers):
                inputs.append(segment.hidden)
                segment.hidden = run_block(layer.block, index, segment)
        kinds = counted_kinds(segment.labels, answers)
        # The token in front of a token predicts it.
        predicting = answers.roll(-1, 1)
        with torch.enable_grad():
            last = segment.hidden.detach().requires_grad_()
            logits = stream.lm_head(stream.final_norm(last[predicting.to(last.device)]))
            exact = torch.promote_types(logits.dtype, torch.float32)
            targets = batch["input_ids"][answers].to(logits.device)
            loss = F.cross_entropy(logits.to(exact), targets)
            (gradient,) = torch.autograd.grad(loss, last)
        for index, layer in reversed(list(enumerate(stream.layers))):
            segment.hidden = inputs.pop()
            attn, mlp, gradient = _block_gradients(layer, index, segment, gradient)
            found.add(index, "attn", attn, kinds)
            found.add(index, "mlp", mlp, kinds)
    return found
