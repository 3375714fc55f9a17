"""Real runs of the engine on a tiny pipeline, in processes of their own: to be sharded, to fail, and to be killed.

A fork server imports the engine once, and each process of a run is forked from it: that saves ten seconds of imports.
All of them are on the CPU. The second half of this file is what happens inside such a process; it is run there by path.
"""

import contextlib
import io
import json
import multiprocessing
import multiprocessing.forkserver
import os
import re
import runpy
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

TRAIN = Path(__file__).parents[2] / "engine" / "train.py"
PATIENCE = 600  # seconds until a process that should have ended counts as hanging; a busy machine is slow
T5_TOKENS = 16
# The last block drops the text tokens, so it does not use their queries; the position table is a constant.
UNTRAINED = re.compile(r"transformer_blocks\.2\.attn\.(add_q_proj|norm_added_q)|pos_embed\.pos_embed")
TINY = {
    "output_dir": "run",
    "rollout": {"num_inference_steps": 2, "samples_per_iteration": 4, "micro_batch_size": 2},
    "critic": {"dim": 16, "num_heads": 2},
    "rewards": [{"name": "tiny_rewards:brightness"}],
    "training": {
        "iterations": 3,
        "updates_per_iteration": 1,
        "value_pretraining_iterations": 1,
        "value_pretraining_epochs": 1,
        "critic_epochs": 1,
        "checkpoint_every": 2,
    },
    "evaluation": {"every": 2, "num_prompts": 3, "num_inference_steps": 2},
    "logging": {"tensorboard": False},
    # DeepSpeed's own linear layer adds the bias to the rounded product, torch's may add it before: another last bit.
    "deepspeed": {
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "memory_efficient_linear": False}
    },
}
REWARDS = """
def brightness(images, prompts, metadata):
    return images.float().mean((1, 2, 3)) / 255


def redness(images, prompts, metadata):
    return (images[..., 0].float() - images[..., 2].float()).mean((1, 2)) / 255


def raises(images, prompts, metadata, on=""):
    if any(on in prompt for prompt in prompts):
        raise RuntimeError("the model of this reward is gone")
    return brightness(images, prompts, metadata)


def not_a_number(images, prompts, metadata):
    return [float("nan")] * len(prompts)


def too_short(images, prompts, metadata):
    return [1.0]
"""


def run_config(pipeline: Path, **changes) -> dict:
    """TINY on this pipeline, as JSON has it; `changes` are merged in, sections key by key."""
    config = json.loads(json.dumps(TINY))
    config["model"] = {"pretrained": str(pipeline), "max_sequence_length": 0}
    for name, change in changes.items():
        config[name] = {**config.get(name, {}), **change} if isinstance(change, Mapping) else change
    return config


def prepare(folder: Path, config: dict) -> Path:
    """`folder` for a run of `config` in it: config.json, and the module of its rewards."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiny_rewards.py").write_text(REWARDS)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class Run:
    """`job`, a function of this file, in `ranks` processes whose working directory is `folder`."""

    def __init__(self, folder: Path, job: str, *arguments, ranks: int = 1, env: Mapping[str, str] | None = None):
        self.folder = folder
        self._paused = folder / "paused"
        self._paused.unlink(missing_ok=True)
        context = _fork_server()
        port = str(free_port())
        self.processes = []
        for rank in range(ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_PORT": port}
            task = {"folder": str(folder), "job": job, "arguments": arguments, "env": place | dict(env or {})}
            process = context.Process(target=runpy.run_path, args=(__file__, {"TASK": task}), daemon=True)
            process.start()
            self.processes.append(process)

    def wait(self) -> list[int]:
        """Exit codes by rank. What hangs is killed, and fails the test."""
        deadline = time.monotonic() + PATIENCE
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        hanging = [process for process in self.processes if process.is_alive()]
        for process in hanging:
            process.kill()
        assert not hanging, f"{len(hanging)} of {len(self.processes)} processes hang\n{self.stderr()}"
        return [process.exitcode for process in self.processes]

    def finish(self) -> "Run":
        """Waits for a run that must succeed."""
        codes = self.wait()
        assert not any(codes), f"exit codes {codes}\n{self.stdout()}\n{self.stderr()}"
        return self

    def kill(self) -> None:
        """kill -9 where `pause` holds it."""
        assert set(self._signal(signal.SIGKILL)) == {-signal.SIGKILL}

    def interrupt(self) -> list[int]:
        """Ctrl-C where `pause` holds it; exit codes by rank."""
        return self._signal(signal.SIGINT)

    def _signal(self, number: signal.Signals) -> list[int]:
        deadline = time.monotonic() + PATIENCE
        while not self._paused.exists():
            assert self.processes[0].is_alive(), f"ended before its pause\n{self.stderr()}"
            assert time.monotonic() < deadline, f"never came to its pause\n{self.stderr()}"
            time.sleep(0.02)
        for process in self.processes:
            os.kill(process.pid, number)
        return self.wait()

    def stdout(self, rank: int = 0) -> str:
        return (self.folder / f"stdout-{rank}.txt").read_text()

    def stderr(self, rank: int = 0) -> str:
        return (self.folder / f"stderr-{rank}.txt").read_text()


def train(folder: Path, *flags: str, ranks: int = 1, patch: str = "nothing") -> Run:
    """`engine/train.py` on `folder`/config.json; `patch`, a function of this file, comes before it."""
    return Run(folder, "command_line", patch, ["--config", "config.json", *flags], ranks=ranks)


_looks: dict[str, Run] = {}


def look(name: str, pipeline: Path, scratch: Path, ranks: int = 1, plain: bool = False) -> Run:
    """`train_and_look` under this name, started once in a session of tests; what each rank saw is `seen(run, rank)`."""
    if name not in _looks:
        config = run_config(
            pipeline,
            model={"pretrained": str(pipeline), "max_sequence_length": T5_TOKENS},
            rollout={"num_inference_steps": 3, "samples_per_iteration": 8},
            # Means over a picture: a size in bytes would jump where a rounding error turns a pixel's last bit.
            rewards=[{"name": "tiny_rewards:brightness", "weight": 2.0}, {"name": "tiny_rewards:redness"}],
            training={"iterations": 2},
            # Targets of mean 0 would leave a critic that starts at 0 with a bias gradient of rounding errors, which
            # Adam would blow up to steps of full size. Clipped targets have another mean.
            algorithm={"target_clip": 1.0},
            optimizer={"critic_lr": 3e-4, "gradient_clipping": 0.05},  # a clip below the norms, so that it acts
            evaluation={"num_prompts": 5},  # 5 is odd: two ranks have one to spare
        )
        folder = prepare(scratch, config)
        env = {"TORCH_EXTENSIONS_DIR": str(folder / "extensions")}
        _looks[name] = Run(folder, "train_and_look", config, plain, ranks=ranks, env=env)
    return _looks[name]


def seen(run: Run, rank: int = 0) -> dict:
    import torch

    return torch.load(run.finish().folder / f"seen-{rank}.pt", weights_only=False)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _fork_server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["latent_critic.engine.trainer"])
    quiet = {"DIFFUSERS_VERBOSITY": "critical", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    with _environment(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", **quiet):
        multiprocessing.forkserver.ensure_running()
    return context


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


# ------------------------------------------------------------------------------------------ inside a run's process


def _work(task: dict) -> None:
    os.chdir(task["folder"])
    os.environ.update(task["env"], MASTER_ADDR="127.0.0.1")
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        with open(f"{name}-{os.environ['RANK']}.txt", "w") as file:
            os.dup2(file.fileno(), descriptor)
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it starts in the background ignore it
    globals()[task["job"]](*task["arguments"])


def command_line(patch: str, flags: list[str]) -> None:
    globals()[patch]()
    sys.argv = [str(TRAIN), *flags]
    runpy.run_path(str(TRAIN), run_name="__main__")


def train_and_look(config: dict, plain: bool) -> None:
    """Trains and exports as `Trainer.run` does, and keeps in seen-RANK.pt what a run folder does not show.

    plain: with torch's own AdamW on the unsharded model, in DeepSpeed's place.
    """
    import torch

    from latent_critic.engine import sharding, trainer
    from latent_critic.engine.backbones.base import timestep_of
    from latent_critic.engine.checkpoint import export
    from latent_critic.engine.config import Config
    from latent_critic.engine.rollout import rollout
    from latent_critic.engine.scoring import Scoring
    from latent_critic.engine.transitions import ode_table

    if plain:
        trainer.shard = PlainEngine
    world = sharding.init_distributed()
    run = trainer.Trainer(Config.model_validate_json(json.dumps(config)), world, Path("run"))
    drawn = run.sample(0, Scoring(run.backbone, run.rewards))
    seen = {"initial": sharding.gather_state(run.model, world), "rollout": drawn.latents, "rows": []}
    places = [parameter.data_ptr() for parameter in run.sampling.model.parameters()]
    for iteration in range(config["training"]["value_pretraining_iterations"] + config["training"]["iterations"]):
        seen["rows"].append(run.iterate(iteration))
    seen["final"] = sharding.gather_state(run.model, world)
    copy = run.sampling.refresh()
    seen["copy"] = {name: tensor.clone() for name, tensor in copy.named_parameters()}
    seen["copy stayed"] = places == [parameter.data_ptr() for parameter in copy.parameters()]
    seen["evaluation"] = vars(run.evaluator(copy, run.standardizer))
    if not plain:
        parameters = dict(run.model.named_parameters())
        seen["shards"] = {n: (p.ds_numel, p.ds_tensor.numel(), p.numel()) for n, p in parameters.items()}
        run.run_dir.mkdir(exist_ok=True)
        export(run.run_dir, run.model, world)
        prompts = run.sampler.prompts[:2]
        sigmas = run.backbone.sigmas(4)
        seen["ode"] = rollout(
            copy,
            run.encode,
            prompts,
            torch.arange(2),
            table=ode_table(sigmas),
            timesteps=timestep_of(sigmas[:-1]),
            latent_shape=run.backbone.latent_shape,
            seed=7,
            micro_batch_size=2,
            device=world.device,
        ).latents
        seen["pictures"] = run.backbone.decode(seen["ode"][:, -1])
        seen["prompts"] = [prompt.text for prompt in prompts]
    torch.save(seen, f"seen-{world.rank}.pt")


class PlainEngine:
    """What the trainer asks of DeepSpeed's engine, done by torch alone."""

    def __init__(self, model, config, world):
        import torch

        options = config.optimizer
        self.module = model
        self.clip = options.gradient_clipping
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(model.trunk.parameters()), "lr": options.policy_lr},
                {"params": list(model.critic.parameters()), "lr": options.critic_lr},
            ],
            betas=options.betas,
            weight_decay=options.weight_decay,
        )

    def __call__(self, *inputs, **options):
        return self.module(*inputs, **options)

    def set_gradient_accumulation_boundary(self, is_last: bool) -> None:
        pass

    def backward(self, loss) -> None:
        loss.backward()

    def step(self) -> None:
        import torch

        torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.clip)
        self.optimizer.step()  # leaves what has no gradient alone, its moments included
        self.optimizer.zero_grad(set_to_none=True)


# --------------------------------------------------------------------------------------------- patches for `train`


def pause() -> None:
    """Says so to the parent, and waits for its kill -9."""
    Path("paused").touch()
    time.sleep(2 * PATIENCE)


def nothing() -> None:
    pass


def pause_before_the_first_checkpoint_is_renamed() -> None:
    replace = os.replace
    os.replace = lambda a, b: pause() if Path(b).name == "iteration-000000" else replace(a, b)


def pause_in_the_last_iteration() -> None:
    from latent_critic.engine.trainer import Trainer

    iterate = Trainer.iterate
    Trainer.iterate = lambda self, iteration: pause() if iteration == 3 else iterate(self, iteration)


def out_of_memory_in_the_last_iteration() -> None:
    import torch

    from latent_critic.engine.trainer import Trainer

    def fail(self, iteration):
        if iteration == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 TiB.\nMore about it.")
        return iterate(self, iteration)

    iterate, Trainer.iterate = Trainer.iterate, fail


def pause_in_the_middle_of_the_last_checkpoint() -> None:
    import torch

    save = torch.save

    def save_half(content, path, *options, **more):
        if ".writing-000004" not in str(path) or "optim_states" not in str(path):
            return save(content, path, *options, **more)
        buffer = io.BytesIO()
        save(content, buffer, *options, **more)
        Path(path).write_bytes(buffer.getvalue()[: buffer.tell() // 2])
        pause()

    torch.save = save_half


def full_disk_at_the_last_checkpoint() -> None:
    """The system refuses to let a file grow, as it does when the disk is full: what is written stays truncated."""
    import resource

    from latent_critic.engine.checkpoint import CheckpointStore

    save = CheckpointStore.save

    def save_on_a_full_disk(self, engine, iteration, state):
        if iteration == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        save(self, engine, iteration, state)

    CheckpointStore.save = save_on_a_full_disk


def policy_breaks_in_the_last_iteration() -> None:
    from latent_critic.engine.trainer import Trainer

    iterate = Trainer.iterate

    def break_and_iterate(self, iteration):
        if iteration == 3:
            next(self.model.trunk.parameters()).ds_tensor.fill_(float("nan"))
        return iterate(self, iteration)

    Trainer.iterate = break_and_iterate


if "TASK" in globals():
    _work(globals()["TASK"])
