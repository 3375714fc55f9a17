"""Prompts are encoded once, as long as memory allows: text encoders run on new prompts only."""

import math
from collections.abc import Sequence

import torch

from .backbones.base import Backbone, Conditioning


class PromptCache:
    """Conditioning by prompt text, kept in float32 on the CPU; beyond `max_bytes` the longest unused ones go.

    Texts are encoded `batch_size` at a time, the last batch filled up with repeats: matrix products of another shape
    round differently, and then a text's last bits would depend on what was asked before, and on whether a run was
    resumed.
    """

    def __init__(self, backbone: Backbone, batch_size: int = 8, max_bytes: int = 4 * 2**30):
        self._backbone = backbone
        self._batch_size = batch_size
        self._max_bytes = max_bytes
        self._rows: dict[str, Conditioning] = {}

    def __call__(self, texts: Sequence[str], device: torch.device) -> Conditioning:
        """Conditioning of `texts` in their order, on `device`."""
        found = {text: self._rows.pop(text) for text in dict.fromkeys(texts) if text in self._rows}
        missing = [text for text in dict.fromkeys(texts) if text not in found]
        for start in range(0, len(missing), self._batch_size):
            part = missing[start : start + self._batch_size]
            encoded = self._backbone.encode_prompts(part + part[-1:] * (self._batch_size - len(part)))
            for row, text in enumerate(part):
                found[text] = {name: tensor[row].to("cpu", copy=True) for name, tensor in encoded.items()}
        self._rows |= found  # at the end, as the last ones used
        while len(self._rows) > self._capacity():
            del self._rows[next(iter(self._rows))]
        return {name: torch.stack([found[text][name] for text in texts]).to(device) for name in found[texts[0]]}

    def prepare(self, texts: Sequence[str]) -> None:
        """Encodes texts ahead, as many as fit: no iteration then waits for a text encoder."""
        texts = list(dict.fromkeys(texts))
        for start in range(0, len(texts), self._batch_size):
            if len(self._rows) + self._batch_size <= self._capacity():
                self(texts[start : start + self._batch_size], torch.device("cpu"))

    def _capacity(self) -> float:
        """Prompts that fit; unknown, and so without limit, before the first."""
        row = next(iter(self._rows.values()), {})
        return self._max_bytes // sum(tensor.nbytes for tensor in row.values()) if row else math.inf
