"""The walk: one tower, block by block, over cached hidden states.

Memory is one block's working set plus the hidden states between two blocks; no activation inside
a block outlives the forward pass that made it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from morphoquant.models.adapter import Batch, OmniAdapter
from morphoquant.models.structure import Block, InputGroup, Modality, Tower

Observer = Callable[[InputGroup, torch.Tensor, torch.Tensor], None]
"""Called with (group, activation [..., channels], modality labels [...])."""


@dataclass
class Segment:
    """Hidden states of one call of a tower, on their way from block to block.

    Attributes:
        hidden: what the next block reads, [batch, tokens, channels] or [tokens, channels].
        labels: int8 modality of every token, the leading shape of ``hidden``.
        arguments: for every block, the further (positional, keyword) arguments it was called with.
    """

    hidden: torch.Tensor
    labels: torch.Tensor
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(repr=False)


class Visitor(Protocol):
    """What is done at every block: see :mod:`morphoquant.quantization.engine`."""

    def visit(self, index: int, block: Block, segments: dict[str, list[Segment]]) -> None:
        """Work on one block and move every segment's ``hidden`` on to its output."""


class _Reached(Exception):
    """Raised by the hook on the first decoder block: nothing beyond it has to run."""


def labels_for(labels: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Modality labels for the rows of ``x``, on its device.

    Labels lie where a prompt enters the model, which may be spread over several GPUs. A vision
    merger concatenates neighbouring tokens: its rows are fewer, and all tokens of a tower call
    have one modality, so the first labels serve.
    """
    rows = x.shape[:-1]
    labels = labels.to(x.device)
    if labels.shape == rows:
        return labels
    flat = labels.reshape(-1)
    count = int(torch.Size(rows).numel())
    if flat.numel() < count or not bool((flat == flat[0]).all()):
        raise ValueError(f"cannot label activations {tuple(x.shape)} from {tuple(labels.shape)}")
    return flat[:count].reshape(rows)


def run_block(block: Block, index: int, segment: Segment) -> torch.Tensor:
    """Output hidden states of ``block`` (number ``index`` of its tower) for one segment."""
    positional, keywords = segment.arguments[index]
    out = block.module(segment.hidden, *positional, **keywords)
    return out[0] if isinstance(out, tuple) else out


@contextmanager
def observing(
    block: Block, labels: Callable[[], torch.Tensor], observe: Observer
) -> Iterator[None]:
    """Show ``observe`` the input of every group of ``block`` while the context is open.

    A module that rewrites its input first (an online rotation) offers ``observe_input`` and is
    observed behind it: statistics describe what is quantized.
    """
    with ExitStack() as stack:
        for group in block.groups:
            module = block.linear(group.linears[0])

            def show(x: torch.Tensor, group: InputGroup = group) -> None:
                observe(group, x, labels_for(labels(), x))

            if hasattr(module, "observe_input"):
                stack.enter_context(module.observe_input(show))  # type: ignore[operator]
            else:
                handle = module.register_forward_pre_hook(
                    lambda _module, args, show=show: show(args[0])
                )
                stack.callback(handle.remove)
        yield


def enter(adapter: OmniAdapter, tower: Tower, batches: Sequence[Batch]) -> list[Segment]:
    """Run every batch up to the first block of ``tower`` and keep what it was called with."""
    blocks = adapter.blocks(tower)
    segments: list[Segment] = []
    for batch in batches:
        if tower == "decoder":
            segments.append(_enter_decoder(adapter, blocks, batch))
        else:
            segments.extend(_enter_tower(adapter, tower, blocks, batch))
    return segments


def _enter_decoder(adapter: OmniAdapter, blocks: Sequence[Block], batch: Batch) -> Segment:
    caught: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def catch(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append((args, kwargs))
        raise _Reached

    handle = blocks[0].module.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        adapter.model(**batch, use_cache=False)
    except _Reached:
        pass
    finally:
        handle.remove()
    args, kwargs = caught[0]
    # Every decoder block gets the same mask and positions (no layer of this family slides).
    return Segment(args[0], adapter.modality_map(batch), [(args[1:], kwargs)] * len(blocks))


def _enter_tower(
    adapter: OmniAdapter, tower: Tower, blocks: Sequence[Block], batch: Batch
) -> list[Segment]:
    """A tower runs once per kind of media; its blocks get different windows, so all are hooked."""
    model = adapter.model
    calls: list[tuple[Modality, Callable[[], Any]]] = []
    if tower == "vision":
        if "pixel_values" in batch:
            still = {k: batch[k] for k in ("pixel_values", "image_grid_thw")}
            calls.append((Modality.IMAGE, lambda: model.get_image_features(**still)))
        if "pixel_values_videos" in batch:
            moving = {k: batch[k] for k in ("pixel_values_videos", "video_grid_thw")}
            calls.append((Modality.VIDEO, lambda: model.get_video_features(**moving)))
    elif "input_features" in batch:
        sound = {k: batch[k] for k in ("input_features", "feature_attention_mask")}
        calls.append((Modality.AUDIO, lambda: model.get_audio_features(**sound)))
    segments = []
    for modality, call in calls:
        caught: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        with ExitStack() as stack:
            for block in blocks:
                handle = block.module.register_forward_pre_hook(
                    lambda _module, args, kwargs, caught=caught: caught.append((args, kwargs)),
                    with_kwargs=True,
                )
                stack.callback(handle.remove)
            call()
        hidden = caught[0][0][0]
        labels = torch.full_like(hidden[..., 0], int(modality), dtype=torch.int8)
        # Only the first block's hidden states are kept; later ones are recomputed by the walk.
        segments.append(Segment(hidden, labels, [(args[1:], kwargs) for args, kwargs in caught]))
    return segments


@torch.no_grad()
def walk(
    adapter: OmniAdapter,
    towers: Sequence[Tower],
    batches: Mapping[str, Sequence[Batch]],
    visitor: Visitor,
    progress: Callable[[int], None] | None = None,
    early: Sequence[str] = (),
) -> None:
    """Visit every block of the given towers, in the order in which data flows.

    Towers before the decoder, so that the decoder sees what the quantized towers give it.

    Args:
        adapter: the model; changed in place by the visitor.
        towers: which, of ``vision``, ``audio`` and ``decoder``.
        batches: named sets of encoded prompts (``statistics``, ``search``).
        visitor: what happens at a block.
        progress: called with 1 after every block.
        early: sets that enter every tower before the visitor has changed anything; the others
            enter the decoder through the towers as they are then.
    """
    order: tuple[Tower, ...] = ("vision", "audio", "decoder")
    first = {t: {n: enter(adapter, t, batches[n]) for n in early} for t in towers}
    for tower in (t for t in order if t in towers):
        segments = first.pop(tower)
        for name, group in batches.items():
            if name not in early:
                segments[name] = enter(adapter, tower, group)
        for index, block in enumerate(adapter.blocks(tower)):
            visitor.visit(index, block, segments)
            if progress is not None:
                progress(1)
