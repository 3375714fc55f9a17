"""What the command lines have in common: imports, other packages' chatter kept out, mistakes told in one message."""

import gc
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import UserError


def quiet() -> None:
    """Keeps other packages' start-up chatter out of the log; their warnings and errors stay. Call it before them."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "critical")  # it raises what it logs as an error
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("DeepSpeed").addFilter(_matters)


@contextmanager
def imports() -> Iterator[None]:
    """Around large ones: Python's collector rests, which would look through what they leave again and again."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def user_errors() -> Iterator[None]:
    """Ends the process with the error's message and exit code where the block raises a UserError."""
    try:
        yield
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)  # rank 0 mostly makes the same mistake: then the launcher ends this process before it speaks
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(error.exit_code)  # peers may wait in a collective: do not join them


def _matters(record: logging.LogRecord) -> bool:
    """False for DeepSpeed's remarks on what is as it should be: no GPU, an optimizer that is not its own."""
    return not any(remark in record.getMessage() for remark in ("Setting accelerator to CPU", "untested optimizer"))
