"""Prompt files with a prompt a line: plain text and JSON Lines."""

import io
import json
from collections.abc import Callable
from pathlib import Path

from ..errors import UserError
from .prompt import Prompt, prompt_text


def load_text(path: Path) -> list[Prompt]:
    """A prompt a line. Blank lines are ignored."""
    return _load_lines(path, lambda line, source: Prompt(line, source=source))


def load_jsonl(path: Path) -> list[Prompt]:
    """An object {"prompt": str, ...metadata} a line. Blank lines are ignored."""
    return _load_lines(path, _parse_json)


def read_text(path: Path) -> str:
    """The file's text, without a byte order mark, line ends as they are. UserError if it cannot be read as UTF-8."""
    try:
        content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except FileNotFoundError:
        raise UserError(f"{path}: no such prompt file; looked in {path.parent.absolute()}") from None
    except OSError as error:
        raise UserError(f"{path}: prompt file cannot be read: {error.strerror}") from None
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        before = content[: error.start].splitlines(keepends=True) or [b""]
        if before[-1].endswith((b"\r", b"\n")):
            before.append(b"")
        where = f"{error.reason} at byte {len(before[-1])}"
        raise UserError(f"{path}:{len(before)}: not UTF-8 text: {where}; save the file as UTF-8") from None


def check_not_empty(path: Path, prompts: list[Prompt], what: str) -> list[Prompt]:
    if not prompts:
        raise UserError(f"{path}: holds no prompt; give one or more, {what}")
    return prompts


def _load_lines(path: Path, parse: Callable[[str, str], Prompt]) -> list[Prompt]:
    prompts = []
    # Lines end at \n, \r or \r\n: str.splitlines would also cut at characters that JSON strings may hold.
    for number, line in enumerate(io.StringIO(read_text(path), newline=None), 1):
        if not line.strip():
            continue
        source = f"{path}:{number}"
        try:
            prompts.append(parse(line.strip(), source))
        except ValueError as error:
            raise UserError(f"{source}: {error}") from None
    return check_not_empty(path, prompts, "a line each")


def _parse_json(line: str, source: str) -> Prompt:
    """Raises ValueError that says what is wrong with the line."""
    try:
        item = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(item, dict):
        raise ValueError('expected an object {"prompt": "...", ...}, got ' + type(item).__name__)
    if "prompt" not in item:
        raise ValueError('no key "prompt"' + (f"; the keys are {', '.join(item)}" if item else ""))
    text = prompt_text(item.pop("prompt"), "prompt")
    return Prompt(text, item, source)
