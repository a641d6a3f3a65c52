"""The vocabulary of a run: typed, frozen, validated before anything expensive is imported.

Hydra composes plain YAML; :func:`morphoquant.config.load` turns the result into a
:class:`RunConfig`. Everything downstream takes these objects and never a raw dictionary, so a
misspelt field or a value out of range is refused by name, in well under a second.

A quantization method is four choices (transform, weight, activation, compensation) and nothing
else; see :class:`MethodConfig`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Bits = Literal[2, 3, 4, 5, 6, 7, 8, 16]
PositiveInt = Annotated[int, Field(ge=1)]
Rule = Literal["local", "global", "top_share"]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Strict(BaseModel):
    """Frozen model that refuses unknown fields and silent type conversions."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


# ------------------------------------------------------------------------------- model


class ScopeConfig(Strict):
    """Which linears are quantized. lm_head, embeddings and the talker never are."""

    decoder: bool = True
    vision: bool = False
    audio: bool = False


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
    threads: PositiveInt | None = None
    """CPU threads of torch; null leaves torch's own choice (one per core)."""
    attention: Literal["eager", "sdpa", "flash_attention_2"] = "sdpa"
    system_prompt: str | None = None
    trust_remote_code: bool = False
    scope: ScopeConfig = ScopeConfig()
    media: MediaConfig = MediaConfig()


# ------------------------------------------------------------------------------- method


class TransformConfig(Strict):
    """Slot 1: how the network is rewritten first, with its function unchanged."""

    name: Literal["none", "rotate"] = "none"
    r1: bool = True
    r2: bool = True
    r4: bool = True
    seed: Annotated[int, Field(ge=0)] = 0
    tolerance: Annotated[float, Field(gt=0.0)] = 1e-4
    """Largest relative change of the unquantized logits (fp32) that is still 'unchanged'."""


class WeightConfig(Strict):
    """Slot 2: on which grid the weights land, and by which algorithm."""

    format: Literal["none", "int", "nf4"] = "none"
    algorithm: Literal["rtn"] = "rtn"
    granularity: Literal["per_tensor", "per_channel", "per_group"] = "per_channel"
    group_size: PositiveInt = 128
    symmetric: bool = True
    clip: Literal["minmax", "mse"] = "minmax"
    double_quantization: bool = True
    """NF4 only: block scales are themselves stored in 8 bits (QLoRA)."""
    fallback_format: Literal["int"] | None = None
    """NF4 exists at 4 bits only; the format used at other widths, or null to refuse them."""
    fold: bool = False
    """Integers only: fold static channel scales of the activation into the weight before it is
    rounded, and keep compensated channels' columns in 16 bits: the deployable path (SPEC 2.11)."""


class RangeConfig(Strict):
    """Where the clipping range of an activation comes from."""

    name: Literal["minmax", "mdqfo"] = "minmax"
    clip_ratio: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Factor on the min-max range (QuaRot's paper uses 0.9)."""
    masked_edge: Literal["far", "near"] = "far"
    """Where dynamically compensated channels of both signs start: at max(|lo|, |hi|), or at
    min(|lo|, |hi|), since what lies beyond is returned anyway (SPEC 2.6)."""
    shrink: Literal["far_edge", "towards_zero"] = "far_edge"
    """How a range of one sign shrinks: from its far edge, or (wasting levels) both edges times
    the ratio, as the public implementation does."""
    # --- MDQFO (SPEC 2.7): search over shrink ratios
    search: bool = True
    optimizer: Literal["grid", "gradient"] = "grid"
    """Try every ratio of a grid, or learn ratios by gradient steps (straight-through)."""
    p: Annotated[float, Field(gt=0.0, le=8.0)] = 2.0
    normalize: bool = True
    """Divide the error by the activation's own p-norm, so that the cosine's weight means the same
    in every layer; false takes the mean of |error|^p as it is."""
    cosine_weight: Annotated[float, Field(ge=0.0)] = 0.0
    cosine: Literal["channel", "token"] = "channel"
    """Of a channel's values over all tokens, or of a token's values over all channels."""
    ratio_per: Literal["channel", "mask_group"] = "channel"
    """One ratio for every channel, or one for all masked and one for all other channels."""
    output_weighting: bool = False
    """Weigh channels by the squared norm of the weight columns that read them."""
    candidates: Annotated[int, Field(ge=1, le=1000)] = 15
    min_ratio: Annotated[float, Field(gt=0.0, le=1.0)] = 0.6
    accumulate: Literal["sum", "ema"] = "sum"
    """Over batches: exact sums, or a moving average that depends on their order."""
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.5
    upstream: Literal["unquantized", "quantized"] = "unquantized"
    """What the search sees: activations behind unquantized or behind quantized activations."""
    steps: PositiveInt = 10
    """Gradient: steps per search batch."""
    learning_rate: Annotated[float, Field(gt=0.0)] = 0.02
    chunk_mb: PositiveInt = 256
    """Upper bound of the search's working memory, MiB."""


class ActivationConfig(Strict):
    """Slot 3: on which grid the activations land, with which granularity and range."""

    format: Literal["none", "int"] = "none"
    granularity: Literal["per_tensor", "per_token", "per_channel", "per_group"] = "per_token"
    mode: Literal["dynamic", "static"] = "dynamic"
    symmetric: bool = True
    grid: Literal["restricted", "full", "sym15"] = "restricted"
    """Symmetric grid: codes -Q..Q, -Q-1..Q at the same step, or -Q-1..Q with step 2a/(2^b-1)."""
    affine_when_sign_constant: bool = False
    """Static per channel: channels that never change sign get a grid over [lo, hi] (SPEC 2.6)."""
    group_size: PositiveInt = 128
    range: RangeConfig = RangeConfig()


class MaskConfig(Strict):
    """Which input channels count as long-tailed outliers (SPEC 2.2, 2.3)."""

    score: Literal["log1p", "mean", "log_l1", "log_mean", "absmax"] = "log1p"
    rules: tuple[Rule, ...] = Field(default=("local",), strict=False)
    """A channel is marked when one of them marks it. ``local``: score >= mean + std_threshold *
    std within its layer; ``global``: the same over all layers; ``top_share``: the layer's best."""
    std_threshold: float = 2.0
    pooling: Literal["channels", "layers"] = "channels"
    """Global: over all channels of all linears, or the mean of the layers' means and deviations."""
    top_share: Share = 0.05
    max_share: Share = 0.03
    """Cap on the share of a layer's channels that rules may mark; the highest scores win."""
    modalities: Literal["pooled", "union"] = "pooled"
    """Score all tokens together, or each modality by itself and join the marks."""
    all_channels: tuple[str, ...] = Field(default=(), strict=False)
    """Linears (patterns such as ``*.down_proj``) whose channels are all marked, past the cap."""


class CompensationConfig(Strict):
    """Slot 4: what is done about what the grid lost."""

    name: Literal["none", "dabc", "static_bias"] = "none"
    reading: Literal["channel", "element"] = "channel"
    """DABC: all of a masked channel's residual (paper eq. 7) or only elements past the gate."""
    gate: Annotated[float, Field(ge=0.0)] = 1.0
    """Element reading: an element bypasses when |x| > gate * range edge (SPEC 2.4, gamma)."""
    per_modality: bool = False
    """Static bias: one vector for every modality, or one for all tokens (SPEC 2.5)."""
    mask: MaskConfig = MaskConfig()


class MethodConfig(Strict):
    """A quantization method is a sentence of four words. The defaults say ``fp16``."""

    name: str = "fp16"
    reference: str | None = None
    """Where the method was published."""
    transform: TransformConfig = TransformConfig()
    weight: WeightConfig = WeightConfig()
    activation: ActivationConfig = ActivationConfig()
    compensation: CompensationConfig = CompensationConfig()

    @property
    def quantizes(self) -> bool:
        """False for the unquantized reference (whatever its transform)."""
        return self.weight.format != "none" or self.activation.format != "none"


class BitsConfig(Strict):
    """Nominal widths. 16 means: left as it is, bit for bit."""

    weight: Bits = 16
    activation: Bits = 16

    @property
    def scheme(self) -> str:
        return f"w{self.weight}a{self.activation}"


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
    batch_size: PositiveInt = 8
    seed: int = 0
    allow_leakage: bool = False
    """Let samples be calibrated on and evaluated. Only under a name that says that it leaks."""


class BenchmarkConfig(Strict):
    name: str
    tasks: tuple[str, ...] = Field(strict=False, min_length=1)
    """Names of task files under ``morphoquant/evaluation/tasks``."""
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


class PathsConfig(Strict):
    runs: str = "runs"
    cache: str = ".cache/morphoquant"


class StatisticsConfig(Strict):
    """Per-modality outlier statistics, collected in the walk for every method."""

    enabled: bool = True
    outlier_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.01
    """Share of a layer's channels that counts as its outlier set, for overlaps."""
    histograms: bool = True
    """Quantiles of |x| and shares of massive tokens, per layer and modality."""
    probes: Annotated[int, Field(ge=0)] = 4
    """Calibration prompts of every modality on which errors are measured; 0 measures none."""
    figures: bool = True


class RunConfig(Strict):
    model: ModelConfig
    method: MethodConfig
    bits: BitsConfig
    calibration: CalibrationConfig
    benchmark: BenchmarkConfig
    tracker: TrackerConfig = TrackerConfig()
    statistics: StatisticsConfig = StatisticsConfig()
    paths: PathsConfig = PathsConfig()
    reference: bool = True
    """Measure the unquantized model in the same harness too (once per sweep)."""
    report: Literal["comparison", "ablation", "table3"] = "comparison"
    """Which table a sweep ends in."""
    seed: int = 0

    @model_validator(mode="after")
    def _choices_fit(self) -> RunConfig:
        from morphoquant.config.rules import check

        check(self)
        return self
