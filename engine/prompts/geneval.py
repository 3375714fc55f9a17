"""GenEval's format of a prompt's metadata (Ghosh et al., arXiv 2310.11513): what the picture must show.

Only its structure; which classes and colours a scorer knows is the scorer's to say.
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..config_text import show

EXAMPLE = (
    '{"prompt": "...", "tag": "position", "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, '
    '"color": "red", "position": ["left of", 0]}], "exclude": [{"class": "cat", "count": 2}]}'
)

_Text = Annotated[str, Field(min_length=1)]


class _Object(BaseModel):
    model_config = ConfigDict(extra="forbid")  # a misspelt "color" would never be judged

    name: _Text = Field(alias="class")
    count: int = Field(ge=1, strict=True)


class _Required(_Object):
    color: _Text | None = None
    position: tuple[_Text, Annotated[int, Field(ge=0, strict=True)]] | None = None  # relation, number of an earlier one


class _GenEval(BaseModel):
    tag: _Text | None = None
    include: list[_Required] = Field(min_length=1)
    exclude: list[_Object] = []


def check_geneval(metadata: dict[str, Any]) -> None:
    """ValueError unless `include` and `exclude`, where there are any, are as GenEval has them."""
    if "include" not in metadata and "exclude" not in metadata:
        return
    try:
        required = _GenEval.model_validate(metadata).include
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
        what = {"missing": f"{key}: missing", "extra_forbidden": f"{key}: unknown key"}.get(first["type"])
        what = what or f"{key} = {show(first['input'])}: {first['msg'].lower()}"
        raise ValueError(f"{what}; GenEval's format is {EXAMPLE}") from None
    for number, one in enumerate(required):
        if one.position and one.position[1] >= number:
            raise ValueError(
                f"include[{number}].position = {show(list(one.position))}: must name an earlier one, counted from 0; "
                f"GenEval's format is {EXAMPLE}"
            )
