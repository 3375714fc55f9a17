"""Prompts: the embedded scenes or a file, and their endless shuffled order."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .embedded import scenes
from .errors import UserError


@dataclass(frozen=True)
class Prompt:
    """A prompt and what a reward may want to know about it: the other keys of its line in a .jsonl file."""

    text: str
    metadata: dict[str, Any] = field(default_factory=dict)


def load_prompts(source: str) -> list[Prompt]:
    """Prompts of a source, in its order.

    `source` is "scenes:train" or "scenes:held-out", optionally with tasks ("scenes:train:counting+position"); a .txt
    file with a prompt a line; or a .jsonl file of objects {"prompt": str, ...metadata}. Blank lines are ignored.
    Raises UserError that names file, line and what is wrong with it, or that there is no prompt at all.
    """
    if source.startswith("scenes:"):
        return _load_scenes(source)
    path = Path(source)
    parsers = {".txt": _parse_text, ".jsonl": _parse_json}
    if path.suffix not in parsers:
        raise UserError(f'prompts "{source}": expected "scenes:train", "scenes:held-out", or a .txt or .jsonl file')
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
    except FileNotFoundError:
        raise UserError(f"{path}: no such prompt file; looked in {path.parent.absolute()}") from None
    except OSError as error:
        raise UserError(f"{path}: prompt file cannot be read: {error.strerror}") from None
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompts.append(parsers[path.suffix](line.decode("utf-8").strip()))
        except UnicodeDecodeError as error:
            raise UserError(f"{path}:{number}: not UTF-8 text: {error.reason} at byte {error.start}") from None
        except ValueError as error:
            raise UserError(f"{path}:{number}: {error}") from None
    if not prompts:
        raise UserError(f"{path}: holds no prompt; give one or more, a line each")
    return prompts


def _parse_text(line: str) -> Prompt:
    return Prompt(line)


def _parse_json(line: str) -> Prompt:
    """Raises ValueError that says what is wrong with the line."""
    try:
        item = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(item, dict):
        raise ValueError('expected an object {"prompt": "...", ...}, got ' + type(item).__name__)
    if "prompt" not in item:
        raise ValueError('no key "prompt"' + (f"; the keys are {', '.join(item)}" if item else ""))
    text = item.pop("prompt")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'"prompt" must be a string that is not empty, got {json.dumps(text)}')
    return Prompt(text.strip(), item)


def _load_scenes(source: str) -> list[Prompt]:
    _, split, *tasks = source.split(":", 2)
    return [Prompt(text) for text in scenes.prompts(split, tasks[0].split("+") if tasks else None)]


class PromptSampler:
    """Endless epochs over `prompts`, each shuffled anew and without repetition.

    The order is a function of (seed, position) alone, so a resumed run needs no saved state.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int):
        if not prompts:
            raise UserError("the list of prompts is empty")
        self.prompts = list(prompts)
        self.seed = seed

    def batch(self, iteration: int, n: int) -> list[Prompt]:
        """The `n` prompts of an iteration (counted from 0), where each iteration takes `n`."""
        size = len(self.prompts)
        positions = range(iteration * n, (iteration + 1) * n)
        orders = {
            epoch: np.random.default_rng((self.seed, epoch)).permutation(size)
            for epoch in range(positions[0] // size, positions[-1] // size + 1)
        }
        return [self.prompts[orders[position // size][position % size]] for position in positions]
