"""Which choices go with scales and branches per modality (SPEC 4.13)."""

from __future__ import annotations

from collections.abc import Iterator

from morphoquant.config.schema import RunConfig


def by_modality(cfg: RunConfig) -> Iterator[str]:
    """Broken rules: which fields clash, why, and what to set instead."""
    if cfg.method.transform.name == "modality_smooth":
        yield from _smoothing(cfg)
    compensation = cfg.method.compensation
    if compensation.name == "low_rank" and compensation.per_modality:
        if compensation.order == "before":
            yield (
                "method.compensation.order='before' with method.compensation.per_modality=true: "
                "one stored weight serves all branches, so none can be taken out of it first. Set "
                "method.compensation.order=after, or per_modality=false."
            )
        if not compensation.groups:
            yield (
                "method.compensation.groups=[] with method.compensation.per_modality=true: no "
                "linear would get a branch. Set method.compensation.groups=[attn_in,mlp_in], or "
                "method/compensation=none."
            )


def _smoothing(cfg: RunConfig) -> Iterator[str]:
    transform, compensation, bits = cfg.method.transform, cfg.method.compensation, cfg.bits
    where = "method.transform.name='modality_smooth'"
    rounds = cfg.method.weight.format != "none" and bits.weight < 16
    branches = compensation.name == "low_rank" and compensation.per_modality
    if rounds and not branches:
        yield (
            f"{where} with method.compensation.name={compensation.name!r}, per_modality="
            f"{compensation.per_modality}: the one rounded weight is smoothed for text, so tokens "
            "of other modalities would go through another function. Set method/compensation="
            "low_rank_per_modality, or method/transform=smooth."
        )
    elif compensation.name not in ("none", "low_rank"):
        yield (
            f"{where} with method.compensation.name={compensation.name!r}: its masks belong to "
            "channels, whose scale would differ from token to token. Set method/compensation=none, "
            "or method/transform=smooth."
        )
    missing = sorted(set(transform.groups) - set(compensation.groups))
    if rounds and branches and missing:
        yield (
            f"{where} with method.transform.groups={list(transform.groups)}, method.compensation."
            f"groups={list(compensation.groups)}: {', '.join(missing)} would be smoothed per "
            "modality with no branch to make up for it. Name it in method.compensation.groups, or "
            "leave it out of method.transform.groups."
        )
    if rounds and branches and compensation.joint_vision and not transform.joint_vision:
        yield (
            "method.transform.joint_vision=false with method.compensation.joint_vision=true: one "
            "branch cannot make up for two scales. Set method.compensation.joint_vision=false."
        )
    rounds_activations = cfg.method.activation.format != "none" and bits.activation < 16
    if transform.steps > 0 and not (rounds or rounds_activations):
        yield (
            f"{where}, steps={transform.steps} where neither weights nor activations are rounded: "
            "every scale would do. Set bits=w4a4 (or w4a16), or method.transform.steps=0."
        )
    if transform.search or transform.balance != "none":
        yield (
            f"{where} with method.transform.search={transform.search}, balance="
            f"{transform.balance!r}: scales of every modality are learned by themselves, there is "
            "no exponent to share. Set search=false and balance=none, or method/transform="
            "smooth_searched."
        )
    if not transform.groups:
        yield (
            f"{where} with method.transform.groups=[]: nothing would be smoothed. Set "
            "method.transform.groups=[attn_in,mlp_in]."
        )
