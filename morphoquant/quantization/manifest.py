"""The manifest: what was done to every linear in scope, and how often it ran.

The usual silent failure of quantization code is a layer that stayed in 16 bit, or an activation
quantizer that was installed and never called. Both fail the run here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from morphoquant.config.schema import BitsConfig, MethodConfig
from morphoquant.errors import HarnessError
from morphoquant.models.structure import Block
from morphoquant.quantization.linear import QuantizedLinear, plain
from morphoquant.quantization.low_rank import has_branch


class ManifestError(HarnessError):
    """A linear in scope that was not quantized, or a quantizer that never ran."""


@dataclass
class LinearRecord:
    """One linear in scope; ``calls`` and ``tokens`` are filled in after evaluation."""

    name: str
    tower: str
    group: str
    in_features: int
    out_features: int
    weight: dict[str, Any]
    activation: dict[str, Any]
    compensation: dict[str, Any] = field(default_factory=dict)
    online_transform: str | None = None
    calls: int = 0
    tokens: int = 0


@dataclass
class Manifest:
    """Records of all linears in scope, and the bits that were really spent."""

    linears: list[LinearRecord]
    counted_on: str = "evaluation"
    cache: dict[str, Any] | None = None
    """What was done to cached keys and values."""

    @property
    def scope_hash(self) -> str:
        """Equal for two runs that had the same linears in scope (SPEC F1)."""
        names = "\n".join(sorted(f"{r.name} {r.in_features}" for r in self.linears))
        return hashlib.sha256(names.encode()).hexdigest()[:16]

    @property
    def weight_bits(self) -> float:
        """Bits per weight in scope, scales included."""
        sizes = [r.in_features * r.out_features for r in self.linears]
        bits = [r.weight["effective_bits"] for r in self.linears]
        return sum(s * b for s, b in zip(sizes, bits, strict=True)) / max(sum(sizes), 1)

    @property
    def activation_bits(self) -> float:
        """Bits per activation element in scope; what bypassed counts with 16 (SPEC F2)."""
        seen: set[tuple[str, str]] = set()
        total, spent = 0.0, 0.0
        for r in self.linears:
            key = (r.name.rsplit(".", 1)[0], r.group)
            if key in seen:
                continue
            seen.add(key)
            weight = r.in_features * max(r.tokens, 1)
            total += weight
            spent += weight * r.activation["effective_bits"]
        return spent / max(total, 1)

    def compensation_cost(self) -> dict[str, float] | None:
        """What the compensation costs over all linears in scope; None without one.

        ``masked_share``: of channels; ``bypass_rate``: of activation elements that stayed in 16
        bits, weighed by traffic; ``extra_flops_share``: operations added to those of the linears;
        ``stored_numbers``: constants kept beside the weights.
        """
        rows = [r for r in self.linears if r.compensation]
        if not rows:
            return None
        inputs = {(r.name.rsplit(".", 1)[0], r.group): r for r in rows}.values()
        elements = [r.in_features * max(r.tokens, 1) for r in inputs]
        bypassed = [
            n * r.compensation.get("bypass_rate", 0.0)
            for n, r in zip(elements, inputs, strict=True)
        ]
        flops = sum(2 * r.in_features * r.out_features for r in self.linears)
        return {
            "masked_share": sum(r.compensation["masked_channels"] for r in inputs)
            / sum(r.compensation["channels"] for r in inputs),
            "bypass_rate": sum(bypassed) / sum(elements),
            "extra_flops_share": sum(r.compensation["extra_flops_per_token"] for r in rows) / flops,
            "stored_numbers": sum(r.compensation.get("stored_numbers", 0) for r in rows),
        }

    def to_dict(self) -> dict[str, Any]:
        return {
            "scope_hash": self.scope_hash,
            "counted_on": self.counted_on,
            "weight_bits": self.weight_bits,
            "activation_bits": self.activation_bits,
            "kv_cache": self.cache,
            "linears": [asdict(r) for r in self.linears],
        }


def describe_scope(blocks: Iterable[Block]) -> Manifest:
    """The manifest of an unquantized model: every linear in scope at 16 bits."""
    return Manifest(
        [
            LinearRecord(
                name=f"{block.name}.{name}",
                tower=block.tower,
                group=group.name,
                in_features=plain(block.linear(name)).in_features,
                out_features=plain(block.linear(name)).out_features,
                weight={"format": "none", "bits": 16, "effective_bits": 16.0},
                activation={"format": "none", "bits": 16, "effective_bits": 16.0},
            )
            for block in blocks
            for group in block.groups
            for name in group.linears
        ]
    )


def reset_counters(blocks: Iterable[Block]) -> None:
    """Forget what ran before evaluation."""
    for block in blocks:
        for group in block.groups:
            for name in group.linears:
                module = block.linear(name)
                if isinstance(module, QuantizedLinear):
                    module.calls = 0
                    module.source.reset()


def complete(
    manifest: Manifest, blocks: Iterable[Block], method: MethodConfig, bits: BitsConfig
) -> None:
    """Fill in the counters after evaluation and verify them.

    Raises:
        ManifestError: naming every linear that was not quantized or never ran.
    """
    records = {r.name: r for r in manifest.linears}
    wrong: list[str] = []
    compensation = method.compensation.name
    for block in blocks:
        for group in block.groups:
            for name in group.linears:
                full = f"{block.name}.{name}"
                width = bits.at(full)
                wants_weight = method.weight.format != "none" and width.weight < 16
                wants_activation = method.activation.format != "none" and width.activation < 16
                wants_compensation = wants_activation and compensation not in ("none", "low_rank")
                wants_branch = wants_weight and compensation == "low_rank"
                module = block.linear(name)
                if not isinstance(module, QuantizedLinear):
                    if wants_weight or wants_activation:
                        wrong.append(f"{full}: still a {type(module).__name__}")
                    continue
                record = records[full]
                record.calls = module.calls
                record.tokens = module.source.tokens or module.source.passed
                if module.calls == 0:
                    wrong.append(f"{full}: never ran")
                elif wants_activation and module.source.tokens == 0:
                    wrong.append(f"{full}: its activation quantizer never ran")
                elif wants_activation and module.source.only and module.source.spared_all:
                    kinds = ", ".join(method.activation.modalities)
                    wrong.append(f"{full}: no token of {kinds} reached its activation quantizer")
                if wants_compensation and module.source.compensation is None:
                    wrong.append(f"{full}: no {method.compensation.name} compensation")
                wanted = wants_branch and has_branch(method.compensation, block.tower, group.name)
                if wanted and module.branch_up is None and module.branches is None:
                    wrong.append(f"{full}: no low-rank branch")
                if wants_weight and record.weight["bits"] >= 16:
                    wrong.append(f"{full}: weights stayed in {record.weight['bits']} bits")
                if module.source.elements:
                    rate = module.source.bypassed / module.source.elements
                    nominal = record.activation.get("base_bits", record.activation["bits"])
                    spent = nominal + (16 - nominal) * rate
                    if record.compensation.get("outlier_bits") == 8:
                        masked = record.compensation["masked_channels"] / record.in_features
                        spent += masked * (8 - nominal)
                    record.activation["effective_bits"] = spent
                    if record.compensation:
                        record.compensation["bypass_rate"] = rate
    if wrong:
        shown = "\n  ".join(wrong[:10])
        more = f"\n  and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise ManifestError(f"not everything in scope was quantized:\n  {shown}{more}")
