"""A cell is one way to steer: its pictures on held-out prompts, their scores and what they took."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from repro_machine import about
from torch import Tensor
from tqdm import tqdm

from latent_critic.engine.backbones.onednn import use_onednn
from latent_critic.engine.config import RewardConfig
from latent_critic.engine.critic_file import load_critic
from latent_critic.engine.errors import UserError
from latent_critic.engine.prompts import Prompt, load_prompts, load_sources
from latent_critic.engine.rewards import build_rewards, score_all
from latent_critic.engine.saved_run import SavedRun
from latent_critic.engine.steering import SMC, BestOfN, Guidance, Particles, Steered, Steerer
from latent_critic.engine.world import resolve_dtype

WATCHED = ("composition", "composition_strict", "background", "jpeg_compressibility")
COUNTS = (2, 4, 8, 16)
GUIDANCE_SCALES = (0.5, 1.0, 2.0, 4.0, 8.0)
SMC_SCALES = (1.0, 3.0, 10.0)
CHOOSING = 256  # training prompts that scales are chosen on
BATCH = 64
EVERY = 1  # SMC's steps between resamplings: before each of the few steps that add noise, but the first
SMC_KINDS = {"by V": {}, "by V, kept by reward": {"keep": "reward"}, "by reward": {"by": "reward"}}
SEED = 1000


class Way(NamedTuple):
    """particles is made anew for each use, since it keeps buffers."""

    name: str
    count: int
    guidance: Guidance | None = None
    particles: Callable[[], Particles] | None = None
    transition: str | None = None  # None: as the critic was trained


def smc(kind: str, count: int, scale: float) -> Way:
    return Way(f"SMC of {count} {kind}", count, None, lambda: SMC(count, scale, EVERY, **SMC_KINDS[kind]))


# What scales are chosen for, of which ways.
TUNED = {"guidance": [(scale, Way("", 1, Guidance(scale))) for scale in GUIDANCE_SCALES]} | {
    kind: [(scale, smc(kind, 4, scale)) for scale in SMC_SCALES] for kind in SMC_KINDS
}


class Bench:
    def __init__(self, folder: Path, prompts: int, seeds: int, most: int):
        self.name, self.seeds, self.most = folder.name, seeds, most
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.run_config = SavedRun(folder).config
        held_out = load_prompts(self.run_config.prompts.eval)
        self.prompts = [held_out[i % len(held_out)] for i in range(prompts)]
        dtype = resolve_dtype(self.run_config.model.dtype, self.device)
        self.backbone = SavedRun(folder).backbone(dtype)
        use_onednn(self.backbone.trunk)
        self.critic = load_critic(folder / "critic.safetensors", self.backbone)
        self.watched = build_rewards([RewardConfig(name=name) for name in WATCHED])

    def run(self, path: Path) -> None:
        """Writes scales and each cell as they are there. UserError where those in the file are of other settings."""
        kept = {"scales": {}, "tried": {}, "cells": {}}
        kept |= json.loads(path.read_text()) if path.exists() else {}
        settings = {"run": self.name, "prompts": len(self.prompts), "seeds": self.seeds}
        for name, value in settings.items():
            if kept.setdefault(name, value) != value:
                raise UserError(f"{path} has cells of {name} {kept[name]}, not {value}; give another --output-dir")
        kept["about"] = about()
        path.parent.mkdir(parents=True, exist_ok=True)
        for name, candidates in TUNED.items():
            if name not in kept["scales"] and (name == "guidance" or self.most > 1):
                found = {scale: self.chosen_by(way) for scale, way in tqdm(candidates, desc=f"scale of {name}")}
                kept["tried"][name], kept["scales"][name] = list(found.items()), max(found, key=found.get)
                path.write_text(json.dumps(kept) + "\n")
        ways = list(self.ways(kept["scales"]))
        for way in tqdm(ways, desc=path.stem):
            if way.name not in kept["cells"]:
                kept["cells"][way.name] = self.cell(way) | {"commit": kept["about"]["commit"]}
                kept["cells"] = {each.name: kept["cells"][each.name] for each in ways if each.name in kept["cells"]}
                path.write_text(json.dumps(kept) + "\n")

    def chosen_by(self, way: Way) -> float:
        """Composition on training prompts, which held-out ones share nothing with."""
        prompts = [prompt for source in load_sources(self.run_config.prompts.train) for prompt in source.prompts]
        prompts = [prompts[i * len(prompts) // CHOOSING] for i in range(CHOOSING)]
        found, _ = self.draw(way, prompts, SEED - 1)
        return self.scores(found.images, prompts)[:, 0].mean().item()

    def ways(self, scales: dict[str, float]) -> Iterator[Way]:
        """Cheap ones first."""
        middle = self.critic.rollout.num_inference_steps // 2 - 1
        scale = scales["guidance"]
        guidance = Guidance(scale)
        yield Way("unsteered", 1)
        yield Way("ODE", 1, transition="ode")
        yield Way("guidance", 1, guidance)
        yield Way("guidance, ODE", 1, guidance, transition="ode")
        for half in (0.5, 2.0):
            yield Way(f"guidance, scale {half:g}x", 1, Guidance(half * scale))
        yield Way("guidance, scale -1x", 1, Guidance(-scale))
        for n in (count for count in COUNTS if count <= self.most):
            half = {middle: max(1, n // 2)}
            yield Way(f"best of {n} by V", n, None, lambda n=n: BestOfN(n))
            yield Way(f"best of {n} by V, half given up midway", n, None, lambda n=n, half=half: BestOfN(n, prune=half))
            yield Way(f"best of {n} by reward", n, None, lambda n=n: BestOfN(n, "reward"))
            kinds = [smc(kind, n, scales[kind]) for kind in SMC_KINDS]
            yield from kinds
            yield Way(f"guidance + best of {n} by V", n, guidance, lambda n=n: BestOfN(n))
            yield Way(f"guidance + best of {n} by reward", n, guidance, lambda n=n: BestOfN(n, "reward"))
            yield Way(f"guidance + {kinds[0].name}", n, guidance, kinds[0].particles)

    def cell(self, way: Way) -> dict[str, Any]:
        """Scores of every picture [seeds][prompts], cost of one picture, and how far two of a prompt are apart."""
        scores, latents, costs = [], [], []
        for seed in range(self.seeds):
            found, cost = self.draw(way, self.prompts, SEED + seed)
            scores.append(self.scores(found.images, self.prompts))
            latents.append(found.latents)
            costs.append(cost)
        apart = (latents[0] - latents[1]).flatten(1).square().mean(1).sqrt()
        count = len(self.prompts) * self.seeds
        total = {name: sum(cost[name] for cost in costs) / count for name in costs[0]}
        columns = torch.stack(scores).permute(2, 0, 1).double().round(decimals=5)
        return {
            "particles": way.count,
            "cost": total,
            "scores": {name: column.tolist() for name, column in zip(WATCHED, columns, strict=True)},
            "apart": apart.double().round(decimals=5).tolist(),
        }

    def draw(self, way: Way, prompts: list[Prompt], seed: int) -> tuple[Steered, dict[str, float]]:
        steerer = Steerer(
            self.backbone,
            self.critic,
            self.device,
            guidance=way.guidance,
            particles=way.particles and way.particles(),
            transition=way.transition,
            batch_size=BATCH,
            graph="step",
        )
        found = steerer(prompts, seed)
        return found, dataclasses.asdict(found.cost)

    def scores(self, images: Tensor, prompts: list[Prompt]) -> Tensor:
        return score_all(self.watched, images, [p.text for p in prompts], [p.metadata for p in prompts])
