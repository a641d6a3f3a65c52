"""Tokenizer and processor of the small model: the real ``Qwen2_5OmniProcessor``, in small.

64 px images become 16 tokens, clips of eight 48 px frames 36, and 1.28 s of audio 32.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from morphoquant.compat import prepare_torchvision
from morphoquant.embedded import clips, pictures

PATCH = 8  # pixels
MEL_BINS = 64
AUDIO_CHUNK = 2  # seconds that every audio is padded to
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>",
    "<|vision_bos|>", "<|vision_eos|>", "<|IMAGE|>", "<|VIDEO|>",
)  # fmt: skip
NAMED_TOKENS = {
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_bos|><|IMAGE|><|vision_eos|>"
    "{% elif part['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>"
    "{% elif part['type'] == 'video' %}<|vision_bos|><|VIDEO|><|vision_eos|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: The processor's class has a video size of its own that wins over the saved one: pass these.
VIDEO_KWARGS: dict[str, Any] = {
    "size": {"shortest_edge": clips.SIZE**2, "longest_edge": clips.SIZE**2},
    "fps": float(clips.FPS),
    "do_sample_frames": False,
}


def build_tokenizer(corpus: Iterable[str]) -> Any:
    """A byte-level BPE tokenizer trained on ``corpus``; one or two digits are one token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = r"[^\r\n\p{L}\p{N}]?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]|\s+"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=NAMED_TOKENS,
        padding_side="left",
        model_max_length=2048,
        chat_template=CHAT_TEMPLATE,
    )


def build_processor(tokenizer: Any) -> Any:
    """The ``Qwen2_5OmniProcessor`` of the small model around ``tokenizer``."""
    prepare_torchvision()
    from transformers import (
        Qwen2_5OmniProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
        WhisperFeatureExtractor,
    )

    def area(edge: int) -> dict[str, int]:
        return {"shortest_edge": edge * edge, "longest_edge": edge * edge}

    patches = {"patch_size": PATCH, "temporal_patch_size": 2, "merge_size": 2}
    return Qwen2_5OmniProcessor(
        image_processor=Qwen2VLImageProcessor(size=area(pictures.SIZE), **patches),
        video_processor=Qwen2VLVideoProcessor(
            size=area(clips.SIZE),
            min_frames=clips.FRAMES,
            max_frames=clips.FRAMES,
            do_sample_frames=False,
            cap_pixels_per_frame=False,
            fps=float(clips.FPS),
            **patches,
        ),
        feature_extractor=WhisperFeatureExtractor(
            feature_size=MEL_BINS,
            sampling_rate=16000,
            hop_length=160,
            n_fft=400,
            chunk_length=AUDIO_CHUNK,
            return_attention_mask=True,
        ),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    )
