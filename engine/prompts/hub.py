"""Prompts from data sets of the Hugging Face hub or of its library's folders, by the extra `datasets`."""

import re
from pathlib import Path
from typing import Any

from ..errors import UserError
from .prompt import Prompt, prompt_text


def load_dataset(source: str) -> list[Prompt]:
    """Prompts of "hf:NAME[:SPLIT[:COLUMN]]", in the data set's order.

    NAME is a hub id, a folder of data files (parquet, JSON Lines, CSV, ...), or one that `save_to_disk` wrote. SPLIT is
    `train` if it is not given or empty, and may be a slice (`train[:1000]`) unless `save_to_disk` wrote it. The other
    columns become metadata, if JSON could hold them: pictures, sounds and dates are left out, and so are nulls, which
    stand for keys that a row does not have. UserError names the row, counted from 0.
    """
    name, split, column = _parts(source)
    rows = _rows(source, name, split)
    if column not in rows.column_names:
        raise UserError(
            f'prompts "{source}": no column "{column}"; the columns are {", ".join(rows.column_names)}. Name the one '
            f"that holds the prompts: hf:{name}:{split}:COLUMN"
        )
    kept = [key for key, feature in rows.features.items() if key == column or _is_plain(feature)]
    prompts = []
    for number, row in enumerate(rows.select_columns(kept).to_list()):
        where = f"hf:{name}:{split}[{number}]"
        metadata = _without_nulls(row)
        try:
            text = prompt_text(metadata.pop(column, None), column)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from None
        prompts.append(Prompt(text, metadata, where))
    if not prompts:
        raise UserError(f'prompts "{source}": the data set is empty; give one with a row or more')
    return prompts


def _parts(source: str) -> tuple[str, str, str]:
    """Name, split and column, or UserError."""
    # A slice of a split may hold a colon: train[:1000].
    found = re.fullmatch(r"hf:([^:]+)(?::([^:\[]*(?:\[[^\]]*\])?))?(?::([^:]*))?", source)
    if not found:
        raise UserError(f'prompts "{source}": expected hf:NAME, hf:NAME:SPLIT or hf:NAME:SPLIT:COLUMN')
    return found[1], found[2] or "train", found[3] or "prompt"


def _rows(source: str, name: str, split: str):
    """The `datasets.Dataset`."""
    try:
        import datasets  # an extra, and seconds to import
    except ImportError as error:
        raise UserError(
            f'prompts "{source}" need the package datasets ({error}): pip install "latent-critic[datasets]"'
        ) from error
    try:
        if not any(Path(name, file).is_file() for file in ("dataset_dict.json", "state.json")):
            return datasets.load_dataset(name, split=split)
        saved = datasets.load_from_disk(name)
    except Exception as error:  # of any kind: no network, no such split, a broken file; StopIteration for an empty one
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        raise UserError(
            f'prompts "{source}": {str(error) or type(error).__name__}{cause}\nGive hf: with a data set of the hub or '
            f"a folder; folders are looked for in {Path().absolute()}"
        ) from error
    if isinstance(saved, datasets.Dataset):
        return saved  # a single split, whatever its name
    if split not in saved:
        raise UserError(f'prompts "{source}": no split "{split}"; the splits are {", ".join(saved)}')
    return saved[split]


def _is_plain(feature: Any) -> bool:
    """Whether JSON could hold the values: strings, numbers, truth values, and lists and objects of them."""
    from datasets import ClassLabel, Json, LargeList, List, Value

    if isinstance(feature, Value):
        return feature.dtype in ("string", "large_string", "bool") or feature.dtype.startswith(("int", "uint", "float"))
    if isinstance(feature, (List, LargeList)):
        return _is_plain(feature.feature)
    if isinstance(feature, dict):
        return all(map(_is_plain, feature.values()))
    return isinstance(feature, (ClassLabel, Json))


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
