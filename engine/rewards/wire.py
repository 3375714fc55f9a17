"""What client and server of a reward tell each other: JSON, with pictures as PNG in base64. Never pickle.

    GET  /health  -> {"reward": name, "value_range": [low or null, high or null]}
    POST /check   {"prompts": [N strings], "metadata": [N objects]} -> {}, or 422 for one that the reward cannot judge
    POST /score   {"prompts": [N strings], "metadata": [N objects], "images": [N strings]}
                  -> {"scores": [N numbers], "extras": {name: [N numbers or null]}}

Every other answer is {"error": message}. Where the server has a token: `Authorization: Bearer TOKEN`.
"""

import base64
import binascii
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from .protocol import Scores

TOKEN_VARIABLE = "LATENT_CRITIC_REWARD_TOKEN"  # of the environment, for both sides


class Refused(Exception):
    """An answer of the server that is no result."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.headers = status, message, dict(headers or {})


@dataclass(frozen=True)
class Limits:
    body: int  # bytes
    images: int
    pixels: int  # of all pictures of a request together


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    prompts: list[str]
    metadata: list[dict[str, Any]]


class _AskedToScore(_Asked):
    images: list[str]


def pack(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping]) -> bytes:
    """The body of /score, of uint8 [N, H, W, 3]."""
    pictures = [base64.b64encode(_png(image)).decode() for image in images.numpy()]
    return json.dumps({"prompts": list(prompts), "metadata": list(metadata), "images": pictures}).encode()


def unpack(body: bytes | bytearray, limits: Limits) -> tuple[Tensor, list[str], list[dict]]:
    """Pictures uint8 [N, H, W, 3], prompts and metadata of a body of /score, or Refused: 400, 413 or 422.

    Nothing is decoded before the headers of all pictures have told that they stay within the limits.
    """
    asked = _validated(_AskedToScore, body)
    count = len(asked.images)
    if not count or count != len(asked.prompts):
        raise Refused(422, f"{count} images, {len(asked.prompts)} prompts: it must be as many of each, 1 or more")
    if count > limits.images:
        raise Refused(413, f"{count} images: at most {limits.images} in a request")
    opened = [_open(number, text, limits) for number, text in enumerate(asked.images)]
    if len({picture.size for picture in opened}) > 1:
        raise Refused(422, "images of a request must be of one size")
    width, height = opened[0].size
    if count * width * height > limits.pixels:
        raise Refused(413, f"{count} images of {width} x {height}: at most {limits.pixels} pixels in a request")
    pictures = np.stack([_decode(number, picture) for number, picture in enumerate(opened)])
    return torch.from_numpy(pictures), asked.prompts, asked.metadata


def pack_prompts(prompts: Sequence[str], metadata: Sequence[Mapping]) -> bytes:
    """The body of /check."""
    return json.dumps({"prompts": list(prompts), "metadata": list(metadata)}).encode()


def unpack_prompts(body: bytes | bytearray) -> tuple[list[str], list[dict]]:
    """Prompts and metadata of a body of /check, or Refused."""
    asked = _validated(_Asked, body)
    return asked.prompts, asked.metadata


def answer(scores: Scores) -> dict:
    """What /score answers."""
    extras = {name: [None if math.isnan(x) else x for x in column.tolist()] for name, column in scores.extras.items()}
    return {"scores": scores.values.tolist(), "extras": extras}


def read_answer(found: Mapping[str, Any]) -> tuple[list[float], dict[str, list[float]]]:
    """What a scorer returns, from what /score answers. KeyError or the like for something else."""
    extras = {name: [math.nan if x is None else x for x in column] for name, column in found.get("extras", {}).items()}
    return found["scores"], extras


def _validated(schema: type[_Asked], body: bytes | bytearray) -> Any:
    try:
        asked = schema.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        if first["type"] == "json_invalid":
            raise Refused(400, f"the body is not JSON: {first['ctx']['error']}") from None
        where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
        raise Refused(422, f"{where.removeprefix('.') or 'the body'}: {first['msg']}") from None
    if len(asked.prompts) != len(asked.metadata):
        counts = f"{len(asked.prompts)} prompts, {len(asked.metadata)} metadata"
        raise Refused(422, f"{counts}: it must be as many of each")
    return asked


def _png(image: np.ndarray) -> bytes:
    with io.BytesIO() as buffer:
        Image.fromarray(image).save(buffer, format="PNG", compress_level=1)  # half as large as raw, and quickly
        return buffer.getvalue()


def _open(number: int, text: str, limits: Limits) -> Image.Image:
    """A picture whose header was read."""
    try:
        picture = Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"])
    except binascii.Error as error:
        raise Refused(422, f"images[{number}] is not base64: {error}") from None
    except Image.DecompressionBombError:
        raise Refused(413, f"images[{number}]: at most {limits.pixels} pixels in a request") from None
    except Exception as error:  # a decoder may raise anything about bytes that were made to break it
        raise Refused(422, f"images[{number}] is not a PNG: {error}") from None
    if picture.width * picture.height > limits.pixels:
        size = f"{picture.width} x {picture.height}"
        raise Refused(413, f"images[{number}] of {size}: at most {limits.pixels} pixels in a request")
    return picture


def _decode(number: int, picture: Image.Image) -> np.ndarray:
    try:
        return np.asarray(picture.convert("RGB"))
    except Exception as error:  # as above
        raise Refused(422, f"images[{number}] is a damaged PNG: {error}") from None
