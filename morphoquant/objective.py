"""What hyper-parameters are chosen by: a number that no benchmark question has touched.

The divergence is of the distribution of the next token, on calibration prompts that neither the
statistics nor the range search have seen, between the original model and the quantized one:
KL(p || q) = sum_v p_v (log p_v - log q_v), the mean over prompts, in nats. It is what GPTQ's and
llama.cpp's comparisons call the KL divergence of a quantized model, restricted to the position that
answers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from morphoquant.config.schema import RunConfig

if TYPE_CHECKING:
    import torch

    from morphoquant.calibration.samples import Calibration
    from morphoquant.models.adapter import Batch, OmniAdapter

DIRECTION = {"kl": "minimize", "held_out_accuracy": "maximize"}
"""Objective -> what an optimiser has to do with it."""


class HeldOut:
    """Held-out prompts, and what the unquantized model says to them.

    Made before anything is changed, asked again when everything is.
    """

    def __init__(self, adapter: OmniAdapter, calibration: Calibration, batch_size: int) -> None:
        from morphoquant.calibration.samples import batches

        self._groups = batches(calibration.held_out, batch_size)
        self._encoded: list[Batch] = [
            adapter.encode([sample.messages for sample in group]) for group in self._groups
        ]
        self._before = [adapter.logits(batch).cpu() for batch in self._encoded]

    def measure(self, adapter: OmniAdapter) -> dict[str, Any] | None:
        """``samples``, ``kl`` and ``top1_agreement``, over all and by modality; None without any.

        ``kl/<modality>`` in nats; agreement of the most likely token as a share.
        """
        if not self._groups:
            return None
        divergences: dict[str, list[float]] = {}
        agreements: dict[str, list[float]] = {}
        pairs = zip(self._groups, self._encoded, self._before, strict=True)
        for group, batch, before in pairs:
            after = adapter.logits(batch).cpu()
            kl, agree = divergence(before, after)
            for sample, one, same in zip(group, kl.tolist(), agree.tolist(), strict=True):
                for name in ("", f"/{sample.modality}"):
                    divergences.setdefault(name, []).append(one)
                    agreements.setdefault(name, []).append(float(same))
        found: dict[str, Any] = {"samples": len(divergences[""])}
        for name in sorted(divergences):
            found[f"kl{name}"] = sum(divergences[name]) / len(divergences[name])
            found[f"top1_agreement{name}"] = sum(agreements[name]) / len(agreements[name])
        return found


def divergence(before: torch.Tensor, after: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(before || after) in nats, and whether the best token is the same.

    Args:
        before: logits [prompts, vocabulary].
        after: the same shape.

    Returns:
        Two tensors [prompts]; float64 and bool.
    """
    p, q = before.double().log_softmax(-1), after.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1), before.argmax(-1) == after.argmax(-1)


def value(config: RunConfig, result: dict[str, Any]) -> float | None:
    """The objective of a finished run; None where the config names none."""
    if config.objective is None:
        return None
    if config.objective == "kl":
        return float(result["held_out"]["kl"])
    return float(result["mean"])
