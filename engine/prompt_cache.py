"""Each prompt is encoded once: text encoders run on new prompts only."""

from collections.abc import Sequence

import torch

from .backbones.base import Backbone, Conditioning


class PromptCache:
    """Conditioning by prompt text, kept in float32 on the CPU.

    Texts are encoded `batch_size` at a time, the last batch filled up with repeats: matrix products of another shape
    round differently, and then a text's last bits would depend on what was asked before, and on whether a run was
    resumed.
    """

    def __init__(self, backbone: Backbone, batch_size: int = 8):
        self._backbone = backbone
        self._batch_size = batch_size
        self._rows: dict[str, Conditioning] = {}

    def __call__(self, texts: Sequence[str], device: torch.device) -> Conditioning:
        """Conditioning of `texts` in their order, on `device`."""
        missing = [text for text in dict.fromkeys(texts) if text not in self._rows]
        for start in range(0, len(missing), self._batch_size):
            part = missing[start : start + self._batch_size]
            encoded = self._backbone.encode_prompts(part + part[-1:] * (self._batch_size - len(part)))
            for row, text in enumerate(part):
                self._rows[text] = {name: tensor[row].to("cpu", copy=True) for name, tensor in encoded.items()}
        first = self._rows[texts[0]]
        return {name: torch.stack([self._rows[text][name] for text in texts]).to(device) for name in first}
