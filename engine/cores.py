"""How a CPU's cores are shared out: one a micro-batch while sampling, all of them to each pass of an update.

Micro-batches that are sampled side by side share nothing, so a thread of its own for each uses the cores better than
threads inside an operation, which wait for each other at the end of every one of some hundred operations a pass. The
passes of an update follow each other, and there all cores go to one pass.

PyTorch keeps the threads that an operation is shared out to for each thread that computes. libgomp lets such threads
wait actively only while they are not more than the cores; from then on every small operation takes up to twice as long.
So threads beside the main one must stay without such a team: PyTorch's number of threads is 1 at all times but during
a pass, and a thread takes it over when it first computes.
"""

import os
import time
from collections import defaultdict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

import torch

RETRY = 64  # passes until what was slower is tried again


def cores_of_this_process() -> int:
    """This process's share of the machine's cores; OMP_NUM_THREADS says otherwise."""
    cores = torch.get_num_threads()
    return cores if "OMP_NUM_THREADS" in os.environ else max(1, cores // int(os.environ.get("LOCAL_SIZE", "1")))


class Cores:
    """Runs passes on all `count` cores, or on one where that is faster.

    An operation ends when the last of its threads has had its turn. Beside another busy program that takes
    milliseconds, and a pass of some hundred operations ten times as long as on one core. So passes are timed, each kind
    apart. With one core, or on a GPU, nothing is done.
    """

    def __init__(self, count: int):
        self.count = count
        self._seconds: dict[Hashable, dict[int, float]] = defaultdict(dict)  # of the last pass, by kind and threads
        self._passes: dict[Hashable, int] = defaultdict(int)

    @contextmanager
    def one_pass(self, kind: Hashable) -> Iterator[None]:
        """All that is computed in the block; passes of a kind are to be of one size."""
        if self.count == 1:
            yield
            return
        threads = self._choose(kind)
        torch.set_num_threads(threads)
        began = time.perf_counter()
        try:
            yield
        finally:
            torch.set_num_threads(1)
        self._seconds[kind][threads] = time.perf_counter() - began

    def _choose(self, kind: Hashable) -> int:
        passes = self._passes[kind]
        self._passes[kind] += 1
        first = (self.count, 1, self.count)  # the very first pass allocates, and is no measure
        if passes < len(first):
            return first[passes]
        seconds = self._seconds[kind]
        slower, faster = sorted(seconds, key=seconds.get, reverse=True)
        return faster if passes % RETRY else slower
