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


def look(name: str, pipeline: Path, scratch: Path, ranks: int = 1, cores: int = 1, plain: bool = False) -> Run:
    """`train_and_look` under this name, started once in a session of tests; what each rank saw is `seen(run, rank)`.

    cores: that each process believes to have.
    """
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
        env = {"TORCH_EXTENSIONS_DIR": str(folder / "extensions"), "OMP_NUM_THREADS": str(cores)}
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

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
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
    from latent_critic.engine.checkpoint import export
    from latent_critic.engine.config import Config
    from latent_critic.engine.scoring import Scoring

    if plain:
        trainer.shard = PlainEngine
    world = sharding.init_distributed()
    run = trainer.Trainer(Config.model_validate_json(json.dumps(config)), world, Path("run"))
    drawn = run.sample(0, Scoring(run.backbone, run.rewards))
    seen = {"initial": sharding.gather_state(run.model), "rollout": drawn.latents, "rows": []}
    copy = run.rollout.models[0]
    places = [parameter.data_ptr() for parameter in copy.parameters()]
    for iteration in range(config["training"]["value_pretraining_iterations"] + config["training"]["iterations"]):
        seen["rows"].append(run.iterate(iteration))
    seen["final"] = sharding.gather_state(run.model)
    run.refresh()
    seen["copy"] = {name: tensor.clone() for name, tensor in copy.named_parameters()}
    seen["copy stayed"] = places == [parameter.data_ptr() for parameter in copy.parameters()]
    seen["evaluation"] = vars(run.evaluator(run.rollout))
    if not plain:
        parameters = dict(run.model.named_parameters())
        seen["shards"] = {n: (p.ds_numel, p.ds_tensor.numel(), p.numel()) for n, p in parameters.items()}
        run.run_dir.mkdir(exist_ok=True)
        export(run.run_dir, run.model, run.config, run.run_dir)
        prompts = run.sampler.prompts[:2]
        ode = run.backbone.schedule("ode", 0.0, 4)
        seen["ode"] = run.rollout(prompts, torch.arange(2), schedule=ode, seed=7).latents
        seen["pictures"] = run.backbone.decode(seen["ode"][:, -1])
        seen["prompts"] = [prompt.text for prompt in prompts]
    torch.save(seen, f"seen-{world.rank}.pt")


def train_and_export(config: dict) -> None:
    """Two PPO iterations and the export; seen-0.pt has the metrics, and float pictures of the trained model."""
    import torch

    from latent_critic.engine import sharding, trainer
    from latent_critic.engine.checkpoint import export
    from latent_critic.engine.config import Config

    world = sharding.init_distributed()
    run = trainer.Trainer(Config.model_validate_json(json.dumps(config)), world, Path("run"))
    seen = {"rows": [run.iterate(iteration) for iteration in range(2)]}
    run.run_dir.mkdir(exist_ok=True)
    export(run.run_dir, run.model, run.config, run.run_dir)
    run.refresh()
    prompts, ode = run.sampler.prompts[:2], run.backbone.schedule("ode", 0.0, 3)
    drawn = run.rollout(prompts, torch.arange(2), schedule=ode, seed=7)
    decoded = []
    run.backbone.pipe.vae.decoder.register_forward_hook(lambda _decoder, _inputs, output: decoded.append(output))
    run.backbone.decode(drawn.latents[:, -1])
    seen["pictures"] = (decoded[0] / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    seen["prompts"] = [prompt.text for prompt in prompts]
    if world.is_main:
        torch.save(seen, "seen-0.pt")


def estimate(configs: dict, iterations: list) -> None:
    """Each algorithm's advantages of this rank's part of the samples, by iteration; seen-RANK.pt has its state too."""
    import torch

    from latent_critic.engine import sharding
    from latent_critic.engine.algorithms import build_algorithm
    from latent_critic.engine.config import Config
    from latent_critic.engine.prompts import Prompt

    world, seen = sharding.init_distributed(), {}
    for name, config in configs.items():
        config = Config.model_validate_json(json.dumps(config))
        algorithm = build_algorithm(config, torch.tensor([reward.weight for reward in config.rewards]))
        seen[name] = []
        for raw, values, texts in iterations:
            share = len(raw) // world.size
            mine = slice(world.rank * share, (world.rank + 1) * share)
            prompts = [Prompt(text) for text in texts[mine]]
            algorithm.observe(raw[mine], prompts)
            seen[name].append(algorithm.advantages(raw[mine], values[mine], slice(0, 3), prompts))
        seen[f"{name}, state"] = algorithm.state_dict()
    torch.save(seen, f"seen-{world.rank}.pt")


class PlainEngine:
    """What the trainer asks of DeepSpeed's engine, done by torch alone."""

    def __init__(self, model, config, world):
        import torch

        options = config.optimizer
        self.module = model
        self.policy_parameters = list(model.trunk.parameters())
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

    def save_on_a_full_disk(self, engine, iteration, *state):
        if iteration == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        save(self, engine, iteration, *state)

    CheckpointStore.save = save_on_a_full_disk


def policy_breaks_in_the_last_iteration() -> None:
    from latent_critic.engine.trainer import Trainer

    iterate = Trainer.iterate

    def break_and_iterate(self, iteration):
        if iteration == 3:
            next(self.model.trunk.parameters()).ds_tensor.fill_(float("nan"))
        return iterate(self, iteration)

    Trainer.iterate = break_and_iterate


# ------------------------------------------------------------------------------- what test_refresh.py has a look at


def refresh_and_look(config: dict, lora: bool) -> None:
    """Three updates, the second of the critic alone, under copies of each kind; seen-RANK.pt is what became of these.

    "auto" has exactly the memory it asks for, "scarce" a byte less, on the last rank alone.
    """
    import torch

    from latent_critic.engine import inference_copy, sharding
    from latent_critic.engine.actor_critic import ActorCritic
    from latent_critic.engine.backbones import load_backbone
    from latent_critic.engine.config import Config
    from latent_critic.engine.world import resolve_dtype
    from latent_critic.kernels.transition import transition_log_prob, transition_step

    world = sharding.init_distributed()
    config = Config.model_validate_json(json.dumps(config))
    torch.manual_seed(0)
    backbone = load_backbone(config.model.pretrained, config.model.max_sequence_length)
    if lora:
        from peft import LoraConfig

        backbone.trunk.requires_grad_(False)
        # Both factors random: one of them starts at 0 otherwise, and the other's first gradients with it.
        targets = ["to_q", "to_k", "to_v"]
        backbone.trunk.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    model = ActorCritic(backbone, config.critic, [reward.name for reward in config.rewards]).eval()
    for layer in (model.critic.taps.modulation, *(head[-1] for head in model.critic.heads)):
        torch.nn.init.normal_(layer.weight)  # they start at 0, where what comes before them learns nothing yet
    model.to(world.device, resolve_dtype(config.model.dtype, world.device))
    modes = {"auto": "auto", "copy": "copy", "scarce": "auto", "sharded": "sharded"}
    copies = {kind: inference_copy.InferenceCopy(model) for kind in modes}
    engine = sharding.shard(model, config, world)
    parameters = dict(model.named_parameters())

    gathered = []  # bytes a call: what each bucket asked for, and what went through the collective
    gather, collective = inference_copy._gather, inference_copy.all_gather_into_tensor
    inference_copy._gather = lambda bucket: (gathered.append(("bucket", sum(w.nbytes for w in bucket))), gather(bucket))

    def count_and_gather(whole, *arguments, **options):
        gathered.append(("collective", whole.nbytes))
        return collective(whole, *arguments, **options)

    inference_copy.all_gather_into_tensor = count_and_gather

    def traffic() -> dict[str, int]:
        found = {what: sum(size for name, size in gathered if name == what) for what in ("bucket", "collective")}
        gathered.clear()
        return found

    def whole() -> dict:
        found = {}
        for name, parameter in parameters.items():
            is_shard = hasattr(parameter, "ds_id")
            with sharding.deepspeed.zero.GatheredParameters([parameter], enabled=is_shard):
                found[name] = parameter.detach().clone()
        return found

    def padded(parameter) -> int:
        return parameter.ds_tensor.nbytes * world.size if hasattr(parameter, "ds_id") else parameter.nbytes

    seen = {
        "padded": {name: padded(parameter) for name, parameter in parameters.items()},
        "attached": {},
        "rounds": [],
        "initial": whole(),
    }
    needed = sum(seen["padded"].values())
    for kind, mode in modes.items():
        is_last = world.rank == world.size - 1
        inference_copy._free_bytes = lambda world, less=kind == "scarce" and is_last: 2 * needed - less
        copies[kind].attach(engine, mode, world)
        about = {"is_static": copies[kind].is_static, "description": copies[kind].description}
        seen["attached"][kind] = about | traffic()
    models = {kind: copies[kind].module() for kind in modes}
    seen["theirs"] = {kind: model is engine.module for kind, model in models.items()}

    generator = torch.Generator().manual_seed(1 + world.rank)
    z, noise = torch.randn(2, 2, *backbone.latent_shape, generator=generator)
    inputs = z, torch.tensor([900.0, 300.0]), backbone.encode_prompts(["a red circle", "a green square"])
    table = torch.tensor([[0.9, -0.1, 0.3]])

    @torch.no_grad()
    def draw() -> dict:
        drawn = {}
        for kind, model in models.items():
            prediction, values = model(*inputs)
            drawn[kind] = (*transition_step(prediction, z, noise, table, 0), values)
        return drawn

    for update in range(4):
        policy_lr = 0.0 if update == 1 else config.optimizer.policy_lr
        sharding.set_learning_rates(engine, policy_lr, config.optimizer.critic_lr)
        row = {"trains": [name for name, parameter in parameters.items() if parameter.requires_grad]}
        drawn = {"stale": draw()}
        row["traffic"] = {}
        for kind in modes:
            copies[kind].refresh()
            row["traffic"][kind] = traffic()
        drawn["fresh"] = draw()
        weights = row["weights"] = whole()
        for kind in ("auto", "copy"):
            mine = dict(models[kind].named_parameters())
            assert mine.keys() == weights.keys()
            same = {name: mine[name].dtype == w.dtype and torch.equal(mine[name], w) for name, w in weights.items()}
            row[f"{kind} differs"] = [name for name, equal in same.items() if not equal]
            row[f"{kind} places"] = [parameter.data_ptr() for parameter in mine.values()]
        row["places"] = [getattr(p, "ds_tensor", p).data_ptr() for p in parameters.values()]
        row["generations"] = {kind: copies[kind].generation for kind in modes}

        engine.set_gradient_accumulation_boundary(True)
        prediction, values = engine(*inputs)
        for when, by_kind in drawn.items():
            for kind, (z_next, log_prob, old_values) in by_kind.items():
                ratio = (transition_log_prob(prediction.detach(), z, z_next, table, 0) - log_prob).exp()
                row[when, kind] = ratio, torch.equal(old_values, values)
        seen["rounds"].append(row)
        if update < 3:
            engine.backward(prediction.square().mean() + (values - 1).square().mean())
            engine.step()
    torch.save(seen, f"seen-{world.rank}.pt")


if "TASK" in globals():
    _work(globals()["TASK"])
