"""CLIP as a judge: the pictures it sees, and how well they fit prompts (Radford et al., arXiv 2103.00020)."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import CLIPConfig, CLIPModel

from ..errors import UserError
from .hub import TEXT_FILES, WEIGHTS, build, find_folder, load_tokenizer, place, read_weights

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of red, green and blue in 0..1, as OpenAI's CLIP was trained
STD = (0.26862954, 0.26130258, 0.27577711)


def crop(images: Tensor, side: int, start: Callable[[int], int] = lambda rest: rest // 2) -> Tensor:
    """uint8 [N, H, W, 3] as float32 [N, 3, side, side]: the shorter side resized to `side` (bicubic, by Pillow, in 8
    bits), the middle of the longer one, normalised.

    start: where the middle begins, of `rest` pixels too many; transformers begins at rest // 2.
    """
    height, width = images.shape[1:3]
    short = min(height, width)
    rows, columns = (int(side * size / short) for size in (height, width))
    top, left = start(rows - side), start(columns - side)
    resized = (
        np.asarray(Image.fromarray(picture).resize((columns, rows), Image.Resampling.BICUBIC))
        for picture in images.numpy()
    )
    cut = np.stack([picture[top : top + side, left : left + side] for picture in resized])
    return normalise(torch.from_numpy(cut).permute(0, 3, 1, 2) / 255)


def normalise(pixels: Tensor) -> Tensor:
    """[N, 3, H, W] in 0..1, less CLIP's mean and by its standard deviation."""
    mean, std = (pixels.new_tensor(values)[:, None, None] for values in (MEAN, STD))
    return (pixels - mean) / std


def load_clip(reward: str, model: str) -> CLIPModel:
    """The CLIP of a local folder or a hub id, float32, on the CPU, frozen. Raises UserError where there is none."""
    folder = find_folder(reward, model, (*TEXT_FILES, WEIGHTS))
    config = read_config(reward, folder)
    # Old checkpoints hold the positions' numbers 0, 1, 2, ... as well.
    state = {name: x for name, x in read_weights(reward, folder).items() if not name.endswith(".position_ids")}
    return build(reward, folder, lambda: CLIPModel(config), state)


def read_config(reward: str, folder: Path) -> CLIPConfig:
    """Raises UserError where the folder has no config.json of a CLIP."""
    path = folder / "config.json"
    try:
        content, _ = CLIPConfig.get_config_dict(path)
    except (OSError, ValueError) as error:
        raise UserError(f"reward {reward!r}: no configuration in {path}: {error}") from error
    if content.get("model_type") != "clip":
        raise UserError(f"reward {reward!r}: {path} is of a model {content.get('model_type')!r}, not of a 'clip'")
    return CLIPConfig.from_dict(content)


class ClipJudge:
    """A frozen CLIP and its tokenizer on a device. side: of the pictures. scale: exp(logit_scale), as trained."""

    def __init__(self, reward: str, load: Callable[[], CLIPModel], tokenizer: str, device: str, dtype: str):
        """load() -> float32, on the CPU; called once all else is known to be there. tokenizer: folder or hub id."""
        self.device, self.dtype = place(reward, device, dtype)
        self._tokenizer = load_tokenizer(reward, tokenizer)
        clip = load()
        self.side = clip.config.vision_config.image_size
        self.scale = clip.logit_scale.exp().item()
        words = clip.config.text_config.vocab_size
        if len(self._tokenizer) > words:
            raise UserError(
                f"reward {reward!r}: the tokenizer of {tokenizer} has {len(self._tokenizer)} tokens, its CLIP {words}; "
                "give the one that belongs to it"
            )
        self._clip = clip.to(self.device, self.dtype)

    @torch.inference_mode()
    def cosines(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Float32 [N] on the CPU: the cosine of each picture's and its prompt's embedding.

        pixels: normalised [N, 3, side, side]. Prompts are cut to the tokens that the CLIP has positions for (77).
        """
        tokens = self._tokenizer(
            list(prompts),
            padding=True,
            truncation=True,
            max_length=self._clip.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.device)
        seen = self._clip(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            pixel_values=pixels.to(self.device, self.dtype),
        )
        return cosine_similarity(seen.image_embeds.float(), seen.text_embeds.float()).cpu()
