"""One run's configuration: pydantic models <-> JSON.

Defaults are those of the method (arXiv 2605.27736) scaled to the embedded model tiny-dit. `config_text` puts the schema
into words, for errors and for the table of configs/README.md.
"""

import difflib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .config_text import explain, show
from .errors import UserError

Transition = Literal["flow-sde", "dance-sde", "cps", "ddim"]

# Keys of DeepSpeed that the engine derives, and the keys of ours that decide them.
DERIVED_DEEPSPEED_KEYS = {
    "train_batch_size": "rollout.samples_per_iteration and training.updates_per_iteration",
    "train_micro_batch_size_per_gpu": "rollout.micro_batch_size",
    "gradient_accumulation_steps": "rollout.samples_per_iteration and rollout.micro_batch_size",
    "optimizer": "optimizer.policy_lr, optimizer.critic_lr, optimizer.betas and optimizer.weight_decay",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "gradient_clipping": "optimizer.gradient_clipping",
}

# DeepSpeed ignores an unknown top-level key in silence, so a misspelt "zero_optimization" would train unsharded.
_DEEPSPEED_KEYS = (
    "zero_optimization",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "activation_checkpointing",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "sparse_gradients",
    "data_types",
    "torch_autocast",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "flops_profiler",
    "comms_logger",
    "dump_state",
    "checkpoint",
    "compile",
    "aio",
)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, validate_default=True)


class LoRAConfig(_Section):
    """Low-rank factors beside frozen weights (arXiv 2106.09685)."""

    rank: int = Field(32, ge=1, description="Rank of the factors")
    alpha: float = Field(64, gt=0, description="The factors' product is added alpha / rank times")
    target_modules: list[str] | Literal["auto"] = Field(
        "auto",
        min_length=1,
        description="Layers that get factors, by the ends of their names, as in PEFT; `auto` are the attention's "
        "projections, as diffusers' own scripts take them for the family",
    )


class ModelConfig(_Section):
    """The diffusion model that is post-trained."""

    pretrained: str = Field(
        "tiny-dit",
        min_length=1,
        description="`tiny-dit` or `tiny-unet` (packaged), a local diffusers folder, or a hub id",
    )
    resolution: int | None = Field(
        None, ge=1, description="Pixels a side of the pictures; null is the model's own (SD3.5-M: 1024)"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Dtype of the model; `auto` is float32 on CPU and bfloat16 on GPU. Latents stay float32"
    )
    max_sequence_length: int = Field(
        256,
        ge=0,
        le=512,
        description="T5 tokens of a prompt, as in diffusers (FLUX.2: Qwen3's); 0 for tiny-dit, which has no T5. UNets "
        "have none",
    )
    fused: bool = Field(
        True,
        description="Fused LayerNorm + modulation and gated residuals in the trunk's blocks (on a GPU: Triton kernels)",
    )
    lora: LoRAConfig | None = Field(
        None, description="Train low-rank factors alone; null is full training. `{}` takes the defaults"
    )
    freeze: list[Annotated[str, Field(min_length=1)]] = Field(
        [],
        description="Modules or parameters of the trunk that are not trained, by name or pattern "
        '(`"transformer_blocks.0"`, `"*.norm*"`)',
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, about a third more time"
    )
    attention_backend: str = Field(
        "auto",
        min_length=1,
        description="Attention by diffusers' name for it (`native`, `_native_cudnn`, `flash`, `_flash_3_hub`, ...), "
        "tried before the run, forward and backward. `auto` is `native`, where torch chooses the kernel: it runs "
        "everywhere, and no other was measured",
    )
    compile: bool = Field(
        False,
        description="torch.compile each block of the trunk, a minute or more at the start. On a CPU: 10 % less time of "
        "tiny-dit's passes, and the first ratio stays exactly 1; on a GPU neither was measured, so watch "
        "`first_ratio_deviation`",
    )


class PromptSourceConfig(_Section):
    """One of several sources of training prompts."""

    source: str = Field(min_length=1, description="Prompts, written as `prompts.train` for one source")
    weight: float = Field(1.0, gt=0, description="The source's share of the samples is weight / sum of weights")


class PromptsConfig(_Section):
    """Where the prompts come from."""

    train: str | list[PromptSourceConfig] = Field(
        "scenes:train",
        min_length=1,
        description="Training prompts: `scenes:train`, `scenes:train:counting+position`, a .txt, .jsonl, .csv or .tsv "
        "file, or `hf:NAME` (Hugging Face hub, or a folder); or a list of such sources, sampled in proportion to their "
        "weights (1 each, if not given)",
    )
    eval: str = Field(
        "scenes:held-out",
        min_length=1,
        description="Evaluation prompts, written like `prompts.train` for one source, and never trained on",
    )


class SDEWindowConfig(_Section):
    """The stochastic, trained steps as a window that moves through the trajectory (MixGRPO, arXiv 2507.21802)."""

    size: int = Field(2, ge=1, description="Steps of the window; the others are the ODE's and not trained")
    every: int = Field(
        4, ge=1, description="Iterations before the window moves on by one step; past the last it starts again"
    )


class RolloutConfig(_Section):
    """How trajectories are sampled."""

    transition: Transition = Field(
        "flow-sde", description="Stochastic sampler: Flow-GRPO, DanceGRPO, coefficient-preserving (flow) or DDIM (UNet)"
    )
    noise_level: float = Field(
        0.7,
        gt=0,
        le=2,
        description="Noise of the transition: `a` 0.7 for flow-sde, `eta` 0.3 for dance-sde, `a` 0.8 for cps, `eta` 1 "
        "for ddim; at most 1 for cps and ddim. The default is flow-sde's whatever the transition",
    )
    num_inference_steps: int = Field(
        10, ge=2, le=1000, description="Denoising steps of a trajectory (SD3.5-M 40, quick 10; SD1.5 50)"
    )
    guidance_scale: float = Field(
        1.0,
        ge=1,
        description="Classifier-free guidance in training; 1 is none, fastest and best (arXiv 2605.27736). For a "
        "guidance-distilled model (FLUX.1-dev) what it is told: 3.5 is diffusers' default",
    )
    samples_per_iteration: int = Field(
        256, ge=1, description="Images of an iteration over all ranks; with `micro_batch_size`, the only batch numbers"
    )
    micro_batch_size: int = Field(
        32,
        ge=1,
        description="Images of a rank in one forward pass, at most: a rank's share of an update may be smaller. "
        "Lower it if memory runs out",
    )
    weights: Literal["auto", "copy", "sharded"] = Field(
        "auto",
        description="Weights that sample: whole ones beside the shards if memory allows (`auto`: at no cost where a "
        "process holds them whole anyway), always a full copy (`copy`), or gathered again for each forward (`sharded`)",
    )
    cuda_graph: Literal["off", "step", "loop"] = Field(
        "step",
        description="On a GPU: replay a captured denoising step (`step`), all of them at once (`loop`: fewer launches, "
        "a longer capture), or run each from Python (`off`)",
    )
    check_addresses: bool = Field(
        False, description="For debugging: before each replay, check that no tensor has moved that a graph reads"
    )
    num_trained_steps: int | None = Field(
        None,
        ge=1,
        description="The first steps, which are stochastic and trained; the others are the ODE's. null is all but the "
        "last, whose std is near 0 and likelihood explodes",
    )
    sde_window: SDEWindowConfig | None = Field(
        None,
        description="Stochastic and trained are only the steps of a window, which moves through those that "
        "`num_trained_steps` leaves; `{}` takes the defaults",
    )


class CriticConfig(_Section):
    """The value function on the noisy latents."""

    trunk: Literal["shared-detached", "shared", "separate", "pixels"] = Field(
        "shared-detached",
        description="Heads read the policy's features without gradient into the trunk, or with it (`shared`), or those "
        "of a trunk of their own that starts as the policy's (`separate`: twice the forwards and the memory; with LoRA "
        "both trunks have the frozen weights in common), or those of a small ViT over the decoded prediction of the "
        "clean picture (`pixels`, the field's usual critic, for comparison)",
    )
    heads: Literal["per-reward", "sum"] = Field(
        "per-reward",
        description="A value for each reward, or one for their weighted sum (of standardised rewards)",
    )
    taps: list[Annotated[int, Field(ge=0)]] | Literal["auto"] = Field(
        "auto",
        description="Blocks (from 0) whose features are read, of one width; `auto` spreads them as 7, 15, 23 of "
        "SD3.5-M's 24. A UNet's are numbered down, mid, up (SD1.5: 0-3, 4, 5-8; `auto` is 4, 5, 6)",
    )
    dim: int = Field(64, ge=1, description="Width of a critic token")
    num_heads: int = Field(4, ge=1, description="Heads of the attention pooling; divides `dim`")
    feature_dropout: float = Field(
        0.0,
        ge=0,
        le=0.99,
        description="Share of the features' numbers that a critic-only pass does not see, others each time; needs "
        "`training.keep_features`",
    )
    timestep_adaln: bool = Field(True, description="Modulate the head by the timestep, as AdaLN (arXiv 2605.27736)")
    value_coef: float = Field(0.5, gt=0, description="Weight of the value loss in the summed loss")

    @model_validator(mode="after")
    def _check(self) -> "CriticConfig":
        if self.dim % self.num_heads:
            raise ValueError(f"critic.num_heads = {self.num_heads}: must divide critic.dim = {self.dim}")
        if self.taps != "auto" and (not self.taps or len(set(self.taps)) < len(self.taps)):
            raise ValueError(f"critic.taps = {show(self.taps)}: needs one block or more, each once")
        return self


class AlgorithmConfig(_Section):
    """Advantages and losses."""

    name: Literal["ppo", "grpo", "ddpo"] = Field(
        "ppo",
        description="Advantage estimator: `ppo` is GAE with the critic (arXiv 2605.27736); without a critic, `grpo` "
        "compares a sample with others of its prompt (arXiv 2505.05470), `ddpo` with statistics (arXiv 2305.13301)",
    )
    group_size: int = Field(8, ge=2, description="grpo: samples of a prompt, which are compared with each other")
    global_std: bool = Field(
        False, description="grpo: divide by the std of all the iteration's rewards, not by that of a prompt's"
    )
    reward_statistics: Literal["global", "prompt"] = Field(
        "global",
        description="ddpo: mean and std are those of the iteration's rewards, or of the prompt's latest 16, once it "
        "has as many (for prompts that come back often)",
    )
    clip_range: float = Field(
        2e-3,
        gt=0,
        lt=1,
        description="Clip of the probability ratio. Belongs to a latent of n numbers: 1e-4 for SD3.5-M at 512 px, "
        "which is 6.6 / n, and 1e-5 for SD1.5 (arXiv 2605.27736)",
    )
    gamma: float = Field(1.0, gt=0, le=1, description="Discount a denoising step (GAE, arXiv 1506.02438)")
    lam: float = Field(
        1.0,
        ge=0,
        le=1,
        description="lambda of the policy's GAE over stochastic steps; 1 compares with what the sample earned (arXiv "
        "2605.27736), less with the critic's later values: less noise, if they explain something",
    )
    value_lam: float = Field(
        1.0,
        ge=0,
        le=1,
        description="lambda of the critic's targets over stochastic steps: 1 is what the sample earned, less are the "
        "critic's own later values, which know more of it than an early step can",
    )
    advantage_clip: float = Field(10.0, gt=0, description="Bound of a normalised advantage, in standard deviations")
    target_clip: float = Field(5.0, gt=0, description="Bound of a value target, in standard deviations of the reward")
    value_clip_range: float | None = Field(
        None, gt=0, description="PPO clip of the value around the rollout's value; null is none"
    )
    kl_coef: float = Field(
        0.0,
        ge=0,
        description="Weight of the KL from the base model's transition, of a number of the latent (arXiv 2505.05470); "
        "above 0 the base model stays in memory and takes a forward of each training pass",
    )
    ratio_normalization: bool = Field(
        False,
        description="Ratios of mean 1 and of one scale at all denoising steps (GRPO-Guard, arXiv 2510.22319); "
        "`clip_range` then bounds other numbers",
    )


class RewardConfig(_Section):
    """One reward."""

    name: str = Field(
        min_length=1, description="A built-in reward, or `module:function` or `module:Class` for one of your own"
    )
    weight: float = Field(1.0, description="Weight of this reward, which counts in its own standard deviations")
    params: dict[str, Any] = Field({}, description="Keyword arguments of the reward")
    batch_size: int | None = Field(
        None, ge=1, description="Pictures of one call, at most; null is what the engine hands over, up to 16"
    )
    device: str = Field(
        "cpu",
        min_length=1,
        description="Where the reward's model computes: `cpu`, `cuda` (the process's own GPU) or `cuda:1`",
    )
    workers: int = Field(0, ge=0, description="Processes of a rank that score; 0 is the training process itself")
    url: str | None = Field(
        None, min_length=1, description="Reward server that scores instead: `http://host:port` of `rewards.serve`"
    )
    timeout_s: float = Field(
        600, gt=0, description="Seconds that a reward server may be away before the run ends, with a checkpoint"
    )
    stop_if_constant: int | None = Field(
        3,
        ge=2,
        description="Trained rewards: iterations in a row with one score for all pictures that end the run; null never "
        "does, as for a strict reward that is rarely met",
    )

    @model_validator(mode="after")
    def _check(self) -> "RewardConfig":
        if self.url and not self.url.startswith(("http://", "https://")):
            raise ValueError(f'reward "{self.name}": url = {show(self.url)}: expected http://host:port')
        served = {"params": "--params", "device": "--device", "workers": "one server for each url"}
        for key, instead in served.items():
            if self.url and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f'reward "{self.name}": {key} is the server\'s own, since there is a url: {instead}')
        return self


class OptimizerConfig(_Section):
    """AdamW, one parameter group each for policy and critic."""

    policy_lr: float = Field(1e-4, gt=0, le=1, description="Learning rate of the policy (SD3.5-M 1e-4, SD1.5 1e-5)")
    critic_lr: float = Field(
        1e-3,
        gt=0,
        le=1,
        description="Learning rate of the critic, of a trunk of its own too; 10x the policy's for the heads alone",
    )
    lr_scheduler: Literal["constant", "linear"] = Field(
        "constant", description="`linear`: both rates fall to 0 over the PPO iterations"
    )
    lr_warmup_iterations: int = Field(
        0,
        ge=0,
        description="PPO iterations over which the policy's rate rises to its full: Adam's first steps are as large as "
        "any, before it knows which numbers of a gradient are noise",
    )
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.95), description="AdamW's decay rates of the first and second moment"
    )
    weight_decay: float = Field(1e-4, ge=0, description="AdamW's decoupled weight decay")
    critic_weight_decay: float | None = Field(
        None, ge=0, description="That of the critic, which has few samples to learn from; null is `weight_decay`"
    )
    gradient_clipping: float = Field(1.0, gt=0, description="Bound of the global gradient norm, an update")


class TrainingConfig(_Section):
    """Length and order of the run."""

    iterations: int = Field(
        100, ge=0, description="PPO iterations, after value pretraining (arXiv 2605.27736 runs 300)"
    )
    updates_per_iteration: int = Field(
        4, ge=1, description="Optimizer steps an iteration, one pass over its samples in all (arXiv 2605.27736: 4)"
    )
    steps_per_forward: int = Field(
        1,
        ge=1,
        description="Denoising steps of a sample in one training forward: fewer, larger passes, and so many times the "
        "activations. On a GPU products of another shape may round otherwise than the rollout's, and the first ratio "
        "then is not exactly 1",
    )
    value_pretraining_iterations: int = Field(
        15, ge=0, description="Critic-only iterations on the frozen policy before PPO; 15 is best in arXiv 2605.27736"
    )
    value_pretraining_epochs: int = Field(3, ge=1, description="Passes over the samples, a value-pretraining iteration")
    critic_epochs: int = Field(
        2,
        ge=0,
        description="Extra critic-only passes an iteration, so that the critic follows a moving policy; `lam` below 1 "
        "needs one, since only these learn the values of steps that are not trained",
    )
    keep_features: bool = Field(
        True,
        description="Critic-only passes read the features that the rollout's own forwards left, kept in the CPU's "
        "memory, so they cost no pass through the trunk; `--plan` says how much. For `critic.trunk` shared-detached "
        "and pixels, which keeps pictures",
    )
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Keep an average of the policy's weights, of which an update is 1 - decay: what is evaluated and "
        "exported. null is none",
    )
    checkpoint_every: int = Field(10, ge=1, description="Iterations between checkpoints, value pretraining counted")


class EarlyStopConfig(_Section):
    """Ends a run whose held-out reward has turned down, and keeps its best model."""

    reward: str = Field(
        min_length=1,
        description="The reward that decides, one of `rewards` or `evaluation.rewards`, on the held-out prompts. The "
        "model of its best evaluation is exported to `best/`",
    )
    patience: int = Field(2, ge=1, description="Evaluations in a row that must be below the best one")
    min_fall: float = Field(
        2.5,
        ge=0,
        description="How far below the best an evaluation must be to count, in standard errors of the paired "
        "difference (the prompts and their noise are the same)",
    )


class EvaluationConfig(_Section):
    """Held-out evaluation: the same prompts and seeds each time, deterministic (ODE) sampling."""

    every: int = Field(
        10,
        ge=0,
        description="Iterations between evaluations, value pretraining among them; 0: before and after the run",
    )
    num_prompts: int = Field(512, ge=2, description="Prompts of an evaluation, one image each")
    num_inference_steps: int = Field(10, ge=1, le=1000, description="Denoising steps of an evaluation image")
    guidance_scale: float = Field(
        1.0, ge=1, description="Classifier-free guidance of an evaluation; keep it at the trained one"
    )
    seed: int = Field(1000, ge=0, lt=2**32, description="Seed of the evaluation's noise, apart from the run's seed")
    rewards: list[RewardConfig] = Field([], description="Rewards that are only watched, never trained on")
    early_stop: EarlyStopConfig | None = Field(
        None,
        description="End the run where a held-out reward has turned down, and keep the best model; null never does",
    )

    @model_validator(mode="after")
    def _check(self) -> "EvaluationConfig":
        if self.early_stop and not self.every:
            raise ValueError(
                "evaluation.every = 0: evaluation.early_stop needs evaluations during the run; give it 1 or more"
            )
        return self


class LoggingConfig(_Section):
    """Trackers beside metrics.jsonl, which is always written."""

    tensorboard: bool = Field(True, description="Write TensorBoard events to the run folder")
    wandb_project: str | None = Field(
        None, min_length=1, description="Project of Weights & Biases; null is off, needs the `wandb` extra"
    )


class Config(_Section):
    """The whole configuration. `rewards` is required; everything else has a default."""

    seed: int = Field(0, ge=0, lt=2**32, description="Seed of prompt order, noise and the critic's initial weights")
    output_dir: str = Field("runs/latent-critic", min_length=1, description="Folder the run writes to")
    model: ModelConfig = Field(ModelConfig(), description="The diffusion model")
    prompts: PromptsConfig = Field(PromptsConfig(), description="Prompts")
    rollout: RolloutConfig = Field(RolloutConfig(), description="Sampling")
    critic: CriticConfig = Field(CriticConfig(), description="Critic")
    algorithm: AlgorithmConfig = Field(AlgorithmConfig(), description="Advantages and losses")
    rewards: list[RewardConfig] = Field(min_length=1, description="Trained rewards, one value head each")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="Optimizer")
    training: TrainingConfig = Field(TrainingConfig(), description="Training")
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="Evaluation")
    logging: LoggingConfig = Field(LoggingConfig(), description="Trackers")
    deepspeed: dict[str, Any] = Field(
        {"zero_optimization": {"stage": 3}},
        description="Passed to DeepSpeed as it is, less the keys that the engine derives: "
        + ", ".join(f"`{key}`" for key in DERIVED_DEEPSPEED_KEYS),
    )

    @field_validator("deepspeed")
    @classmethod
    def _check_deepspeed(cls, section: dict[str, Any]) -> dict[str, Any]:
        mistakes = []
        for key in section:
            if key in DERIVED_DEEPSPEED_KEYS:
                mistakes.append(f"deepspeed.{key}: derived by the engine; set {DERIVED_DEEPSPEED_KEYS[key]} instead")
            elif key not in _DEEPSPEED_KEYS and (near := difflib.get_close_matches(key, _DEEPSPEED_KEYS, 1, 0.8)):
                mistakes.append(f"deepspeed.{key}: unknown to DeepSpeed; did you mean deepspeed.{near[0]}?")
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return section

    @model_validator(mode="after")
    def _check(self) -> "Config":
        rollout, mistakes = self.rollout, []
        if rollout.transition in ("cps", "ddim") and rollout.noise_level > 1:
            mistakes.append(
                f"rollout.noise_level = {rollout.noise_level}: at most 1 for rollout.transition = "
                f'"{rollout.transition}", whose std would exceed the noise that the latent holds'
            )
        if (rollout.num_trained_steps or 0) > rollout.num_inference_steps:
            mistakes.append(
                f"rollout.num_trained_steps = {rollout.num_trained_steps}: at most rollout.num_inference_steps = "
                f"{rollout.num_inference_steps}"
            )
        reads_taps = self.critic.trunk == "shared-detached"
        if self.has_critic and self.critic.feature_dropout and not (reads_taps and self.keeps_features):
            mistakes.append(
                f"critic.feature_dropout = {self.critic.feature_dropout}: only critic-only passes on kept features "
                'drop any; needs critic.trunk = "shared-detached", training.keep_features and training.critic_epochs, '
                "or 0 in its place"
            )
        for name in ("lam", "value_lam"):
            lam = getattr(self.algorithm, name)
            if self.has_critic and lam < 1 and self.training.critic_epochs == 0:
                mistakes.append(
                    f"training.critic_epochs = 0: algorithm.{name} = {lam} needs 1 or more: no other pass learns the "
                    "values of steps that are not trained"
                )
        if rollout.sde_window:
            room = rollout.num_trained_steps or rollout.num_inference_steps - 1
            if rollout.sde_window.size > room:
                mistakes.append(
                    f"rollout.sde_window.size = {rollout.sde_window.size}: at most {room}, the trained steps"
                )
        stop, known = self.evaluation.early_stop, [reward.name for reward in (*self.rewards, *self.evaluation.rewards)]
        if stop and stop.reward not in known:
            near = difflib.get_close_matches(stop.reward, known, 1, 0)[0]
            mistakes.append(
                f"evaluation.early_stop.reward = {show(stop.reward)}: not evaluated; did you mean {show(near)}? "
                f"Evaluated are {', '.join(known)}"
            )
        if not any(reward.weight for reward in self.rewards):
            mistakes.append("rewards: each weight is 0; give one reward or more another weight")
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return self

    @property
    def has_critic(self) -> bool:
        return self.algorithm.name == "ppo"

    @property
    def keeps_features(self) -> bool:
        """The rollout keeps what the critic reads."""
        training = self.training
        passes = training.value_pretraining_iterations + training.critic_epochs
        fixed = self.critic.trunk in ("shared-detached", "pixels")  # no critic-only pass moves what makes them
        return bool(self.has_critic and fixed and training.keep_features and passes)

    @property
    def value_names(self) -> list[str]:
        """What the critic has a head for each of: rewards, or their sum."""
        if not self.has_critic:
            return []
        return ["sum"] if self.critic.heads == "sum" else [reward.name for reward in self.rewards]

    @property
    def samples_per_prompt(self) -> int:
        return self.algorithm.group_size if self.algorithm.name == "grpo" else 1

    def critic_steps_per_forward(self, depth: int) -> int:
        """Denoising steps of a sample in a critic-only pass through a trunk of so many blocks."""
        steps = self.training.steps_per_forward
        if self.critic.trunk in ("separate", "pixels"):
            return steps  # its own trunk is trained: every block's activations are kept
        # A pass without the trunk's gradient keeps one block's activations, a training pass every block's (or with
        # checkpointing their inputs): so many steps of a sample at once need no more memory.
        return max(steps, depth // 8 if self.model.gradient_checkpointing else depth)

    def for_processes(self, world_size: int) -> "Config":
        """This config, its micro-batch cut to a rank's share of one optimizer step where that is smaller, and without
        the training of a critic where there is none.

        Raises UserError unless samples_per_iteration splits evenly over ranks, updates and micro-batches, and over
        ranks in whole groups.
        """
        samples, updates = self.rollout.samples_per_iteration, self.training.updates_per_iteration
        micro_batch = max(1, min(self.rollout.micro_batch_size, samples // (updates * world_size)))
        unit, processes = micro_batch * updates * world_size, f"{world_size} process{'es' if world_size > 1 else ''}"
        factors = f"micro-batch {micro_batch} x training.updates_per_iteration {updates} x {processes}"
        groups = self.samples_per_prompt * world_size
        if samples % unit == 0 and samples % groups:
            factors = f"({factors}) and of {groups} = algorithm.group_size {self.samples_per_prompt} x {processes}"
            unit = math.lcm(unit, groups)
        if samples % unit == 0:
            rollout = self.rollout.model_copy(update={"micro_batch_size": micro_batch})
            changes: dict[str, Any] = {"rollout": rollout}
            if not self.has_critic:
                without = {"value_pretraining_iterations": 0, "critic_epochs": 0}
                changes["training"] = self.training.model_copy(update=without)
            return self.model_copy(update=changes)
        below = samples // unit * unit
        valid = [below, below + unit] if below else [unit]
        nearest = min(valid, key=lambda n: abs(n - samples))
        raise UserError(
            f"rollout.samples_per_iteration = {samples}: must be a multiple of {unit} = {factors}; "
            f"nearest valid: {nearest}" + "".join(f" (or {n})" for n in valid if n != nearest)
        )


def load_config(path: str | os.PathLike, overrides: Sequence[str] = ()) -> Config:
    """Read a JSON file, apply `section.key=json_value` overrides (bare strings allowed), and validate.

    List items are addressed by number (`rewards.0.weight=2`). Raises UserError listing each mistake on a line.
    """
    path = Path(path)
    data = _read_json(path)
    overridden = [_apply_override(data, override) for override in overrides]
    try:
        # Through JSON, so that strict types mean JSON's types: an array is a tuple here, a number is no string.
        return Config.model_validate_json(json.dumps(data))
    except ValidationError as error:
        mistakes = explain(error, Config, data, overridden)
    if len(mistakes) == 1:
        raise UserError(f"{path}: {mistakes[0]}")
    raise UserError(f"{path}: {len(mistakes)} mistakes\n" + "\n".join(f"  {mistake}" for mistake in mistakes))


def save_config(config: Config, path: str | os.PathLike) -> None:
    """Write the resolved configuration, each default spelt out, as JSON that `load_config` reads back equal."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(config.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{_nearest_file(path)}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    except _DuplicateKey as error:
        raise UserError(f'{path}: key "{error}" is given twice in the same object; keep one') from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a JSON object of sections, got {show(data)}")
    return data


class _DuplicateKey(Exception):
    pass


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = {}
    for key, value in pairs:
        if key in result:
            raise _DuplicateKey(key)
        result[key] = value
    return result


def _nearest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; the folder {path.parent} does not exist"
    names = sorted(entry.name for entry in path.parent.iterdir() if entry.is_file())
    near = difflib.get_close_matches(path.name, names, 1, 0) if names else []
    return f"; nearest in {path.parent}: {near[0]}" if near else f"; {path.parent} holds no files"


def _apply_override(data: dict[str, Any], override: str) -> str:
    """Set one value in `data`; returns the dotted key."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        raise UserError(f'override "{override}": expected section.key=value, as in training.iterations=20')
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    node: Any = data
    *parents, last = key.split(".")
    for done, part in enumerate(parents):
        node = node.setdefault(part, {}) if isinstance(node, dict) else _item(node, part, override)
        if not isinstance(node, dict | list):
            raise UserError(f'override "{override}": {".".join(parents[: done + 1])} holds {show(node)}, no keys')
    if isinstance(node, dict):
        node[last] = value
    else:
        _item(node, last, override)
        node[int(last)] = value
    return key


def _item(items: list, number: str, override: str) -> Any:
    if not number.isdecimal() or int(number) >= len(items):
        raise UserError(f'override "{override}": "{number}" is no item of this list of {len(items)} (counted from 0)')
    return items[int(number)]
