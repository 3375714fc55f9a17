"""What `engine/sample.py --steer` does."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backbones import Backbone
from ..backbones.onednn import use_onednn
from ..critic_file import load_critic
from ..errors import UserError
from ..prompts import Prompt
from ..saved_run import SavedRun
from .guidance import Guidance
from .particles import SMC, BestOfN, Particles
from .steer import Steerer

SCALE, PARTICLES = 4.0, 4  # where none is given


def draw_steered(
    args: argparse.Namespace,
    run: SavedRun | None,
    backbone: Backbone,
    prompts: Sequence[Prompt],
    device: torch.device,
    chosen: dict[str, Any],
) -> Tensor:
    """uint8 [P, H, W, 3]; what was chosen by, and what it took, goes to a .json beside the picture.

    chosen: options of the command line that are not the defaults. Raises UserError for what cannot be.
    """
    if run is None and args.critic is None:
        raise UserError("--steer needs a critic: --run FOLDER, or --critic FILE beside --model")
    scale = SCALE if args.scale is None else args.scale
    guidance = Guidance(scale, *_window(args.window)) if "guidance" in args.steer else None
    particles = _particles(args)
    use_onednn(backbone.trunk)
    critic = load_critic(args.critic or args.run / "critic.safetensors", backbone)
    seed = chosen.pop("seed", run.config.evaluation.seed if run else 0)
    steerer = Steerer(
        backbone,
        critic,
        device,
        guidance=guidance,
        particles=particles,
        weights=_weights(args.weight or []),
        rewards=run.config.rewards if run and args.critic is None else None,
        batch_size=args.batch_size,
        graph="step",
        **chosen,
    )
    found = steerer(prompts, seed, progress=True)
    about = {
        "steer": args.steer,
        "guidance": guidance and dataclasses.asdict(guidance),
        "particles": particles and {"count": particles.count, "by": particles.by, "keep": particles.keep},
        "weights": dict(zip(critic.names, steerer.weights.tolist(), strict=True)),
        "seed": seed,
        "cost": dataclasses.asdict(found.cost),
        "prompts": [prompt.text for prompt in prompts],
        "potentials": found.potentials.tolist(),
        "chosen": found.chosen.tolist(),
    }
    path = args.output.with_suffix(".json")
    path.write_text(json.dumps(about) + "\n")
    print(f"scores and cost: {path}")
    return found.images


def _particles(args: argparse.Namespace) -> Particles | None:
    count, by = PARTICLES if args.particles is None else args.particles, args.by or "value"
    if "bon" in args.steer:
        return BestOfN(count, by, keep=args.keep)
    if "smc" in args.steer:
        return SMC(count, args.smc_scale, args.resample_every, by=by, keep=args.keep)
    return None


def _window(text: str | None) -> tuple[int, int | None]:
    """START:END, either of which may be missing."""
    if text is None:
        return 0, None
    start, colon, end = text.partition(":")
    if not colon or not all(part == "" or part.isdecimal() for part in (start, end)):
        raise UserError(f"--window {text}: expected START:END in steps, as in 2:6 or :4")
    return int(start or 0), int(end) if end else None


def _weights(given: Sequence[str]) -> dict[str, float] | None:
    weights = {}
    for text in given:
        name, equals, number = text.rpartition("=")
        try:
            weights[name] = float(number)
        except ValueError:
            equals = ""
        if not equals:
            raise UserError(f"--weight {text}: expected REWARD=NUMBER, as in composition=2")
    return weights or None
