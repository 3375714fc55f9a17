"""Judges a picture of the embedded world against the scene its caption describes.

Segment by hue, label connected components, compare each with the four shapes rendered in its bounding box, match what
was found with what was asked for. `strict` is GenEval's 0/1 verdict (arXiv 2310.11513); `dense` gives partial credit,
in the spirit of the dense GenEval reward of Flow-GRPO (arXiv 2505.05470). Neither is differentiable.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from .scenes import COLORS, RELATIONS, SHAPES, SIZE, Group, Scene

MIN_AREA = 50  # pixels: a third of the smallest object (a triangle of radius 9); anything smaller is a speck
MIN_SHAPE_SCORE = 0.7  # below it a blob is no shape at all
MIN_COLOR_SCORE = 0.25  # below it a colour is too pale, too dark or too odd to be called by its nearest name
MIN_DISTANCE = 8  # pixels between two centres along the axis of their relation

_EXTENT = (15, 25)  # pixels: height and width of every drawn object (16.2 to 23), and a pixel more for the borders
_FULL_COLOR, _NO_COLOR = 30.0, 130.0  # distances in RGB; drawn colours vary by at most 17, palette colours by 119
_SHAPE_MARGIN = 0.15  # a square seen as a circle has this much less overlap than a circle
_MIN_STRENGTH = 0.4  # of the palette colour's saturation: less is a stain of the background, drawn ones stay below 0.14
_SMOOTHING = np.array([0.25, 0.5, 0.25], dtype=np.float32)
_WINDOW = 11  # pixels: wider than any blurred border
_MIN_SEED = 9  # pixels that are left of a region after erosion; rims leave none, a touching object many

_PALETTE = np.array(list(COLORS.values()), dtype=np.float32)
_CHROMATIC = _PALETTE - _PALETTE.mean(axis=1, keepdims=True)
_HUES = _CHROMATIC / np.linalg.norm(_CHROMATIC, axis=1, keepdims=True)  # rows sum to 0: mixing with grey keeps the hue
_SATURATION = (_PALETTE * _HUES).sum(axis=1)


@dataclass(frozen=True)
class Detection:
    """One object. center: (row, column) in pixels; area in pixels; scores in [0, 1] for every shape and colour."""

    shape: str
    color: str
    center: tuple[float, float]
    area: int
    shape_scores: dict[str, float]
    color_scores: dict[str, float]


@dataclass(frozen=True)
class Score:
    dense: float
    strict: bool


def detect(image: np.ndarray) -> list[Detection]:
    """Every object of a uint8 [64, 64, 3] picture, from top to bottom. ValueError for another form."""
    image = np.asarray(image)
    if image.shape != (SIZE, SIZE, 3) or image.dtype != np.uint8:
        raise ValueError(f"image must be uint8 [{SIZE}, {SIZE}, 3], got {image.dtype} {list(image.shape)}")
    pixels = image.astype(np.float32)
    return [_describe(pixels, region, box) for region, box in _regions(pixels)]


def score(image: np.ndarray, scene: Scene) -> Score:
    """How well a uint8 [64, 64, 3] picture shows `scene`. Quoted numbers are not read: see the OCR reward.

    dense: mean of a count term max(0, 1 - |found - expected| / expected), an object term (shape and colour agreement
    after optimal matching) and, where there is a relation, a relation term. strict: exactly the expected objects with
    the right shapes, the named colours, nothing else, and the relation.
    """
    found = detect(image)
    expected = [group for group in scene.groups for _ in range(group.count)]
    agreement = np.array([[_agreement(d, g) for d in found] for g in expected]).reshape(len(expected), len(found))
    rows, columns = linear_sum_assignment(agreement, maximize=True)
    matched = dict(zip(rows.tolist(), columns.tolist(), strict=True))

    terms = [
        max(0.0, 1 - abs(len(found) - len(expected)) / len(expected)),
        agreement[rows, columns].sum() / len(expected),
    ]
    strict = len(found) == len(expected) and all(_is(found[j], expected[i]) for i, j in matched.items())
    if scene.relation is not None:
        margin, certainty = -np.inf, 0.0
        if len(matched) == len(expected):
            first, second = matched[0], matched[scene.groups[0].count]
            margin = _relation_margin(found[first].center, found[second].center, scene.relation)
            certainty = float(agreement[rows, columns].mean())
        terms.append(float(np.clip(0.5 + margin / (2 * MIN_DISTANCE), 0, 1)) * certainty)
        strict = strict and margin > 0
    return Score(float(np.mean(terms)), strict)


# ------------------------------------------------------------------------------------------------------ segmentation


def _regions(pixels: np.ndarray) -> Iterable[tuple[np.ndarray, tuple[slice, slice]]]:
    """(mask inside the box, box) of every object."""
    projections = _HUES @ pixels.reshape(-1, 3).T
    hue = projections.argmax(axis=0).reshape(SIZE, SIZE)
    strength = projections.max(axis=0).reshape(SIZE, SIZE) / _SATURATION[hue]
    for axis in (0, 1):  # noise of single pixels must not stretch a bounding box
        strength = ndimage.correlate1d(strength, _SMOOTHING, axis)
    # Half of the nearby maximum, not of the palette: a faded object keeps its borders, and so its shape.
    nearby = ndimage.maximum_filter1d(ndimage.maximum_filter1d(strength, _WINDOW, axis=0), _WINDOW, axis=1)
    mask = strength > np.maximum(_MIN_STRENGTH, 0.5 * nearby)
    labels, count = ndimage.label(mask)
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    for index, box in enumerate(ndimage.find_objects(labels), start=1):
        if areas[index] < MIN_AREA:
            continue
        region = labels[box] == index
        if (np.bincount(hue[box][region]) >= MIN_AREA).sum() > 1:
            yield from _split(region, hue[box], box)
        else:
            yield region, box


def _split(region: np.ndarray, hue: np.ndarray, box: tuple[slice, slice]):
    """Touching objects of different hues, apart. A rim of mixed hue is thin, and goes with the object it surrounds."""
    seeds = np.zeros(region.shape, dtype=np.int64)
    for color in np.unique(hue[region]):
        core = ndimage.binary_erosion(np.pad(region & (hue == color), 1), np.ones((3, 3)))[1:-1, 1:-1]
        labels, count = ndimage.label(core)
        areas = np.bincount(labels.ravel(), minlength=count + 1)
        for index in range(1, count + 1):
            if areas[index] >= _MIN_SEED:
                seeds[labels == index] = seeds.max() + 1
    if seeds.max() <= 1:
        yield region, box
        return
    nearest = ndimage.distance_transform_edt(seeds == 0, return_distances=False, return_indices=True)
    parts = np.where(region, seeds[tuple(nearest)], 0)
    for index, inner in enumerate(ndimage.find_objects(parts), start=1):
        if inner is not None and (parts[inner] == index).sum() >= MIN_AREA:
            outer = tuple(slice(b.start + i.start, b.start + i.stop) for b, i in zip(box, inner, strict=True))
            yield parts[inner] == index, outer


# ------------------------------------------------------------------------------------------------------- description


@lru_cache(maxsize=1024)
def _templates(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The shapes filling a box: float32 [shapes, height * width] masks, and their areas."""
    fine = 4
    y, x = np.mgrid[0 : height * fine, 0 : width * fine]
    y, x = (2 * y + 1) / (height * fine) - 1, (2 * x + 1) / (width * fine) - 1
    filled = {
        "circle": x**2 + y**2 <= 1,
        "square": np.ones_like(x, dtype=bool),
        "triangle": np.abs(x) <= 0.12 + 0.88 * (y + 1) / 2,  # its tip is thinner than a pixel, and not in the mask
        "cross": np.minimum(np.abs(x), np.abs(y)) <= 0.34,
    }
    coverage = np.stack([filled[s] for s in SHAPES]).reshape(len(SHAPES), height, fine, width, fine).mean(axis=(2, 4))
    masks = (coverage >= 0.5).reshape(len(SHAPES), -1).astype(np.float32)
    return masks, masks.sum(axis=1)


def _describe(pixels: np.ndarray, region: np.ndarray, box: tuple[slice, slice]) -> Detection:
    height, width = region.shape
    masks, areas = _templates(height, width)
    area = int(np.count_nonzero(region))
    overlap = masks @ region.ravel().astype(np.float32)
    iou = overlap / (areas + area - overlap)
    for extent in (height, width):  # a dwarf or a giant is no object of this world
        iou = iou * min(1.0, extent / _EXTENT[0], _EXTENT[1] / extent)
    rgb = np.partition(pixels[box][region], area // 2, axis=0)[area // 2]  # the median: borders do not count
    distance = np.linalg.norm(_PALETTE - rgb, axis=1)
    agreement = np.clip((_NO_COLOR - distance) / (_NO_COLOR - _FULL_COLOR), 0, 1)
    rows, columns = np.nonzero(region)
    return Detection(
        shape=SHAPES[int(iou.argmax())],
        color=list(COLORS)[int(distance.argmin())],
        center=(float(rows.mean()) + box[0].start, float(columns.mean()) + box[1].start),
        area=area,
        shape_scores=dict(zip(SHAPES, iou.tolist(), strict=True)),
        color_scores=dict(zip(COLORS, agreement.tolist(), strict=True)),
    )


# ------------------------------------------------------------------------------------------------------------ scoring


def _agreement(detection: Detection, group: Group) -> float:
    """[0, 1]; shapes and colours count alike. Another shape that fits better takes credit away."""
    fit = detection.shape_scores[group.shape]
    behind = detection.shape_scores[detection.shape] - fit
    shape = fit * max(0.0, 1 - behind / _SHAPE_MARGIN)
    return shape if group.color is None else (shape + detection.color_scores[group.color]) / 2


def _is(detection: Detection, group: Group) -> bool:
    if detection.shape != group.shape or detection.shape_scores[group.shape] < MIN_SHAPE_SCORE:
        return False
    return group.color is None or (
        detection.color == group.color and detection.color_scores[group.color] >= MIN_COLOR_SCORE
    )


def _relation_margin(first: tuple[float, float], second: tuple[float, float], relation: str) -> float:
    """Pixels by which the relation holds (> 0): far enough along its axis, and further along it than across it."""
    towards = RELATIONS[relation]
    offset = [a - b for a, b in zip(first, second, strict=True)]
    along = sum(o * t for o, t in zip(offset, towards, strict=True))
    across = sum(abs(o) for o, t in zip(offset, towards, strict=True) if t == 0)
    return min(along - MIN_DISTANCE, along - across)
