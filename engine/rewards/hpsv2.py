"""HPS v2.1 (Wu et al., arXiv 2306.09341): an open_clip ViT-H-14 fine-tuned on people's preferences between pictures."""

import re
from collections.abc import Mapping, Sequence
from html import unescape

from torch import Tensor
from torch.nn.functional import interpolate, pad
from transformers import CLIPModel

from .clip import ClipJudge, normalise, read_config
from .hub import TEXT_FILES, build, find_file, find_folder, read_checkpoint

# open_clip's names for a CLIP's weights, and transformers'.
_NAMES = (
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.in_proj_(weight|bias)$", r".self_attn.{}_proj.\1"),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
_TRANSPOSED = ("visual.proj", "text_projection")


class HPSv2:
    """cos(picture, prompt).

    model, file: a local folder or a hub id, and the name in it of open_clip's checkpoint. clip: likewise, of the CLIP
    that it was made from: its config.json and tokenizer are read, not its weights.
    """

    name = "hpsv2"
    value_range = (-1.0, 1.0)

    def __init__(
        self,
        model: str = "xswu/HPSv2",
        file: str = "HPS_v2.1_compressed.pt",
        clip: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        device: str = "cpu",
        dtype: str = "auto",
    ):
        def load() -> CLIPModel:
            config = read_config(self.name, find_folder(self.name, clip, TEXT_FILES))
            path = find_file(self.name, model, file)
            state = from_open_clip(read_checkpoint(self.name, path))
            return build(self.name, path, lambda: CLIPModel(config), state)

        self._judge = ClipJudge(self.name, load, clip, device, dtype)

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict]) -> list[float]:
        """images: uint8 [N, H, W, 3]."""
        # As open_clip reads prompts; ftfy's repair of wrongly decoded text is left out.
        texts = [unescape(unescape(prompt)) for prompt in prompts]
        return self._judge.cosines(fit(images.to(self._judge.device), self._judge.side), texts).tolist()


def fit(images: Tensor, side: int) -> Tensor:
    """uint8 [N, H, W, 3] as float32 [N, 3, side, side]: the longer side resized to `side` (bicubic and antialiased, in
    float32), black beside the shorter one, normalised."""
    pixels = images.permute(0, 3, 1, 2) / 255
    longer = max(pixels.shape[2:])
    height, width = (round(size * side / longer) for size in pixels.shape[2:])
    if longer != side:
        pixels = interpolate(pixels, (height, width), mode="bicubic", antialias=True)
    top, left = (side - height) // 2, (side - width) // 2
    return normalise(pad(pixels, (left, side - width - left, top, side - height - top)))


def from_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of open_clip's CLIP as one of transformers' CLIPModel. Names that neither has stay as they are."""
    renamed = {}
    for name, tensor in state.items():
        new = name
        for pattern, replacement in _NAMES:
            new = re.sub(pattern, replacement, new)
        if "{}" in new:
            renamed |= {new.format(part): x for part, x in zip("qkv", tensor.chunk(3), strict=True)}
        else:
            renamed[new] = tensor.T if name in _TRANSPOSED else tensor
    return renamed
