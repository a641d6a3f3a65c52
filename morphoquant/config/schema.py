"""The vocabulary of a run: typed, frozen, validated before anything expensive is imported.

Hydra composes plain YAML; :func:`morphoquant.config.load` turns the result into a
:class:`RunConfig`. Everything downstream takes these objects and never a raw dictionary, so a
misspelt field or a value out of range is refused by name, in well under a second.

A quantization method is four choices (transform, weight, activation, compensation) and nothing
else; see :class:`MethodConfig`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from morphoquant.config.base import Bits, PositiveInt, Strict
from morphoquant.config.method import (
    ActivationConfig,
    CompensationConfig,
    MaskConfig,
    MethodConfig,
    RangeConfig,
    TransformConfig,
    WeightConfig,
)

__all__ = [
    "ActivationConfig",
    "BenchmarkConfig",
    "Bits",
    "BitsConfig",
    "CalibrationConfig",
    "CalibrationSource",
    "CompensationConfig",
    "MaskConfig",
    "MediaConfig",
    "MethodConfig",
    "ModelConfig",
    "PathsConfig",
    "RangeConfig",
    "RunConfig",
    "ScopeConfig",
    "SensitivityConfig",
    "StatisticsConfig",
    "Strict",
    "TrackerConfig",
    "TransformConfig",
    "WeightConfig",
    "WidthOverride",
]

# ------------------------------------------------------------------------------- model


class ScopeConfig(Strict):
    """Which linears are quantized. lm_head, embeddings and the talker never are."""

    decoder: bool = True
    vision: bool = False
    audio: bool = False
    only: tuple[str, ...] = Field(default=(), strict=False)
    """Patterns of linears' names (``*.mlp.down_proj``): those that none of them matches are out of
    scope and stay as they are. Empty takes every linear of the towers above."""


class MediaConfig(Strict):
    """How pictures, clips and sound become tensors; null leaves the processor's own setting."""

    image_min_pixels: PositiveInt | None = None
    image_max_pixels: PositiveInt | None = None
    video_min_pixels: PositiveInt | None = None
    video_max_pixels: PositiveInt | None = None
    video_max_frames: Annotated[int, Field(ge=2)] = 32
    video_fps: Annotated[float, Field(gt=0.0)] = 2.0
    """Frames per second taken from a clip, before the cap of ``video_max_frames``."""


class ModelConfig(Strict):
    name: str
    family: Literal["qwen2_5_omni"] = "qwen2_5_omni"
    path: str
    """A local folder, a hub id, or ``embedded:<name>`` for weights that ship with the package."""
    revision: str | None = None
    dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    device_map: Literal["auto", "balanced", "sequential"] | None = None
    """Spread the model over all GPUs that are seen; null puts it on one. ``balanced`` (and
    ``auto``) evens memory out, ``sequential`` fills one GPU after the other."""
    max_memory: dict[int | str, str] | None = None
    """With ``device_map``: what a GPU may hold, e.g. ``{0: 20GiB, 1: 40GiB}``; null: what is free.
    Calibration needs room beside the weights."""
    threads: PositiveInt | None = None
    """CPU threads of torch; null leaves torch's own choice (one per core)."""
    attention: Literal["eager", "sdpa", "flash_attention_2"] = "sdpa"
    system_prompt: str | None = None
    trust_remote_code: bool = False
    scope: ScopeConfig = ScopeConfig()
    media: MediaConfig = MediaConfig()


# ------------------------------------------------------------------------------- widths


class WidthOverride(Strict):
    """Other widths for some linears; null keeps what is said elsewhere."""

    linears: str
    """Pattern of their names, such as ``model.layers.3.*``."""
    weight: Bits | None = None
    activation: Bits | None = None
    """The same for all linears that read one activation."""


class BitsConfig(Strict):
    """Nominal widths. 16 means: left as it is, bit for bit."""

    weight: Bits = 16
    activation: Bits = 16
    kv: Bits = 16
    """Of cached keys and values."""
    overrides: tuple[WidthOverride, ...] = Field(default=(), strict=False)
    """Mixed precision by linear; of two that match a linear the later one holds. Transforms that
    search or learn do so at the widths above."""

    @property
    def scheme(self) -> str:
        """``w4a4``; with overrides ``w4a4mix-`` and a hash that tells one mixture from another."""
        cache = f"kv{self.kv}" if self.kv < 16 else ""
        mixed = ""
        if self.overrides:
            told = "\n".join(o.model_dump_json() for o in self.overrides)
            mixed = f"mix-{hashlib.sha256(told.encode()).hexdigest()[:4]}"
        return f"w{self.weight}a{self.activation}{cache}{mixed}"

    def at(self, linear: str) -> BitsConfig:
        """The widths of one linear, by its full name, without overrides."""
        weight, activation = self.weight, self.activation
        for override in self.overrides:
            if fnmatchcase(linear, override.linears):
                weight = weight if override.weight is None else override.weight
                activation = activation if override.activation is None else override.activation
        return BitsConfig(weight=weight, activation=activation, kv=self.kv)

    def of(self, linears: Iterable[str]) -> BitsConfig:
        """The widths of linears that read one activation: its own, and the lowest of theirs."""
        return min((self.at(name) for name in linears), key=lambda bits: bits.weight)

    @property
    def lowest(self) -> BitsConfig:
        """The smallest width of each side that any linear may have, without overrides."""
        weights = [o.weight for o in self.overrides if o.weight is not None]
        activations = [o.activation for o in self.overrides if o.activation is not None]
        weight: Bits = min([self.weight, *weights])
        activation: Bits = min([self.activation, *activations])
        return BitsConfig(weight=weight, activation=activation, kv=self.kv)


# ------------------------------------------------------------------------------- data


class CalibrationSource(Strict):
    """One data set that calibration samples are drawn from."""

    reader: Literal["mmmu", "scienceqa", "videomme", "air_bench"]
    """The column schema, which decides how a row becomes a prompt."""
    path: str
    """A folder written by ``datasets.save_to_disk``, a hub id, or ``mini:<set>``."""
    config: str | None = None
    split: str = "calibration"
    videos: str | None = None
    """Folder of the clips (videomme only)."""


class CalibrationConfig(Strict):
    name: str
    sources: tuple[CalibrationSource, ...] = Field(strict=False)
    samples: PositiveInt = 128
    """Prompts for statistics, masks and initial ranges, drawn round-robin over the sources."""
    search_samples: Annotated[int, Field(ge=0)] = 32
    """Further prompts, disjoint from the first, for the range search; 0 searches on the first."""
    held_out_samples: Annotated[int, Field(ge=0)] = 0
    """Further prompts, disjoint from both, that only measure: the quantized model's divergence
    from the original. 0 measures none."""
    batch_size: PositiveInt = 8
    seed: int = 0
    allow_leakage: bool = False
    """Let samples be calibrated on and evaluated. Only under a name that says that it leaks."""


class BenchmarkConfig(Strict):
    name: str
    tasks: tuple[str, ...] = Field(strict=False)
    """Rows of ``morphoquant/evaluation/tasks.py``; none (benchmark=none) asks nothing."""
    held_out: bool = False
    """Its questions are for choosing hyper-parameters: no benchmark scores them."""
    data_root: str | None = None
    """Folder with local copies (``<data_root>/<set>``); null takes the hub (or, mini, builds)."""
    limit: PositiveInt | None = None
    """First n questions of every task; null takes all."""
    batch_size: PositiveInt = 16


# ------------------------------------------------------------------------------- record


class TrackerConfig(Strict):
    name: Literal["wandb", "none"] = "wandb"
    mode: Literal["offline", "online"] = "offline"
    project: str = "morphoquant"
    entity: str | None = None
    group: str | None = None

    @field_validator("project")
    @classmethod
    def _is_a_name(cls, value: str) -> str:
        """wandb would refuse it only after the model was loaded."""
        if not 0 < len(value) <= 128 or set(value) & set("/\\#?%:"):
            raise ValueError(
                f"{value!r} is no name of a wandb project: 1 to 128 characters without / \\ # ? % :"
                " (the team is tracker.entity)"
            )
        return value


class PathsConfig(Strict):
    runs: str = "runs"
    cache: str = ".cache/morphoquant"
    share_artifacts: bool = True
    """Keep encoded calibration prompts, activation statistics and content hashes below ``cache``
    for other runs; false computes everything and keeps nothing."""
    cache_limit_gb: Annotated[float, Field(gt=0.0)] = 20.0
    """GiB that these may take together; what was not used for longest goes first."""


class StatisticsConfig(Strict):
    """Per-modality outlier statistics, collected in the walk for every method."""

    enabled: bool = True
    unquantized: bool = False
    """For the unquantized model too. It is then another run for every calibration; without, one
    reference serves every calibration and method."""
    outlier_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.01
    """Share of a layer's channels that counts as its outlier set, for overlaps."""
    histograms: bool = True
    """Quantiles of |x| and shares of massive tokens, per layer and modality."""
    probes: Annotated[int, Field(ge=0)] = 4
    """Calibration prompts of every modality on which errors are measured; 0 measures none."""
    kl_probes: PositiveInt = 2
    """Calibration prompts of every modality on which the next token's distribution is compared with
    the unquantized model's (KL divergence)."""
    figures: bool = True


class SensitivityConfig(Strict):
    """What the report ``sensitivity`` suggests from its measurements."""

    budget: Annotated[float, Field(ge=2.0, le=16.0)] = 6.0
    """Upper bound of the average effective bits, of weights and of activations each."""
    widths: tuple[Bits, ...] = Field(default=(4, 8, 16), strict=False, min_length=1)
    """Widths to choose from, besides those that were measured."""


class RunConfig(Strict):
    model: ModelConfig
    method: MethodConfig
    bits: BitsConfig
    calibration: CalibrationConfig
    benchmark: BenchmarkConfig
    tracker: TrackerConfig = TrackerConfig()
    statistics: StatisticsConfig = StatisticsConfig()
    sensitivity: SensitivityConfig = SensitivityConfig()
    paths: PathsConfig = PathsConfig()
    reference: bool = True
    """Measure the unquantized model in the same harness too (once per sweep)."""
    report: Literal["comparison", "ablation", "table1", "table3", "trials", "sensitivity"] = (
        "comparison"
    )
    """Which table a sweep ends in."""
    objective: Literal["kl", "held_out_accuracy"] | None = None
    """What a run hands to a sweeper that optimises, never a benchmark's accuracy. ``kl``: of
    next-token distributions on calibration.held_out_samples (less is better);
    ``held_out_accuracy``: on a benchmark that is held out (more is better)."""
    seed: int = 0

    @model_validator(mode="after")
    def _choices_fit(self) -> RunConfig:
        from morphoquant.config.rules import check

        check(self)
        return self
