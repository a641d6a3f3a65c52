"""What runs of a sweep share: encoded calibration prompts and what was observed on them.

Decoding and processing calibration media depends on the processor alone, and activations are
observed behind rounded weights with nothing else quantized yet (SPEC 2.12): methods that differ
only in what they choose from the observations (masks, ranges, search, compensation) observe the
same. The first run keeps both below ``paths.cache`` and the others read them, bit for bit what they
would have computed. Where something further upstream differs, the identity does, and nothing is
shared.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morphoquant.config.schema import PathsConfig, RunConfig
from morphoquant.sharing.artifacts import Artifact, ArtifactStore, Claim
from morphoquant.sharing.content import checkpoint_hash
from morphoquant.tracking.fingerprint import code_hash, package_versions

if TYPE_CHECKING:
    import torch

    from morphoquant.calibration.readers import Sample
    from morphoquant.calibration.samples import Calibration
    from morphoquant.calibration.statistics import ModalityStatistics
    from morphoquant.models.adapter import Batch, OmniAdapter
    from morphoquant.models.structure import Block
    from morphoquant.quantization.engine import BlockQuantizer
    from morphoquant.quantization.masks import ScoreMoments

log = logging.getLogger(__name__)

INPUTS, STATISTICS, MOMENTS = "inputs", "statistics", "moments"
ENCODING = ("models", "calibration", "compat.py")
"""Rooms whose code decides how a prompt is encoded."""


def open_store(paths: PathsConfig, maker: str = "") -> ArtifactStore:
    """The artifacts below ``paths.cache``; where that is switched off, a store without any."""
    root = Path(paths.cache).expanduser() / "artifacts" if paths.share_artifacts else None
    return ArtifactStore(root, paths.cache_limit_gb, maker)


class Prompts:
    """Calibration prompts of one run as model inputs, each batch encoded once for all runs.

    Args:
        config: of the run.
        adapter: encodes them.
        store: where encoded batches are kept; by default nowhere.

    Attributes:
        read, encoded: batches that came from the cache, and that were encoded here.
        statistics_from: the run whose statistics were read, or None.
    """

    def __init__(
        self, config: RunConfig, adapter: OmniAdapter, store: ArtifactStore | None = None
    ) -> None:
        self.config, self.adapter = config, adapter
        self.store = store or ArtifactStore(None)
        self.read = self.encoded = 0
        self.statistics_from: str | None = None

    def encode(self, samples: Sequence[Sample]) -> list[Batch]:
        """Batches of ``calibration.batch_size`` prompts of one modality, on the model's device."""
        from morphoquant.calibration.samples import batches

        groups = batches(samples, self.config.calibration.batch_size)
        return [self.encode_batch(group) for group in groups]

    def encode_batch(self, samples: Sequence[Sample]) -> Batch:
        """Some prompts as one batch, on the model's device."""
        conversations = [sample.messages for sample in samples]
        if self.store.root is None:
            self.encoded += 1
            return self.adapter.encode(conversations)
        with self.store.claim(INPUTS, self._encoding() | {"content": _content(samples)}) as claim:
            if claim.found is not None:
                self.read += 1
                tensors, order = claim.found.tensors, claim.found.values["order"]
                return {name: tensors[name].to(self.adapter.device) for name in order}
            batch = self.adapter.encode(conversations)
            claim.put({"order": list(batch)}, batch)
        self.encoded += 1
        return batch

    def describe(self) -> dict[str, Any]:
        """What ``result.json`` says: batches read and encoded, and whose statistics were read."""
        return {
            "inputs_read": self.read,
            "inputs_encoded": self.encoded,
            "statistics_from": self.statistics_from,
        }

    def say(self) -> None:
        """One line on where the prompts came from."""
        if self.read and not self.encoded:
            log.info("calibration inputs: cached (%d batches)", self.read)
        elif self.read:
            log.info("calibration inputs: %d batches cached, %d encoded", self.read, self.encoded)

    def _encoding(self) -> dict[str, Any]:
        """All that the encoding of a prompt depends on, but for the prompt."""
        from morphoquant.models.loading import model_hash

        model = self.config.model
        versions = package_versions() | {"pillow": version("pillow")}
        return {
            "processor": model_hash(model, weights=False),
            "commit": self._commit(),
            "system_prompt": model.system_prompt,
            "media": model.media.model_dump(mode="json"),
            "code": code_hash(*ENCODING),
            "versions": versions,
        }

    def _commit(self) -> str | None:
        """Of a checkpoint from the hub, whose revision may be a branch that moves."""
        return getattr(self.adapter.model.config, "_commit_hash", None)

    # ------------------------------------------------------------------- statistics

    @contextmanager
    def statistics(
        self, calibration: Calibration, towers: Sequence[str], quantizer: BlockQuantizer
    ) -> Iterator[SharedStatistics]:
        """Statistics that another run has taken, or a place for those that this one takes.

        While a process takes them, others that want the same ones wait. Where they were taken the
        quantizer is told to recall them. Runs that record no statistics have nothing to share.
        """
        shared = SharedStatistics(self, calibration, towers, quantizer)
        if self.store.root is None or not quantizer.observe:
            yield shared
            return
        with self.store.claim(STATISTICS, shared.identity) as claim:
            shared.claim = claim
            if claim.found is not None:
                self.statistics_from = claim.found.maker
                log.info("statistics: read from cache (made by %s)", claim.found.maker)
                quantizer.recall = _Recall(claim.found)
            yield shared


class SharedStatistics:
    """Statistics of one calibration behind one set of weights; see :meth:`Prompts.statistics`."""

    def __init__(
        self,
        prompts: Prompts,
        calibration: Calibration,
        towers: Sequence[str],
        quantizer: BlockQuantizer,
    ) -> None:
        self.prompts, self.calibration = prompts, calibration
        self.towers, self.quantizer = towers, quantizer
        self.claim: Claim | None = None
        self._encoded: list[Batch] | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """All that observed activations depend on."""
        from morphoquant.quantization.rounding import rounds_late

        config, adapter = self.prompts.config, self.prompts.adapter
        method, bits, model = config.method, config.bits, config.model
        rounds = method.weight.format != "none" and bits.lowest.weight < 16
        transform = method.transform if method.transform.name != "none" else None
        # A branch beside the weight, or columns left out of its grid.
        apart = method.compensation.name in ("low_rank", "mixed_precision")
        branch = method.compensation if apart else None
        identity: dict[str, Any] = {
            "model": checkpoint_hash(model, self.prompts.store),
            "commit": self.prompts._commit(),
            "prompts": _content(self.calibration.samples),
            "batch_size": config.calibration.batch_size,
            "encoding": self.prompts._encoding(),
            "computation": _computation(adapter, model.attention),
            "towers": list(self.towers),
            "transform": transform and transform.model_dump(mode="json"),
            "weight": method.weight.model_dump(mode="json") if rounds else None,
            "bits": bits.model_dump(mode="json", exclude={"activation", "kv"}) if rounds else None,
            "scope": list(model.scope.only),
            "branch": branch and branch.model_dump(mode="json"),
            "histograms": self.quantizer.keeps_histograms,
            "code": code_hash(),
            "versions": package_versions(),
        }
        learns = transform is not None and transform.name != "rotate"
        if learns or len(self.towers) > 1 or rounds_late(method, bits.lowest):
            # The transform looks at the other slots; a tower in front of the decoder is finished
            # when the decoder is observed; weights rounded late depend on masks and ranges.
            identity["method"] = method.model_dump(mode="json", exclude={"name", "reference"})
            identity["widths"] = bits.model_dump(mode="json")
            identity["search"] = _content(self.calibration.search)
        return identity

    def passing(self) -> list[Batch]:
        """The statistics prompts that have to go through the blocks: all, or none."""
        from morphoquant.quantization.gather import gathers

        quantizer = self.quantizer
        searched = quantizer.searches and not self.calibration.search
        rereads = gathers(quantizer.method, quantizer.bits.lowest) or quantizer.biases
        takes = quantizer.chooses or quantizer.observe
        if searched or rereads or (takes and quantizer.recall is None):
            return self._all()
        return []

    def _all(self) -> list[Batch]:
        if self._encoded is None:
            self._encoded = self.prompts.encode(self.calibration.samples)
        return self._encoded

    def moments(self) -> Mapping[str, ScoreMoments] | None:
        """What masks with a global rule compare with; see :func:`survey`."""
        from morphoquant.quantization import survey
        from morphoquant.quantization.masks import ScoreMoments

        method, bits = self.quantizer.method, self.quantizer.bits
        if not survey.surveys(method):
            return None
        adapter, towers = self.prompts.adapter, list(self.towers)
        recall = self.quantizer.recall
        if recall is not None and survey.sees_the_walk(method, bits, towers):  # type: ignore[arg-type]
            blocks = adapter.blocks(towers[0])  # type: ignore[arg-type]
            return survey.recalled(method, bits, blocks, recall)
        mask = {"mask": method.compensation.mask.model_dump(mode="json")}
        with self.prompts.store.claim(MOMENTS, self.identity | mask) as claim:
            if claim.found is not None:
                return {view: ScoreMoments(**m) for view, m in claim.found.values.items()}
            found = survey.survey(adapter, towers, self._all(), method, bits)  # type: ignore[arg-type]
            assert found is not None
            claim.put({view: asdict(m) for view, m in found.items()})
        return found

    def keep(self) -> None:
        """Hand what the walk has taken to the other runs."""
        if self.claim is None or self.claim.found is not None:
            return
        taken = self.quantizer.collected
        tensors: dict[str, torch.Tensor] = {}
        for number, statistics in enumerate(taken.values()):
            tensors |= {f"{number}/{k}": t for k, t in statistics.state().items()}
        self.claim.put({"groups": [list(place) for place in taken]}, tensors)


class _Recall:
    """Statistics of a kept artifact, block by block."""

    def __init__(self, artifact: Artifact) -> None:
        self.by_block: dict[str, dict[str, dict[str, torch.Tensor]]] = {}
        states: list[dict[str, torch.Tensor]] = [{} for _ in artifact.values["groups"]]
        for name, tensor in artifact.tensors.items():
            number, _, rest = name.partition("/")
            states[int(number)][rest] = tensor
        for (block, group), state in zip(artifact.values["groups"], states, strict=True):
            self.by_block.setdefault(block, {})[group] = state

    def __call__(self, block: Block) -> dict[str, ModalityStatistics]:
        from morphoquant.calibration.statistics import ModalityStatistics

        device = next(block.module.parameters()).device
        return {
            group: ModalityStatistics.restored(state, device)
            for group, state in self.by_block.get(block.name, {}).items()
        }


def _content(samples: Sequence[Sample]) -> str:
    from morphoquant.calibration.samples import content_hash

    return content_hash(samples, exact=True)


def _computation(adapter: OmniAdapter, attention: str) -> dict[str, Any]:
    """What decides how sums are rounded."""
    import torch

    devices = {parameter.device for parameter in adapter.model.parameters()}
    found: dict[str, Any] = {"dtype": str(adapter.model.dtype), "attention": attention}
    if adapter.device.type == "cuda":  # where a model is spread out, over all of its GPUs
        names = {torch.cuda.get_device_name(d) if d.type == "cuda" else d.type for d in devices}
        return found | {"devices": sorted(names)}
    return found | {
        "devices": sorted(str(device) for device in devices),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }
