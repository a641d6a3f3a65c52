"""One adapter for the Qwen2.5-Omni family: loading, encoding, generation, structure.

It wraps the unmodified ``Qwen2_5OmniThinkerForConditionalGeneration`` and its processor. The
thinker loads from a full checkpoint's folder as well as from its own, and is all that reading
and answering need: the talker and the vocoder are never loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from morphoquant.compat import prepare_torchvision
from morphoquant.config.partial import in_scope
from morphoquant.config.schema import ModelConfig
from morphoquant.models import qwen_omni
from morphoquant.models.loading import ModelError, check
from morphoquant.models.media import SAMPLE_RATE, as_rgb, as_waveform, read_clip
from morphoquant.models.messages import Conversation, Generation
from morphoquant.models.placement import check_blocks, pick_device, plan
from morphoquant.models.structure import Block, ResidualStream, TokenLabels, Tower

Batch = dict[str, torch.Tensor]


def pick_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 on a GPU and float32 on a CPU."""
    if config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {
        "float64": torch.float64,
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }[config.dtype]


def check_finite(model: torch.nn.Module, path: str) -> None:
    """Refuse weights that hold NaN or infinite values: one of them makes every answer garbage.

    Raises:
        ModelError: naming the first such tensor and how many values are affected.
    """
    for name, parameter in model.named_parameters():
        bad = int((~torch.isfinite(parameter)).sum())
        if not bad:
            continue
        raise ModelError(
            f"model.path: {path!r} holds {bad} NaN or infinite values in {name} (of "
            f"{parameter.numel()}); download or convert the checkpoint again"
        )


class OmniAdapter:
    """A loaded model with everything the rest of the package asks of it."""

    def __init__(self, model: Any, processor: Any, config: ModelConfig) -> None:
        self.model = model
        self.processor = processor
        self.config = config

    @classmethod
    def load(cls, config: ModelConfig) -> OmniAdapter:
        """Check, then load weights and processor.

        Raises:
            ModelError: an unusable checkpoint (see :func:`morphoquant.models.loading.check`).
        """
        folder = check(config)
        prepare_torchvision()
        import transformers
        from transformers import Qwen2_5OmniProcessor, Qwen2_5OmniThinkerForConditionalGeneration

        transformers.utils.logging.disable_progress_bar()
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        device = pick_device(config)
        source: str | Path = folder if folder is not None else config.path
        options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
        if folder is None and config.revision:
            options["revision"] = config.revision
        try:
            processor = Qwen2_5OmniProcessor.from_pretrained(source, **options)
            dtype = pick_dtype(config, device)
            placed = plan(config, source, options, dtype)
            model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
                source,
                dtype=dtype,
                device_map=placed,
                attn_implementation=config.attention,
                use_safetensors=True,
                **options,
            )
        except OSError as error:
            raise ModelError(
                f"model.path: {config.path!r} could not be loaded: {error}. Without the hub, "
                f"download the checkpoint elsewhere and give its folder: model.path=FOLDER"
            ) from error
        check_finite(model, config.path)
        if placed is None:
            model.to(device)
        model.eval().requires_grad_(False)
        adapter = cls(model, processor, config)
        for tower in ("vision", "audio", "decoder") if placed else ():
            check_blocks(adapter.blocks(tower))  # type: ignore[arg-type]
        return adapter

    # ----------------------------------------------------------------- structure

    @property
    def device(self) -> torch.device:
        """Where prompts enter; a model may be spread over further devices."""
        found: torch.device = qwen_omni.text_model(self.model).embed_tokens.weight.device
        return found

    def blocks(self, tower: Tower) -> tuple[Block, ...]:
        """All blocks of a tower, each with its linears in scope (a block may have none)."""
        only = self.config.scope.only
        found = qwen_omni.blocks(self.model, tower)
        if not only:
            return found
        return tuple(block.narrowed(lambda name: in_scope(name, only)) for block in found)

    def input_groups(self) -> list[list[str]]:
        """Full names of the linears of every input group of the towers in scope."""
        towers: tuple[Tower, ...] = ("vision", "audio", "decoder")
        return [
            block.names(group)
            for tower in towers
            if getattr(self.config.scope, tower)
            for block in qwen_omni.blocks(self.model, tower)
            for group in block.groups
        ]

    def residual_stream(self) -> ResidualStream:
        return qwen_omni.residual_stream(self.model)

    def untie_head(self) -> bool:
        return qwen_omni.untie_head(self.model)

    def modality_map(self, batch: Batch) -> torch.Tensor:
        """int8 [batch, tokens]; see :func:`morphoquant.models.qwen_omni.modality_map`."""
        return qwen_omni.modality_map(
            self.model.config, batch["input_ids"], batch["attention_mask"]
        )

    def follow_labels(self, labels: TokenLabels) -> None:
        """Keep ``labels`` at the modality of the tokens of every forward pass from now on.

        While an answer is written the pass holds the new tokens only, which are text.
        """

        def note(_module: Any, _args: Any, inputs: dict[str, Any]) -> None:
            tokens = inputs.get("input_ids")
            if tokens is None:
                labels.current = None
                return
            mask = inputs.get("attention_mask")
            seen = torch.ones_like(tokens) if mask is None else mask[:, -tokens.shape[1] :]
            labels.current = qwen_omni.modality_map(self.model.config, tokens, seen)

        self.model.register_forward_pre_hook(note, with_kwargs=True)

    # ----------------------------------------------------------------- encoding

    def encode(self, conversations: Sequence[Conversation]) -> Batch:
        """Messages to model inputs, left-padded, on the model's device.

        Raises:
            MediaError: a picture, clip or sound that cannot be decoded.
        """
        texts, images, clips, sounds = [], [], [], []
        for conversation in conversations:
            turns = []
            if self.config.system_prompt:
                parts = [{"type": "text", "text": self.config.system_prompt}]
                turns.append({"role": "system", "content": parts})
            for turn in conversation:
                parts = []
                for part in turn["content"]:
                    kind = part["type"]
                    if kind == "text":
                        parts.append({"type": "text", "text": part["text"]})
                        continue
                    if kind == "image":
                        images.append(as_rgb(part["image"]))
                    elif kind == "video":
                        media = self.config.media
                        clips.append(
                            read_clip(part["video"], media.video_fps, media.video_max_frames)
                        )
                    elif kind == "audio":
                        sounds.append(as_waveform(part["audio"]))
                    else:
                        raise ValueError(f"unknown content type {kind!r}")
                    parts.append({"type": kind})
                turns.append({"role": turn["role"], "content": parts})
            texts.append(
                self.processor.apply_chat_template(
                    turns, tokenize=False, add_generation_prompt=True
                )
            )
        inputs: dict[str, Any] = {"text": texts, "padding": True, "return_tensors": "pt"}
        if images:
            inputs["images"] = images
            size = self._size("image")
            if size:
                inputs["images_kwargs"] = {"size": size}
        if clips:
            inputs["videos"] = [clip.frames for clip in clips]
            # The class default of the size overrides the saved processor's: always say it. The
            # processor knows one frame rate per call; each clip's own is put in below.
            inputs["videos_kwargs"] = {
                "size": self._size("video") or self._saved_size("video"),
                "fps": 2.0,
                "do_sample_frames": False,
            }
        if sounds:
            inputs["audio"] = sounds
            inputs["audio_kwargs"] = {"sampling_rate": SAMPLE_RATE}
        batch = dict(self.processor(**inputs))
        if clips:
            step = self.processor.video_processor.temporal_patch_size
            batch["video_second_per_grid"] = torch.tensor([step / clip.fps for clip in clips])
        return {key: torch.as_tensor(value).to(self.device) for key, value in batch.items()}

    def _size(self, kind: str) -> dict[str, int] | None:
        """The processor's ``size`` (pixels per frame) where the config sets one."""
        low = getattr(self.config.media, f"{kind}_min_pixels")
        high = getattr(self.config.media, f"{kind}_max_pixels")
        if low is None and high is None:
            return None
        saved = self._saved_size(kind)
        return {
            "shortest_edge": low or saved["shortest_edge"],
            "longest_edge": high or saved["longest_edge"],
        }

    def _saved_size(self, kind: str) -> dict[str, int]:
        size = dict(getattr(self.processor, f"{kind}_processor").size)
        return {edge: size[edge] for edge in ("shortest_edge", "longest_edge")}

    # ----------------------------------------------------------------- running

    @torch.inference_mode()
    def logits(self, batch: Batch) -> torch.Tensor:
        """float32 [batch, vocabulary]: logits of the token after each prompt."""
        return self.model(**batch, use_cache=False).logits[:, -1].float()

    @torch.inference_mode()
    def generate(
        self, conversations: Sequence[Conversation], max_new_tokens: int
    ) -> list[Generation]:
        """Greedy answers, whatever the checkpoint's own generation config says.

        Raises:
            MediaError: a picture, clip or sound that cannot be decoded.
        """
        from transformers import GenerationConfig

        tokenizer = self.processor.tokenizer
        batch = self.encode(conversations)
        stops = sorted({tokenizer.eos_token_id, tokenizer.pad_token_id} - {None})
        settings = GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=max_new_tokens,
            eos_token_id=stops,
            pad_token_id=tokenizer.pad_token_id,
        )
        # A fresh call must not reuse the rope offsets of the previous batch.
        self.model.rope_deltas = None
        sequences = self.model.generate(**batch, generation_config=settings)
        new = sequences[:, batch["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        is_stop = torch.isin(new, torch.tensor(stops, device=new.device))
        written = (is_stop.cumsum(1) == 0).sum(1) + is_stop.any(1).long()
        read = batch["attention_mask"].sum(1)
        return [
            Generation(text.strip(), int(i), int(o))
            for text, i, o in zip(texts, read, written, strict=True)
        ]
