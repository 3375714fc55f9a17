"""From what a configuration names as a source to prompts."""

import re
from collections.abc import Sequence
from pathlib import Path

from ..config import PromptSourceConfig
from ..embedded import scenes
from ..errors import UserError
from .files import load_jsonl, load_text
from .hub import load_dataset
from .prompt import Prompt
from .sampler import PromptSource
from .tables import load_table

EXPECTED = (
    'expected "scenes:train", "scenes:held-out", a .txt, .jsonl, .csv or .tsv file, or "hf:" and a data set of the '
    "Hugging Face hub or its folder"
)


def load_prompts(source: str) -> list[Prompt]:
    """Prompts of a source, in its order.

    "scenes:train", "scenes:held-out": the embedded world's, or those of some tasks: "scenes:train:counting+position";
    FILE.txt: a prompt a line;
    FILE.jsonl: a line {"prompt": str, ...metadata}, as in GenEval's files;
    FILE.csv, FILE.tsv: a header and records, the text in the column `prompt`, or in another with FILE.csv:COLUMN;
    hf:NAME, hf:NAME:SPLIT, hf:NAME:SPLIT:COLUMN: a data set by hub id or folder (split `train`, column `prompt`).

    Raises UserError that names file, line and what is wrong with it, or that there is no prompt at all.
    """
    if source.startswith("scenes:"):
        _, split, *tasks = source.split(":", 2)
        texts = scenes.prompts(split, tasks[0].split("+") if tasks else None)
        return [Prompt(text, source=source) for text in texts]
    if source.startswith("hf:"):
        return load_dataset(source)
    if table := re.fullmatch(r"(.+\.(?:csv|tsv))(?::(.+))?", source):
        return load_table(Path(table[1]), table[2] or "prompt")
    path = Path(source)
    if path.suffix == ".txt":
        return load_text(path)
    if path.suffix == ".jsonl":
        return load_jsonl(path)
    raise UserError(f'prompts "{source}": {EXPECTED}')


def load_sources(train: str | Sequence[PromptSourceConfig]) -> list[PromptSource]:
    """What `prompts.train` names: one source, or several with their weights. UserError as for `load_prompts`."""
    if isinstance(train, str):
        return [PromptSource(load_prompts(train))]
    return [PromptSource(load_prompts(entry.source), entry.weight) for entry in train]
