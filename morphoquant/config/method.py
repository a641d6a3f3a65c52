"""A quantization method is a sentence of four words: the slots, and what can stand in each."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from morphoquant.config.base import PositiveInt, Share, Strict

Rule = Literal["local", "global", "top_share", "rotated_mean"]
TokenKind = Literal["text", "image", "video", "audio"]
TOKEN_KINDS: tuple[TokenKind, ...] = ("text", "image", "video", "audio")


class TransformConfig(Strict):
    """Slot 1: how the network is rewritten first, with its function unchanged."""

    name: Literal["none", "rotate", "spin", "smooth", "modality_smooth"] = "none"
    """``spin`` rotates with learned R1 and R2, ``smooth`` moves scales from activations into
    weights (SmoothQuant, AWQ, MBQ), ``modality_smooth`` learned ones for every kind of token."""
    # --- rotate, spin
    r1: bool = True
    """Of the residual stream."""
    r2: bool = True
    """Of every head's values."""
    r3: bool = False
    """Of queries and keys while the model runs; it matters for the cache (bits.kv) only."""
    r4: bool = True
    """Of the down projection's input, while the model runs."""
    block_diagonal: bool = False
    """Where a width has no known Hadamard matrix, use blocks of the largest power of two."""
    seed: Annotated[int, Field(ge=0)] = 0
    # --- spin, modality_smooth
    steps: Annotated[int, Field(ge=0)] = 100
    learning_rate: Annotated[float, Field(gt=0.0)] = 1.5
    batch_size: PositiveInt = 8
    # --- smooth, modality_smooth
    formula: Literal["smoothquant", "awq"] = "smoothquant"
    """max|X|^alpha / max|W|^(1-alpha), or the normalised mean|X|^alpha."""
    alpha: Share = 0.5
    """The exponent where none is searched."""
    search: bool = False
    """Choose every group's exponent by the error of the part of the block behind it."""
    loss: Literal["mse", "mae"] = "mse"
    balance: Literal["none", "mean", "gradient"] = "none"
    """Tokens count alike, modalities do, or media tokens count by their gradients (MBQ)."""
    groups: tuple[Literal["attn_in", "attn_out", "mlp_in", "mlp_out"], ...] = Field(
        default=("attn_in", "mlp_in"), strict=False
    )
    """Input groups that are smoothed; through norms, v and up."""
    grouped_attn_out: bool = False
    """Smooth ``attn_out`` under grouped-query attention too: query heads share their scales."""
    # --- modality_smooth
    joint_vision: bool = True
    """Pictures and clips share scales (as published), or each have their own."""
    tokens: PositiveInt = 256
    """Calibration tokens of every kind that scales are learned from."""
    tolerance: Annotated[float, Field(gt=0.0)] = 1e-4
    """Largest relative change of the unquantized logits (fp32) that is still 'unchanged'."""


FIXED_WIDTH = {"nf4": 4, "fp4": 4, "mxfp4": 4, "nvfp4": 4, "hif4": 4, "hif8": 8}
"""Formats that exist at one width only."""


class WeightConfig(Strict):
    """Slot 2: on which grid the weights land, and by which algorithm."""

    format: Literal["none", "int", "nf4", "fp4", "mxfp4", "nvfp4", "hif4", "hif8"] = "none"
    """All but ``int`` have one width, blocks and scales of their own (SPEC 1.5)."""
    algorithm: Literal["rtn", "gptq"] = "rtn"
    act_order: bool = False
    """GPTQ: columns in falling order of what reads them."""
    damping: Annotated[float, Field(gt=0.0)] = 0.01
    """GPTQ: on the Hessian's diagonal, in units of its mean."""
    balanced: bool = False
    """GPTQ: every modality weighs the same in the Hessian, however many tokens it has."""
    granularity: Literal["per_tensor", "per_channel", "per_group"] = "per_channel"
    group_size: PositiveInt = 128
    symmetric: bool = True
    clip: Literal["minmax", "mse", "awq"] = "minmax"
    """``mse`` shrinks ranges by the weight's own error, ``awq`` by the output's (not of q, k)."""
    double_quantization: bool = True
    """NF4 and FP4: block scales are themselves stored in 8 bits (QLoRA)."""
    fallback_format: Literal["int"] | None = None
    """A format of one width: what is used at other widths, or null to refuse them."""
    fold: bool = False
    """Integers only: fold static channel scales of the activation into the weight before it is
    rounded, and keep compensated channels' columns in 16 bits: the deployable path (SPEC 2.11)."""


class RangeConfig(Strict):
    """Where the clipping range of an activation comes from."""

    name: Literal["minmax", "percentile", "mse", "mdqfo"] = "minmax"
    clip_ratio: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Factor on the min-max range (QuaRot's paper uses 0.9)."""
    percentile: Annotated[float, Field(gt=50.0, le=100.0)] = 99.99
    """Of |x|, for ranges per tensor or per modality."""
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

    format: Literal["none", "int", "mxfp4", "nvfp4", "hif4", "hif8"] = "none"
    """All but ``int`` have one width and scales of their own: dynamic, per group."""
    granularity: Literal["per_tensor", "per_modality", "per_token", "per_channel", "per_group"] = (
        "per_token"
    )
    mode: Literal["dynamic", "static"] = "dynamic"
    symmetric: bool = True
    grid: Literal["restricted", "full", "sym15"] = "restricted"
    """Symmetric grid: codes -Q..Q, -Q-1..Q at the same step, or -Q-1..Q with step 2a/(2^b-1)."""
    affine_when_sign_constant: bool = False
    """Static per channel: channels that never change sign get a grid over [lo, hi] (SPEC 2.6)."""
    group_size: PositiveInt = 128
    kv_group_size: PositiveInt | None = None
    """Of cached keys and values within a head; null takes the whole head."""
    kv_symmetric: bool = False
    modalities: tuple[TokenKind, ...] = Field(default=TOKEN_KINDS, strict=False, min_length=1)
    """Whose tokens are quantized; all others pass in 16 bits and count with 16. Ranges and masks
    are chosen on all tokens, so that a modality meets the grid that the whole method has."""
    range: RangeConfig = RangeConfig()

    @property
    def quantizes_some(self) -> bool:
        """Whether tokens of some modality pass as they are."""
        return set(self.modalities) != set(TOKEN_KINDS)


class MaskConfig(Strict):
    """Which input channels count as long-tailed outliers (SPEC 2.2, 2.3)."""

    score: Literal["log1p", "mean", "log_l1", "log_mean", "absmax", "random"] = "log1p"
    """``absmax`` is what Atom and LLM.int8() look at. ``random`` is the control: as many channels
    of a layer as ``log1p`` marks, drawn blindly."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the random draw."""
    rules: tuple[Rule, ...] = Field(default=("local",), strict=False)
    """A channel is marked when one of them marks it. ``local``: score >= mean + std_threshold *
    std within its layer; ``global``: the same over all layers; ``top_share``: the layer's best;
    ``rotated_mean``: channel 0 behind an online Hadamard matrix, where its weight column is an
    outlier (MQuant's RMS, SPEC 4.8), whatever its score and the cap."""
    std_threshold: float = 2.0
    pooling: Literal["channels", "layers"] = "channels"
    """Global: over all channels of all linears, or the mean of the layers' means and deviations."""
    top_share: Share = 0.05
    max_share: Share = 0.03
    """Cap on the share of a layer's channels that rules may mark; the highest scores win."""
    mean_share: Share = 0.05
    """Rotated mean: the column is an outlier where it holds the largest weight of at least this
    share of output channels (by chance it does in one of as many as there are inputs). At 0
    every such column is set apart, as MQuant's released code does."""
    modalities: Literal["pooled", "union"] = "pooled"
    """Score all tokens together, or each modality by itself and join the marks."""
    all_channels: tuple[str, ...] = Field(default=(), strict=False)
    """Linears (patterns such as ``*.down_proj``) whose channels are all marked, past the cap."""

    @property
    def by_weights(self) -> bool:
        """Whether marks follow from weights alone, before any activation is seen."""
        return set(self.rules) == {"rotated_mean"} and not self.all_channels


class CompensationConfig(Strict):
    """Slot 4: what is done about what the grid lost."""

    name: Literal["none", "dabc", "static_bias", "mixed_precision", "low_rank"] = "none"
    reading: Literal["channel", "element"] = "channel"
    """DABC: all of a masked channel's residual (paper eq. 7) or only elements past the gate."""
    gate: Annotated[float, Field(ge=0.0)] = 1.0
    """Element reading: an element bypasses when |x| > gate * range edge (SPEC 2.4, gamma)."""
    per_modality: bool = False
    """Static bias: one vector for every modality, or one for all tokens (SPEC 2.5). Low rank: one
    branch for every kind of token but text, beside one weight (SPEC 4.13)."""
    outlier_bits: Literal[8, 16] = 8
    """Mixed precision: width of masked channels, in activations and weights (Atom: 8)."""
    rank: PositiveInt = 32
    """Low rank: of the 16-bit branch beside every quantized linear."""
    rank_share: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Low rank: the rank as a share of the weight's smaller side, or null to take ``rank``."""
    order: Literal["before", "after"] = "after"
    """Low rank: taken out of the weight before it is rounded (SVDQuant), or fitted to what
    rounding lost."""
    whitened: bool = False
    """Low rank: least error of the outputs on calibration data, instead of the weight's own."""
    groups: tuple[Literal["attn_in", "attn_out", "mlp_in", "mlp_out"], ...] = Field(
        default=("attn_in", "attn_out", "mlp_in", "mlp_out"), strict=False
    )
    """Low rank: input groups of the decoder whose linears get a branch."""
    joint_vision: bool = True
    """Low rank per modality: pictures and clips share a branch (as published)."""
    text_branch: bool = False
    """Low rank per modality: a branch for text too, which MASQuant does without."""
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
