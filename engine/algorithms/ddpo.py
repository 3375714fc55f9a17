"""DDPO (arXiv 2305.13301): a sample is compared with the mean reward, of the iteration or of its prompt's latest
samples, in units of its std. All steps of a sample have the same advantage."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..advantages import normalize
from ..config import Config
from ..errors import UserError
from ..prompts import Prompt
from .base import Algorithm

KEPT = 16  # rewards of a prompt, the latest, which count once there are so many
EPSILON = 1e-6


class DDPO(Algorithm):
    def __init__(self, config: Config, weights: Tensor):
        super().__init__(config, weights)
        self._history: dict[str, Tensor] = {}  # prompt -> float64 [<= KEPT, M], the latest last

    def observe(self, raw: Tensor, prompts: Sequence[Prompt]) -> None:
        if self.config.reward_statistics == "global":
            return
        parts = [([prompt.text for prompt in prompts], raw.cpu().double())]
        if dist.is_initialized():
            parts = [None] * dist.get_world_size()
            dist.all_gather_object(parts, ([prompt.text for prompt in prompts], raw.cpu().double()))
        for texts, rewards in parts:
            for text, row in zip(texts, rewards, strict=True):
                before = self._history.get(text, row.new_empty(0, len(row)))
                self._history[text] = torch.cat([before, row[None]])[-KEPT:]

    def advantages(self, raw: Tensor, values: Tensor, trained: slice, prompts: Sequence[Prompt]) -> Tensor:
        clip = self.config.advantage_clip
        advantages = normalize(raw[:, None], self.weights, clip)
        if self.config.reward_statistics == "prompt":
            for i, prompt in enumerate(prompts):
                known = self._history[prompt.text].to(raw.device)
                if len(known) == KEPT:
                    standardized = (raw[i].double() - known.mean(0)) / (known.std(0, correction=0) + EPSILON)
                    advantages[i] = (standardized.clamp(-clip, clip) @ self.weights.to(standardized)).to(raw.dtype)
        return advantages.repeat(1, trained.stop - trained.start)

    def state_dict(self) -> dict[str, Tensor]:
        return {f"history/{text}": rewards for text, rewards in self._history.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if any(rewards.shape[1] != len(self.weights) for rewards in state.values()):
            raise UserError("the checkpoint has other rewards than the config: resume with those of its run")
        self._history = {name.removeprefix("history/"): rewards for name, rewards in state.items()}
