"""T2, T11: every rotation, alone and together, leaves a random full-architecture model as it was.

The model is the real thinker class in float64 with tiny sizes, and everything that a wrong
rotation could hide behind is made non-trivial: biases of the projectors, of v, q and k are
random, norm gains are far from one, grouped-query attention repeats values.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from morphoquant.compat import prepare_torchvision
from morphoquant.config.schema import BitsConfig, MethodConfig, TransformConfig
from morphoquant.models.qwen_omni import residual_stream
from morphoquant.models.structure import ResidualStream
from morphoquant.quantization.transforms import (
    RotatedInputLinear,
    RotationReport,
    TransformInput,
    apply_transform,
    rotate,
)
from morphoquant.quantization.transforms.check import largest_relative_change

HIDDEN, INTERMEDIATE, PATCH, MELS = 56, 96, 4, 16  # 28 * 2 and 12 * 8: no plain power of two
IMAGE, VIDEO, AUDIO, VISION_START, VISION_END, AUDIO_START, AUDIO_END = range(50, 57)
TOLERANCE = 1e-10


def build(tied: bool, in_float64: Callable[[Any], Any]) -> Any:
    """A random thinker in float64."""
    prepare_torchvision()
    from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

    config = Qwen2_5OmniThinkerConfig(
        text_config={
            "vocab_size": 64,
            "hidden_size": HIDDEN,
            "intermediate_size": INTERMEDIATE,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 256,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 3, 3],
            },
            "tie_word_embeddings": tied,
            "bos_token_id": None,
            "eos_token_id": 1,
            "pad_token_id": 0,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": PATCH,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 16,
            "out_hidden_size": HIDDEN,
            "fullatt_block_indexes": [1],
        },
        audio_config={
            "num_mel_bins": MELS,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "d_model": 16,
            "max_source_positions": 64,
            "n_window": 16,
            "output_dim": HIDDEN,
        },
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        audio_token_index=AUDIO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        audio_start_token_id=AUDIO_START,
        audio_end_token_id=AUDIO_END,
        tie_word_embeddings=tied,
        pad_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    model: Any = Qwen2_5OmniThinkerForConditionalGeneration(config).double().eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if name.endswith("bias"):
            parameter.normal_(0, 0.5)
        elif "norm" in name or "ln_" in name:
            parameter.uniform_(0.3, 2.5)
        else:
            parameter.normal_(0, 0.15)
    return in_float64(model)


def inputs(parts: str) -> dict[str, torch.Tensor]:
    """A prompt of text (t), an image (i), a clip (v) and a sound (a), in the order given."""
    generator = torch.Generator().manual_seed(sum(map(ord, parts)))

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    ids: list[int] = []
    found: dict[str, torch.Tensor] = {}
    for part in parts:
        if part == "t":
            ids += torch.randint(2, 50, (5,), generator=generator).tolist()
        elif part == "i":  # 4 x 4 patches, merged by 2 x 2
            ids += [VISION_START, *[IMAGE] * 4, VISION_END]
            found["pixel_values"] = noise(16, 3 * 2 * PATCH**2)
            found["image_grid_thw"] = torch.tensor([[1, 4, 4]])
        elif part == "v":
            ids += [VISION_START, *[VIDEO] * 8, VISION_END]
            found["pixel_values_videos"] = noise(32, 3 * 2 * PATCH**2)
            found["video_grid_thw"] = torch.tensor([[2, 4, 4]])
            found["video_second_per_grid"] = torch.tensor([1.0])
        elif part == "a":  # 24 mel frames, halved by a convolution and by pooling
            ids += [AUDIO_START, *[AUDIO] * 6, AUDIO_END]
            found["input_features"] = noise(1, MELS, 32)
            mask = torch.zeros(1, 32, dtype=torch.long)
            mask[:, :24] = 1
            found["feature_attention_mask"] = mask
    found["input_ids"] = torch.tensor([ids])
    found["attention_mask"] = torch.ones_like(found["input_ids"])
    return found


PROMPTS = {
    "text": "tt",
    "image": "tit",
    "video": "tvt",
    "audio": "tat",
    "mixed": "tatitvt",
}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def original(request: pytest.FixtureRequest, in_float64: Any) -> Any:
    return build(request.param, in_float64)


@pytest.fixture(scope="module")
def before(original: Any) -> dict[str, torch.Tensor]:
    return {name: logits(original, parts) for name, parts in PROMPTS.items()}


def logits(model: Any, parts: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(parts)).logits


def rotated(model: Any, **chosen: bool) -> tuple[Any, ResidualStream, RotationReport]:
    switches = {"r1": False, "r2": False, "r4": False} | chosen
    changed = copy.deepcopy(model)
    stream = residual_stream(changed)
    report = rotate(stream, TransformConfig(name="rotate", seed=3, **switches))
    return changed, stream, report


CHOICES = {
    "r1": {"r1": True},
    "r2": {"r2": True},
    "r4": {"r4": True},
    "all": {"r1": True, "r2": True, "r4": True},
}


def test_the_prompts_reach_every_tower(original: Any, before: dict[str, torch.Tensor]) -> None:
    """Else the tests below would prove nothing about projectors: media change the outputs."""
    for name, key in (
        ("image", "pixel_values"),
        ("video", "pixel_values_videos"),
        ("audio", "input_features"),
    ):
        other = inputs(PROMPTS[name])
        other[key] = other[key] + 1
        with torch.no_grad():
            assert largest_relative_change(before[name], original(**other).logits) > 1e-3


@pytest.mark.parametrize("choice", CHOICES)
def test_logits_do_not_move(original: Any, before: dict[str, torch.Tensor], choice: str) -> None:
    changed, _, report = rotated(original, **CHOICES[choice])
    for name, parts in PROMPTS.items():
        assert largest_relative_change(before[name], logits(changed, parts)) <= TOLERANCE, name
    assert {key for key in ("r1", "r2", "r4") if getattr(report, key)} == set(CHOICES[choice])


@pytest.mark.parametrize("choice", CHOICES)
def test_weights_do_move(original: Any, choice: str) -> None:
    changed, _, _ = rotated(original, **CHOICES[choice])
    touched = {
        "r1": "self_attn.q_proj.weight",
        "r2": "self_attn.v_proj.bias",
        "r4": "mlp.down_proj.linear.weight",
    }
    old, new = dict(original.named_parameters()), dict(changed.named_parameters())
    decoder = [name for name in new if "visual" not in name and "audio" not in name]
    for rotation in CHOICES[choice]:
        name = next(name for name in decoder if name.endswith(touched[rotation]))
        assert not torch.allclose(old[name.replace(".linear.", ".")], new[name])


def test_biases_matter(original: Any, before: dict[str, torch.Tensor]) -> None:
    """Regression for the bug of other implementations: projector biases left unrotated."""
    changed, stream, _ = rotated(original, r1=True)
    kept = residual_stream(original)
    names = ("image", "audio")
    for name, now, then in zip(names, stream.projectors, kept.projectors, strict=True):
        right = now.bias.data.clone()
        now.bias.data.copy_(then.bias.data)
        assert largest_relative_change(before[name], logits(changed, PROMPTS[name])) > 1e-3
        now.bias.data.copy_(right)
    assert largest_relative_change(before["mixed"], logits(changed, PROMPTS["mixed"])) <= TOLERANCE


def test_decoding_with_a_cache_equals_prefill(original: Any) -> None:
    """T11: prompt first, then token by token, against everything at once."""
    changed, _, _ = rotated(original, r1=True, r2=True, r4=True)
    prompt = inputs(PROMPTS["mixed"])
    extra = torch.tensor([[7, 9, 11]])
    whole = dict(prompt)
    whole["input_ids"] = torch.cat([prompt["input_ids"], extra], dim=1)
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    with torch.no_grad():
        expected = original(**whole).logits
        assert largest_relative_change(expected, changed(**whole).logits) <= TOLERANCE
        out = changed(**prompt, use_cache=True)
        steps = [out.logits]
        for i in range(extra.shape[1]):
            out = changed(
                input_ids=extra[:, i : i + 1],
                past_key_values=out.past_key_values,
                use_cache=True,
            )
            steps.append(out.logits)
    assert largest_relative_change(expected, torch.cat(steps, dim=1)) <= TOLERANCE


def test_gains_are_folded_and_the_head_is_untied(in_float64: Any) -> None:
    model = build(True, in_float64)
    stream = residual_stream(model)
    shared = stream.lm_head.weight.data_ptr() == stream.embedding.weight.data_ptr()
    report = rotate(stream, TransformConfig(name="rotate"))
    assert report.untied == shared
    assert stream.lm_head.weight.data_ptr() != stream.embedding.weight.data_ptr()
    for norm, _ in stream.consumers():
        assert torch.equal(norm.weight, torch.ones_like(norm.weight))  # type: ignore[arg-type]


def test_down_projection_is_wrapped_and_its_input_rotated(original: Any) -> None:
    changed, stream, _ = rotated(original, r4=True)
    layer = stream.layers[0]
    wrapped = layer.block.linear("mlp.down_proj")
    assert isinstance(wrapped, RotatedInputLinear)
    assert isinstance(wrapped.linear, nn.Linear)
    seen: list[torch.Tensor] = []
    wrapped.linear.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    x = torch.zeros(1, 1, INTERMEDIATE, dtype=torch.float64)
    x[..., 5] = 1.0
    wrapped(x)
    torch.testing.assert_close(seen[0].abs(), torch.full_like(x, INTERMEDIATE**-0.5))
    with pytest.raises(ValueError, match="rotated already"):
        rotate(residual_stream(changed), TransformConfig(name="rotate"))


def test_seed_decides_the_signs(original: Any) -> None:
    def head(seed: int) -> torch.Tensor:
        stream = residual_stream(copy.deepcopy(original))
        rotate(stream, TransformConfig(name="rotate", seed=seed))
        return stream.lm_head.weight

    assert torch.equal(head(0), head(0))
    assert not torch.equal(head(0), head(1))


def test_unknown_width_changes_nothing(original: Any) -> None:
    changed = copy.deepcopy(original)
    stream = residual_stream(changed)
    broken = ResidualStream(**{**vars(stream), "intermediate_size": 3420})
    with pytest.raises(ValueError, match="3420"):
        rotate(broken, TransformConfig(name="rotate"))
    for old, new in zip(original.parameters(), changed.parameters(), strict=True):
        assert torch.equal(old, new)


def test_dtype_of_parameters_is_kept(original: Any) -> None:
    model = copy.deepcopy(original).to(torch.bfloat16)
    rotate(residual_stream(model), TransformConfig(name="rotate"))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_dispatch(fresh_omni: Any) -> None:
    def apply(name: Any) -> Any:
        method = MethodConfig(name=name, transform=TransformConfig(name=name))
        return apply_transform(TransformInput(fresh_omni, method, BitsConfig(), (), ()))

    before = fresh_omni.residual_stream().lm_head.weight.clone()
    assert apply("none") is None
    assert torch.equal(fresh_omni.residual_stream().lm_head.weight, before)
    report = apply("rotate")
    assert report.name == "rotate"
    assert not torch.equal(fresh_omni.residual_stream().lm_head.weight, before)


def test_largest_relative_change() -> None:
    before = torch.tensor([1.0, -4.0])
    assert largest_relative_change(before, before) == 0.0
    assert largest_relative_change(before, torch.tensor([1.5, -4.0])) == pytest.approx(0.125)
    assert largest_relative_change(torch.zeros(2), torch.zeros(2)) == 0.0
    assert largest_relative_change(torch.zeros(2), torch.ones(2)) == float("inf")
    assert not largest_relative_change(before, torch.tensor([float("nan"), 0.0])) <= 1.0
    with pytest.raises(ValueError, match="cannot compare"):
        largest_relative_change(before, torch.zeros(3))
