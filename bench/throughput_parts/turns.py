"""Loops in processes of their own, which take turns: each as its user would run it, and all in one run."""

import contextlib
import importlib
import logging
import multiprocessing
import os
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


class WorkerError(RuntimeError):
    """A process failed; the message is its traceback."""


class OutOfMemory(WorkerError):
    """The device's memory did not suffice; the message is PyTorch's."""


class Worker:
    """An object of class `kind` of `module` in a process of its own; `call` runs one of its methods."""

    def __init__(self, module: str, kind: str, *arguments):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, module, kind, arguments), daemon=True)
        self._process.start()
        theirs.close()

    def ready(self) -> "Worker":
        """Waits until it is built."""
        self._receive()
        return self

    def call(self, method: str, *arguments) -> Any:
        self._pipe.send((method, arguments))
        return self._receive()

    def close(self) -> None:
        """Ends the process, and with it its memory on the device."""
        with contextlib.suppress(BrokenPipeError):  # it may have failed before
            self._pipe.send(None)
        self._process.join()

    def _receive(self) -> Any:
        try:
            kind, content = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise WorkerError(f"a process of the benchmark ended with exit code {self._process.exitcode}") from None
        if kind is not None:
            raise kind(content)
        return content


def _serve(pipe: Connection, module: str, kind: str, arguments: tuple) -> None:
    os.dup2(2, 1)  # standard output is for the results
    _quiet()
    import torch

    served = None

    def build() -> None:
        nonlocal served
        served = getattr(importlib.import_module(module), kind)(*arguments)

    def answer(run: Callable[[], Any]) -> None:
        try:
            result = None, run()
        except torch.OutOfMemoryError as error:
            result = OutOfMemory, str(error).splitlines()[0]
        except Exception:
            result = WorkerError, traceback.format_exc()
        pipe.send(result)

    answer(build)
    while (request := pipe.recv()) is not None:
        method, options = request
        answer(lambda method=method, options=options: getattr(served, method)(*options))


def _quiet() -> None:
    """Keeps other packages' start-up chatter out of the output; their errors stay."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
