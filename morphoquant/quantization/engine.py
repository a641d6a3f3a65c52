"""What the walk does at a block: quantize weights, observe, choose ranges and masks, pass on.

Order of things (SPEC 2.12, clean preset): activations are observed with the block's weights
already quantized and all activations unquantized. Ranges and masks are then set for the block,
and the *unquantized-activation* outputs are passed on. Nothing that is chosen at one block can
therefore depend on the order of batches, and every prompt passes every block once.

Some choices need further passes over the same prompts (a gradient search, a mean residual) or
another order (weights into which activation scales are folded come last): :meth:`_passes` lists
them, and the last one over a set of prompts moves it to the next block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from morphoquant.calibration.samples import CalibrationError
from morphoquant.calibration.statistics import ModalityStatistics
from morphoquant.calibration.walk import Observer, Segment, observing, run_block
from morphoquant.config.schema import BitsConfig, MethodConfig
from morphoquant.models.structure import Block, InputGroup, TokenLabels
from morphoquant.quantization.activation import StaticQuantizer, dynamic_quantizer
from morphoquant.quantization.choose import (
    GroupChoice,
    SearchingQuantizer,
    make_learner,
    make_search,
    start_choice,
)
from morphoquant.quantization.compensation import (
    ResidualMeans,
    build_compensation,
    describe_compensation,
)
from morphoquant.quantization.linear import GroupInput, QuantizedLinear, plain
from morphoquant.quantization.manifest import LinearRecord, Manifest
from morphoquant.quantization.masks import ScoreMoments
from morphoquant.quantization.mdqfo import Search
from morphoquant.quantization.measure import ErrorMeter
from morphoquant.quantization.weights import fold_weight, quantize_weight

STATISTICS, SEARCH = "statistics", "search"
PROBE, PROBE_QUANTIZED = "probe", "probe_quantized"

Segments = dict[str, list[Segment]]


@dataclass(frozen=True)
class Visit:
    """Where the walk is: a block, its number, and what its groups' inputs go through."""

    index: int
    block: Block
    sources: dict[str, GroupInput]


Work = Callable[[Visit, list[Segment], bool], None]
"""A pass over some prompts; the last argument says whether they move to the next block."""


@dataclass
class BlockQuantizer:
    """A :class:`morphoquant.calibration.walk.Visitor` that quantizes.

    Attributes:
        collected: activation statistics per (block, group), on the CPU, filled by the walk.
        records: one manifest record per linear.
        choices: masks and ranges per (block, group), for static methods.
        moments: scores of all layers, for masks with a global rule (see ``survey``).
        meter: measures errors on probe prompts, where the walk is given some.
        labels: the modality of the tokens under way; needed where ``needs_labels``.
    """

    method: MethodConfig
    bits: BitsConfig
    observe: bool = True
    collected: dict[tuple[str, str], ModalityStatistics] = field(default_factory=dict)
    records: list[LinearRecord] = field(default_factory=list)
    choices: dict[tuple[str, str], GroupChoice] = field(default_factory=dict)
    moments: Mapping[str, ScoreMoments] | None = None
    histograms: bool = False
    meter: ErrorMeter = field(default_factory=ErrorMeter)
    labels: TokenLabels = field(default_factory=TokenLabels)

    @property
    def quantizes_activations(self) -> bool:
        return self.method.activation.format != "none" and self.bits.activation < 16

    @property
    def is_static(self) -> bool:
        return self.quantizes_activations and self.method.activation.mode == "static"

    @property
    def searches(self) -> bool:
        """Whether the method looks at activations a second time, for the range search."""
        chosen = self.method.activation.range
        return self.is_static and chosen.name in ("mdqfo", "mse") and chosen.search

    @property
    def learns(self) -> bool:
        return self.searches and self.method.activation.range.optimizer == "gradient"

    @property
    def folds(self) -> bool:
        return self.is_static and self.method.weight.fold and self.bits.weight < 16

    @property
    def biases(self) -> bool:
        return self.is_static and self.method.compensation.name == "static_bias"

    @property
    def needs_labels(self) -> bool:
        """Whether the quantized model must know the modality of the tokens it is given."""
        by_range = self.is_static and self.method.activation.granularity == "per_modality"
        return by_range or (self.biases and self.method.compensation.per_modality)

    @property
    def manifest(self) -> Manifest:
        return Manifest(self.records)

    # ------------------------------------------------------------------- the visit

    def visit(self, index: int, block: Block, segments: Segments) -> None:
        """Quantize one block and move all segments on to its output.

        Raises:
            CalibrationError: static ranges are wanted, and no prompt reaches this tower.
        """
        installs = self.method.quantizes or self.method.transform.name != "none"
        originals = {n: block.linear(n) for group in block.groups for n in group.linears}
        at = Visit(index, block, self._install(block) if installs else {})
        for work, name, move in self._passes(segments):
            work(at, segments[name], move)
        if self.folds:
            self._fold(block, originals)
        for work, name, move in self._passes(segments, behind_fold=True):
            work(at, segments[name], move)
        if self.quantizes_activations:
            for group in block.groups:
                self._enable(at.sources[group.name], group, block)
        if segments.get(PROBE) and installs:
            self.meter.visit(
                index,
                block,
                originals,
                segments[PROBE],
                segments[PROBE_QUANTIZED],
                self.labels,
                (lambda group: self._fresh_search(at, group)) if self.searches else None,
            )

    def _passes(
        self, segments: Segments, behind_fold: bool = False
    ) -> list[tuple[Work, str, bool]]:
        """(what is done, with which prompts, whether they then move on), in order."""
        # Without separate search samples the statistics samples serve twice.
        searched = SEARCH if segments.get(SEARCH) else STATISTICS
        before: list[tuple[Work, str]] = [(self._observe, STATISTICS)]
        if self.learns:
            before.append((self._learn, searched))
        if self.searches:
            before.append((self._search, searched))
        elif segments.get(SEARCH):
            before.append((self._pass_on, SEARCH))
        behind: list[tuple[Work, str]] = []
        if self.biases:
            behind.append((self._average_residual, STATISTICS))
        if self.folds:
            # What went through before went through weights that were not rounded yet.
            again = {STATISTICS, searched} - {name for _, name in behind}
            behind += [(self._pass_on, name) for name in sorted(again)]
        order = before + behind
        last = {name: i for i, (_, name) in enumerate(order)}
        marked = [(work, name, last[name] == i) for i, (work, name) in enumerate(order)]
        return marked[len(before) :] if behind_fold else marked[: len(before)]

    def _run(self, at: Visit, segments: list[Segment], move: bool, see: Observer | None) -> None:
        """One forward of every segment through the block; ``see`` is shown every group's input."""
        current: list[torch.Tensor] = []
        for segment in segments:
            current[:] = [segment.labels]
            self.labels.current = segment.labels if at.block.tower == "decoder" else None
            if see is None:
                hidden = run_block(at.block, at.index, segment)
            else:
                with observing(at.block, lambda: current[0], see):
                    hidden = run_block(at.block, at.index, segment)
            if move:
                segment.hidden = hidden
        self.labels.current = None

    # ------------------------------------------------------------------- passes

    def _observe(self, at: Visit, segments: list[Segment], move: bool) -> None:
        """Statistics of every group's input by modality, and the choices that follow from them."""
        found: dict[str, ModalityStatistics] = {}

        def see(group: InputGroup, x: torch.Tensor, labels: torch.Tensor) -> None:
            if group.name not in found:
                percentile = self.method.activation.range.name == "percentile"
                histograms = self.histograms or (self.is_static and percentile)
                found[group.name] = ModalityStatistics(x.shape[-1], x.device, histograms)
            found[group.name].update(x, labels)

        wanted = self.observe or self.is_static
        self._run(at, segments, move, see if wanted else None)
        if self.is_static:
            if not found:
                raise CalibrationError(
                    f"no calibration prompt reaches the {at.block.tower} tower, whose static "
                    f"ranges are to be set: add a source with such media to calibration.sources, "
                    f"or set model.scope.{at.block.tower}=false"
                )
            for group in at.block.groups:
                names = [f"{at.block.name}.{name}" for name in group.linears]
                self.choices[at.block.name, group.name] = start_choice(
                    self.method, found[group.name], names, self.moments
                )
        if self.observe:
            for name, statistics in found.items():
                self.collected[at.block.name, name] = statistics.cpu()

    def _pass_on(self, at: Visit, segments: list[Segment], move: bool) -> None:
        self._run(at, segments, move, None)

    def _learn(self, at: Visit, segments: list[Segment], move: bool) -> None:
        """Gradient steps; what they propose is compared with ratio 1 in the search pass."""
        choices = {g.name: self.choices[at.block.name, g.name] for g in at.block.groups}
        learners = {n: make_learner(c, self.method, self.bits) for n, c in choices.items()}
        self._run(at, segments, move, _updating(learners))
        for name, learner in learners.items():
            choices[name].ratios = learner.best_ratios()

    def _search(self, at: Visit, segments: list[Segment], move: bool) -> None:
        """The losses of all candidates over the search samples, and the best of them."""
        searches = {}
        for group in at.block.groups:
            learned = self.choices[at.block.name, group.name].ratios
            candidates = None
            if learned is not None:
                candidates = torch.stack([learned, torch.ones_like(learned)])
            searches[group.name] = self._fresh_search(at, group, candidates)
        if self.method.activation.range.upstream == "quantized":
            for group in at.block.groups:
                dynamic = self.method.compensation.name == "dabc"
                mask = self.choices[at.block.name, group.name].mask if dynamic else None
                at.sources[group.name].quantizer = SearchingQuantizer(
                    searches[group.name], self.bits.activation, mask, self.method.compensation
                )
        self._run(at, segments, move, _updating(searches))
        for name, search in searches.items():
            choice = self.choices[at.block.name, name]
            choice.ratios, choice.final = search.best_ratios(), search.result()
            at.sources[name].quantizer = None

    def _fresh_search(
        self, at: Visit, group: InputGroup, candidates: torch.Tensor | None = None
    ) -> Search:
        weights = [plain(at.block.linear(name)).weight for name in group.linears]
        choice = self.choices[at.block.name, group.name]
        return make_search(choice, self.method, self.bits, weights, candidates)

    def _average_residual(self, at: Visit, segments: list[Segment], move: bool) -> None:
        """The mean residual of masked channels, by modality, at the final ranges."""
        means, quantizers = {}, {}
        for group in at.block.groups:
            choice = self.choices[at.block.name, group.name]
            assert choice.mask is not None
            means[group.name] = ResidualMeans(choice.mask)
            quantizers[group.name] = StaticQuantizer(choice.final, self.bits.activation)

        def see(group: InputGroup, x: torch.Tensor, labels: torch.Tensor) -> None:
            means[group.name].update(x, quantizers[group.name](x), labels)

        self._run(at, segments, move, see)
        for name, found in means.items():
            at.sources[name].compensation = found.result(self.method.compensation.per_modality)

    # ------------------------------------------------------------------- changes

    def _install(self, block: Block) -> dict[str, GroupInput]:
        """Replace the block's linears; weights quantized (unless folded), activations not yet."""
        sources: dict[str, GroupInput] = {}
        width = 16 if self.folds else self.bits.weight
        for group in block.groups:
            first = block.linear(group.linears[0])
            online = getattr(first, "transform", None)
            source = GroupInput(len(group.linears), online)
            source.labels = self.labels if self.needs_labels else None
            sources[group.name] = source
            for name in group.linears:
                module = block.linear(name)
                linear = plain(module)
                weight = quantize_weight(linear.weight, self.method.weight, width)
                block.replace(name, QuantizedLinear(weight.dequantized, linear.bias, source))
                self.records.append(
                    LinearRecord(
                        name=f"{block.name}.{name}",
                        tower=block.tower,
                        group=group.name,
                        in_features=linear.in_features,
                        out_features=linear.out_features,
                        weight=weight.description,
                        activation={"format": "none", "bits": 16, "effective_bits": 16.0},
                        online_transform=getattr(online, "description", None),
                    )
                )
        return sources

    def _fold(self, block: Block, originals: Mapping[str, nn.Module]) -> None:
        """Round weights with the activation scales folded in (SPEC 2.11)."""
        records = {r.name: r for r in self.records}
        for group in block.groups:
            choice = self.choices[block.name, group.name]
            dynamic = self.method.compensation.name == "dabc"
            for name in group.linears:
                module = block.linear(name)
                assert isinstance(module, QuantizedLinear)
                folded = fold_weight(
                    plain(originals[name]).weight,
                    choice.final.grid(self.bits.activation),
                    choice.mask if dynamic else None,
                    self.method,
                    self.bits.weight,
                )
                module.weight.data = folded.dequantized
                records[f"{block.name}.{name}"].weight = folded.description

    def _enable(self, source: GroupInput, group: InputGroup, block: Block) -> None:
        """Put the activation quantizer (and the compensation) in place, and say so."""
        config, width = self.method.activation, self.bits.activation
        activation: dict[str, Any] = {
            "format": config.format,
            "bits": width,
            "effective_bits": float(width),
            "granularity": config.granularity,
            "mode": config.mode,
            "range": config.range.name if config.mode == "static" else "minmax",
        }
        if config.grid != "restricted":
            activation["grid"] = config.grid
        choice = self.choices.get((block.name, group.name))
        if choice is None:
            source.quantizer = dynamic_quantizer(config, width)
        else:
            if choice.ratios is not None:
                floor = config.range.min_ratio * (1 + 1e-6)
                ratios = choice.ratios.double()
                activation |= {
                    "share_at_floor": float((choice.ratios <= floor).double().mean()),
                    "share_unshrunk": float((ratios >= 1).double().mean()),
                    "ratio_min": float(ratios.min()),
                    "ratio_median": float(ratios.median()),
                    "ratio_max": float(ratios.max()),
                }
            source.quantizer = StaticQuantizer(choice.final, width)
            if choice.mask is not None and not self.biases:
                source.compensation = build_compensation(
                    self.method.compensation, choice.mask, choice.final
                )
        members = {f"{block.name}.{name}" for name in group.linears}
        for record in self.records:
            if record.name in members:
                record.activation = dict(activation)
                record.compensation = describe_compensation(
                    self.method.compensation, source.compensation, record.out_features
                )


def _updating(searches: Mapping[str, Search]) -> Observer:
    """Shows each group's real tokens to its search."""

    def see(group: InputGroup, x: torch.Tensor, labels: torch.Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        kinds = labels.reshape(-1)
        padded = bool((kinds < 0).any())
        real = kinds >= 0
        searches[group.name].update(
            rows[real] if padded else rows, kinds[real] if padded else kinds
        )

    return see
