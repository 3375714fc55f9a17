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
    """Scores the micro-batches of one rollout in the order in which they are submitted.

    PyTorch leaves Python free while it computes, so decoding and scoring run beside the trunk; on a CPU they have one
    core (`sharding.init_distributed` leaves it to them). Once the trunk rests, its thread decodes too: the last
    pictures are all that an iteration waits for. Rewards are called by one thread only.
    """

    def __init__(self, backbone: Backbone, rewards: Sequence[Reward]):
        self._backbone, self._rewards = backbone, rewards
        self._thread = ThreadPoolExecutor(1, "scoring", initializer=torch.set_num_threads, initargs=(1,))
        self._undecoded: deque[tuple[Future, Tensor]] = deque()
        self._pictures: list[Future] = []
        self._scores: list[Future] = []

    def submit(self, part: Trajectory) -> None:
        for start in range(0, len(part.prompts), BATCH):
            batch = slice(start, start + BATCH)
            pictures = Future()
            self._undecoded.append((pictures, part.latents[batch, -1]))
            self._thread.submit(self._decode_next)
            self._pictures.append(pictures)
            self._scores.append(self._thread.submit(self._score, pictures, part.prompts[batch]))

    def result(self) -> tuple[Tensor, Tensor]:
        """Waits for all: uint8 [N, H, W, 3] pictures, float32 [N, M] raw rewards. Raises what a reward raised."""
        while self._undecoded:
            self._decode_next()
        self._thread.shutdown()
        scores = torch.cat([scores.result() for scores in self._scores])
        return torch.cat([pictures.result() for pictures in self._pictures]), scores

    def _decode_next(self) -> None:
        try:
            pictures, latents = self._undecoded.popleft()
        except IndexError:
            return  # the other thread was faster
        try:
            with torch.cuda.device_of(latents):  # a thread of its own starts at device 0
                pictures.set_result(self._backbone.decode(latents).cpu())
        except BaseException as error:  # raised where the pictures are asked for
            pictures.set_exception(error)

    def _score(self, pictures: Future, prompts: Sequence[Prompt]) -> Tensor:
        texts, metadata = zip(*((p.text, p.metadata) for p in prompts), strict=True)
        return score_all(self._rewards, pictures.result(), texts, metadata)
