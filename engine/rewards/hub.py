"""Reward models: found on the hub or in a local folder, read as plain tensors, checked by name and shape, frozen."""

import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import init_empty_weights
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..errors import UserError

TEXT_FILES = ("*.json", "*.txt")  # configurations and tokenizers
WEIGHTS = "model*.safetensors"  # one file, or the parts of a sharded one
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_NOT_THERE = (OSError, ValueError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError)
_Module = TypeVar("_Module", bound=nn.Module)


def place(reward: str, device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Where a model runs, and in what. "auto" is float32 on a CPU and float16 on a GPU: its three bits more than
    bfloat16's are for the small differences between scores. Raises UserError for another dtype than DTYPES."""
    where = torch.device(device)
    if dtype == "auto":
        return where, torch.float16 if where.type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise UserError(f"reward {reward!r}: dtype {dtype!r} is none of auto, {', '.join(DTYPES)}")
    return where, DTYPES[dtype]


# ----------------------------------------------------------------------------------------------------------- finding


def find_folder(reward: str, model: str, patterns: Sequence[str]) -> Path:
    """The local folder `model`, or the one that the hub's files of these patterns were downloaded to.

    Raises UserError where there is neither.
    """
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(model, allow_patterns=list(patterns)))
    except _NOT_THERE as error:
        raise _not_there(reward, model, "", error) from error


def find_file(reward: str, model: str, name: str) -> Path:
    """The file of that name in the local folder `model`, or else in that repository of the hub.

    Raises UserError where there is neither.
    """
    if Path(model).is_dir():
        path = Path(model) / name
        if not path.is_file():
            raise UserError(f"reward {reward!r}: the folder {model} has no {name}")
        return path
    try:
        return Path(hf_hub_download(model, name))
    except _NOT_THERE as error:
        raise _not_there(reward, model, f" {name}", error) from error


def _not_there(reward: str, model: str, name: str, error: Exception) -> UserError:
    return UserError(
        f"reward {reward!r}: {model!r} is no local folder and could not be downloaded as a hub id: {error}\n"
        f"Without network give a local folder: `hf download {model}{name} --local-dir FOLDER` makes one where there is"
    )


# ----------------------------------------------------------------------------------------------------------- reading


def load_tokenizer(reward: str, model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder or a hub id. Raises UserError where there is none."""
    folder = find_folder(reward, model, TEXT_FILES)
    # Of a folder without these, transformers makes a tokenizer that knows no word.
    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise UserError(f"reward {reward!r}: {model} has no tokenizer: none of {', '.join(VOCABULARIES)}")
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # tokenizers raises nothing more special for a damaged file
        raise UserError(f"reward {reward!r}: the tokenizer of {model} cannot be read: {error}") from error


def read_weights(reward: str, folder: Path) -> dict[str, Tensor]:
    """The weights of a transformers folder. Raises UserError where it has no safetensors, or damaged ones."""
    paths = sorted(folder.glob(WEIGHTS))
    if not paths:
        raise UserError(f"reward {reward!r}: {folder} has no weights: no {WEIGHTS}")
    return {name: tensor for path in paths for name, tensor in read_checkpoint(reward, path).items()}


def read_checkpoint(reward: str, path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a state dict that `torch.save` wrote by itself or as "state_dict".

    No code of a pickle is run. Raises UserError for a damaged file, and for one that holds anything but tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        raise UserError(f"reward {reward!r}: {path} is damaged or no file of plain tensors: {error}") from error
    state = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"reward {reward!r}: {path} is no state dict")
    return dict(state)


def build(reward: str, source: Path, make: Callable[[], _Module], state: Mapping[str, Tensor]) -> _Module:
    """make() with the weights `state` that were read from `source`: float32, on the CPU, frozen.

    Raises UserError unless names and shapes are exactly the module's.
    """
    with init_empty_weights(include_buffers=False):  # nothing is initialised only to be replaced
        module = make()
    own = module.state_dict()
    wrong = {
        "missing": own.keys() - state.keys(),
        "unknown": state.keys() - own.keys(),
        "of another shape": {name for name in own.keys() & state.keys() if own[name].shape != state[name].shape},
    }
    if any(wrong.values()):
        raise UserError(
            f"reward {reward!r}: {source} does not hold this model's weights: "
            + "; ".join(f"{len(names)} {what} ({_some(names)})" for what, names in wrong.items() if names)
        )
    module.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    return module.eval().requires_grad_(False)


def _some(names: set[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
