"""Monitors that a reward cannot see: how varied, structured, colourful and sharp pictures are, whatever their prompts.

A policy that exploits its reward gives itself away in statistics that nobody trains on: pictures become flat or covered
with texture, lose their colours, or all look alike. None of these is good or bad by itself; what tells is a steady
drift from where the base model was. They need no model, no network and little time: on one CPU core 0.1 s for 512
pictures of 64 x 64, 0.4 s for 64 of 512 x 512, 2.7 s for 64 of 1024 x 1024.

N pictures are uint8 [N, H, W, 3] on the CPU, 8 pixels a side or more.
"""

import torch
from torch import Tensor
from torch.nn import functional

EDGE = 8.0  # levels a pixel: a gradient from which on a pixel counts as an edge

_SIDE = 128  # pixels: larger pictures are averaged down to it, so that a number means the same at each resolution
_BATCH = 16  # pictures at a time
_CELLS = 8  # of a thumbnail, a side
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def edge_density(images: Tensor) -> Tensor:
    """Share of pixels, 0 to 1, at which Sobel's gradient of the luma exceeds `EDGE`; float32 [N].

    Falls where pictures are flattened or emptied, rises where they are covered with texture or noise.
    """
    x = _luma(images)
    rows, columns = x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:], x[:, :, :-2] + 2 * x[:, :, 1:-1] + x[:, :, 2:]
    horizontal, vertical = (rows[:, :, 2:] - rows[:, :, :-2]) / 8, (columns[:, 2:] - columns[:, :-2]) / 8
    return (horizontal.square() + vertical.square() > EDGE**2).float().mean((1, 2))


def color_entropy(images: Tensor) -> Tensor:
    """Entropy -sum p log2 p, in bits, of a picture's histogram of 8 x 8 x 8 colours: 0 (one colour) to 9; float32 [N].

    Falls where palettes collapse and surfaces go flat, rises with noise and garish colours.
    """
    red, green, blue = (images.long() // 32).flatten(1, 2).unbind(2)
    color = red * 64 + green * 8 + blue + 512 * torch.arange(len(images))[:, None]
    share = torch.bincount(color.flatten(), minlength=512 * len(images)).view(-1, 512) / color.shape[1]
    return -(share * share.clamp(min=1e-30).log2()).sum(1)


def sharpness(images: Tensor) -> Tensor:
    """Variance over a picture of the Laplacian of its luma, in squared levels; float32 [N].

    Falls with blur, rises with over-sharpening, halos, grids and noise.
    """
    x = _luma(images)
    laplacian = x[:, :-2, 1:-1] + x[:, 2:, 1:-1] + x[:, 1:-1, :-2] + x[:, 1:-1, 2:] - 4 * x[:, 1:-1, 1:-1]
    return laplacian.square().mean((1, 2)) - laplacian.mean((1, 2)).square()


def thumbnails(images: Tensor) -> Tensor:
    """What `diversity` compares: means over 8 x 8 cells of a picture, 0 to 255, float32 [N, 192]."""
    return functional.adaptive_avg_pool2d(images.permute(0, 3, 1, 2).float(), _CELLS).flatten(1)


def diversity(thumbnails: Tensor) -> float:
    """Root mean square difference, in levels, between two of N pictures at a glance: over all pairs of thumbnails.

    Falls where pictures become flat, or those of different prompts come to share layout and palette (mode collapse).
    It sees what colour is where; it sees neither texture nor what is drawn, nor how much pictures of one prompt differ,
    unless prompts come more than once. The mean square over pairs is twice the variance, so no pair need be formed.
    """
    return (2 * thumbnails.double().var(0, correction=1).mean()).sqrt().item()


def measure(images: Tensor) -> Tensor:
    """All that `monitor` needs of N pictures: float32 [N, 3 + 192]. Those of several processes can be concatenated."""
    return torch.cat([_measure(batch) for batch in images.split(_BATCH)])


def monitor(measured: Tensor) -> dict[str, float]:
    """Each monitor of the pictures that were measured: their diversity, and means over pictures."""
    edges, entropy, sharp = measured[:, :3].double().mean(0).tolist()
    return {
        "diversity": diversity(measured[:, 3:]),
        "edge_density": edges,
        "color_entropy": entropy,
        "sharpness": sharp,
    }


def shrink(images: Tensor, side: int) -> Tensor:
    """uint8 [N, h, w, 3], the longer side at most `side` pixels; antialiased."""
    longer = max(images.shape[1:3])
    if longer <= side:
        return images
    size = [max(8, round(length * side / longer)) for length in images.shape[1:3]]
    shrunk = functional.interpolate(images.permute(0, 3, 1, 2), size=size, mode="bilinear", antialias=True)
    return shrunk.permute(0, 2, 3, 1)


def _measure(images: Tensor) -> Tensor:
    small = shrink(images, _SIDE)  # sharpness is lost in it
    numbers = torch.stack([edge_density(small), color_entropy(small), sharpness(images)], 1)
    return torch.cat([numbers, thumbnails(small)], 1)


def _luma(images: Tensor) -> Tensor:
    """float32 [N, H, W], 0 to 255."""
    red, green, blue = (images[..., i] * weight for i, weight in enumerate(_LUMA))
    return red + green + blue
