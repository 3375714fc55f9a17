"""GenEval's rules (arXiv 2310.11513) on detected objects, without any model.

A prompt's metadata say what its picture must show: `include`, requirements {class, count, color?, position?} that hold
together, where a position is [relation, number of an earlier requirement]; and `exclude`, {class, count} that no class
may reach. What counts as an object: `Thresholds`. From these, three scores, as the field has them:

official: 0 or 1, the benchmark's verdict. Each requirement finds `count` objects of its class or more, the `count` most
    certain of which have the colour, and each of them the relation to each object of the earlier requirement, if that
    was met; and no `exclude` is reached. Extra objects do no harm, unless excluded (as in the task `counting`).
dense: Flow-GRPO's training reward (arXiv 2505.05470), the mean of terms. A requirement gives 1 - |count - found| /
    count, below 0 from 2 x count + 1 objects on. If its count is not met exactly, one more term of 0 stands for its
    colour and position. Otherwise a colour gives the share of objects that have it; and a position, asked for if all
    have the colour, 1 if it holds, 0 if the earlier requirement was not met exactly, and both a 0 and a 1 if it is
    wrong (so does the published reward server; [1, 1, 0, 1] is 0.75). `exclude` plays no part.
strict: 0 or 1, Flow-GRPO's own verdict: dense is 1. Unlike the official one, extra objects of a class are wrong.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..errors import UserError

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
_CLASSES = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,"
    "skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,"
    "cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,computer mouse,tv remote,computer keyboard,cell phone,microwave,"
    "oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"
)
CLASSES = tuple(_CLASSES.split(","))
OTHER_NAMES = {  # what COCO itself and the label lists of some detectors call them
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "hair dryer": "hair drier",
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
}
EXAMPLE = (
    '{"prompt": "a photo of a red dog right of a cat", "tag": "position", "include": [{"class": "cat", "count": 1}, '
    '{"class": "dog", "count": 1, "color": "red", "position": ["right of", 0]}]}'
)

# ------------------------------------------------------------------------------------------------------ what is asked


def _known(name: str) -> str:
    if name not in CLASSES:
        near = OTHER_NAMES.get(name) or difflib.get_close_matches(name, CLASSES, 1, 0)[0]
        raise ValueError(f"{name!r} is none of GenEval's names for COCO's 80 classes; nearest: {near!r}")
    return name


ClassName = Annotated[str, AfterValidator(_known)]
Count = Annotated[int, Field(ge=1, strict=True)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Required(_Section):
    name: ClassName = Field(alias="class")
    count: Count
    color: Literal[COLORS] | None = None
    position: tuple[Literal["left of", "right of", "above", "below"], Annotated[int, Field(strict=True)]] | None = None


class Excluded(_Section):
    name: ClassName = Field(alias="class")
    count: Count


class Task(BaseModel):
    """What a picture must show."""

    tag: Literal["single_object", "two_object", "counting", "colors", "position", "color_attr"]
    include: list[Required] = Field(min_length=1)
    exclude: list[Excluded] = []

    @model_validator(mode="after")
    def _check(self) -> "Task":
        for number, required in enumerate(self.include):
            if required.position and not 0 <= required.position[1] < number:
                raise ValueError(f"include[{number}].position: must name an earlier requirement, counted from 0")
        return self


def read_task(prompt: str, metadata: Mapping[str, Any]) -> Task:
    """The task of a prompt's metadata, whose other keys are left alone. UserError names prompt, key and the format."""
    try:
        return Task.model_validate(dict(metadata))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
        what = ": ".join(filter(None, [key, first["msg"].removeprefix("Value error, ")]))
        raise UserError(
            f"reward 'geneval' cannot judge prompt {prompt!r}: {what}. It takes prompts from a .jsonl file with lines "
            f"like {EXAMPLE}"
        ) from None


# ------------------------------------------------------------------------------------------------------ what is found


@dataclass
class Found:
    """An object in a picture. box: left, top, right, bottom in pixels. color: one of COLORS, once it was asked for."""

    box: Sequence[float]
    score: float
    mask: np.ndarray | None = None  # bool [H, W]
    color: str | None = None


Objects = Mapping[str, Sequence[Found]]  # by class


@dataclass(frozen=True)
class Thresholds:
    """The benchmark's, by default."""

    score: float = 0.3  # an object counts above it
    counting_score: float = 0.9  # the same for the task `counting`
    max_objects: int = 16  # of a class; the most certain count
    max_overlap: float = 1.0  # IoU with a more certain object of its class at which one is dropped; 1 drops none
    position: float = 0.1  # of both boxes' sizes: so much distance between centres is none


def keep(objects: Objects, task: Task, thresholds: Thresholds) -> dict[str, list[Found]]:
    """The objects that count, by class, the most certain first. Classes without any are left out."""
    least = thresholds.counting_score if task.tag == "counting" else thresholds.score
    result = {}
    for name, found in objects.items():
        certain = sorted((o for o in found if o.score > least), key=lambda o: -o.score)[: thresholds.max_objects]
        kept: list[Found] = []
        for candidate in certain:
            if thresholds.max_overlap == 1 or all(iou(o.box, candidate.box) < thresholds.max_overlap for o in kept):
                kept.append(candidate)
        if kept:
            result[name] = kept
    return result


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of boxes that hold their last pixels, as the benchmark takes them."""

    def area(left, top, right, bottom):
        return max(right - left + 1, 0) * max(bottom - top + 1, 0)

    shared = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a) + area(*b) - shared
    return shared / union if union else 0.0


def relations(a: Sequence[float], b: Sequence[float], threshold: float) -> set[str]:
    """Where box a is, seen from box b: one of "left of", "right of", "above", "below", two of them, or none.

    The distance of the centres along an axis, less threshold x (both boxes' sizes along it), must be more than half of
    the centres' distance.
    """
    a, b = (np.asarray(box, dtype=float).reshape(2, 2) for box in (a, b))
    offset = a.mean(axis=0) - b.mean(axis=0)
    sizes = np.abs(a[1] - a[0]) + np.abs(b[1] - b[0])
    beyond = np.maximum(np.abs(offset) - threshold * sizes, 0) * np.sign(offset)
    if (np.abs(beyond) < 1e-3).all():
        return set()
    x, y = beyond / np.linalg.norm(offset)
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, held in holds.items() if held}


def need_color(task: Task, kept: Objects) -> Iterator[tuple[str, Found]]:
    """(class, object) for each object of `keep` whose colour the scores ask for."""
    for required in task.include:
        found = kept.get(required.name, ())
        if required.color and len(found) >= required.count:
            for one in found[: required.count]:
                yield required.name, one


# ------------------------------------------------------------------------------------------------------------- scores


def official(task: Task, kept: Objects, thresholds: Thresholds) -> float:
    """0 or 1, of the objects that `keep` returned, colours filled in where `need_color` asks."""
    matched: list[Sequence[Found]] = []
    for required in task.include:
        found = kept.get(required.name, ())[: required.count]
        right = len(found) == required.count and all(o.color == required.color for o in found if required.color)
        if not right or (required.position and not _holds(required.position, found, matched, thresholds)):
            return 0.0
        matched.append(found)
    return float(all(len(kept.get(excluded.name, ())) < excluded.count for excluded in task.exclude))


def dense(task: Task, kept: Objects, thresholds: Thresholds) -> float:
    """The mean of terms, at most 1, of the objects that `keep` returned, colours filled in where `need_color` asks."""
    terms: list[float] = []
    matched: list[Sequence[Found] | None] = []
    for required in task.include:
        found = kept.get(required.name, ())
        terms.append(1 - abs(required.count - len(found)) / required.count)
        right = len(found) == required.count
        if not right and (required.color or required.position):
            terms.append(0.0)
        if right and required.color:
            terms.append(sum(o.color == required.color for o in found) / required.count)
            right = terms[-1] == 1
        if right and required.position:
            if matched[required.position[1]] is None:
                right = False
                terms.append(0.0)
            else:
                right = _holds(required.position, found, matched, thresholds)
                terms += [1.0] if right else [0.0, 1.0]
        matched.append(found if right else None)
    return sum(terms) / len(terms)


def strict(task: Task, kept: Objects, thresholds: Thresholds) -> float:
    """0 or 1: no term of the dense score is below 1."""
    return float(dense(task, kept, thresholds) == 1)


SCORES = {"dense": dense, "strict": strict, "official": official}


def _holds(
    position: tuple[str, int], found: Sequence[Found], matched: Sequence[Sequence[Found]], thresholds: Thresholds
) -> bool:
    relation, target = position
    return all(relation in relations(o.box, t.box, thresholds.position) for o in found for t in matched[target])
