"""Statistics of activations per modality: moments per channel, histograms per layer (SPEC 2.1, 6).

The result does not depend on batch size, batch order or padding.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from morphoquant.calibration.histogram import LayerDistribution
from morphoquant.calibration.moments import ChannelStatistics, Score, piece_rows
from morphoquant.models.structure import MODALITIES, Modality

__all__ = ["ChannelStatistics", "ModalityStatistics", "Score"]


class ModalityStatistics:
    """Statistics of the input of one group of linears, for every modality.

    Attributes:
        parts: moments per channel.
        distributions: histograms of the layer as a whole, of the modalities that occurred;
            empty without ``histograms``.

    Args:
        channels: width of the input.
        device: where the activations are.
        histograms: keep the distributions too. Ranges and masks do not need them.
    """

    def __init__(
        self, channels: int, device: torch.device | str = "cpu", histograms: bool = True
    ) -> None:
        self.parts = {m: ChannelStatistics(channels, device) for m in MODALITIES}
        self.distributions: dict[Modality, LayerDistribution] = {}
        self._histograms = histograms

    def update(self, x: torch.Tensor, labels: torch.Tensor) -> None:
        """Add activations [..., channels] with modality labels [...]; padding is skipped.

        Labels of the form [prompts, tokens] also say which token is a prompt's first.

        Raises:
            ActivationError: a value is NaN or infinite, other than in padding.
        """
        labels = labels.to(x.device)
        rows = x.reshape(-1, x.shape[-1])
        size = piece_rows(rows.shape[1])
        for modality, chosen in _by_modality(labels.reshape(-1)).items():
            if chosen is None:
                pieces = rows.split(size)
            else:
                pieces = (rows.index_select(0, part) for part in chosen.split(size))
            for piece in pieces:
                self.parts[modality].add(piece)
                if self._histograms:
                    self._distribution(modality, x.device).update(piece)
        if self._histograms and labels.dim() == 2:
            self._update_first(rows, labels)

    def _distribution(self, modality: Modality, device: torch.device | str) -> LayerDistribution:
        if modality not in self.distributions:
            self.distributions[modality] = LayerDistribution(device)
        return self.distributions[modality]

    def _update_first(self, rows: torch.Tensor, labels: torch.Tensor) -> None:
        """Energy of the first non-padding token of every prompt, by that token's modality."""
        real = labels >= 0
        starts = torch.arange(labels.shape[0], device=labels.device) * labels.shape[1]
        first = (real.int().argmax(1) + starts)[real.any(1)]
        kinds = labels.reshape(-1).index_select(0, first).long()
        energy = rows.index_select(0, first).double().square().sum(1)
        by_kind = energy.new_zeros(len(MODALITIES)).index_add_(0, kinds, energy)
        for modality, found in self.distributions.items():
            found.tokens.update_first(by_kind[int(modality)])

    def merge(self, other: ModalityStatistics) -> None:
        for modality, part in self.parts.items():
            part.merge(other.parts[modality])
        for modality, found in other.distributions.items():
            self._distribution(modality, found.magnitudes.counts.device).merge(found)

    @property
    def present(self) -> dict[Modality, ChannelStatistics]:
        """The modalities that occurred."""
        return {m: part for m, part in self.parts.items() if part.n}

    def pooled(self) -> ChannelStatistics:
        """Statistics over all non-padding tokens, whatever their modality."""
        return ChannelStatistics.merged(self.parts.values())

    def pooled_distribution(self) -> LayerDistribution | None:
        """Histograms over all non-padding tokens; None if none were kept."""
        total: LayerDistribution | None = None
        # In one order, whichever modality came first: sums of energies round.
        for found in (self.distributions[m] for m in MODALITIES if m in self.distributions):
            total = total or LayerDistribution(found.magnitudes.counts.device)
            total.merge(found)
        return total

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that is known of the modalities that occurred, as tensors ``<modality>/..``.

        :meth:`restored` takes it up bit for bit.
        """
        found = {"channels": torch.tensor(next(iter(self.parts.values())).lo.numel())}
        found["histograms"] = torch.tensor(self._histograms)
        for modality, part in self.present.items():
            found |= {f"{modality.name}/moments/{k}": t for k, t in part.state().items()}
        for modality, layer in self.distributions.items():
            found |= {f"{modality.name}/histograms/{k}": t for k, t in layer.state().items()}
        return found

    @classmethod
    def restored(
        cls, state: Mapping[str, torch.Tensor], device: torch.device | str = "cpu"
    ) -> ModalityStatistics:
        """Statistics from their :meth:`state`, moved to ``device``."""
        found = cls(int(state["channels"]), device, bool(state["histograms"]))
        for modality in MODALITIES:
            moments = _below(state, f"{modality.name}/moments/", device)
            if moments:
                found.parts[modality] = ChannelStatistics.restored(moments)
            layer = _below(state, f"{modality.name}/histograms/", device)
            if layer:
                found.distributions[modality] = LayerDistribution.restored(layer)
        return found

    def cpu(self) -> ModalityStatistics:
        """Move everything to the CPU, in place; returns itself."""
        for part in self.parts.values():
            part.cpu()
        for found in self.distributions.values():
            found.cpu()
        return self


def _by_modality(labels: torch.Tensor) -> dict[Modality, torch.Tensor | None]:
    """Row numbers of every modality that occurs in ``labels`` [rows]; None stands for all rows."""
    kinds = labels.to(torch.int8)
    counts = torch.bincount(kinds + 1, minlength=1 + len(MODALITIES)).tolist()
    if max(counts) == kinds.numel():
        only = Modality(counts.index(max(counts)) - 1)
        return {} if only is Modality.PADDING or not kinds.numel() else {only: None}
    ordered = torch.sort(kinds, stable=True).indices.split(counts)
    return {m: ordered[int(m) + 1] for m in MODALITIES if counts[int(m) + 1]}


def _below(
    state: Mapping[str, torch.Tensor], prefix: str, device: torch.device | str
) -> dict[str, torch.Tensor]:
    """The tensors whose names begin with ``prefix``, without it, on ``device``."""
    return {k.removeprefix(prefix): t.to(device) for k, t in state.items() if k.startswith(prefix)}
