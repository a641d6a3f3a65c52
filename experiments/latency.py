"""What one decoder layer's linears take, in executions that can be told apart.

Timed per input group (q, k, v as one product; gate and up as one), with random weights and
activations of realistic spread: a few channels are 30 times larger and are compensated. Four
executions of the same layer:

- ``reference``: unquantized, in the dtype named;
- ``simulated``: fake quantization as accuracy is measured with it, never faster than the reference;
- ``integer``: codes, a product on 8-bit integers, scales, bias and the 16-bit panel of compensated
  channels, with the activation's rounding inside the timed region;
- ``integer product``: that product alone, which is what a kernel's advertisement shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from timeit import default_timer

import torch
from torch.utils.benchmark import Timer
from torch.utils.benchmark.utils.timer import timer as synchronized_timer

from morphoquant.quantization.activation import StaticQuantizer
from morphoquant.quantization.compensation import DynamicCompensation
from morphoquant.quantization.folding import fold_weight
from morphoquant.quantization.int8_product import pack
from morphoquant.quantization.integer_linear import IntegerLinear
from morphoquant.quantization.linear import GroupInput, QuantizedLinear
from morphoquant.quantization.ranges import StaticRange

OUTLIERS, FACTOR = 100, 30.0  # every hundredth channel is a larger one
Call = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class LayerShape:
    """The widths of one decoder layer (SPEC 4)."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int = 128

    def groups(self) -> dict[str, tuple[int, int]]:
        """Input group -> (outputs of its linears together, channels)."""
        queries = self.heads * self.head_dim
        return {
            "attn_in": (queries + 2 * self.kv_heads * self.head_dim, self.hidden),
            "attn_out": (self.hidden, queries),
            "mlp_in": (2 * self.intermediate, self.hidden),
            "mlp_out": (self.hidden, self.intermediate),
        }


@dataclass(frozen=True)
class SquareShape:
    """One linear of equal widths, as public kernels are timed with (SPEC 2.14, D-20)."""

    width: int

    def groups(self) -> dict[str, tuple[int, int]]:
        return {"linear": (self.width, self.width)}


SHAPES: dict[str, LayerShape | SquareShape] = {
    "3b": LayerShape(2048, 11008, 16, 2),
    "7b": LayerShape(3584, 18944, 28, 4),
    "8192": SquareShape(8192),
}


@dataclass
class Group:
    """One input group in every execution."""

    executions: dict[str, Call]
    """Name -> what is called with the activation [tokens, channels], float32."""
    channels: int
    kappa: int
    """Compensated channels."""


def make_group(
    outputs: int, channels: int, dtype: torch.dtype, device: torch.device, bits: int, seed: int
) -> Group:
    """The executions of one input group.

    Args:
        outputs, channels: of the linears that read it, together.
        dtype: of the reference.
        device: where everything lives.
        bits: of weights and activations.
        seed: of weights and activations.

    Raises:
        RuntimeError: integer path and simulation disagree.
    """
    draw = torch.Generator().manual_seed(seed)
    weight = (torch.randn(outputs, channels, generator=draw) / channels**0.5).to(device)
    x = activations(64, channels, device, seed)
    edge = x.abs().amax(0)
    chosen = StaticRange(-edge, edge, torch.zeros_like(edge, dtype=torch.bool))
    grid = chosen.grid(bits)
    mask = torch.zeros(channels, dtype=torch.bool, device=device)
    mask[::OUTLIERS] = True
    folded = fold_weight(weight, grid, mask, bits, group_size=None)
    integer = IntegerLinear(folded, grid).to(device)
    source = GroupInput(1)
    source.quantizer = StaticQuantizer(chosen, bits)
    source.compensation = DynamicCompensation(mask)
    simulated = QuantizedLinear(folded.dequantized, None, source)
    plain = torch.nn.Linear(channels, outputs, bias=False, device=device, dtype=dtype)
    plain.weight.data.copy_(weight)
    executions: dict[str, Call] = {
        "reference": lambda x: plain(x.to(dtype)),
        "simulated": simulated,
    }
    if integer.pack():
        executions["integer"] = integer
        product = pack(folded.codes, int(grid.low.min()), int(grid.high.max()))
        assert product is not None
        made: dict[int, torch.Tensor] = {}

        def alone(x: torch.Tensor) -> torch.Tensor:
            # Codes are made once per shape, outside the timed calls.
            if len(x) not in made:
                made[len(x)] = integer.quantize(x)
            return product(made[len(x)])

        executions["integer product"] = alone
        agree(simulated(x), integer(x))
    return Group(executions, channels, int(mask.sum()))


def activations(tokens: int, channels: int, device: torch.device, seed: int) -> torch.Tensor:
    """float32 [tokens, channels], every hundredth channel thirty times as large."""
    draw = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(tokens, channels, generator=draw)
    x[:, ::OUTLIERS] *= FACTOR
    return x.to(device)


def agree(simulated: torch.Tensor, integer: torch.Tensor) -> None:
    """What is timed must be what is simulated: equal but for the order of float32 sums.

    Raises:
        RuntimeError: it is not.
    """
    error = float((simulated - integer).norm() / simulated.norm())
    if not error < 1e-4:
        raise RuntimeError(f"integer path and simulation differ by {error:.1e} (relative)")


def time_layer(
    groups: dict[str, Group], tokens: int, device: torch.device, rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Milliseconds of one layer (its groups one after the other), per execution and round.

    Executions take turns within a round, so that a machine that slows down slows all of them.

    Args:
        groups: of the layer.
        tokens: rows of the activation: a prompt's in prefill, the batch's in decoding.
        device: where the groups are.
        rounds: measurements of every execution.
        seconds: about how long one measurement repeats the call.
    """
    inputs = {n: activations(tokens, g.channels, device, 7) for n, g in groups.items()}
    names = list(next(iter(groups.values())).executions)

    def layer(name: str) -> None:
        for group, found in groups.items():
            found.executions[name](inputs[group])

    timers = {
        name: Timer(
            "layer(name)",
            globals={"layer": layer, "name": name},
            num_threads=torch.get_num_threads(),
            timer=default_timer if device.type == "cpu" else synchronized_timer,
        )
        for name in names
    }
    once = {name: timer.timeit(1).mean for name, timer in timers.items()}  # and warms up
    found: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, timer in timers.items():
            repeats = max(1, min(1000, round(seconds / once[name])))
            found[name].append(1e3 * timer.timeit(repeats).mean)
    return found
