"""Reward models in small, with random weights, in the files their published ones come in, and how such a model is read
without the engine or transformers: in float64, from the very names of its checkpoint."""

import json
import math
import re
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel

ROUNDING = 100 * 2.0**-24  # relative: a hundred roundings of float32, one upon the other
SIDE = 28  # of the pictures that the models see, in four patches
TOKENS = 12  # that the CLIPs have positions for
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789&;."
VOCABULARY = [*CHARACTERS, *(c + "</w>" for c in CHARACTERS), "<|startoftext|>", "<|endoftext|>"]
START, END = len(VOCABULARY) - 2, len(VOCABULARY) - 1
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "cat", "and", "dog", "left", "of", "7"]
MEAN, STD = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
PROMPTS = ["A red cat", "a blue dog 7", "a cat left of a dog and a red cat and a blue dog " * 4, "blue", "a red dog"]


def pictures():
    """uint8 [5, 48, 68, 3] of coloured tiles."""
    tiles = np.random.default_rng(0).integers(0, 256, (len(PROMPTS), 4, 4, 3), dtype=np.uint8)
    return torch.from_numpy(tiles.repeat(12, axis=1).repeat(17, axis=2))


def noise(shape, generator):
    """Matrices of about unit gain."""
    return torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]) or 1)


# ------------------------------------------------------------------------------------------------------------- files


def clip_config():
    return CLIPConfig(
        projection_dim=24,
        text_config={
            "vocab_size": len(VOCABULARY),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": TOKENS,
            "hidden_act": "gelu",
            "bos_token_id": START,
            "eos_token_id": END,
            "pad_token_id": END,
        },
        vision_config={
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "image_size": SIDE,
            "patch_size": SIDE // 2,
            "hidden_act": "gelu",
        },
    )


def write_clip(folder: Path) -> CLIPModel:
    """A CLIP in transformers' format, without a tokenizer."""
    clip = CLIPModel(clip_config()).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in clip.named_parameters():
        is_scale = "norm" in name and name.endswith("weight")
        parameter.data = is_scale + (noise(parameter.shape, generator) if parameter.ndim else torch.tensor(4.0))
    clip.save_pretrained(folder)
    return clip


def write_clip_tokenizer(folder: Path) -> None:
    """One token a character."""
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(VOCABULARY)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {
        "bos_token": VOCABULARY[START],
        **dict.fromkeys(("eos_token", "unk_token", "pad_token"), VOCABULARY[END]),
    }
    options = {"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(options))


def write_bert_tokenizer(folder: Path) -> None:
    """One token a word."""
    folder.mkdir()
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in WORDS))
    options = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(options))


def linear_head(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
    sizes = {0: (1024, width), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    weights = {f"{prefix}layers.{i}.weight": size for i, size in sizes.items()}
    return weights | {f"{prefix}layers.{i}.bias": size[:1] for i, size in sizes.items()}


def _linear(name, rows, columns):
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def _norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def open_clip() -> dict[str, tuple[int, ...]]:
    """Names and shapes of open_clip's checkpoint of the CLIP that `clip_config` describes."""

    def blocks(prefix, width, hidden):
        for i in range(2):
            block = f"{prefix}transformer.resblocks.{i}"
            yield from _norm(f"{block}.ln_1", width).items()
            yield from _norm(f"{block}.ln_2", width).items()
            yield f"{block}.attn.in_proj_weight", (3 * width, width)
            yield f"{block}.attn.in_proj_bias", (3 * width,)
            yield from _linear(f"{block}.attn.out_proj", width, width).items()
            yield from _linear(f"{block}.mlp.c_fc", hidden, width).items()
            yield from _linear(f"{block}.mlp.c_proj", width, hidden).items()

    return {
        "positional_embedding": (TOKENS, 32),
        "text_projection": (32, 24),
        "logit_scale": (),
        "visual.class_embedding": (48,),
        "visual.positional_embedding": (5, 48),
        "visual.proj": (48, 24),
        "visual.conv1.weight": (48, 3, SIDE // 2, SIDE // 2),
        **_norm("visual.ln_pre", 48),
        **dict(blocks("visual.", 48, 64)),
        **_norm("visual.ln_post", 48),
        **dict(blocks("", 32, 48)),
        "token_embedding.weight": (len(VOCABULARY), 32),
        **_norm("ln_final", 32),
    }


def image_reward() -> dict[str, tuple[int, ...]]:
    """Names and shapes of ImageReward's checkpoint, its BLIP in small."""
    vision, text = 192, 128

    def vit():
        for i in range(2):
            block = f"blip.visual_encoder.blocks.{i}"
            yield from _norm(f"{block}.norm1", vision).items()
            yield from _norm(f"{block}.norm2", vision).items()
            yield from _linear(f"{block}.attn.qkv", 3 * vision, vision).items()
            yield from _linear(f"{block}.attn.proj", vision, vision).items()
            yield from _linear(f"{block}.mlp.fc1", 64, vision).items()
            yield from _linear(f"{block}.mlp.fc2", vision, 64).items()

    def bert():
        for i in range(2):
            layer = f"blip.text_encoder.encoder.layer.{i}"
            for attention, seen in (("attention", text), ("crossattention", vision)):
                yield from _linear(f"{layer}.{attention}.self.query", text, text).items()
                yield from _linear(f"{layer}.{attention}.self.key", text, seen).items()
                yield from _linear(f"{layer}.{attention}.self.value", text, seen).items()
                yield from _linear(f"{layer}.{attention}.output.dense", text, text).items()
                yield from _norm(f"{layer}.{attention}.output.LayerNorm", text).items()
            yield from _linear(f"{layer}.intermediate.dense", 64, text).items()
            yield from _linear(f"{layer}.output.dense", text, 64).items()
            yield from _norm(f"{layer}.output.LayerNorm", text).items()

    return {
        "blip.visual_encoder.cls_token": (1, 1, vision),
        "blip.visual_encoder.pos_embed": (1, 5, vision),
        **_linear("blip.visual_encoder.patch_embed.proj", vision, 3),
        "blip.visual_encoder.patch_embed.proj.weight": (vision, 3, SIDE // 2, SIDE // 2),
        **dict(vit()),
        **_norm("blip.visual_encoder.norm", vision),
        "blip.text_encoder.embeddings.word_embeddings.weight": (len(WORDS) + 2, text),  # two that the tokenizer lacks
        "blip.text_encoder.embeddings.position_embeddings.weight": (40, text),
        "blip.text_encoder.embeddings.position_ids": (1, 40),
        **_norm("blip.text_encoder.embeddings.LayerNorm", text),
        **dict(bert()),
        **_linear("blip.vision_proj", 16, vision),
        **_linear("blip.text_proj", 16, text),
        **linear_head("mlp.", text),
    }


def checkpoint(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Random weights of these names and shapes. What BLIP makes of pixels is small, so that it matters what its norms
    add to a variance."""
    generator = torch.Generator().manual_seed(2)
    is_norm = re.compile(r"(ln_\w+|norm\d?|LayerNorm)\.weight$")
    state = {name: bool(is_norm.search(name)) + noise(shape, generator) for name, shape in shapes.items()}
    return {name: x / 50 if re.search("cls_token|pos_embed|patch_embed", name) else x for name, x in state.items()}


# --------------------------------------------------------------------------------------------------- reading prompts


def clip_tokens(prompt: str) -> list[int]:
    """Start, characters (the last of a word is another token), end."""
    words = re.findall(r"[a-z]+|[0-9]|[&;.]+", prompt.lower())
    characters = [token for word in words for token in (*word[:-1], word[-1] + "</w>")]
    return [START, *(VOCABULARY.index(token) for token in characters[: TOKENS - 2]), END]


def bert_tokens(prompt: str) -> list[int]:
    """[CLS], at most 33 words, [SEP]."""
    return [2, *(WORDS.index(word) for word in prompt.lower().split()[:33]), 3]


# -------------------------------------------------------------------------------------------------- reading pictures


def normalised(pixels: np.ndarray) -> torch.Tensor:
    """[H, W, 3] in 0..255 -> float64 [1, 3, H, W]."""
    return torch.from_numpy(((pixels / 255 - MEAN) / STD).transpose(2, 0, 1))[None]


def bicubic(count: int, size: int) -> np.ndarray:
    """[size, count]: the resize of a row of `count` pixels; Keys' cubic (a = -1/2), as wide as a new pixel."""
    scale = count / size
    wide = max(1.0, scale)
    distance = np.abs((np.arange(count) + 0.5 - scale * (np.arange(size)[:, None] + 0.5)) / wide)
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0))
    return weights / weights.sum(axis=1, keepdims=True)


# ------------------------------------------------------------------------------------------------------------ layers


class Reader:
    """The layers of a checkpoint, by name, in float64."""

    def __init__(self, state, eps):
        self.state, self.eps = {name: tensor.double() for name, tensor in state.items()}, eps

    def __getitem__(self, name):
        return self.state[name]

    def linear(self, x, name):
        return x @ self[f"{name}.weight"].T + self[f"{name}.bias"]

    def norm(self, x, name, eps=None):
        centred = x - x.mean(-1, keepdim=True)
        unit = centred / (centred.square().mean(-1, keepdim=True) + (eps or self.eps)).sqrt()
        return unit * self[f"{name}.weight"] + self[f"{name}.bias"]

    def patches(self, x, name):
        """[1, 3, H, W] -> [number, width]; without bias."""
        weight = self[f"{name}.weight"]
        side = weight.shape[-1]
        cut = x[0].unfold(1, side, side).unfold(2, side, side).permute(1, 2, 0, 3, 4).flatten(2).flatten(0, 1)
        return cut @ weight.flatten(1).T


def attention(q, k, v, head_width, mask=0.0):
    """[Q, D], [K, D], [K, D] -> [Q, D]."""
    q, k, v = (x.unflatten(1, (-1, head_width)).transpose(0, 1) for x in (q, k, v))
    weights = (q @ k.transpose(1, 2) / math.sqrt(head_width) + mask).softmax(-1)
    return (weights @ v).transpose(0, 1).flatten(1)


# ------------------------------------------------------------------------------------------------------------ models


def open_clip_cosine(state, pixels, tokens) -> float:
    """pixels: float64 [1, 3, SIDE, SIDE]. The formulas of open_clip's CLIP, for one picture and one prompt."""
    clip = Reader(state, eps=1e-5)

    def transformer(x, prefix, mask=0.0):
        for i in range(2):
            block = f"{prefix}transformer.resblocks.{i}"
            inside = clip.norm(x, f"{block}.ln_1")
            qkv = inside @ clip[f"{block}.attn.in_proj_weight"].T + clip[f"{block}.attn.in_proj_bias"]
            x = x + clip.linear(attention(*qkv.chunk(3, dim=1), 16, mask), f"{block}.attn.out_proj")
            inside = functional.gelu(clip.linear(clip.norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc"))
            x = x + clip.linear(inside, f"{block}.mlp.c_proj")
        return x

    x = torch.cat([clip["visual.class_embedding"][None], clip.patches(pixels, "visual.conv1")])
    x = transformer(clip.norm(x + clip["visual.positional_embedding"], "visual.ln_pre"), "visual.")
    picture = clip.norm(x[0], "visual.ln_post") @ clip["visual.proj"]
    x = clip["token_embedding.weight"][tokens] + clip["positional_embedding"][: len(tokens)]
    x = transformer(x, "", torch.full((len(tokens),) * 2, -math.inf, dtype=torch.float64).triu(1))
    text = clip.norm(x[-1], "ln_final") @ clip["text_projection"]
    return (picture @ text / (picture.norm() * text.norm())).item()


def image_reward_score(state, pixels, tokens) -> float:
    """pixels: float64 [1, 3, SIDE, SIDE]. BLIP's formulas, for one picture and one prompt."""
    blip = Reader(state, eps=1e-12)
    vit = "blip.visual_encoder"
    seen = blip.patches(pixels, f"{vit}.patch_embed.proj") + blip[f"{vit}.patch_embed.proj.bias"]
    seen = torch.cat([blip[f"{vit}.cls_token"][0], seen]) + blip[f"{vit}.pos_embed"][0]
    for i in range(2):
        block = f"{vit}.blocks.{i}"
        qkv = blip.linear(blip.norm(seen, f"{block}.norm1", 1e-6), f"{block}.attn.qkv")
        seen = seen + blip.linear(attention(*qkv.chunk(3, dim=1), 64), f"{block}.attn.proj")
        inside = functional.gelu(blip.linear(blip.norm(seen, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1"))
        seen = seen + blip.linear(inside, f"{block}.mlp.fc2")
    seen = blip.norm(seen, f"{vit}.norm", 1e-6)

    bert = "blip.text_encoder"
    x = blip[f"{bert}.embeddings.word_embeddings.weight"][tokens]
    x = blip.norm(
        x + blip[f"{bert}.embeddings.position_embeddings.weight"][: len(tokens)], f"{bert}.embeddings.LayerNorm"
    )
    for i in range(2):
        layer = f"{bert}.encoder.layer.{i}"
        for name, source in (("attention", None), ("crossattention", seen)):
            source = x if source is None else source
            q, k, v = (
                blip.linear(y, f"{layer}.{name}.self.{part}")
                for y, part in ((x, "query"), (source, "key"), (source, "value"))
            )
            added = blip.linear(attention(q, k, v, 64), f"{layer}.{name}.output.dense")
            x = blip.norm(x + added, f"{layer}.{name}.output.LayerNorm")
        inside = functional.gelu(blip.linear(x, f"{layer}.intermediate.dense"))
        x = blip.norm(x + blip.linear(inside, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
    return (head_score(state, x[0], "mlp.") - 0.16717362830052426) / 1.0333394966054072


def head_score(state, x, prefix="") -> float:
    """Five linear layers on float64 [D]."""
    head = Reader(state, eps=0)
    for i in (0, 2, 4, 6, 7):
        x = head.linear(x, f"{prefix}layers.{i}")
    return x.item()
