"""Prompt tables: CSV and TSV with a header, as spreadsheets, pandas and DuckDB write them (RFC 4180)."""

import csv
import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError
from .files import check_not_empty, read_text
from .prompt import Prompt, prompt_text

DELIMITERS = {".csv": ",", ".tsv": "\t"}


def load_table(path: Path, column: str) -> list[Prompt]:
    """A prompt a record, from one column. The other columns are its metadata, as strings, since a table has no types;
    columns without a name (an index, say) are left out.

    A field in double quotes may hold delimiters, line ends, and double quotes written twice. Records whose fields are
    all blank are ignored. Raises UserError with the first line of the record that is wrong.
    """
    records = _records(path)
    try:
        line, header = next(records)
    except StopIteration:
        raise UserError(f'{path}: is empty; give a header with a column "{column}" and a record a prompt') from None
    names = [name.strip() for name in header]
    _check_header(path, line, names, column)
    prompts = []
    for line, fields in records:
        source = f"{path}:{line}"
        if len(fields) != len(names):
            raise UserError(
                f"{source}: {len(fields)} fields, the header has {len(names)}; put a field that holds "
                f"{_show(path)} or a line end into double quotes"
            )
        metadata = {name: value for name, value in zip(names, fields, strict=True) if name}
        try:
            text = prompt_text(metadata.pop(column), column)
        except ValueError as error:
            raise UserError(f"{source}: {error}") from None
        prompts.append(Prompt(text, metadata, source))
    return check_not_empty(path, prompts, "a record each, below the header")


def _records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """First line (from 1) and fields of each record that is not blank."""
    lines = io.StringIO(read_text(path), newline="")  # line ends within a field stay as they are
    reader = csv.reader(lines, delimiter=DELIMITERS[path.suffix], strict=True)
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(
                f"{path}:{line}: {error}; a field that begins with a double quote must end with one, and hold two for "
                "each within it"
            ) from None
        if any(field.strip() for field in fields):
            yield line, fields


def _check_header(path: Path, line: int, names: list[str], column: str) -> None:
    twice = [name for name, count in Counter(names).items() if name and count > 1]
    if twice:
        raise UserError(f'{path}:{line}: two columns are named "{twice[0]}"; rename or remove one')
    if column not in names:
        raise UserError(
            f'{path}:{line}: no column "{column}"; the header, separated by {_show(path)}, has '
            f"{', '.join(filter(None, names))}. Name the one that holds the prompts: {path}:COLUMN"
        )


def _show(path: Path) -> str:
    return {",": "a comma", "\t": "a tab"}[DELIMITERS[path.suffix]]
