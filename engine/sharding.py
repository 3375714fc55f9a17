"""DeepSpeed: processes, the sharded engine, and whole tensors back from its shards."""

import os
import socket
from collections.abc import Iterable
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad, safe_get_local_grad
from torch import Tensor, nn

from .actor_critic import ActorCritic
from .config import Config
from .errors import UserError
from .optimizer import PhasedAdamW
from .units import make_units
from .world import World, resolve_dtype


def init_distributed() -> World:
    """Joins the `deepspeed` launcher's processes, or stands alone under plain `python`: nccl on GPUs, else gloo."""
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    on_gpu, cores = torch.cuda.is_available(), 1
    if not on_gpu:
        # Otherwise DeepSpeed compiles its shared-memory collectives at start: a minute, and a lock if interrupted.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        cores = cores_of_this_process()
        # Work is shared out by whole passes, a thread each. PyTorch keeps the threads of an operation for each thread
        # that computes, and libgomp lets them wait actively only while they are not more than the cores: from then on
        # every small operation takes up to twice as long.
        torch.set_num_threads(1)
    deepspeed.init_distributed(
        dist_backend="nccl" if on_gpu else "gloo", auto_mpi_discovery=False, verbose=False, dist_init_required=None
    )
    local_rank = int(os.environ["LOCAL_RANK"])
    if on_gpu:
        torch.cuda.set_device(local_rank)
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    return World(dist.get_rank(), dist.get_world_size(), device, cores)


def cores_of_this_process() -> int:
    """This process's share of the machine's cores; OMP_NUM_THREADS says otherwise."""
    cores = torch.get_num_threads()
    return cores if "OMP_NUM_THREADS" in os.environ else max(1, cores // int(os.environ.get("LOCAL_SIZE", "1")))


def shard(model: ActorCritic, config: Config, world: World) -> deepspeed.DeepSpeedEngine:
    """Wraps the actor-critic, already of its dtype, in DeepSpeed: policy and critic are parameter groups of their own,
    in this order.

    The policy is what requires a gradient of the trunk: with LoRA, the adapters.
    Raises UserError where DeepSpeed refuses the `deepspeed` section.
    """
    options = config.optimizer
    dtype = resolve_dtype(config.model.dtype, world.device)
    policy = model.policy_parameters
    groups = [{"params": policy, "lr": options.policy_lr}]
    if model.critic_parameters:
        decay = options.weight_decay if options.critic_weight_decay is None else options.critic_weight_decay
        groups.append({"params": model.critic_parameters, "lr": options.critic_lr, "weight_decay": decay})
    optimizer = PhasedAdamW(
        groups,
        betas=options.betas,
        weight_decay=options.weight_decay,
        fused=True,  # one pass over memory: on a CPU a sixth of the default's time
    )
    section: dict[str, Any] = {
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # with an offloaded optimizer too it is PhasedAdamW
        **config.deepspeed,
        "train_micro_batch_size_per_gpu": config.rollout.micro_batch_size,
        "gradient_accumulation_steps": 1,  # the trainer sets the boundary of each update itself
        "gradient_clipping": options.gradient_clipping,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        "steps_per_print": 10**9,
    }
    make_units(model.units)
    try:
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=section)
    except (ValueError, AssertionError, deepspeed.runtime.config.DeepSpeedConfigError) as error:
        raise UserError(f"deepspeed: DeepSpeed refuses this section: {error}") from error
    engine.policy_parameters = policy  # the optimizer's groups hold flat shards from now on
    return engine


def set_learning_rates(engine: deepspeed.DeepSpeedEngine, policy: float, critic: float) -> None:
    """A rate of 0 makes that group rest: no gradient, no update, no change to its moments.

    What was frozen when the engine was made stays so.
    """
    for group, rate in zip(engine.optimizer.param_groups, (policy, critic), strict=False):  # there may be no critic
        group["lr"] = rate
    for parameter in engine.policy_parameters:
        parameter.requires_grad_(policy > 0)


def gradient_norm(parameters: Iterable[nn.Parameter], world: World) -> float:
    """2-norm of their accumulated gradients over all shards; call it between the last backward and the step."""
    squares = torch.zeros((), dtype=torch.float64, device=world.device)
    sharded = False
    for parameter in parameters:
        is_shard = hasattr(parameter, "ds_id")
        grad = safe_get_local_grad(parameter) if is_shard else safe_get_full_grad(parameter)
        sharded = sharded or is_shard
        if grad is not None:
            squares += grad.double().square().sum()
    if sharded:
        dist.all_reduce(squares)
    return squares.sqrt().item()


def gather_state(module: nn.Module) -> dict[str, Tensor]:
    """The whole state dict on the CPU of rank 0 (empty elsewhere), gathered parameter by parameter."""
    state, is_main = {}, not dist.is_initialized() or dist.get_rank() == 0
    for name, parameter in module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if is_main:
                state[name] = parameter.detach().cpu().clone()
    if is_main:
        persistent = module.state_dict().keys()
        state.update({name: b.detach().cpu().clone() for name, b in module.named_buffers() if name in persistent})
    return state
