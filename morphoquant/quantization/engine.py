"""What the walk does at a block: quantize weights, observe, choose ranges and masks, pass on.

Order of things (SPEC 2.12, clean preset): activations are observed with the block's weights
already quantized and all activations unquantized. Ranges and masks are then set for the block,
and the *unquantized-activation* outputs are passed on. Nothing that is chosen at one block can
therefore depend on the order of batches, and every prompt passes every block once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from morphoquant.calibration.samples import CalibrationError
from morphoquant.calibration.statistics import ModalityStatistics
from morphoquant.calibration.walk import Segment, observing, run_block
from morphoquant.config.schema import BitsConfig, MethodConfig
from morphoquant.models.structure import Block, InputGroup
from morphoquant.quantization.activation import StaticQuantizer, dynamic_quantizer, static_range
from morphoquant.quantization.compensation import build_compensation, outlier_mask
from morphoquant.quantization.linear import GroupInput, QuantizedLinear
from morphoquant.quantization.manifest import LinearRecord, Manifest
from morphoquant.quantization.mdqfo import RangeSearch
from morphoquant.quantization.weights import quantize_weight

STATISTICS, SEARCH = "statistics", "search"


@dataclass
class BlockQuantizer:
    """A :class:`morphoquant.calibration.walk.Visitor` that quantizes.

    Attributes:
        collected: activation statistics per (block, group), on the CPU, filled by the walk.
        records: one manifest record per linear.
    """

    method: MethodConfig
    bits: BitsConfig
    observe: bool = True
    collected: dict[tuple[str, str], ModalityStatistics] = field(default_factory=dict)
    records: list[LinearRecord] = field(default_factory=list)

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
        return self.is_static and chosen.name == "mdqfo" and chosen.search

    @property
    def manifest(self) -> Manifest:
        return Manifest(self.records)

    # ------------------------------------------------------------------- the visit

    def visit(self, index: int, block: Block, segments: dict[str, list[Segment]]) -> None:
        """Quantize one block and move all segments on to its output.

        Raises:
            CalibrationError: static ranges are wanted, and no prompt reaches this tower.
        """
        installs = self.method.quantizes or self.method.transform.name != "none"
        sources = self._install(block) if installs else {}
        # Without separate search samples the statistics samples serve twice, so their hidden
        # states must stay put until the search has seen them too.
        shared = self.searches and not segments.get(SEARCH)
        statistics = self._observe(index, block, segments[STATISTICS], move=not shared)
        searches: dict[str, RangeSearch] = {}
        masks: dict[str, torch.Tensor | None] = {}
        if self.is_static:
            if not statistics:
                raise CalibrationError(
                    f"no calibration prompt reaches the {block.tower} tower, whose static ranges "
                    f"are to be set: add a source with such media to calibration.sources, or set "
                    f"model.scope.{block.tower}=false"
                )
            for group in block.groups:
                pooled = statistics[group.name].pooled()
                mask = None
                if self.method.compensation.name == "dabc":
                    mask = outlier_mask(pooled, self.method.compensation.mask)
                masks[group.name] = mask
                start = static_range(self.method.activation, pooled, mask)
                searches[group.name] = RangeSearch(
                    start,
                    self.bits.activation,
                    self.method.activation.range,
                    mask,
                    self.method.compensation,
                )
        if self.searches:
            read = segments[STATISTICS] if shared else segments[SEARCH]
            self._search(index, block, read, searches)
        elif segments.get(SEARCH):
            for segment in segments[SEARCH]:
                segment.hidden = run_block(block, index, segment)
        if self.quantizes_activations:
            for group in block.groups:
                self._enable(sources[group.name], group, block, searches, masks)
        if self.observe:
            for name, found in statistics.items():
                self.collected[block.name, name] = _to_cpu(found)

    def _install(self, block: Block) -> dict[str, GroupInput]:
        """Replace the block's linears; weights quantized, activations not yet."""
        sources: dict[str, GroupInput] = {}
        for group in block.groups:
            first = block.linear(group.linears[0])
            online = getattr(first, "transform", None)
            source = GroupInput(len(group.linears), online)
            sources[group.name] = source
            for name in group.linears:
                module = block.linear(name)
                linear = getattr(module, "linear", module)
                weight = quantize_weight(linear.weight, self.method.weight, self.bits.weight)  # type: ignore[arg-type]
                block.replace(
                    name,
                    QuantizedLinear(weight.dequantized, linear.bias, source),  # type: ignore[arg-type]
                )
                self.records.append(
                    LinearRecord(
                        name=f"{block.name}.{name}",
                        tower=block.tower,
                        group=group.name,
                        in_features=linear.in_features,  # type: ignore[arg-type]
                        out_features=linear.out_features,  # type: ignore[arg-type]
                        weight=weight.description,
                        activation={"format": "none", "bits": 16, "effective_bits": 16.0},
                        online_transform=getattr(online, "description", None),
                    )
                )
        return sources

    def _observe(
        self, index: int, block: Block, segments: list[Segment], move: bool
    ) -> dict[str, ModalityStatistics]:
        """Forward every segment once; statistics of every group's input by modality."""
        found: dict[str, ModalityStatistics] = {}
        current: list[torch.Tensor] = []

        def see(group: InputGroup, x: torch.Tensor, labels: torch.Tensor) -> None:
            if group.name not in found:
                found[group.name] = ModalityStatistics(x.shape[-1], x.device)
            found[group.name].update(x, labels)

        wanted = self.observe or self.is_static
        for segment in segments:
            current[:] = [segment.labels]
            if wanted:
                with observing(block, lambda: current[0], see):
                    hidden = run_block(block, index, segment)
            else:
                hidden = run_block(block, index, segment)
            if move:
                segment.hidden = hidden
        return found

    def _search(
        self, index: int, block: Block, segments: list[Segment], searches: dict[str, RangeSearch]
    ) -> None:
        current: list[torch.Tensor] = []

        def see(group: InputGroup, x: torch.Tensor, labels: torch.Tensor) -> None:
            rows = x.reshape(-1, x.shape[-1])
            searches[group.name].update(rows[labels.reshape(-1) >= 0])

        for segment in segments:
            current[:] = [segment.labels]
            with observing(block, lambda: current[0], see):
                segment.hidden = run_block(block, index, segment)

    def _enable(
        self,
        source: GroupInput,
        group: InputGroup,
        block: Block,
        searches: dict[str, RangeSearch],
        masks: dict[str, torch.Tensor | None],
    ) -> None:
        """Put the activation quantizer (and the compensation) in place, and say so."""
        config, width = self.method.activation, self.bits.activation
        activation = {
            "format": config.format,
            "bits": width,
            "effective_bits": float(width),
            "granularity": config.granularity,
            "mode": config.mode,
            "range": config.range.name if config.mode == "static" else "minmax",
        }
        compensation = {}
        if config.mode == "dynamic":
            source.quantizer = dynamic_quantizer(config, width)
        else:
            search = searches[group.name]
            ratios = search.best_ratios() if self.searches else None
            chosen = search.result() if self.searches else search.initial
            if ratios is not None:
                at_floor = float((ratios <= search.ratios[0]).double().mean())
                activation["share_at_floor"] = at_floor
                activation["share_unshrunk"] = float((ratios >= 1).double().mean())
            source.quantizer = StaticQuantizer(chosen, width)
            mask = masks[group.name]
            if mask is not None:
                source.compensation = build_compensation(self.method.compensation, mask, chosen)
                compensation = {
                    "name": self.method.compensation.name,
                    "reading": self.method.compensation.reading,
                    "masked_channels": int(mask.sum()),
                    "channels": mask.numel(),
                }
        members = {f"{block.name}.{name}" for name in group.linears}
        for record in self.records:
            if record.name in members:
                record.activation = dict(activation)
                record.compensation = dict(compensation)


def _to_cpu(statistics: ModalityStatistics) -> ModalityStatistics:
    for part in statistics.parts.values():
        for name, value in vars(part).items():
            if isinstance(value, torch.Tensor):
                setattr(part, name, value.cpu())
    return statistics
