"""A loop like that of flow_grpo and ddpo-pytorch: diffusers' modules step by step, scheduler in eager torch, GRPO.

Written from the equations, in the way of flow_grpo and ddpo-pytorch: per prompt a group of samples, one Python step at
a time, each sample's noise level looked up by its timestep, pictures scored in a thread pool, advantages from each
group's mean and std, then one forward and backward per micro-batch and trained step. Three things favour it: weights
and moments are in the model's own type (those projects keep float32 weights and compute under autocast), prompts are
encoded once, and its thread pool computes nothing in torch.
"""

import functools
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from bench_accounting import (
    count_calls,
    count_flops,
    default_device,
    device_name,
    peak_flops,
    peak_memory,
    reset_peak_memory,
    seconds_of,
)
from bench_pipelines import build_pipeline, build_trunk, predict, random_conditioning, trunk_of
from bench_work import COMPILED, GROUP_SIZE, UPDATES, Work
from phase_clock import PhaseClock
from torch import Tensor

LEARNING_RATE, CLIP_RANGE, ADVANTAGE_CLIP, GRADIENT_CLIPPING = 1e-5, 1e-4, 5.0, 1.0


def flow_sde_step(
    scheduler, prediction: Tensor, timesteps: Tensor, z: Tensor, noise_level: float, z_next: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One stochastic step of a flow model and its log-probability [B]; with `z_next`, the log-probability of that one.

    prediction, z: [B, C, H, W]; timesteps: [B]. std w sqrt(D) with w = noise_level sqrt(sigma / (1 - sigma)).
    """
    prediction, z = prediction.float(), z.float()
    steps = [scheduler.index_for_timestep(timestep) for timestep in timesteps]
    sigma = scheduler.sigmas[steps].view(-1, 1, 1, 1)
    sigma_next = scheduler.sigmas[[step + 1 for step in steps]].view(-1, 1, 1, 1)
    sigma_max = scheduler.sigmas[1].item()
    dt = sigma - sigma_next
    w = noise_level * torch.sqrt(sigma / (1 - torch.where(sigma == 1, sigma_max, sigma)))
    mean = z * (1 - w**2 * dt / (2 * sigma)) - prediction * dt * (1 + w**2 * (1 - sigma) / (2 * sigma))
    return _draw(mean, w * torch.sqrt(dt), z_next)


def ddim_step(
    scheduler, prediction: Tensor, timesteps: Tensor, z: Tensor, eta: float, z_next: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same for a model that predicts noise: DDIM (arXiv 2010.02502, eq. 12 and 16). timesteps: integer [B]."""
    prediction, z = prediction.float(), z.float()
    following = timesteps - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    alphas = scheduler.alphas_cumprod  # on the CPU, as diffusers keeps them
    ab = alphas.gather(0, timesteps.cpu())
    ab_next = alphas.gather(0, following.cpu().clamp(min=0))  # the last step's is that of timestep 0, as in SD1.5
    ab, ab_next = (x.view(-1, 1, 1, 1).to(z.device) for x in (ab, ab_next))
    std = eta * torch.sqrt((1 - ab_next) / (1 - ab) * (1 - ab / ab_next))
    x0 = (z - torch.sqrt(1 - ab) * prediction) / torch.sqrt(ab)
    mean = torch.sqrt(ab_next) * x0 + torch.sqrt(1 - ab_next - std**2) * prediction
    return _draw(mean, std, z_next)


def _draw(mean: Tensor, std: Tensor, z_next: Tensor | None) -> tuple[Tensor, Tensor]:
    if z_next is None:
        z_next = mean + std * torch.randn(mean.shape, device=mean.device)
    log_prob = -((z_next.detach() - mean) ** 2) / (2 * std**2) - torch.log(std) - math.log(math.sqrt(2 * math.pi))
    return z_next, log_prob.mean(dim=(1, 2, 3))


STEPS = {"flow-sde": flow_sde_step, "ddim": ddim_step}


def group_advantages(rewards: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """GRPO: each reward [N] against mean and std of those of its own prompt."""
    prompts, advantages = np.asarray(prompts), np.empty_like(rewards)
    for prompt in np.unique(prompts):
        group = prompts == prompt
        advantages[group] = (rewards[group] - rewards[group].mean()) / (rewards[group].std() + 1e-4)
    return advantages


class StockLoop:
    """Builds the model and serves measurements: seconds, phases, counts."""

    def __init__(self, work: Work):
        before = os.environ.get("MKL_CBWR")
        from latent_critic.engine.backbones import TINY_DIT
        from latent_critic.engine.config import RewardConfig
        from latent_critic.engine.prompts import load_prompts
        from latent_critic.engine.rewards import build_rewards, score_all

        if before is None:
            os.environ.pop("MKL_CBWR")  # the engine sets it at its import, for its own processes
        self.work, self.device, self.tiny_dit = work, default_device(), TINY_DIT
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        torch.manual_seed(0)
        self.score_all = functools.partial(score_all, build_rewards([RewardConfig(name=work.reward)]))
        self.pipe = build_pipeline(work.model, TINY_DIT, self.device)
        self.vae = self.pipe.vae.requires_grad_(False)
        self.trunk = trunk_of(self.pipe).to(self.dtype).requires_grad_(True)
        self.optimizer = torch.optim.AdamW(self.trunk.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=1e-4)
        side = work.resolution // self.pipe.vae_scale_factor
        self.latent_shape = (self.trunk.config.in_channels, side, side)
        self.clock = PhaseClock(self.device)
        texts = [prompt.text for prompt in load_prompts("scenes:train")[: work.images // GROUP_SIZE]]
        self.prompts = [texts[i // GROUP_SIZE % len(texts)] for i in range(work.images)]
        self.encode_seconds = seconds_of(lambda: self._encode(texts), self.device) / len(texts)
        self.compiled = {}
        if work.with_compile:
            torch._dynamo.config.recompile_limit = 64  # a block has several kinds, batch sizes and modes
            blocks = getattr(self.trunk, "transformer_blocks", [self.trunk])
            self.compiled = {block: torch.compile(block.forward, dynamic=False) for block in blocks}

    # ------------------------------------------------------------------------------------------------ measurements

    def about(self) -> dict:
        parameters = sum(p.numel() for p in self.trunk.parameters())
        shapes = {name: tensor.shape[1:] for name, tensor in self.conditioning.items()}
        flops = count_flops(build_trunk(self.work.model, self.tiny_dit, "meta"), self.latent_shape, shapes)
        return {
            "device": device_name(self.device),
            "threads": torch.get_num_threads(),
            "dtype": str(self.dtype).removeprefix("torch."),
            "parameters": parameters,
            "flops_per_image": flops,
            "encode_seconds": None if self.work.is_random else self.encode_seconds,
        }

    def peak(self) -> dict:
        return peak_flops(self.device, self.dtype)

    def compiler_missing(self) -> str | None:
        """Why nothing can be compiled here, or None."""
        try:
            torch.compile(lambda x: 2 * x + 1)(torch.zeros(8, device=self.device))
        except RuntimeError as error:
            return str(error).strip().splitlines()[0]
        return None

    def rollout(self, variant: str, batch: int, batches: int) -> float:
        """Seconds of `batches` rollouts of `batch` images."""
        self._use(variant)
        rows = [[i % self.work.images for i in range(batch)]] * batches
        return seconds_of(lambda: [self._sample(part) for part in rows], self.device)

    def iterate(self, variant: str) -> dict:
        """One iteration: seconds, phases, peak memory."""
        self._use(variant)
        self.clock.read()
        reset_peak_memory(self.device)
        seconds = seconds_of(self._iterate, self.device)
        return {"seconds": seconds, "phases": self.clock.read(), "peak_memory": peak_memory(self.device)}

    def count(self, variant: str, batch: int) -> dict:
        """What a rollout of a batch asks of PyTorch, in all its steps; on a CPU compiled code calls no operators."""
        if variant == COMPILED and self.device.type == "cpu":
            return {}
        self._use(variant)
        return count_calls(lambda: self._sample([i % self.work.images for i in range(batch)]), self.device)

    def release(self) -> None:
        """Gives the device's unused memory back, for the process whose turn comes."""
        self.optimizer.zero_grad()
        torch.cuda.empty_cache()

    # ---------------------------------------------------------------------------------------------------- the loop

    def _use(self, variant: str) -> None:
        for block, forward in self.compiled.items():
            if variant == COMPILED:
                block.forward = forward
            else:
                vars(block).pop("forward", None)

    def _encode(self, texts: Sequence[str]) -> None:
        """Prompts are encoded once; the cache lies on the device."""
        if self.work.is_random:
            tensors = random_conditioning(self.work.model, texts, self.device)
        else:
            with torch.no_grad():
                embeds, _, pooled, _ = self.pipe.encode_prompt(
                    texts, None, None, do_classifier_free_guidance=False, max_sequence_length=0
                )
            tensors = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
        rows = [texts.index(prompt) for prompt in self.prompts]
        self.conditioning = {name: tensor[rows].to(self.dtype) for name, tensor in tensors.items()}

    def _predict(self, z: Tensor, timesteps: Tensor, conditioning: dict) -> Tensor:
        return predict(self.trunk, z.to(self.dtype), timesteps, conditioning)

    def _step(self, prediction: Tensor, timesteps: Tensor, z: Tensor, z_next: Tensor | None = None):
        step = STEPS[self.work.transition]
        return step(self.pipe.scheduler, prediction, timesteps, z, self.work.noise_level, z_next)

    @torch.no_grad()
    def _sample(self, rows: list[int]) -> dict[str, Tensor]:
        """Rollouts of some of the iteration's prompts."""
        scheduler = self.pipe.scheduler
        scheduler.set_timesteps(self.work.steps, device=self.device)
        conditioning = {name: tensor[rows] for name, tensor in self.conditioning.items()}
        z = torch.randn(len(rows), *self.latent_shape, device=self.device)
        latents, log_probs = [z], []
        for timestep in scheduler.timesteps:
            timesteps = timestep.repeat(len(rows))
            z, log_prob = self._step(self._predict(z, timesteps, conditioning), timesteps, z)
            latents.append(z)
            log_probs.append(log_prob)
        latents = torch.stack(latents, dim=1)
        return {
            "timesteps": scheduler.timesteps.repeat(len(rows), 1),
            "latents": latents[:, :-1],
            "next_latents": latents[:, 1:],
            "log_probs": torch.stack(log_probs, dim=1),
            **conditioning,
        }

    @torch.no_grad()
    def _decode(self, latents: Tensor) -> Tensor:
        """uint8 [B, height, width, 3], on the device."""
        config = self.vae.config
        latents = latents / config.scaling_factor + (config.shift_factor or 0.0)
        images = self.pipe.image_processor.postprocess(self.vae.decode(latents).sample, output_type="pt")
        return (images * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)

    def _score(self, images: Tensor, prompts: Sequence[str]) -> np.ndarray:
        with self.clock.span("reward", on_host=True):
            return self.score_all(images.cpu(), prompts, [{}] * len(prompts))[:, 0].numpy()

    def _iterate(self) -> None:
        work, parts, scores = self.work, [], []
        with ThreadPoolExecutor(8) as pool:
            for start in range(0, work.images, work.batch):
                rows = list(range(start, start + work.batch))
                with self.clock.span("rollout"):
                    parts.append(self._sample(rows))
                with self.clock.span("decode"):
                    images = self._decode(parts[-1]["next_latents"][:, -1])
                scores.append(pool.submit(self._score, images, [self.prompts[row] for row in rows]))
        rewards = np.concatenate([score.result() for score in scores])
        samples = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        samples["advantages"] = torch.as_tensor(group_advantages(rewards, self.prompts), device=self.device)

        order = torch.randperm(work.images, device=self.device)
        samples = {name: tensor[order] for name, tensor in samples.items()}
        starts = range(0, work.images, work.batch)
        batches = [{name: tensor[i : i + work.batch] for name, tensor in samples.items()} for i in starts]
        share = len(batches) // UPDATES
        for start in range(0, len(batches), share):
            self._update(batches[start : start + share])

    def _update(self, batches: list[dict[str, Tensor]]) -> dict[str, float]:
        """One optimizer step."""
        log: dict[str, list[Tensor]] = {"loss": [], "approx_kl": [], "clipfrac": []}
        count = len(batches) * self.work.trained_steps
        for sample in batches:
            conditioning = {name: sample[name] for name in self.conditioning}
            for k in range(self.work.trained_steps):
                z, z_next, timesteps = (sample[name][:, k] for name in ("latents", "next_latents", "timesteps"))
                with self.clock.span("forward"):
                    prediction = self._predict(z, timesteps, conditioning)
                _, log_prob = self._step(prediction, timesteps, z, z_next)
                advantages = sample["advantages"].clamp(-ADVANTAGE_CLIP, ADVANTAGE_CLIP)
                ratio = torch.exp(log_prob - sample["log_probs"][:, k])
                clipped = ratio.clamp(1.0 - CLIP_RANGE, 1.0 + CLIP_RANGE)
                loss = torch.maximum(-advantages * ratio, -advantages * clipped).mean()
                log["approx_kl"].append(0.5 * ((log_prob - sample["log_probs"][:, k]) ** 2).mean().detach())
                log["clipfrac"].append(((ratio - 1.0).abs() > CLIP_RANGE).float().mean())
                log["loss"].append(loss.detach())
                with self.clock.span("backward"):
                    (loss / count).backward()
        with self.clock.span("optimizer"):
            torch.nn.utils.clip_grad_norm_(self.trunk.parameters(), GRADIENT_CLIPPING)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return {name: torch.stack(values).mean().item() for name, values in log.items()}
