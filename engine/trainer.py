"""The loop: prompts -> rollout -> rewards -> advantages -> updates -> metrics, evaluation, checkpoint."""

import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

from .actor_critic import ActorCritic
from .advantages import mean_and_variance
from .algorithms import build_algorithm
from .backbones import load_backbone
from .backbones.attention import set_attention_backend
from .backbones.base import Backbone, Conditioning
from .backbones.compiled import compile_blocks
from .backbones.onednn import use_onednn
from .checkpoint import CheckpointStore, disk_errors, export
from .config import Config, save_config
from .early_stop import EarlyStop
from .ema import WeightAverage
from .evaluate import Evaluation, Evaluator
from .html_report import write_report
from .inference_copy import InferenceCopy
from .metrics import PRETRAINING, MetricsLogger, ProgressBar, read_metrics
from .outcome import Outcome
from .passes import EnginePasses, Passes, SideBySidePasses
from .plan import check_host_memory, describe_plan, measure
from .prompt_cache import PromptCache
from .prompts import PromptSampler, load_prompts, load_sources
from .rewards import ConstantGuard, RewardError, build_rewards, check_prompts
from .rollout import Rollout
from .saved_evaluations import drop_evaluations, read_evaluations
from .scoring import Scoring
from .sde_window import build_schedules, place
from .sharding import shard
from .summary import summarize
from .trainable import choose_trained
from .trajectory import Trajectory
from .transitions import trained_steps
from .trunk_clock import TrunkClock
from .update import Updater
from .world import World, resolve_dtype


class Trainer:
    """One run of one configuration. Every rank builds one; rank 0 writes."""

    def __init__(self, config: Config, world: World, run_dir: Path, backbone: Backbone | None = None):
        """backbone: in place of the one that `model.pretrained` names."""
        config = config.for_processes(world.size)
        self.config, self.world, self.run_dir = config, world, run_dir
        torch.manual_seed(config.seed)
        self.rewards = build_rewards(config.rewards)
        watched = build_rewards(config.evaluation.rewards)
        self.sampler = PromptSampler(load_sources(config.prompts.train), config.seed)
        held_out = load_prompts(config.prompts.eval)
        check_prompts(self.rewards, self.sampler.prompts)
        check_prompts([*self.rewards, *watched], held_out)
        self.guard = ConstantGuard(self.rewards)

        options, dtype = config.model, resolve_dtype(config.model.dtype, world.device)
        self.backbone = backbone or load_backbone(
            options.pretrained, options.max_sequence_length, options.resolution, dtype
        )
        trunk = self.backbone.trunk
        choose_trained(trunk, options.lora, self.backbone.lora_targets(), options.freeze)
        if options.fused:
            self.backbone.fuse()
        use_onednn(trunk)
        self.backbone.to(world.device)
        if options.gradient_checkpointing:
            trunk.enable_gradient_checkpointing()
        self.schedules = [schedule.to(world.device) for schedule in build_schedules(self.backbone, config.rollout)]

        with_reference = config.algorithm.kl_coef > 0
        guidance = config.rollout.guidance_scale
        self.model = ActorCritic(self.backbone, config.critic, config.value_names, guidance, with_reference).eval()
        self.model.to(world.device, dtype)
        for trunk in self.model.trunks:
            self.attention = set_attention_backend(trunk, options.attention_backend)
            if options.compile:
                compile_blocks(self.backbone.blocks(trunk))
        self.encode = PromptCache(self.backbone, world.device)
        inputs, steps = self._micro_batch(), config.training.steps_per_forward
        self.cost = measure(self.model, world.cores, steps, *inputs, keeps_features=config.keeps_features)
        check_host_memory(config, world, self.cost)
        self.weights = InferenceCopy(self.model)
        self.clock = TrunkClock(world.device)
        self._watch(self.model)
        self.engine = shard(self.model, config, world)
        self.weights.attach(self.engine, config.rollout.weights, world)
        self._generation = self.weights.generation
        self.rollout = self._rollout()
        decay = config.training.ema_decay
        self.average = WeightAverage(self.engine.policy_parameters, decay) if decay else None
        self.updater = Updater(self.engine, self._passes(), config, world, self.average)
        weights = torch.tensor([reward.weight for reward in self.rewards], device=world.device)
        self.algorithm = build_algorithm(config, weights)
        self.evaluator = Evaluator(
            config, world, self.backbone, held_out, self.rewards, watched, self.algorithm, self.schedules[0]
        )
        stop = config.evaluation.early_stop
        self.early_stop = EarlyStop(stop) if stop else None
        self.store = CheckpointStore(run_dir, world, self.model)

    # -------------------------------------------------------------------------------------------------- one iteration

    def iterate(self, iteration: int) -> dict:
        """One iteration, from prompts to metrics. The first `value_pretraining_iterations` train the critic alone."""
        config, began = self.config, time.perf_counter()
        pretraining = iteration < config.training.value_pretraining_iterations
        self.clock.read()

        scoring = Scoring(self.backbone, self.rewards, self.guard)
        trajectory = self.sample(iteration, scoring)
        sampled = time.perf_counter()
        outcome = Outcome(trajectory, scoring, self.algorithm)

        order = torch.Generator().manual_seed(config.seed * 1_000_003 + iteration)
        work = trajectory, outcome, self._unconditional(), order
        if pretraining:
            update = self.updater.critic(*work, config.training.value_pretraining_epochs)
        else:
            lr_scale, warm_up = self._lr_scales(iteration)
            update = self.updater.policy(*work, lr_scale, warm_up)
            update["learning_rate"] = warm_up * lr_scale * config.optimizer.policy_lr
            if config.training.critic_epochs:
                self.updater.critic(*work, config.training.critic_epochs, lr_scale)
        mean, variance, count = mean_and_variance(outcome.raw, (0,))
        ended = time.perf_counter()

        row = {"phase": PRETRAINING if pretraining else config.algorithm.name, "samples": count}
        for m, reward in enumerate(self.rewards):
            row[f"reward/{reward.name}"] = mean[m].item()
            row[f"reward/{reward.name}_std"] = variance[m].sqrt().item()
        row |= {f"reward/{name}": mean for name, mean in scoring.extras.items()}
        if config.has_critic:
            explained = outcome.explained_variance
            row["explained_variance"] = explained.mean().item()
            row["explained_variance_per_step"] = explained.tolist()
        trunk = self.clock.read()
        return {
            **row,
            **update,
            "seconds": ended - began,
            "seconds/rollout": sampled - began,
            "seconds/rewards": outcome.seconds,
            "seconds/update": ended - sampled - outcome.seconds,
            "overhead": (ended - began) / trunk,
        }

    def sample(self, iteration: int, scoring: Scoring) -> Trajectory:
        """This rank's share of the iteration's rollouts, handed to `scoring` as they end."""
        total, repeats = self.config.rollout.samples_per_iteration, self.config.samples_per_prompt
        share = total // self.world.size
        mine = slice(self.world.rank * share, (self.world.rank + 1) * share)
        prompts = [prompt for prompt in self.sampler.batch(iteration, total // repeats) for _ in range(repeats)]
        self.refresh()
        return self.rollout(
            prompts[mine],
            torch.arange(total)[mine] + iteration * total,
            schedule=self.schedules[place(self.config.rollout, iteration, len(self.schedules))],
            seed=self.config.seed,
            keep_features=self.config.keeps_features,
            finished=scoring.submit,
        )

    def refresh(self) -> None:
        """Brings the weights that sample up to those that are trained."""
        self.weights.refresh()
        if self.weights.generation != self._generation:
            self.rollout.close()  # what was captured reads the old addresses
            self._generation = self.weights.generation

    # -------------------------------------------------------------------------------------------------------- the run

    def run(self) -> None:
        """Trains to the end, from the newest checkpoint if there is one, and writes the run folder."""
        with disk_errors(self.run_dir):
            self._run()

    def _run(self) -> None:
        training = self.config.training
        total = training.value_pretraining_iterations + training.iterations
        main, start = self.world.is_main, self.store.latest()
        if start is not None:
            self._load(start)
        if main:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            save_config(self.config, self.run_dir / "config.json")
            where = self.attention, self.weights.description, self.rollout.describe()
            trained = int(trained_steps(self.schedules[0].table).sum())
            plan = describe_plan(self.config, self.world, self.model, trained, self.cost, *where)
            print(f"latent-critic: {self.run_dir}\n{plan}", flush=True)
            logging = self.config.logging
            log = MetricsLogger(
                self.run_dir, logging.tensorboard, logging.wandb_project, self.config.model_dump(mode="json")
            )
            log.truncate(-1 if start is None else start)
            drop_evaluations(self.run_dir, -1 if start is None else start)
            progress = ProgressBar(total, start or 0)
        if start is None:
            first = self.evaluate(0)
            if main:
                log.log(0, first.row())
            self._save(0)
        elif self._is_evaluated(start) and not self._evaluation_path(start).with_suffix(".json").exists():
            late = self.evaluate(start).row()  # a reward failed in it, and the run ended
            if main:
                row = read_metrics(self.run_dir)[-1]
                log.truncate(start - 1)
                log.log(start, row | late)
        self.encode.prepare([prompt.text for prompt in self.sampler.prompts])
        for iteration in range(start or 0, total):
            if self._stops():
                break
            done, row = iteration, None
            try:
                row = self.iterate(iteration)
                done += 1
                if self._is_evaluated(done):
                    row |= self.evaluate(done).row()
            except RewardError:  # on every rank; rewards come before the update, so nothing is half done
                if main and row is not None:
                    log.log(done, row)
                if done != self.store.latest():
                    self._save(done)
                raise
            if main:
                log.log(done, row)
                progress.update(row)
                if row["phase"] != PRETRAINING:
                    first = (row["first_ratio"], row["first_ratio_deviation"], row["first_clipfrac"])
                    progress.explain_first_update(*first)
            if done == total or self._stops() or done % training.checkpoint_every == 0:
                self._save(done)
        self.rollout.close()
        self._export(self.run_dir)
        if main:
            progress.close()
            log.close()
            print(summarize(self.run_dir), flush=True)
        dist.barrier()

    def evaluate(self, iteration: int) -> Evaluation:
        """Held-out scores, kept in `evaluations/` with the settings that repeat them."""
        with self._averaged():
            self.refresh()
            result = self.evaluator(self.rollout)
        if self.world.is_main:
            settings = {**self.config.evaluation.model_dump(mode="json"), "prompts": self.config.prompts.eval}
            result.save(self._evaluation_path(iteration), settings)
        if self.early_stop:
            self.early_stop.observe(iteration, result.of(self.early_stop.options.reward).numpy())
            if self.early_stop.best.iteration == iteration:
                self._export(self.run_dir / "best")
        return result

    def _stops(self) -> bool:
        return self.early_stop is not None and self.early_stop.fired

    def _export(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        with self._averaged():
            export(folder, self.model, self.config, self.run_dir, state=self.algorithm.state_dict())

    def _is_evaluated(self, done: int) -> bool:
        """After the last iteration, and every so many."""
        training, every = self.config.training, self.config.evaluation.every
        total = training.value_pretraining_iterations + training.iterations
        return done == total or bool(every and done % every == 0)

    def _evaluation_path(self, iteration: int) -> Path:
        return self.run_dir / "evaluations" / f"iteration-{iteration:06d}"

    def _averaged(self) -> AbstractContextManager:
        """The policy's weights are their running average within it, if the run keeps one."""
        return self.average.applied() if self.average else nullcontext()

    def _load(self, iteration: int) -> None:
        state, here = self.store.load(self.engine, iteration)
        self.algorithm.load_state_dict(state)
        if self.early_stop:
            self.early_stop = EarlyStop.over(self.early_stop.options, read_evaluations(self.run_dir, iteration))
        if self.average and here:
            self.average.load_state_dict(here)
        elif self.average:
            self.average.restart()

    def _save(self, iteration: int) -> None:
        here = self.average.state_dict() if self.average else {}
        self.store.save(self.engine, iteration, self.algorithm.state_dict(), here)
        if self.world.is_main:
            write_report(self.run_dir)

    def _lr_scales(self, iteration: int) -> tuple[float, float]:
        """What `optimizer.lr_scheduler` makes of the learning rates, and the warm-up of the policy's."""
        training, options = self.config.training, self.config.optimizer
        done = iteration - training.value_pretraining_iterations
        scale = 1.0 - done / training.iterations if options.lr_scheduler == "linear" else 1.0
        return scale, min(1.0, (done + 1) / max(1, options.lr_warmup_iterations))

    def _rollout(self) -> Rollout:
        """On a CPU a micro-batch for each core at a time, unless the weights must be gathered for each forward."""
        options, device, size = self.config.rollout, self.world.device, self.config.rollout.micro_batch_size
        count = self.world.cores if self.weights.is_static else 1
        models = [self.weights.module() for _ in range(count)]
        if self.weights.is_static:  # else it is the model itself, which is watched
            for model in models:
                self._watch(model, side_by_side=count)
        graph = options.cuda_graph if self.weights.is_static else "off"
        shape = self.backbone.latent_shape
        return Rollout(models, self.encode, shape, size, device, self.clock, graph, options.check_addresses)

    def _watch(self, model: ActorCritic, side_by_side: int = 1) -> None:
        for trunk in model.trunks:
            self.clock.watch(trunk, side_by_side)

    def _passes(self) -> Passes:
        """Side by side, as micro-batches are sampled; where there is one at a time, through DeepSpeed."""
        if len(self.rollout.models) == 1:
            if self.world.cores > 1:
                torch.set_num_threads(self.world.cores)
            return EnginePasses(self.engine, self.clock)
        return SideBySidePasses(self.engine, self.weights, self.rollout.models, self.clock)

    def _micro_batch(self) -> tuple:
        """Inputs of one forward, for measuring."""
        size = self.config.rollout.micro_batch_size
        prompts = self.sampler.batch(0, self.config.rollout.samples_per_iteration)[:size]
        latents = torch.zeros(size, *self.backbone.latent_shape, device=self.world.device)
        conditioning = self.encode([prompt.text for prompt in prompts])
        return latents, self.schedules[0].timesteps[0].expand(size), conditioning, self._unconditional()

    def _unconditional(self) -> Conditioning | None:
        guided = self.backbone.needs_unconditional(self.config.rollout.guidance_scale)
        return self.encode([""]) if guided else None
