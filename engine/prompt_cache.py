"""Prompts are encoded once, as long as memory allows: text encoders run on new prompts only."""

from collections.abc import Sequence

import torch

from .backbones.base import Backbone, Conditioning
from .streams import to_device


class PromptCache:
    """Conditioning by prompt text, kept in float32 on the CPU; beyond `max_bytes` the longest unused ones go.

    Texts are encoded `batch_size` at a time, the last batch filled up with repeats: matrix products of another shape
    round differently, and then a text's last bits would depend on what was asked before, and on whether a run was
    resumed. The encoders move to `device` for as long as they encode, and back.
    """

    def __init__(self, backbone: Backbone, device: torch.device, batch_size: int = 8, max_bytes: int = 4 * 2**30):
        self._backbone, self._device = backbone, device
        self._batch_size = batch_size
        self._max_bytes = max_bytes
        self._rows: dict[str, Conditioning] = {}

    def __call__(self, texts: Sequence[str]) -> Conditioning:
        """Conditioning of `texts` in their order, on the device."""
        found = self._find(texts)
        stacked = {name: torch.stack([found[text][name] for text in texts]) for name in found[texts[0]]}
        return {name: to_device(tensor, self._device) for name, tensor in stacked.items()}

    def prepare(self, texts: Sequence[str]) -> None:
        """Encodes texts ahead, as many as fit: no micro-batch of theirs then waits for a text encoder."""
        texts = list(dict.fromkeys(texts))
        self._find(texts[: self._batch_size])  # now it is known how many fit
        self._find(texts[: self._capacity() // self._batch_size * self._batch_size])

    def _find(self, texts: Sequence[str]) -> dict[str, Conditioning]:
        found = {text: self._rows.pop(text) for text in dict.fromkeys(texts) if text in self._rows}
        found |= self._encode([text for text in dict.fromkeys(texts) if text not in found])
        self._rows |= found  # at the end, as the last ones used
        while len(self._rows) > self._capacity():
            del self._rows[next(iter(self._rows))]
        return found

    def _encode(self, texts: list[str]) -> dict[str, Conditioning]:
        rows, encoders = {}, self._backbone.encoders if texts else ()
        homes = [next(encoder.parameters()).device for encoder in encoders]
        for encoder in encoders:
            encoder.to(self._device)
        for start in range(0, len(texts), self._batch_size):
            part = texts[start : start + self._batch_size]
            encoded = self._backbone.encode_prompts(part + part[-1:] * (self._batch_size - len(part)))
            for row, text in enumerate(part):
                rows[text] = {name: tensor[row].to("cpu", copy=True) for name, tensor in encoded.items()}
        for encoder, home in zip(encoders, homes, strict=True):
            encoder.to(home)
        return rows

    def _capacity(self) -> int:
        """Prompts that fit, going by one of them."""
        row = next(iter(self._rows.values()))
        return self._max_bytes // sum(tensor.nbytes for tensor in row.values())
