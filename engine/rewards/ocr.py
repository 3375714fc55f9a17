"""Is the quoted text of the prompt written in the picture? Read by a real recognition model, PP-OCRv6 (Apache-2.0).

The model file ships in the package `rapidocr`; it is found without importing that package and run with onnxruntime. It
reads one line of text, so the line's place is a param instead of a second, ten times slower detection model.
"""

import importlib.util
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from ..errors import UserError

MODEL_FILE = Path("models", "PP-OCRv6_rec_small.onnx")
HEIGHT = 48  # pixels: the height that the model reads
BATCH = 16  # pictures in one call; larger ones are no faster and hold 18,710 scores a column of each picture
LOWER_HALF = (0.5, 0.0, 1.0, 1.0)  # where the embedded world writes its number

_QUOTED = re.compile(r'"([^"]+)"')


class Ocr:
    """max(0, 1 - Levenshtein distance / length of the target); both texts in lower case and without spaces.

    region: (top, left, bottom, right) of the line of text, as fractions of height and width. threads: CPU threads.
    """

    name = "ocr"
    value_range = (0.0, 1.0)

    def __init__(self, region: Sequence[float] = LOWER_HALF, threads: int = 1):
        if not _is_region(region):
            raise UserError(
                f"reward 'ocr': region must be [top, left, bottom, right] as fractions with 0 <= top < bottom <= 1 and "
                f"0 <= left < right <= 1, got {region!r}"
            )
        if not isinstance(threads, int) or isinstance(threads, bool) or threads < 1:
            raise UserError(f"reward 'ocr': threads must be a whole number of at least 1, got {threads!r}")
        self.region = tuple(region)
        self._session, self._characters = _load(threads)

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict]) -> list[float]:
        """images: uint8 [N, H, W, 3]; prompts with a text in double quotes, the first of which counts."""
        targets = [quoted_text(prompt) for prompt in prompts]
        return [similarity(read, target) for read, target in zip(self.read(images), targets, strict=True)]

    def check_prompt(self, prompt: str, metadata: Mapping) -> None:
        quoted_text(prompt)

    def read(self, images: Tensor | np.ndarray) -> list[str]:
        """The line of text in the region of each picture (uint8 [N, H, W, 3]); "" where none is seen."""
        pictures = np.asarray(images)
        return [text for i in range(0, len(pictures), BATCH) for text in self._read_batch(pictures[i : i + BATCH])]

    def _read_batch(self, pictures: np.ndarray) -> list[str]:
        top, left, bottom, right = np.multiply(self.region, np.tile(pictures.shape[1:3], 2)).tolist()
        width = max(8, round(HEIGHT * (right - left) / (bottom - top)))
        size, box = (width, HEIGHT), (left, top, right, bottom)
        lines = [Image.fromarray(p).resize(size, Image.Resampling.BICUBIC, box) for p in pictures]
        rgb = np.stack([np.asarray(line) for line in lines]).astype(np.float32)
        bgr = np.ascontiguousarray(rgb[..., ::-1].transpose(0, 3, 1, 2)) / 127.5 - 1
        (scores,) = self._session.run(None, {self._session.get_inputs()[0].name: bgr})
        return [self._decode(best) for best in scores.argmax(axis=-1)]

    def _decode(self, best: np.ndarray) -> str:
        """Greedy CTC: repeated symbols are one, symbol 0 is blank."""
        changed = np.diff(best, prepend=0) != 0
        return "".join(self._characters[k] for k in best[changed] if k != 0)


def quoted_text(prompt: str) -> str:
    """What stands between the first double quotes. UserError if there are none."""
    match = _QUOTED.search(prompt)
    if match is None:
        raise UserError(f"reward 'ocr' needs the text to draw in double quotes; prompt {prompt!r} has none")
    return match[1]


def similarity(read: str, target: str) -> float:
    """max(0, 1 - Levenshtein(read, target) / len(target)), in lower case and without spaces."""
    read, target = ("".join(text.lower().split()) for text in (read, target))
    row = list(range(len(target) + 1))
    for i, a in enumerate(read, start=1):
        previous, row = row, [i]
        for j, b in enumerate(target, start=1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (a != b)))
    return max(0.0, 1 - row[-1] / max(1, len(target)))


def _is_region(region: object) -> bool:
    if not isinstance(region, (list, tuple)) or len(region) != 4:
        return False
    if not all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in region):
        return False
    top, left, bottom, right = region
    return 0 <= top < bottom <= 1 and 0 <= left < right <= 1


def _load(threads: int):
    spec = importlib.util.find_spec("rapidocr")
    folders = spec.submodule_search_locations if spec else []
    path = next((found for f in folders if (found := Path(f) / MODEL_FILE).is_file()), None)
    if path is None:
        raise UserError(f"reward 'ocr' needs {MODEL_FILE.name} from the package rapidocr: pip install 'rapidocr>=3.10'")
    import onnxruntime  # only this reward needs it

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    characters = session.get_modelmeta().custom_metadata_map["character"].splitlines()
    return session, ["", *characters, " "]
