"""PickScore (Kirstain et al., arXiv 2305.01569): a CLIP ViT-H fine-tuned on people's choices between two pictures."""

from collections.abc import Sequence

from torch import Tensor

from .clip import ClipJudge, crop, load_clip

DIVISOR = 26.0  # brings scores to about 0..1, as flow_grpo does; the published score is without it


class PickScore:
    """exp(logit_scale) cos(picture, prompt) / 26.

    model: a local folder or a hub id of the fine-tuned CLIP. tokenizer: likewise, of the CLIP that it was made from.
    """

    name = "pickscore"
    value_range = (-100 / DIVISOR, 100 / DIVISOR)  # CLIP's training keeps exp(logit_scale) to 100 at most

    def __init__(
        self,
        model: str = "yuvalkirstain/PickScore_v1",
        tokenizer: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        device: str = "cpu",
        dtype: str = "auto",
    ):
        self._judge = ClipJudge(self.name, lambda: load_clip(self.name, model), tokenizer, device, dtype)

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict]) -> list[float]:
        """images: uint8 [N, H, W, 3]."""
        cosines = self._judge.cosines(crop(images, self._judge.side), prompts)
        return (self._judge.scale * cosines / DIVISOR).tolist()
