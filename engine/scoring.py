"""Pictures and rewards of finished samples, in a thread of their own while the next samples are denoised."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from .backbones.base import Backbone
from .rewards import Reward, score_all
from .trajectory import Trajectory


class Scoring:
    """Scores the micro-batches of one rollout in the order in which they are submitted.

    PyTorch leaves Python free while it computes, so decoding and scoring run beside the trunk; on a CPU they have one
    core (`sharding.init_distributed` leaves it to them).
    """

    def __init__(self, backbone: Backbone, rewards: Sequence[Reward]):
        self._backbone, self._rewards = backbone, rewards
        self._thread = ThreadPoolExecutor(1, "scoring", initializer=torch.set_num_threads, initargs=(1,))
        self._parts: list[Future] = []

    def submit(self, part: Trajectory) -> None:
        self._parts.append(self._thread.submit(self._score, part))

    def result(self) -> tuple[Tensor, Tensor]:
        """Waits for all: uint8 [N, H, W, 3] pictures, float32 [N, M] raw rewards. Raises what a reward raised."""
        self._thread.shutdown()
        images, scores = zip(*(part.result() for part in self._parts), strict=True)
        return torch.cat(images), torch.cat(scores)

    def _score(self, part: Trajectory) -> tuple[Tensor, Tensor]:
        with torch.cuda.device_of(part.latents):  # a thread of its own starts at device 0
            images = self._backbone.decode(part.latents[:, -1]).cpu()
        texts, metadata = zip(*((p.text, p.metadata) for p in part.prompts), strict=True)
        return images, score_all(self._rewards, images, texts, metadata)
