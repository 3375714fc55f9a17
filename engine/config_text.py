"""A configuration's schema in words: errors that name key, given and allowed, and the table of configs/README.md."""

import difflib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

KeyPath = tuple[int | str, ...]  # ("rewards", 0, "weight"), written rewards[0].weight

_BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def explain(error: ValidationError, schema: type[BaseModel], data: dict[str, Any], overridden: list[str]) -> list[str]:
    """One line for each mistake that pydantic found in `data`; `overridden` are the dotted keys of overrides."""
    details = error.errors(include_url=False)
    paths = [_locate(schema, detail["loc"])[0] for detail in details]
    lines: dict[str, None] = {}  # ordered and unique: a union reports each of its arms
    for detail in details:
        if detail["type"] == "value_error":  # the schema's own checks already name their keys
            lines.update(dict.fromkeys(str(detail["ctx"]["error"]).splitlines()))
            continue
        path, annotation, info = _locate(schema, detail["loc"])
        if any(len(other) > len(path) and other[: len(path)] == path for other in paths):
            continue  # another arm of the union got further: the mistake is there
        if detail["type"] == "missing" and path[-1] == detail["loc"][-1]:
            line = f"{_dotted(path)}: missing; expected {_allowed(annotation, info)}"
        else:
            origin = " (given as an override)" if ".".join(map(str, path)) in overridden else ""
            line = f"{_dotted(path)} = {show(_lookup(data, path))}{origin}: "
            if detail["type"] == "extra_forbidden":
                line += f"unknown key; {_nearest_key(schema, annotation, path)}"
            else:
                line += f"expected {_allowed(annotation, info)}"
        lines[line] = None
    return list(lines)


def show(value: Any) -> str:
    """A value as the user wrote it in JSON, cut to 60 characters."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def key_table(schema: type[BaseModel]) -> str:
    """The Markdown table of all keys: allowed values, default, meaning."""
    rows = ["| key | allowed | default | meaning |", "|---|---|---|---|"]
    for key, annotation, info in _leaves(schema):
        default = "required" if info.is_required() else f"`{json.dumps(info.get_default())}`"
        rows.append(f"| `{key}` | {_allowed(annotation, info)} | {default} | {info.description} |")
    return "\n".join(rows) + "\n"


def write_key_table(schema: type[BaseModel], page: str | os.PathLike) -> None:
    """Replace what stands between the `keys` markers of a Markdown page by `key_table`."""
    text = Path(page).read_text(encoding="utf-8")
    begin, end = "<!-- keys: begin -->\n", "<!-- keys: end -->"
    head, tail = text[: text.index(begin) + len(begin)], text[text.index(end) :]
    Path(page).write_text(head + key_table(schema) + tail, encoding="utf-8")


def _locate(schema: type[BaseModel], loc: KeyPath) -> tuple[KeyPath, Any, FieldInfo | None]:
    """Walk pydantic's location down to a key: its path, annotation and field.

    What pydantic adds below a key (arm of a union, item of a plain list) is left out. For an unknown key the annotation
    is that of the section that does not have it.
    """
    annotation: Any = schema
    info = None
    path: KeyPath = ()
    for depth, part in enumerate(loc):
        if section := _section(annotation):
            if part not in section.model_fields:
                return (*path, part), section, None
            info = section.model_fields[part]
            annotation = info.annotation
        elif _is_section_list(annotation):
            annotation, info = get_args(annotation)[0], None
        elif (
            isinstance(part, str)
            and depth + 1 < len(loc)
            and (arm := next(filter(_is_section_list, get_args(annotation)), None))
        ):
            annotation = arm  # an item of a list that is one arm of a union: `part` is the arm's name
            continue
        else:
            break
        path = (*path, part)
    return path, annotation, info


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section that the annotation is, or may be instead of null."""
    arms = get_args(annotation) if get_origin(annotation) in (UnionType, Union) else (annotation,)
    return next((arm for arm in arms if _is_section(arm)), None)


def _is_section_list(annotation: Any) -> bool:
    return get_origin(annotation) is list and _is_section(get_args(annotation)[0])


def _lookup(data: Any, path: KeyPath) -> Any:
    for part in path:
        data = data[part]
    return data


def _dotted(path: KeyPath) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def _leaves(schema: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any, FieldInfo]]:
    """Each key that holds a value: dotted name, annotation, field; the items of a list of sections only once."""
    for name, info in schema.model_fields.items():
        if _is_section(info.annotation):
            yield from _leaves(info.annotation, f"{prefix}{name}.")
            continue
        yield f"{prefix}{name}", info.annotation, info
        if section := _section(info.annotation):
            yield from _leaves(section, f"{prefix}{name}.")
        if _is_section_list(info.annotation) and not prefix:
            yield from _leaves(get_args(info.annotation)[0], f"{name}[].")


def _nearest_key(schema: type[BaseModel], section: type[BaseModel], path: KeyPath) -> str:
    """Nearest by spelling in the same section, else the same key of another section, else the least unlike one."""
    *parents, key = path
    names = list(section.model_fields)
    in_section = [_dotted((*parents, name)) for name in difflib.get_close_matches(str(key), names, 1)]
    elsewhere = [known for known, *_ in _leaves(schema) if known.rpartition(".")[2] == key]
    least_unlike = [_dotted((*parents, name)) for name in difflib.get_close_matches(str(key), names, 1, 0)]
    return f"did you mean {[*in_section, *elsewhere, *least_unlike][0]}? Keys allowed here: {', '.join(names)}"


def _allowed(annotation: Any, info: FieldInfo | None = None) -> str:
    """What a key takes, from its annotation and bounds."""
    metadata = info.metadata if info else []
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _allowed(args[0], args[1])
    if origin is Literal:
        return "one of " * (len(args) > 1) + ", ".join(f'"{choice}"' for choice in args)
    if origin in (UnionType, Union):  # bounds given beside a union hold for each arm but null
        return " or ".join("null" if arm is type(None) else _allowed(arm, info) for arm in args)
    if _is_section_list(annotation):
        return (
            "a list of " + "one or more " * bool(metadata) + f"objects with the keys {', '.join(args[0].model_fields)}"
        )
    if origin in (list, tuple):
        count = f"{len(args)} " if origin is tuple else ""
        return f"a list of {count}" + _allowed(args[0]).replace("an integer", "integers").replace("a number", "numbers")
    if origin is dict or _is_section(annotation):
        return "an object {...}"
    if annotation is str:
        return "a string that is not empty" if metadata else "a string"
    if annotation is bool:
        return "true or false"
    bounds = [
        f"{sign} {getattr(item, name)}" for item in metadata for name, sign in _BOUNDS.items() if hasattr(item, name)
    ]
    return " ".join(["an integer" if annotation is int else "a number", " and ".join(bounds)]).strip()
