"""GenEval (arXiv 2310.11513): does the picture show the objects, counts, colours and positions of its prompt?

A detector that knows COCO's classes finds objects, CLIP names their colours, and `geneval_rules` judges them. The
benchmark's own detector is mmdetection's Mask2Former with a Swin-S backbone; the default here is the same architecture
as its authors trained it, in transformers, so scores come close to published ones without being the same.

Thresholds, all params: an object counts above a score of 0.3 (0.9 in the task `counting`), the 16 most certain of a
class count, none is dropped for overlap (1.0), and 0.1 of the boxes' sizes is no distance (`geneval_rules.relations`).
Scores: `dense` for training, at most 1; `strict`, 0 or 1, that dense is 1; `official`, 0 or 1, the benchmark's verdict,
to evaluate with. `geneval_rules` tells them apart.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForObjectDetection,
    AutoTokenizer,
    CLIPModel,
    Mask2FormerForUniversalSegmentation,
)

from ..errors import UserError
from .geneval_rules import CLASSES, COLORS, OTHER_NAMES, SCORES, Found, Objects, Thresholds, keep, need_color, read_task

DETECTOR = "facebook/mask2former-swin-small-coco-instance"
CLIP = "openai/clip-vit-large-patch14"
ARRAYS = {"input_data_format": "channels_last", "return_tensors": "pt"}  # not guessed: a cut-out may be 3 pixels high
GREY = 0x99  # what hides the surroundings of an object whose colour is asked for


class GenEval:
    """detector: Mask2Former, or any of transformers' object detectors (boxes only), by hub id or folder, with COCO's 80
    classes. clip: the same for CLIP. score: "dense", "strict" or "official".
    """

    name = "geneval"

    def __init__(
        self,
        detector: str = DETECTOR,
        clip: str = CLIP,
        score: str = "dense",
        threshold: float = 0.3,
        counting_threshold: float = 0.9,
        max_objects: int = 16,
        max_overlap: float = 1.0,
        position_threshold: float = 0.1,
        device: str = "cpu",
    ):
        if score not in SCORES:
            raise UserError(f"reward 'geneval': score must be one of {', '.join(SCORES)}, got {score!r}")
        fractions = {"threshold": threshold, "counting_threshold": counting_threshold, "max_overlap": max_overlap}
        for name, value in {**fractions, "position_threshold": position_threshold}.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise UserError(f"reward 'geneval': {name} must be a number from 0 to 1, got {value!r}")
        if isinstance(max_objects, bool) or not isinstance(max_objects, int) or max_objects < 1:
            raise UserError(f"reward 'geneval': max_objects must be a whole number of at least 1, got {max_objects!r}")
        self.thresholds = Thresholds(threshold, counting_threshold, max_objects, max_overlap, position_threshold)
        # Of one object that is asked for, `max_objects` may be found.
        self.value_range = (2.0 - max_objects, 1.0) if score == "dense" else (0.0, 1.0)
        self._score = score
        self._detect = Detector(detector, min(threshold, counting_threshold), device)
        self._name_colors = ColorNamer(clip, device)

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping]
    ) -> tuple[list[float], dict[str, list[float]]]:
        """images: uint8 [N, H, W, 3]; metadata: GenEval's, as `geneval_rules` describes them: UserError without. The
        two scores that are not the reward are extras."""
        tasks = [read_task(prompt, known) for prompt, known in zip(prompts, metadata, strict=True)]
        pictures = np.asarray(images)
        found = self._detect(pictures)
        kept = [keep(objects, task, self.thresholds) for objects, task in zip(found, tasks, strict=True)]
        asked = [
            (picture, name, one)
            for picture, task, objects in zip(pictures, tasks, kept, strict=True)
            for name, one in need_color(task, objects)
        ]
        if asked:
            self._name_colors(asked)
        judged = list(zip(tasks, kept, strict=True))
        scores = {name: [score(*pair, self.thresholds) for pair in judged] for name, score in SCORES.items()}
        return scores.pop(self._score), scores

    def check_prompt(self, prompt: str, metadata: Mapping) -> None:
        read_task(prompt, metadata)


class Detector:
    """Objects of COCO's classes, with masks if the model has them."""

    def __init__(self, source: str, threshold: float, device: str):
        """threshold: the score above which an object may count."""
        with _loading("detector", source):
            self._segments = AutoConfig.from_pretrained(source).model_type == "mask2former"
            kind = Mask2FormerForUniversalSegmentation if self._segments else AutoModelForObjectDetection
            self._processor = AutoImageProcessor.from_pretrained(source)
            self._model = _model(kind, source, device)
        self._threshold = threshold
        names = {number: OTHER_NAMES.get(label, label) for number, label in self._model.config.id2label.items()}
        self._class_of = {number: name for number, name in names.items() if name in CLASSES}
        if missing := [name for name in CLASSES if name not in self._class_of.values()]:
            raise UserError(
                f"reward 'geneval': detector {source!r} must know COCO's 80 classes; it has no label for "
                f"{', '.join(missing[:3])}" + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            )

    @torch.inference_mode()
    def __call__(self, pictures: np.ndarray) -> list[Objects]:
        """pictures: uint8 [N, H, W, 3]. Boxes are left, top, right, bottom in pixels, the last two beyond the object's
        last pixel."""
        inputs = self._processor(images=list(pictures), **ARRAYS).to(self._model.device)
        outputs = self._model(**inputs)
        options = {"threshold": self._threshold, "target_sizes": [pictures.shape[1:3]] * len(pictures)}
        if self._segments:
            found = self._processor.post_process_instance_segmentation(outputs, **options, return_binary_maps=True)
            return [self._by_class(_segments(picture)) for picture in found]
        found = self._processor.post_process_object_detection(outputs, **options)
        return [self._by_class(_boxes(picture)) for picture in found]

    def _by_class(self, labelled: Iterator[tuple[int, Found]]) -> Objects:
        objects: dict[str, list[Found]] = {}
        for label, found in labelled:
            if label in self._class_of:
                objects.setdefault(self._class_of[label], []).append(found)
        return objects


def _segments(found: dict) -> Iterator[tuple[int, Found]]:
    for number, segment in enumerate(found["segments_info"]):
        mask = found["segmentation"][number].cpu().numpy() == 1
        rows, columns = (np.flatnonzero(mask.any(axis=axis)).tolist() for axis in (1, 0))
        box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        yield segment["label_id"], Found(box, segment["score"], mask)


def _boxes(found: dict) -> Iterator[tuple[int, Found]]:
    for label, box, score in zip(*(found[key].tolist() for key in ("labels", "boxes", "scores")), strict=True):
        yield label, Found(box, score)


class ColorNamer:
    """CLIP zero-shot over ten colours: the object cut out on grey, against three descriptions of each colour."""

    def __init__(self, source: str, device: str):
        with _loading("clip", source):
            self._processor = AutoImageProcessor.from_pretrained(source)
            self._tokenizer = AutoTokenizer.from_pretrained(source)
            self._model = _model(CLIPModel, source, device)
        self._classifiers: dict[str, Tensor] = {}

    def __call__(self, asked: Sequence[tuple[np.ndarray, str, Found]]) -> None:
        """Fills in `color` of objects in pictures (uint8 [H, W, 3]), whose class is given."""
        for (_, _, one), likely in zip(asked, self.similarities(asked).argmax(dim=1).tolist(), strict=True):
            one.color = COLORS[likely]

    @torch.inference_mode()
    def similarities(self, asked: Sequence[tuple[np.ndarray, str, Found]]) -> Tensor:
        """[N, 10]: cosines of each object and the ten colours."""
        cut = [cut_out(picture, one) for picture, _, one in asked]
        pixels = self._processor(images=cut, **ARRAYS)["pixel_values"].to(self._model.device)
        seen = F.normalize(self._model.visual_projection(self._model.vision_model(pixels).pooler_output), dim=-1)
        return torch.stack([self._classifier(asked[i][1]) @ features for i, features in enumerate(seen)])

    def _classifier(self, name: str) -> Tensor:
        """[10, D]: each colour of a class by the normalised mean of its descriptions' normalised features."""
        if name not in self._classifiers:
            forms = (f"a photo of a {{}} {name}", f"a photo of a {{}}-colored {name}", "a photo of a {} object")
            texts = [form.format(color) for color in COLORS for form in forms]
            tokens = self._tokenizer(texts, padding=True, return_tensors="pt").to(self._model.device)
            features = self._model.text_projection(self._model.text_model(**tokens).pooler_output)
            means = F.normalize(features, dim=-1).unflatten(0, (len(COLORS), len(forms))).mean(dim=1)
            self._classifiers[name] = F.normalize(means, dim=-1)
        return self._classifiers[name]


def cut_out(picture: np.ndarray, found: Found) -> np.ndarray:
    """The object's box, all but the object grey if it has a mask. At least one pixel."""
    if found.mask is not None:
        picture = np.where(found.mask[..., None], picture, np.uint8(GREY))
    left, top, right, bottom = map(round, found.box)
    return np.asarray(Image.fromarray(picture).crop((left, top, max(right, left + 1), max(bottom, top + 1))))


def _model(kind: type, source: str, device: str) -> nn.Module:
    """Frozen, in float32. ValueError for weights that the file lacks: transformers would draw them at random."""
    options = {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
    model, about = kind.from_pretrained(source, **options)
    weights = {name for name, _ in model.named_parameters()}
    if lacking := sorted(weights & set(about["missing_keys"])):
        raise ValueError(f"it lacks {len(lacking)} of the {kind.__name__}'s weights, {lacking[0]} among them")
    return model.to(device).eval().requires_grad_(False)


@contextmanager
def _loading(param: str, source: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"reward 'geneval': {param} {source!r} cannot be loaded: {error}\n"
            f"Give a folder or a hub id with safetensors"
        ) from error
