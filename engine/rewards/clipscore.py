"""CLIPScore: how well a picture fits its prompt, by the logits of OpenAI's CLIP ViT-L."""

from collections.abc import Sequence

from torch import Tensor

from .clip import ClipJudge, crop, load_clip


class ClipScore:
    """exp(logit_scale) cos(picture, prompt) / 100: the cosine, since OpenAI's scale is 100.

    flow_grpo divides by 30 instead and resizes bilinearly. model: a local folder or a hub id, tokenizer included.
    """

    name = "clipscore"
    value_range = (-1.0, 1.0)  # CLIP's training keeps exp(logit_scale) to 100 at most

    def __init__(self, model: str = "openai/clip-vit-large-patch14", device: str = "cpu", dtype: str = "auto"):
        self._judge = ClipJudge(self.name, lambda: load_clip(self.name, model), model, device, dtype)

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict]) -> list[float]:
        """images: uint8 [N, H, W, 3]."""
        cosines = self._judge.cosines(crop(images, self._judge.side), prompts)
        return (self._judge.scale * cosines / 100).tolist()
