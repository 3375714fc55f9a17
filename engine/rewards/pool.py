"""A reward in processes of its own: for scorers that hold Python's lock, or have work for more than one core."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .checks import join, judge
from .local import build_here, resolve_device
from .protocol import Reward, RewardError, Scores


def build_pool(name: str, params: Mapping[str, Any], device: str, batch_size: int | None, workers: int) -> Reward:
    """The reward in so many processes, each with a scorer of its own and one CPU thread."""
    pool = Pool(name, params, resolve_device(name, device), batch_size, workers)
    return Reward(name, 1.0, pool.value_range, pool.score, pool.check_prompts, is_elsewhere=True)


class Pool:
    """Splits each batch over the processes, which are started here and end with this one."""

    def __init__(self, name: str, params: Mapping[str, Any], device: str, batch_size: int | None, workers: int):
        self._name, self._batch_size, self._workers = name, batch_size, workers
        context, recipe = multiprocessing.get_context("spawn"), (name, dict(params), device)
        self._executor = ProcessPoolExecutor(workers, context, _start, recipe)
        with _one_thread():
            self.value_range = self._all(_value_range, [()] * workers)[0]  # a task each: so all of them start

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping]) -> Any:
        share = -(-len(prompts) // self._workers)
        size = min(share, self._batch_size or share)
        cuts = [slice(first, first + size) for first in range(0, len(prompts), size)]
        pictures = images.numpy()  # tensors would travel in shared memory, with a file descriptor each
        found = self._all(_judge, [(pictures[cut], prompts[cut], metadata[cut]) for cut in cuts])
        parts = [Scores(torch.from_numpy(values), _tensors(extras)) for values, extras in found]
        return tuple(join(parts))

    def check_prompts(self, prompts: Sequence[str], metadata: Sequence[Mapping]) -> None:
        self._all(_check_prompts, [(prompts, metadata)])

    def _all(self, task: Callable, arguments: Sequence[tuple]) -> list:
        try:
            return [future.result() for future in [self._executor.submit(task, *each) for each in arguments]]
        except BrokenProcessPool as error:
            raise RewardError(
                f"reward {self._name!r}: one of its {self._workers} processes ended by itself or was killed, as a "
                "system short of memory does; set fewer rewards[].workers"
            ) from error


def _tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


@contextmanager
def _one_thread() -> Iterator[None]:
    """Processes that start within it compute on one thread each: there is one for each core already."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before


# ------------------------------------------------------------------------------------------------ inside a process

_built: Reward | UserError | None = None


def _start(name: str, params: Mapping[str, Any], device: str) -> None:
    """Builds this process's scorer. What an initializer raises is lost, so its error waits for the first task."""
    global _built
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        _built = build_here(name, params, device)
    except UserError as error:
        _built = error


def _end_with_parent() -> None:
    """It may be killed, and then nobody tells this process to end."""
    connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _reward() -> Reward:
    if isinstance(_built, UserError):
        raise _built
    return _built


def _value_range() -> tuple[float, float]:
    return _reward().value_range


def _check_prompts(prompts: Sequence[str], metadata: Sequence[Mapping]) -> None:
    _reward().check_prompts(prompts, metadata)


def _judge(pictures: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping]) -> tuple:
    """Scores, of arrays instead of tensors."""
    values, extras = judge(_reward(), torch.from_numpy(pictures), prompts, metadata)
    return values.numpy(), {name: column.numpy() for name, column in extras.items()}
