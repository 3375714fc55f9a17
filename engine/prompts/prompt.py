"""What a prompt is."""

import json
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Prompt:
    """A prompt, and what a reward may want to know about it: the other keys or columns of its source.

    source: where it is written, for messages: "prompts.jsonl:12". Empty for one that was given by itself.
    """

    text: str
    metadata: dict[str, Any] = field(default_factory=dict)
    source: str = field(default="", compare=False)


def prompt_text(value: Any, key: str) -> str:
    """The text without surrounding blanks. ValueError unless it is a string that is not empty."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f'"{key}" must be a string that is not empty, got {json.dumps(value, default=repr)}')
    return value.strip()
