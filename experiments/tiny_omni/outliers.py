"""Engineer modality-specific outlier channels into a trained thinker; its function stays.

A model this small has nearly Gaussian activations after its norms. Large models do not: a few
channels are many times larger than the rest, and not the same ones for every modality. Gains on
norm channels alone would make the *same* channels large for all modalities. So:

1. norm weights are fused into the linears that read them (the head is untied for the final one);
2. the residual stream is rotated so that the directions in which one modality carries much more
   energy than the others (a generalized eigenproblem of their covariances) become single channels,
   four per modality, scattered over the stream;
3. those channels get a gain of 4 in the norms, divided out of the consumers: exact, a power of two.

The unquantized function stays the same up to rounding. Whatever is shown of these outliers has to
call them engineered: smoothing and rotation undo them almost by construction.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import torch

from experiments.tiny_omni.evaluate import encode
from morphoquant.calibration.readers import Sample

MODALITIES = ("text", "image", "audio", "video")
GAIN = 4.0
PER_MODALITY = 4
#: Images and videos share the vision tower, hence directions: neither is held against the other.
RELATED = frozenset(("image", "video"))


def norms(model: Any) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Every norm of the decoder's blocks with the linears that read it."""
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        yield layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)
        yield layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)


def token_modality(model: Any, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Index into :data:`MODALITIES` per token ``[B, L]``; -1 for padding."""
    labels = torch.zeros_like(input_ids)
    config = model.config
    tokens = {"image": config.image_token_id, "audio": config.audio_token_id}
    tokens["video"] = config.video_token_id
    for name, token in tokens.items():
        labels[input_ids == token] = MODALITIES.index(name)
    labels[mask == 0] = -1
    return labels


@torch.no_grad()
def norm_outputs(model: Any, processor: Any, listed: list[Sample]) -> list[dict[str, torch.Tensor]]:
    """Per norm: modality -> its outputs ``[tokens, hidden]`` on the samples' prompts."""
    collected: list[dict[str, list[torch.Tensor]]] = []
    hooks = []
    current: dict[str, torch.Tensor] = {}
    for norm, _ in norms(model):
        store: dict[str, list[torch.Tensor]] = defaultdict(list)
        collected.append(store)

        def keep(_m: Any, _i: Any, output: torch.Tensor, store: Any = store) -> None:
            for index, name in enumerate(MODALITIES):
                store[name].append(output[current["labels"] == index])

        hooks.append(norm.register_forward_hook(keep))
    try:
        for modality in MODALITIES:
            part = [sample for sample in listed if sample.modality == modality]
            for start in range(0, len(part), 32):
                inputs = encode(processor, part[start : start + 32])
                current["labels"] = token_modality(
                    model, inputs["input_ids"], inputs["attention_mask"]
                )
                model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return [{name: torch.cat(values) for name, values in store.items()} for store in collected]


@torch.no_grad()
def fuse_norms(model: Any) -> None:
    """Set all norm weights of the decoder to one; their consumers absorb them."""
    for norm, consumers in norms(model):
        for linear in consumers:
            linear.weight.mul_(norm.weight)
        norm.weight.fill_(1.0)
    final = model.model.norm
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone() * final.weight)
    final.weight.fill_(1.0)
    model.config.tie_word_embeddings = False
    model.config.text_config.tie_word_embeddings = False


@torch.no_grad()
def rotate_residual(model: Any, rotation: torch.Tensor) -> None:
    """h -> h R in the residual stream; R orthogonal ``[hidden, hidden]``, norms already fused."""
    rotation = rotation.double()

    def after(weight: torch.Tensor) -> None:  # reads the stream
        weight.copy_((weight.double() @ rotation).to(weight.dtype))

    def before(weight: torch.Tensor) -> None:  # writes into the stream
        weight.copy_((rotation.T @ weight.double()).to(weight.dtype))

    after(model.model.embed_tokens.weight)
    after(model.lm_head.weight)
    for linear in (model.visual.merger.mlp[2], model.audio_tower.proj):
        before(linear.weight)
        linear.bias.copy_((linear.bias.double() @ rotation).to(linear.bias.dtype))
    after(model.audio_tower.audio_bos_eos_token.weight)
    for layer in model.model.layers:
        before(layer.self_attn.o_proj.weight)
        before(layer.mlp.down_proj.weight)
    for _, consumers in norms(model):
        for linear in consumers:
            after(linear.weight)


def special_directions(outputs: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Unit vectors ``[hidden, 16]``: where each modality has most energy relative to the others.

    ``outputs`` come from norms whose weights are one.
    """
    covariance = {}
    for name in MODALITIES:
        values = torch.cat([store[name] for store in outputs]).double()
        covariance[name] = values.T @ values / len(values)
    found = []
    for name in MODALITIES:
        others = [o for o in MODALITIES if o != name and {o, name} != RELATED]
        rest = torch.stack([covariance[other] for other in others]).mean(0)
        rest = rest + 0.03 * rest.diagonal().mean() * torch.eye(len(rest), dtype=rest.dtype)
        inverse = torch.linalg.inv(torch.linalg.cholesky(rest))
        _, vectors = torch.linalg.eigh(inverse @ covariance[name] @ inverse.T)
        chosen = inverse.T @ vectors.flip(1)[:, :PER_MODALITY]
        found.append(chosen / chosen.norm(dim=0))
    return torch.stack(found, 2).reshape(len(found[0]), -1)  # best of each first


def engineer(model: Any, processor: Any, listed: list[Sample], seed: int = 0) -> list[int]:
    """Rewrite ``model`` (float32) in place; returns the channels that were made large."""
    fuse_norms(model)
    axes = special_directions(norm_outputs(model, processor, listed))
    hidden, special = axes.shape
    generator = torch.Generator().manual_seed(seed)
    filler = torch.randn(hidden, hidden - special, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(torch.cat([axes, filler], 1))[0]
    order = torch.randperm(hidden, generator=generator)
    rotate_residual(model, basis[:, order])
    channels = [int((order == i).nonzero()) for i in range(special)]
    with torch.no_grad():
        for norm, consumers in norms(model):
            norm.weight[channels] *= GAIN
            for linear in consumers:
                linear.weight[:, channels] /= GAIN
    return sorted(channels)


def statistics(outputs: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """Size and overlap of the outlier channels: how much they differ by modality.

    Per modality the mean over norms of max/median channel range and of the kurtosis; per pair the
    mean Jaccard index of the four largest channels.
    """
    ratio: dict[str, list[float]] = defaultdict(list)
    kurtosis: dict[str, list[float]] = defaultdict(list)
    overlap: dict[str, list[float]] = defaultdict(list)
    for store in outputs:
        largest = {}
        for name in MODALITIES:
            values = store[name]
            ranges = values.abs().amax(0)
            ratio[name].append(float(ranges.max() / ranges.median()))
            centered = (values - values.mean()) / values.std()
            kurtosis[name].append(float((centered**4).mean()))
            largest[name] = set(ranges.topk(PER_MODALITY).indices.tolist())
        for a, b in combinations(MODALITIES, 2):
            union = largest[a] | largest[b]
            overlap[f"{a}-{b}"].append(len(largest[a] & largest[b]) / len(union))

    def means(values: dict[str, list[float]]) -> dict[str, float]:
        return {key: round(sum(v) / len(v), 3) for key, v in values.items()}

    return {"max_over_median": means(ratio), "kurtosis": means(kurtosis), "jaccard": means(overlap)}
