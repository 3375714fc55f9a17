"""Where an iteration's time goes: python bench/throughput.py

Times the parts of post-training on one process, interleaved in one run, so that ratios hold on a shared machine:
the bare trunk, the unsharded actor-critic, the same under DeepSpeed ZeRO-3, decoding and scoring. Writes a table and a
JSON file with the 20th, 50th and 80th percentile of each, in seconds per micro-batch.
"""

import argparse
import json
import os
import platform
import sys
import time
import warnings
from pathlib import Path

# Python puts this folder first, where transformers would find kernels.py for the package of that name.
sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

import torch
from tqdm import tqdm

from latent_critic.engine.actor_critic import ActorCritic
from latent_critic.engine.backbones import load_backbone
from latent_critic.engine.backbones.base import timestep_of
from latent_critic.engine.config import Config
from latent_critic.engine.embedded import scenes
from latent_critic.engine.rewards import build_rewards, score_all
from latent_critic.engine.sharding import init_distributed, resolve_dtype, shard
from latent_critic.kernels.transition import transition_step


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", default="tiny-dit")
    parser.add_argument("--max-sequence-length", type=int, default=0)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output-dir", type=Path, default=Path("bench/results"))
    return parser.parse_args()


def build(args: argparse.Namespace, world, sharded: bool):
    """An actor-critic of its own, sharded or bare, with its backbone."""
    config = Config.model_validate(
        {
            "model": {"pretrained": args.pretrained, "max_sequence_length": args.max_sequence_length},
            "rewards": [{"name": "composition"}],
            "deepspeed": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
        }
    )
    torch.manual_seed(0)
    backbone = load_backbone(args.pretrained, args.max_sequence_length)
    backbone.fuse()
    backbone.to(world.device)
    model = ActorCritic(backbone, config.critic, ["composition"]).eval()
    model.to(world.device, resolve_dtype("auto", world.device))
    return backbone, (shard(model, config, world) if sharded else model)


def parts(bare, sharded, backbone, batch: int, world) -> dict:
    """What is timed, by name: functions that do one micro-batch."""
    captions = scenes.prompts("train")[:batch]
    conditioning = {n: t.to(world.device) for n, t in backbone.encode_prompts(captions).items()}
    sigmas = backbone.sigmas(10)
    z = torch.randn(batch, *backbone.latent_shape, device=world.device)
    timesteps = timestep_of(sigmas[:1]).to(world.device).expand(batch)
    table = torch.tensor([[1.0, -0.1, 0.1]], device=world.device)
    rewards = build_rewards(Config.model_validate({"rewards": [{"name": "composition"}]}).rewards)
    images = backbone.decode(z).cpu()

    @torch.no_grad()
    def trunk_forward():
        dtype = next(bare.trunk.parameters()).dtype
        cast = {name: tensor.to(dtype) for name, tensor in conditioning.items()}
        backbone.predict(bare.trunk, z.to(dtype), timesteps, cast)

    @torch.no_grad()
    def step(model):
        prediction, _ = model(z, timesteps, conditioning)
        transition_step(prediction, z, torch.randn_like(z), table, 0)

    def train(model, backward):
        prediction, values = model(z, timesteps, conditioning)
        backward(prediction.square().mean() + values.square().mean())

    def train_sharded():
        sharded.set_gradient_accumulation_boundary(False)
        train(sharded, sharded.backward)

    def train_bare():
        train(bare, torch.Tensor.backward)
        bare.zero_grad(set_to_none=True)

    return {
        "trunk forward": trunk_forward,
        "rollout step, unsharded": lambda: step(bare),
        "rollout step, ZeRO-3": lambda: step(sharded),
        "forward + backward, unsharded": train_bare,
        "forward + backward, ZeRO-3": train_sharded,
        "decode": lambda: backbone.decode(z),
        "composition reward": lambda: score_all(rewards, images, captions, [{}] * batch),
    }


def measure(work: dict, repeats: int, on_gpu: bool) -> dict[str, list[float]]:
    """Seconds of each part, the parts taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for repeat in tqdm(range(repeats + 2), desc="rounds", leave=False):
        for name, run in work.items():
            begin = time.perf_counter()
            run()
            if on_gpu:
                torch.cuda.synchronize()
            if repeat >= 2:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def main() -> None:
    args = arguments()
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch's, of what DeepSpeed calls
    world = init_distributed()
    on_gpu = world.device.type == "cuda"
    backbone, bare = build(args, world, sharded=False)
    _, sharded = build(args, world, sharded=True)
    about = {
        "device": torch.cuda.get_device_name() if on_gpu else f"{platform.processor() or platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "model": args.pretrained,
        "repeats": args.repeats,
    }
    lines = [f"`python bench/throughput.py`: {', '.join(f'{k} {v}' for k, v in about.items())}", ""]
    results = {}
    for batch in args.batch_size:
        seconds = measure(parts(bare, sharded, backbone, batch, world), args.repeats, on_gpu)
        quantiles = {n: torch.tensor(s).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist() for n, s in seconds.items()}
        results[batch] = quantiles
        base = quantiles["trunk forward"][1]
        lines += [f"| micro-batch {batch} | p20 ms | p50 ms | p80 ms | x trunk forward |", "|---|---|---|---|---|"]
        lines += [
            f"| {n} | {q[0] * 1e3:.1f} | {q[1] * 1e3:.1f} | {q[2] * 1e3:.1f} | {q[1] / base:.2f} |"
            for n, q in quantiles.items()
        ]
        lines.append("")
    text = "\n".join(lines)
    print(text)
    name = "throughput_gpu" if on_gpu else "throughput_cpu"
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / f"{name}.json").write_text(json.dumps({"about": about, "seconds": results}, indent=1) + "\n")
    (args.output_dir / f"{name}.md").write_text(text)


if __name__ == "__main__":
    main()
