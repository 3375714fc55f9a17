"""ImageReward v1.0 (Xu et al., arXiv 2304.05977): a BLIP that reads the prompt while it looks, and a linear head."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from ..errors import UserError
from .aesthetic import linear_head
from .clip import crop
from .hub import build, find_file, load_tokenizer, place, read_checkpoint

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw reward, as published with v1.0
TOKENS = 35  # of a prompt that are read
HEAD_WIDTH = 64  # of attention, in BLIP's picture encoders (base and large) and in BERT

# BLIP's names for the weights, and transformers'. What BLIP has for its contrastive loss, and the numbers of the
# positions, are not used.
_NAMES = (
    (r"^blip\.visual_encoder\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^blip\.visual_encoder\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.norm", r"vision.encoder.layers.\1.layer_norm"),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision.encoder.layers.\1.self_attn.projection."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"vision.encoder.layers.\1.self_attn.qkv."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision.encoder.layers.\1.mlp."),
    (r"^blip\.text_encoder\.", "text."),
    (r"^mlp\.layers\.", "head."),
)
_UNUSED = re.compile(r"^blip\.(vision|text)_proj\.|\.position_ids$")


class ImageReward:
    """(head(t) - mean) / std, where t is BLIP's embedding of the text's first token, which has seen the picture.

    model, file: a local folder or a hub id, and the name in it of the checkpoint. tokenizer: likewise, of BERT's.
    """

    name = "imagereward"
    value_range = (float("-inf"), float("inf"))

    def __init__(
        self,
        model: str = "THUDM/ImageReward",
        file: str = "ImageReward.pt",
        tokenizer: str = "google-bert/bert-base-uncased",
        device: str = "cpu",
        dtype: str = "auto",
    ):
        self._device, self._dtype = place(self.name, device, dtype)
        self._tokenizer = load_tokenizer(self.name, tokenizer)
        path = find_file(self.name, model, file)
        state = {name: x for name, x in read_checkpoint(self.name, path).items() if not _UNUSED.search(name)}
        vision, text = _configs(path, state)
        self._side = vision.image_size
        self._blip = build(self.name, path, lambda: _Blip(vision, text), _renamed(state))
        self._blip.to(self._device, self._dtype).head.float()

    @torch.inference_mode()
    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict]) -> list[float]:
        """images: uint8 [N, H, W, 3]."""
        # torchvision, which the original uses, begins its crop half a pixel further right or down where it can.
        pixels = crop(images, self._side, start=lambda rest: round(rest / 2))
        tokens = self._tokenizer(
            list(prompts), padding=True, truncation=True, max_length=TOKENS, return_tensors="pt"
        ).to(self._device)
        raw = self._blip(pixels.to(self._device, self._dtype), tokens["input_ids"], tokens["attention_mask"])
        return ((raw - MEAN) / STD).tolist()


class _Blip(nn.Module):
    def __init__(self, vision: BlipVisionConfig, text: BlipTextConfig):
        super().__init__()
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        self.head = linear_head(text.hidden_size)

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The raw reward, float32 [N]."""
        seen = self.vision(pixel_values=pixels).last_hidden_state
        read = self.text(input_ids=input_ids, attention_mask=attention_mask, encoder_hidden_states=seen)
        return self.head(read.last_hidden_state[:, 0].float())[:, 0]


def _configs(path: Path, state: Mapping[str, Tensor]) -> tuple[BlipVisionConfig, BlipTextConfig]:
    """The sizes of the checkpoint's BLIP. Raises UserError where it has none."""
    try:
        _, places, width = state["blip.visual_encoder.pos_embed"].shape
        patch = state["blip.visual_encoder.patch_embed.proj.weight"].shape[-1]
        vision = BlipVisionConfig(
            hidden_size=width,
            intermediate_size=len(state["blip.visual_encoder.blocks.0.mlp.fc1.bias"]),
            num_hidden_layers=_count(state, r"^blip\.visual_encoder\.blocks\.\d+\.norm1\.bias$"),
            num_attention_heads=width // HEAD_WIDTH,
            image_size=math.isqrt(places - 1) * patch,
            patch_size=patch,
            layer_norm_eps=1e-6,
        )
        words, text_width = state["blip.text_encoder.embeddings.word_embeddings.weight"].shape
        text = BlipTextConfig(
            vocab_size=words,
            hidden_size=text_width,
            encoder_hidden_size=width,
            intermediate_size=len(state["blip.text_encoder.encoder.layer.0.intermediate.dense.bias"]),
            num_hidden_layers=_count(state, r"^blip\.text_encoder\.encoder\.layer\.\d+\.output\.dense\.bias$"),
            num_attention_heads=text_width // HEAD_WIDTH,
            max_position_embeddings=len(state["blip.text_encoder.embeddings.position_embeddings.weight"]),
            layer_norm_eps=1e-12,
            is_decoder=True,  # that is, with cross-attention; it is asked for no causal mask
            bos_token_id=None,
            eos_token_id=None,
            sep_token_id=None,
        )
    except KeyError as error:
        raise UserError(f"reward 'imagereward': {path} is no ImageReward checkpoint: it has no {error}") from error
    return vision, text


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return sum(re.match(pattern, name) is not None for name in state)


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names that neither BLIP nor transformers has stay as they are."""
    renamed = {}
    for name, tensor in state.items():
        new = name
        for pattern, replacement in _NAMES:
            new = re.sub(pattern, replacement, new)
        renamed[new] = tensor
    return renamed
