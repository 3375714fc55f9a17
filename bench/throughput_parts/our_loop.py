"""The engine's own trainer, on the work that `stock_loop` does."""

import dataclasses
import json
import tempfile
from pathlib import Path

import torch
from bench_accounting import count_calls, peak_memory, reset_peak_memory, seconds_of
from bench_backbones import build_backbone
from bench_work import NO_GRAPHS, OURS, UPDATES, WITH_CRITIC_PASSES, Work
from critic_price import measure_critics
from phase_clock import PhaseClock

from latent_critic.engine import plan
from latent_critic.engine.backbones import Conditioning
from latent_critic.engine.config import Config, load_config
from latent_critic.engine.denoising import DenoisingLoop
from latent_critic.engine.prompts import Prompt, load_prompts
from latent_critic.engine.rollout import Rollout
from latent_critic.engine.sharding import init_distributed
from latent_critic.engine.trainer import Trainer

RECIPE = Path(__file__).resolve().parents[2] / "configs" / "zero3_dit.json"


def build_config(work: Work, prompts: Path) -> Config:
    """tiny-dit as its recipe trains it, other models by the defaults; the sizes are the work's."""
    recipe = load_config(RECIPE).model_dump(mode="json") if work.model == "tiny-dit" else {}
    sizes = {
        "prompts": {"train": str(prompts)},
        "rollout": {
            "transition": work.transition,
            "noise_level": work.noise_level,
            "num_inference_steps": work.steps,
            "num_trained_steps": work.trained_steps,
            "samples_per_iteration": work.images,
            "micro_batch_size": work.batch,
        },
        "training": {"iterations": 10**6, "updates_per_iteration": UPDATES, "value_pretraining_iterations": 0},
    }
    sections = {name: {**recipe.get(name, {}), **changes} for name, changes in sizes.items()}
    return Config.model_validate_json(
        json.dumps({**recipe, **sections, "rewards": [{"name": work.reward, "stop_if_constant": None}]})
    )


class OurLoop:
    """Builds the trainer and serves measurements, as StockLoop does."""

    def __init__(self, work: Work):
        self.work, self.iteration = work, 0
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        texts = [prompt.text for prompt in load_prompts("scenes:train")[: work.images]]
        (folder / "prompts.txt").write_text("\n".join(texts) + "\n")
        world = init_distributed()
        self.device, self.cores = world.device, world.cores
        as_configured = build_config(work, folder / "prompts.txt")
        same_work = as_configured.training.model_copy(update={"critic_epochs": 0})
        self._configs = {WITH_CRITIC_PASSES: as_configured}
        self._configs[OURS] = self._configs[NO_GRAPHS] = as_configured.model_copy(update={"training": same_work})
        run = self.trainer = Trainer(as_configured, world, folder, build_backbone(work, world.device))
        run.encode.prepare(texts)
        self._rollouts = {(run.rollout.graph, work.batch): run.rollout}
        self._graphs = {OURS: run.rollout.graph, WITH_CRITIC_PASSES: run.rollout.graph, NO_GRAPHS: "off"}
        self.clock = PhaseClock(world.device)
        self._watch()

    def _watch(self) -> None:
        """Times the phases from outside."""
        run, timed = self.trainer, self.clock.timed
        run.sample, run.refresh = timed("rollout", run.sample), timed("refresh", run.refresh)
        run.backbone.encode_prompts = timed("encode", run.backbone.encode_prompts)
        run.backbone.decode = timed("decode", run.backbone.decode)
        run.rewards = [
            dataclasses.replace(reward, score=timed("reward", reward.score, on_host=True)) for reward in run.rewards
        ]
        for phase, method in (("forward", "forward"), ("backward", "backward"), ("optimizer", "step")):
            setattr(run.engine, method, timed(phase, getattr(run.engine, method)))
        passes = run.updater.passes
        if passes.at_once > 1:  # in threads, past the engine's own
            share, start = 1 / passes.at_once, passes.run
            passes.run = lambda parts, forward: start(parts, timed("forward", forward, share=share))
            passes._backward = timed("backward", passes._backward, share=share)
            passes._hand_over = timed("backward", passes._hand_over)

    # ------------------------------------------------------------------------------------------------ measurements

    def about(self) -> dict:
        run = self.trainer
        return {
            "threads": self.cores,
            "weights": run.weights.description,
            "critic_parameters": plan.count(run.model.critic),
            "steps_per_forward": run.config.training.steps_per_forward,
            "critic_epochs": self._configs[WITH_CRITIC_PASSES].training.critic_epochs,
        }

    def rollout(self, variant: str, batch: int, batches: int) -> float:
        """Seconds of `batches` rollouts of `batch` images."""
        rollout = self._rollout(variant, batch)
        return seconds_of(lambda: self._sample(rollout, batch * batches), self.device)

    def iterate(self, variant: str) -> dict:
        """One iteration: seconds, phases, peak memory."""
        run = self.trainer
        run.config, run.rollout = self._configs[variant], self._rollout(variant, self.work.batch)
        self.clock.read()
        reset_peak_memory(self.device)
        seconds = seconds_of(lambda: run.iterate(self.iteration), self.device)
        self.iteration += 1
        return {"seconds": seconds, "phases": self.clock.read(), "peak_memory": peak_memory(self.device)}

    def count(self, variant: str, batch: int) -> dict:
        """What a rollout of a batch asks of PyTorch, in all its steps."""
        rollout = self._rollout(variant, batch)
        return count_calls(lambda: self._sample(rollout, batch), self.device)

    def graph_cost(self, batch: int) -> dict:
        """Seconds and bytes that a captured step costs beyond the loop itself, the steps that warm up included."""
        run = self.trainer
        inputs = run.rollout.models[0], run.schedules[0], run.backbone.latent_shape, batch, self._conditioning(batch)
        loops: list[DenoisingLoop] = []

        def build(graph: str) -> tuple[float, int]:
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved()
            seconds = seconds_of(lambda: loops.append(DenoisingLoop(*inputs, graph=graph)), self.device)
            torch.cuda.empty_cache()
            taken = torch.cuda.memory_reserved() - before
            loops.pop().close()
            return seconds, taken

        plain, captured = build("off"), build(self._graphs[OURS])
        return {"seconds": captured[0] - plain[0], "bytes": captured[1] - plain[1]}

    def critics(self, batch: int, rounds: int) -> dict[str, list[float]]:
        run = self.trainer
        return measure_critics(run.rollout.models[0], run.schedules[0], self._conditioning(batch), rounds)

    def release(self) -> None:
        """Gives the device's unused memory back, for the process whose turn comes."""
        for (_, batch), rollout in self._rollouts.items():
            if batch != self.work.batch:
                rollout.close()
        torch.cuda.empty_cache()

    def _rollout(self, variant: str, batch: int) -> Rollout:
        graph, trained = self._graphs[variant], self.trainer.rollout
        if (graph, batch) not in self._rollouts:
            self._rollouts[graph, batch] = Rollout(
                trained.models, trained.encode, trained.latent_shape, batch, self.device, trained.clock, graph
            )
        return self._rollouts[graph, batch]

    def _sample(self, rollout: Rollout, images: int) -> None:
        run = self.trainer
        rollout(self._prompts(images), torch.arange(images), schedule=run.schedules[0], seed=run.config.seed)

    def _conditioning(self, batch: int) -> Conditioning:
        return self.trainer.encode([prompt.text for prompt in self._prompts(batch)])

    def _prompts(self, count: int) -> list[Prompt]:
        prompts = self.trainer.sampler.prompts
        return [prompts[i % len(prompts)] for i in range(count)]
