"""Pictures and rewards of finished samples, in a thread of their own while the next samples are denoised."""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from .backbones.base import Backbone
from .prompts import Prompt
from .rewards import Reward, score_all
from .trajectory import Trajectory

BATCH = 16  # pictures at a time: larger batches leave a CPU's caches, and share the last work less evenly


class Scoring:
    """Scores the micro-batches of one rollout.

    PyTorch leaves Python free while it computes, so decoding and scoring run beside the trunk, on a GPU in a stream of
    their own. Once the trunk rests, its thread decodes too: the last pictures are all that an iteration waits for.
    Rewards are called by one thread only.
    """

    def __init__(self, backbone: Backbone, rewards: Sequence[Reward]):
        self._backbone, self._rewards = backbone, rewards
        self._thread = ThreadPoolExecutor(1, "scoring", initializer=torch.set_num_threads, initargs=(1,))
        self._undecoded: deque[tuple[Future, Tensor, torch.cuda.Event | None]] = deque()
        self._scored: dict[int, tuple[Future, Future]] = {}  # pictures and scores by the number of their first sample
        self._stream: torch.cuda.Stream | None = None

    def submit(self, start: int, part: Trajectory) -> None:
        """A micro-batch, whose first sample has the number `start`; in any order, from any thread."""
        latents = part.latents[:, -1]
        sampled = None
        if latents.is_cuda:
            self._stream = self._stream or torch.cuda.Stream(latents.device)
            sampled = torch.cuda.Event()
            sampled.record()
        for first in range(0, len(part.prompts), BATCH):
            batch = slice(first, first + BATCH)
            pictures = Future()
            self._undecoded.append((pictures, latents[batch], sampled))
            self._thread.submit(self._decode_next)
            scores = self._thread.submit(self._score, pictures, part.prompts[batch])
            self._scored[start + first] = pictures, scores

    def result(self) -> tuple[Tensor, Tensor]:
        """Waits for all: uint8 [N, H, W, 3] pictures, float32 [N, M] raw rewards. Raises what a reward raised."""
        while self._undecoded:
            self._decode_next()
        self._thread.shutdown()
        pictures, scores = zip(*(self._scored[start] for start in sorted(self._scored)), strict=True)
        scores = torch.cat([part.result() for part in scores])
        return torch.cat([part.result() for part in pictures]), scores

    def _decode_next(self) -> None:
        try:
            pictures, latents, sampled = self._undecoded.popleft()
        except IndexError:
            return  # the other thread was faster
        try:
            pictures.set_result(self._decode(latents, sampled))
        except BaseException as error:  # raised where the pictures are asked for
            pictures.set_exception(error)

    def _decode(self, latents: Tensor, sampled: torch.cuda.Event | None) -> Tensor:
        if sampled is None:
            return self._backbone.decode(latents)
        # A thread of its own starts at device 0.
        with torch.cuda.device(latents.device), torch.cuda.stream(self._stream):
            self._stream.wait_event(sampled)
            latents.record_stream(self._stream)
            return self._backbone.decode(latents).cpu()

    def _score(self, pictures: Future, prompts: Sequence[Prompt]) -> Tensor:
        texts, metadata = zip(*((p.text, p.metadata) for p in prompts), strict=True)
        return score_all(self._rewards, pictures.result(), texts, metadata)
