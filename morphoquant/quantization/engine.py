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

import torch

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
    returned,
    start_choice,
    unreached,
    updating,
)
from morphoquant.quantization.compensation import (
    ResidualMeans,
    build_compensation,
    describe_branch,
    describe_compensation,
)
from morphoquant.quantization.gather import Gathered
from morphoquant.quantization.install import Visit, describe_activation, install
from morphoquant.quantization.linear import GroupInput, QuantizedLinear, plain
from morphoquant.quantization.manifest import LinearRecord, Manifest
from morphoquant.quantization.masks import ScoreMoments, drawn, group_mask
from morphoquant.quantization.mdqfo import Search
from morphoquant.quantization.measure import ErrorMeter
from morphoquant.quantization.mixed import ExcludingQuantizer
from morphoquant.quantization.modality import ModalityScale
from morphoquant.quantization.needs import Needs
from morphoquant.quantization.observation import Observation, Recall
from morphoquant.quantization.rotated_mean import rotated_mean_mask
from morphoquant.quantization.rounding import (
    GroupData,
    method_of,
    round_weight,
    rounds_late,
)

STATISTICS, SEARCH = "statistics", "search"
PROBE, PROBE_QUANTIZED = "probe", "probe_quantized"

Segments = dict[str, list[Segment]]


Work = Callable[[Visit, list[Segment], bool], None]
"""A pass over some prompts; the last argument says whether they move to the next block."""


@dataclass
class BlockQuantizer(Needs):
    """A :class:`morphoquant.calibration.walk.Visitor` that quantizes.

    Attributes:
        collected: activation statistics per (block, group), on the CPU, filled by the walk.
        records: one manifest record per linear.
        choices: ranges per (block, group), for static methods.
        masks: compensated channels per (block, group), bool [channels].
        largest: magnitudes per (block, group), for formats that need one in advance.
        moments: scores of all layers, for masks with a global rule (see ``survey``).
        meter: measures errors on probe prompts, where the walk is given some.
        labels: the modality of the tokens under way; needed where ``needs_labels``.
        recall: gives a block's statistics, taken before, in place of an observation.
    """

    collected: dict[tuple[str, str], ModalityStatistics] = field(default_factory=dict)
    records: list[LinearRecord] = field(default_factory=list)
    choices: dict[tuple[str, str], GroupChoice] = field(default_factory=dict)
    masks: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)
    largest: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)
    moments: Mapping[str, ScoreMoments] | None = None
    meter: ErrorMeter = field(default_factory=ErrorMeter)
    labels: TokenLabels = field(default_factory=TokenLabels)
    recall: Recall | None = None

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
        sources: dict[str, GroupInput] = {}
        if installs:
            labels = self.labels if self.needs_labels else None
            sources, records = install(block, labels, self.only)
            self.records += records
        at = Visit(index, block, sources, originals)
        late = rounds_late(self.method, self.bits.lowest)
        if self.masks_channels and not self.masks_by_statistics:
            for group in block.groups:
                config, names = self.method.compensation.mask, block.names(group)
                marked = self._rotated_mean(at, group)
                self.masks[block.name, group.name] = drawn(marked, names, config)
        if installs and not late:
            self._round(at, segments[STATISTICS])
        for work, name, move in self._passes(segments):
            work(at, segments[name], move)
        if late:
            self._round(at, segments[STATISTICS])
        for work, name, move in self._passes(segments, behind_rounding=True):
            work(at, segments[name], move)
        if self.quantizes_activations:
            for group in block.groups:
                self._enable(at, group)
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
        self, segments: Segments, behind_rounding: bool = False
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
        if rounds_late(self.method, self.bits.lowest):
            # What went through before went through weights that were not rounded yet.
            again = {STATISTICS, searched} - {name for _, name in behind}
            behind += [(self._pass_on, name) for name in sorted(again)]
        order = before + behind
        last = {name: i for i, (_, name) in enumerate(order)}
        marked = [(work, name, last[name] == i) for i, (work, name) in enumerate(order)]
        return marked[len(before) :] if behind_rounding else marked[: len(before)]

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
        seen = Observation(self.keeps_histograms)
        watched = self.recall is None and (self.chooses or self.observe)
        if watched or move:
            self._run(at, segments, move, seen if watched else None)
        found = seen.found if self.recall is None else self.recall(at.block)
        if self.chooses and at.block.groups:
            if not found:
                raise unreached(at.block, "whose static ranges or masks are to be set")
            for group in at.block.groups:
                key, names = (at.block.name, group.name), at.block.names(group)
                statistics = found[group.name]
                if self.scales_tensors:
                    self.largest[key] = statistics.pooled().absmax.max()
                if self.masks_by_statistics:
                    config = self.method.compensation.mask
                    marked = None
                    if "rotated_mean" in config.rules:
                        marked = self._rotated_mean(at, group)
                    self.masks[key] = group_mask(statistics, names, config, self.moments, marked)
                if self.is_static:
                    mask = self.masks.get(key)
                    self.choices[key] = start_choice(self.method, statistics, mask)
        for name, statistics in found.items() if self.observe else ():
            self.collected[at.block.name, name] = statistics.cpu()

    def _rotated_mean(self, at: Visit, group: InputGroup) -> torch.Tensor:
        weights = [plain(at.originals[name]).weight for name in group.linears]
        share = self.method.compensation.mask.mean_share
        return rotated_mean_mask(weights, at.sources[group.name].online, share)

    def _pass_on(self, at: Visit, segments: list[Segment], move: bool) -> None:
        self._run(at, segments, move, None)

    def _learn(self, at: Visit, segments: list[Segment], move: bool) -> None:
        """Gradient steps; what they propose is compared with ratio 1 in the search pass."""
        choices = {g.name: self.choices[at.block.name, g.name] for g in at.block.groups}
        widths = {g.name: self._bits(at, g) for g in at.block.groups}
        learners = {n: make_learner(c, self.method, widths[n]) for n, c in choices.items()}
        self._run(at, segments, move, updating(learners))
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
                mask = returned(self.method, self.choices[at.block.name, group.name].mask)
                width = self._bits(at, group).activation
                at.sources[group.name].quantizer = SearchingQuantizer(
                    searches[group.name], width, mask, self.method.compensation
                )
        self._run(at, segments, move, updating(searches))
        for name, search in searches.items():
            choice = self.choices[at.block.name, name]
            choice.ratios, choice.final = search.best_ratios(), search.result()
            at.sources[name].quantizer = None

    def _fresh_search(
        self, at: Visit, group: InputGroup, candidates: torch.Tensor | None = None
    ) -> Search:
        weights = [plain(at.block.linear(name)).weight for name in group.linears]
        choice = self.choices[at.block.name, group.name]
        return make_search(choice, self.method, self._bits(at, group), weights, candidates)

    def _average_residual(self, at: Visit, segments: list[Segment], move: bool) -> None:
        """The mean residual of masked channels, by modality, at the final ranges."""
        means, quantizers = {}, {}
        for group in at.block.groups:
            choice = self.choices[at.block.name, group.name]
            assert choice.mask is not None
            means[group.name] = ResidualMeans(choice.mask)
            width = self._bits(at, group).activation
            quantizers[group.name] = StaticQuantizer(choice.final, width)

        def see(group: InputGroup, x: torch.Tensor, labels: torch.Tensor) -> None:
            means[group.name].update(x, quantizers[group.name](x), labels)

        self._run(at, segments, move, see)
        for name, found in means.items():
            at.sources[name].compensation = found.result(self.method.compensation.per_modality)

    # ------------------------------------------------------------------- changes

    def _bits(self, at: Visit, group: InputGroup) -> BitsConfig:
        return self.bits.of(at.block.names(group))

    def _round(self, at: Visit, prompts: list[Segment]) -> None:
        """Round the block's weights, group after group in the order in which they run."""
        records = {r.name: r for r in self.records}
        for group in at.block.groups:
            choice = self.choices.get((at.block.name, group.name))
            method = method_of(self.method, at.block.tower, group.name)
            gathered = self._gather(at, group, prompts, method)
            width = self._bits(at, group).activation
            online = at.sources[group.name].online
            scale = online if isinstance(online, ModalityScale) else None
            data = GroupData(
                mask=self.masks.get((at.block.name, group.name)),
                grid=choice.final.grid(width) if choice and self.folds else None,
                second_moment=gathered.second_moment,
                tokens=gathered.tokens,
                moments_by_kind=gathered.moments_by_kind,
                scale=scale,
            )
            for name in group.linears:
                module = at.block.linear(name)
                assert isinstance(module, QuantizedLinear)
                original = plain(at.originals[name]).weight
                bits = self.bits.at(f"{at.block.name}.{name}")
                rounded = round_weight(original, method, bits, data, name)
                module.weight.data = rounded.weight
                if rounded.branch is not None:
                    module.set_branch(rounded.branch)
                record = records[f"{at.block.name}.{name}"]
                record.weight = rounded.description
                if scale is not None:
                    stored = scale.storage_bits(original, len(group.linears))
                    record.weight["effective_bits"] += stored
                if rounded.branch is not None:
                    record.compensation = describe_branch(rounded.branch)

    def _gather(
        self, at: Visit, group: InputGroup, prompts: list[Segment], method: MethodConfig
    ) -> Gathered:
        """What rounding wants to know of a group's input, behind groups rounded already."""
        gathered = Gathered(method, self._bits(at, group), len(prompts))
        if not gathered.wanted:
            return gathered

        def see(seen: InputGroup, x: torch.Tensor, labels: torch.Tensor) -> None:
            if seen.name == group.name:
                gathered.update(x, labels)

        self._run(at, prompts, False, see)
        if gathered.empty:
            raise unreached(at.block, "whose weights are rounded by what they read")
        gathered.check()
        return gathered

    def _enable(self, at: Visit, group: InputGroup) -> None:
        """Put the activation quantizer (and the compensation) in place, and say so."""
        source, block = at.sources[group.name], at.block
        config, width = self.method.activation, self._bits(at, group).activation
        if width >= 16:
            source.compensation = None
            return
        choice = self.choices.get((block.name, group.name))
        mask = self.masks.get((block.name, group.name))
        if choice is None:
            largest = self.largest.get((block.name, group.name))
            dynamic = dynamic_quantizer(config, width, largest)
            source.quantizer = dynamic if mask is None else ExcludingQuantizer(dynamic, mask)
        else:
            source.quantizer = StaticQuantizer(choice.final, width)
        if mask is not None and not self.biases:
            edge = None if choice is None else choice.final.edge
            source.compensation = build_compensation(self.method.compensation, mask, edge)
        members = set(block.names(group))
        for record in self.records:
            if record.name in members:
                record.activation = describe_activation(config, width, record.in_features, choice)
                if source.compensation is not None:
                    record.compensation = describe_compensation(
                        self.method.compensation, source.compensation, record.out_features
                    )
