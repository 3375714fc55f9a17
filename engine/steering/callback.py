"""Guidance inside of a stock diffusers pipeline, with its own scheduler: a `callback_on_step_end`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ..backbones import backbone_of
from ..critic_file import load_critic, prompt_length
from ..errors import UserError
from .guidance import Guidance


class GuidanceCallback:
    """Moves the latents between two steps by what guidance would change in the next one, to first order in its size.

        callback = GuidanceCallback(pipe, "critic.safetensors", prompts, Guidance(4.0))
        images = pipe(prompts, callback_on_step_end=callback).images

    prompts: those of the call; num_images_per_prompt and max_sequence_length as in it (None: as the critic was
    trained, which is what the call should have too). The first step is not steered. It takes a forward and a
    backward a step beside the pipeline's own; `steer` takes both from one. For pipelines whose latents are pictures
    [B, C, H, W]; FLUX packs them into tokens. Raises UserError as `steer` does.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        critic: str | Path,
        prompts: str | Sequence[str],
        guidance: Guidance,
        *,
        weights: dict[str, float] | None = None,
        num_images_per_prompt: int = 1,
        max_sequence_length: int | None = None,
    ):
        if max_sequence_length is None:
            max_sequence_length = prompt_length(Path(critic))
        self.guidance, self.backbone = guidance, backbone_of(pipe, max_sequence_length)
        found = load_critic(Path(critic), self.backbone)
        dtype = next(self.backbone.trunk.parameters()).dtype
        self.model, self.weights = found.model.to(pipe.device, dtype), found.weights(weights).to(pipe.device)
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        conditioning = self.backbone.encode_prompts(texts)
        self.conditioning = {
            name: tensor.to(pipe.device).repeat_interleave(num_images_per_prompt, 0)
            for name, tensor in conditioning.items()
        }

    def __call__(self, pipe: DiffusionPipeline, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        number, timesteps = step + 1, pipe.scheduler.timesteps
        if step == 0:
            self.guidance.check(len(timesteps))
        if number >= len(timesteps) or not self.guidance.is_on(number):
            return kwargs
        latents = kwargs["latents"]
        if latents.ndim != 4:
            raise UserError(f"{type(pipe).__name__} packs its latents into tokens; steer() draws with it")
        table, known = self.backbone.schedule("ode", 0.0, len(timesteps)).to(latents.device)
        row = (known - timesteps[number]).abs().argmin()  # schedulers of other kinds have timesteps a little apart
        with torch.enable_grad():
            z = latents.detach().float().requires_grad_()
            steps = timesteps[number].to(latents.device, torch.float32).expand(len(z))
            _, values = self.model(z, steps, self.conditioning, guidance_scale=1.0)
            (gradient,) = torch.autograd.grad((values @ self.weights).sum(), z)
        change = self.guidance(torch.zeros_like(gradient), gradient, self.backbone.per_score(known[row]))
        return {**kwargs, "latents": (latents + table[row, 1] * change).to(latents.dtype)}

    def close(self) -> None:
        """Takes the critic's taps out of the pipeline's trunk."""
        self.model.untap()
