"""Pictures and rewards of finished samples, in a thread of their own while the next samples are denoised."""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from .backbones.base import Backbone
from .rewards import Reward, score_all
from .trajectory import Trajectory

DECODE_BATCH = 32  # larger ones leave a CPU's caches, and are slower for it


class Scoring:
    """Scores the micro-batches of one rollout in the order in which they are submitted.

    PyTorch leaves Python free while it computes, so decoding and scoring run beside the trunk; on a CPU they have one
    core (`sharding.init_distributed` leaves it to them). Once the trunk rests, its thread decodes too: the last
    micro-batch's pictures are all that an iteration waits for. Rewards are called by one thread only.
    """

    def __init__(self, backbone: Backbone, rewards: Sequence[Reward]):
        self._backbone, self._rewards = backbone, rewards
        self._thread = ThreadPoolExecutor(1, "scoring", initializer=torch.set_num_threads, initargs=(1,))
        self._undecoded: deque[tuple[Future, Tensor]] = deque()
        self._parts: list[tuple[list[Future], Future]] = []

    def submit(self, part: Trajectory) -> None:
        pictures = []
        for latents in part.latents[:, -1].split(DECODE_BATCH):
            pictures.append(Future())
            self._undecoded.append((pictures[-1], latents))
            self._thread.submit(self._decode_next)
        self._parts.append((pictures, self._thread.submit(self._score, part, pictures)))

    def result(self) -> tuple[Tensor, Tensor]:
        """Waits for all: uint8 [N, H, W, 3] pictures, float32 [N, M] raw rewards. Raises what a reward raised."""
        while self._undecoded:
            self._decode_next()
        self._thread.shutdown()
        scores = torch.cat([scores.result() for _, scores in self._parts])
        return torch.cat([picture.result() for pictures, _ in self._parts for picture in pictures]), scores

    def _decode_next(self) -> None:
        try:
            picture, latents = self._undecoded.popleft()
        except IndexError:
            return  # the other thread was faster
        try:
            with torch.cuda.device_of(latents):  # a thread of its own starts at device 0
                picture.set_result(self._backbone.decode(latents).cpu())
        except BaseException as error:  # raised where the pictures are asked for
            picture.set_exception(error)

    def _score(self, part: Trajectory, pictures: Sequence[Future]) -> Tensor:
        images = torch.cat([picture.result() for picture in pictures])
        texts, metadata = zip(*((p.text, p.metadata) for p in part.prompts), strict=True)
        return score_all(self._rewards, images, texts, metadata)
