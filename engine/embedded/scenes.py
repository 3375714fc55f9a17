"""The embedded world: 64 x 64 pictures of coloured shapes with exact captions.

GenEval's six tasks in small (single object, two objects, counting, colours, position, colour attribution) plus quoted
numbers for OCR. A caption and a `Scene` carry the same facts: `Scene.caption()` writes one, `parse()` reads it back, so
a prompt alone is enough for the checker to know what must be seen.
"""

import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..errors import UserError

SIZE = 64  # pixels
SHAPES = ("circle", "square", "triangle", "cross")
COLORS = {  # sRGB; far apart and saturated, so that a grey background is never taken for an object
    "red": (214, 38, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 215),
    "yellow": (235, 205, 30),
    "purple": (150, 45, 185),
}
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}  # (row, column) of the first
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr", "text")
NUMBERS = {"a": 1, "two": 2, "three": 3}

_CELL = SIZE // 2  # objects stand in a jittered 2 x 2 layout
_SUPERSAMPLE = 4


@dataclass(frozen=True)
class Group:
    """`count` objects of one shape and colour; `color` is None where the caption leaves it open."""

    count: int
    color: str | None
    shape: str

    def words(self) -> str:
        number = {v: k for k, v in NUMBERS.items()}[self.count]
        noun = self.shape if self.count == 1 else ("crosses" if self.shape == "cross" else self.shape + "s")
        return " ".join(filter(None, (number, self.color, noun)))


@dataclass(frozen=True)
class Scene:
    """What a caption says: one or two groups, at most one relation between them, at most one quoted number."""

    groups: tuple[Group, ...]
    relation: str | None = None
    text: str | None = None
    task: str = field(default="", compare=False)

    def caption(self) -> str:
        joint = f" {self.relation} " if self.relation else " and "
        words = joint.join(group.words() for group in self.groups)
        return words if self.text is None else f'{words} and the text "{self.text}"'

    def combinations(self) -> tuple[tuple[str, str | None, str], ...]:
        """The (shape, colour, relation) triples by which training and held-out prompts are kept apart."""
        relation = self.relation or ("text" if self.text else {1: "alone", 2: "and"}[len(self.groups)])
        return tuple(
            (g.shape, g.color, relation if g.count == 1 else {2: "two", 3: "three"}[g.count]) for g in self.groups
        )


_GROUP = rf"(a|two|three) (?:({'|'.join(COLORS)}) )?({'|'.join(SHAPES)})(?:e?s)?"
_CAPTION = re.compile(rf'{_GROUP}(?: (and|{"|".join(RELATIONS)}) {_GROUP})?(?: and the text "(\w+)")?')


def parse(caption: str) -> Scene:
    """The scene that a caption of this world describes. Raises UserError for any other text."""
    match = _CAPTION.fullmatch(caption.strip())
    if match is None:
        raise UserError(
            f"prompt {caption!r} is not a scene caption; write it like 'two red circles and a blue square', "
            f"'a green triangle left of a yellow circle' or 'a red circle and the text \"47\"' "
            f"(shapes: {', '.join(SHAPES)}; colours: {', '.join(COLORS)})"
        )
    n1, c1, s1, joint, n2, c2, s2, text = match.groups()
    groups = [Group(NUMBERS[n1], c1, s1)]
    if joint:
        groups.append(Group(NUMBERS[n2], c2, s2))
    relation = joint if joint in RELATIONS else None
    return Scene(tuple(groups), relation, text, _task(groups, relation, text))


def _task(groups: Sequence[Group], relation: str | None, text: str | None) -> str:
    if text is not None:
        return "text"
    if relation is not None:
        return "position"
    if any(group.count > 1 for group in groups):
        return "counting"
    if len(groups) == 1:
        return "colors" if groups[0].color else "single_object"
    return "color_attr" if groups[0].color else "two_object"


@lru_cache(maxsize=1)
def all_scenes() -> dict[str, tuple[Scene, ...]]:
    """Every scene of every task. In two groups shapes differ, and so do colours where they are named."""
    coloured = list(itertools.product(COLORS, SHAPES))
    pairs = [
        (Group(1, c1, s1), Group(1, c2, s2))
        for (c1, s1), (c2, s2) in itertools.permutations(coloured, 2)
        if c1 != c2 and s1 != s2
    ]
    scenes = {
        "single_object": [Scene((Group(1, None, s),)) for s in SHAPES],
        "two_object": [Scene((Group(1, None, a), Group(1, None, b))) for a, b in itertools.permutations(SHAPES, 2)],
        "counting": [Scene((Group(n, c, s),)) for n in (2, 3) for c, s in coloured]
        + [Scene((Group(2, a.color, a.shape), b)) for a, b in pairs],
        "colors": [Scene((Group(1, c, s),)) for c, s in coloured],
        "position": [Scene(pair, relation) for relation in RELATIONS for pair in pairs],
        "color_attr": [Scene(pair) for pair in pairs],
        "text": [Scene((Group(1, c, s),), None, str(n)) for c, s in coloured for n in range(10, 100)],
    }
    return {task: tuple(Scene(s.groups, s.relation, s.text, task) for s in found) for task, found in scenes.items()}


@lru_cache(maxsize=1)
def held_out_combinations() -> frozenset[tuple[str, str | None, str]]:
    """A third of each relation's (shape, colour) pairs, drawn once with a fixed seed; no training prompt uses them."""
    by_relation: dict[str, set] = {}
    for scene in itertools.chain(*all_scenes().values()):
        for shape, color, relation in scene.combinations():
            by_relation.setdefault(f"{relation}/{color is None}", set()).add((shape, color, relation))
    held: set = set()
    for key in sorted(by_relation):
        found = sorted(by_relation[key], key=str)
        random.Random(f"held-out {key}").shuffle(found)
        held.update(found[: max(2, len(found) // 3)])
    return frozenset(held)


def prompts(split: str, tasks: Sequence[str] | None = None) -> list[str]:
    """Captions of one split, every task equally often (the largest task sets how often the others repeat).

    split: "train" or "held-out"; a prompt all of whose combinations are held out is held-out, one that has none is
    train, and mixed ones belong to neither. tasks: default all but "text". Raises UserError for an unknown name.
    """
    if split not in ("train", "held-out"):
        raise UserError(f"scenes have no split {split!r}; use 'scenes:train' or 'scenes:held-out'")
    tasks = tuple(tasks or TASKS[:-1])
    for task in tasks:
        if task not in TASKS:
            raise UserError(f"scenes have no task {task!r}; use one of: {', '.join(TASKS)}")
    held = held_out_combinations()
    wanted = all if split == "held-out" else (lambda flags: not any(flags))
    by_task = [
        [s.caption() for s in all_scenes()[task] if wanted([c in held for c in s.combinations()])] for task in tasks
    ]
    longest = max(map(len, by_task))
    return [captions[i % len(captions)] for i in range(longest) for captions in by_task]


# ---------------------------------------------------------------------------------------------------------- drawing


def random_scene(rng: np.random.Generator) -> Scene:
    """A scene of a task drawn uniformly, so that pretraining sees each task equally often."""
    task = TASKS[rng.integers(len(TASKS))]
    found = all_scenes()[task]
    return found[rng.integers(len(found))]


def draw(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """One picture of the scene: uint8 [64, 64, 3]; places, sizes, hues and the background vary with `rng`."""
    canvas = _background(rng)
    picture = Image.fromarray(canvas).resize((SIZE * _SUPERSAMPLE,) * 2, Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(picture)
    colors = _free_colors(scene, rng)
    objects = [(g.shape, color) for g, color in zip(scene.groups, colors, strict=True) for _ in range(g.count)]
    for (shape, color), (row, column) in zip(objects, _cells(scene, len(objects), rng), strict=True):
        radius = rng.uniform(9.0, 11.5)
        y, x = (_CELL * (i + 0.5) + rng.uniform(-3.0, 3.0) for i in (row, column))
        rgb = np.clip(np.array(COLORS[color]) + rng.uniform(-10, 10, 3), 0, 255).astype(int)
        _stamp(pen, shape, x, y, radius, tuple(rgb))
    if scene.text is not None:
        x, y = _CELL + rng.uniform(-6, 6), _CELL * 1.5 + rng.uniform(-1, 1)
        pen.text((x * _SUPERSAMPLE, y * _SUPERSAMPLE), scene.text, fill=(16, 16, 16), font=_font(), anchor="mm")
    picture = picture.resize((SIZE, SIZE), Image.Resampling.BOX)
    return np.asarray(picture)


def _free_colors(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Colours of the groups; those the caption leaves open are drawn at random, all different."""
    names = rng.permutation([c for c in COLORS if c not in {g.color for g in scene.groups}])
    return [g.color or str(names[i]) for i, g in enumerate(scene.groups)]


def _cells(scene: Scene, count: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    if scene.relation is not None:
        drow, dcolumn = RELATIONS[scene.relation]
        line = int(rng.integers(2))
        first = (line if drow == 0 else (1 + drow) // 2, line if dcolumn == 0 else (1 + dcolumn) // 2)
        second = (first[0] - drow, first[1] - dcolumn)
        return [first, second]
    cells = [(0, 0), (0, 1)] if scene.text is not None else [(0, 0), (0, 1), (1, 0), (1, 1)]  # the number stands below
    return [cells[i] for i in rng.permutation(len(cells))[:count]]


def _stamp(pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, rgb: tuple[int, ...]) -> None:
    def polygon(points):
        pen.polygon([((x + r * px) * _SUPERSAMPLE, (y + r * py) * _SUPERSAMPLE) for px, py in points], fill=rgb)

    if shape == "circle":
        pen.ellipse(
            [(x - r) * _SUPERSAMPLE, (y - r) * _SUPERSAMPLE, (x + r) * _SUPERSAMPLE, (y + r) * _SUPERSAMPLE], rgb
        )
    elif shape == "square":
        polygon([(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)])
    elif shape == "triangle":
        polygon([(0, -1), (1, 0.9), (-1, 0.9)])
    else:
        w = 0.34
        polygon(
            [(-w, -1), (w, -1), (w, -w), (1, -w), (1, w), (w, w), (w, 1), (-w, 1), (-w, w), (-1, w), (-1, -w), (-w, -w)]
        )


def _background(rng: np.random.Generator) -> np.ndarray:
    """Light grey with a faint tint and one of four textures, coarse enough to survive a VAE of factor 4."""
    yy, xx = np.mgrid[0:SIZE, 0:SIZE].astype(np.float64)
    angle, period, phase = rng.uniform(0, np.pi), rng.uniform(10, 18), rng.uniform(0, 2 * np.pi)
    along = xx * np.cos(angle) + yy * np.sin(angle)
    kind = rng.integers(4)
    if kind == 0:
        wave = along / SIZE
    elif kind == 1:
        wave = np.sin(2 * np.pi * along / period + phase)
    elif kind == 2:
        across = -xx * np.sin(angle) + yy * np.cos(angle)
        wave = np.sin(2 * np.pi * along / period + phase) * np.sin(2 * np.pi * across / period)
    else:
        coarse = Image.fromarray(rng.uniform(-1, 1, (9, 9)).astype(np.float32))
        wave = np.asarray(coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    tint = rng.uniform(-8, 8, 3)
    grey = rng.uniform(170, 215) + rng.uniform(12, 22) * wave[..., None] + tint
    return np.clip(grey, 0, 255).astype(np.uint8)


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont:
    from matplotlib import font_manager  # takes a while, and who draws nothing needs no font

    path = font_manager.findfont(font_manager.FontProperties(family="DejaVu Sans", weight="bold"))
    return ImageFont.truetype(path, 24 * _SUPERSAMPLE)
