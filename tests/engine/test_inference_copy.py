"""The copy that samples: shared storage, weights of its own or none, modules for threads, and what cannot be."""

import copy
import gc
import threading
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from torch.profiler import ProfilerActivity, profile

from latent_critic.engine import inference_copy
from latent_critic.engine.errors import UserError
from latent_critic.engine.inference_copy import InferenceCopy
from latent_critic.engine.sharding import shard
from latent_critic.engine.world import World

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture
def original(tiny_config, tiny_model):
    return tiny_model(tiny_config())


@pytest.fixture
def inputs(original):
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    return latents, torch.tensor([900.0, 300.0]), original.backbone.encode_prompts(["a red circle", "a green square"])


@pytest.fixture
def sharded(tiny_config, tiny_model, world):
    """make(stage, model={...}, **zero) -> (copy, its engine), not attached. Engines are torn down."""
    engines = []

    def make(stage: int = 3, model: dict | None = None, **zero):
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0, **zero}
        config = tiny_config(
            model=model or {}, deepspeed={"zero_optimization": zero}, optimizer={"policy_lr": 1e-2, "critic_lr": 1e-2}
        )
        plain = tiny_model(config).to(world.device)
        found = InferenceCopy(plain)
        engines.append(shard(plain, config, world))
        return found, engines[-1]

    yield make
    for engine in engines:
        engine.destroy()


def attached(original, mode="auto") -> InferenceCopy:
    found = InferenceCopy(original)
    found.attach(SimpleNamespace(module=original), mode, ALONE)
    return found


def train(engine, world) -> None:
    """One update of everything."""
    backbone = engine.module.backbone
    latents = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(0)).to(world.device)
    conditioning = backbone.encode_prompts(["a red circle", "a green square"])
    conditioning = {name: tensor.to(world.device) for name, tensor in conditioning.items()}
    engine.set_gradient_accumulation_boundary(True)
    prediction, values = engine(latents, torch.tensor([900.0, 300.0], device=world.device), conditioning)
    engine.backward(prediction.square().mean() + (values - 1).square().mean())
    engine.step()


def here(parameter) -> torch.Tensor:
    """All of a parameter, of one process, wherever it has it."""
    return parameter.ds_tensor.view(parameter.ds_shape) if hasattr(parameter, "ds_id") else parameter.data


def places(module) -> list[int]:
    return [getattr(p, "ds_tensor", p).data_ptr() for p in module.parameters()]


def follows(module, original) -> bool:
    pairs = list(zip(module.parameters(), original.parameters(), strict=True))
    return all(torch.equal(mine, here(p)) and mine.dtype == here(p).dtype for mine, p in pairs)


def move(parameter) -> None:
    """As what re-flattens does: the same values at another address."""
    tensor = getattr(parameter, "ds_tensor", parameter)
    tensor.data = tensor.data.clone()


def outputs_agree(left, right) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def bytes_kept(work: Callable) -> tuple[int, object]:
    """Of CPU memory that `work` leaves allocated, and its result."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        result = work()
    return sum(event.self_cpu_memory_usage for event in found.events()), result


# ------------------------------------------------------------------------------------------------- where weights live


def test_no_second_set_of_weights_before_it_is_attached(original):
    size, found = bytes_kept(lambda: InferenceCopy(original))
    assert size == 0
    assert all(parameter.numel() == 0 for parameter in found._pristine.parameters())
    size, twin = bytes_kept(lambda: copy.deepcopy(original))
    assert size >= sum(parameter.nbytes for parameter in twin.parameters())  # what would be seen


def test_unsharded_weights_are_shared(original, inputs):
    size, found = bytes_kept(lambda: attached(original))
    assert size == 0
    module = found.module()
    assert module is not original and places(module) == places(original)
    assert found.is_static and found.description == "shares the shards (1 process), 0 MiB more"
    assert outputs_agree(module(*inputs), original(*inputs))
    with torch.no_grad():
        for parameter in original.parameters():
            parameter += 0.01
    assert outputs_agree(module(*inputs), original(*inputs))  # no refresh is needed


def test_only_trunk_and_critic_are_there_again(original):
    found = InferenceCopy(original)
    assert all(a is b for a, b in zip(found._pristine.buffers(), original.buffers(), strict=True))
    original.trunk.pos_embed.pos_embed = original.trunk.pos_embed.pos_embed.clone()  # as a cast by DeepSpeed does
    found.attach(SimpleNamespace(module=original), "copy", ALONE)
    module = found.module()
    assert module.backbone is original.backbone and module.trunk is not original.trunk
    buffers = dict(module.named_buffers())
    assert buffers["trunk.pos_embed.pos_embed"] is original.trunk.pos_embed.pos_embed
    assert all(buffer is buffers[name] for name, buffer in original.named_buffers())


@pytest.mark.parametrize("bucket_bytes", [1, 20_000, 2**30])
def test_a_copy_follows_at_each_refresh(original, inputs, monkeypatch, bucket_bytes):
    monkeypatch.setattr(inference_copy, "BUCKET_BYTES", bucket_bytes)
    found = attached(original, "copy")
    module, first = found.module(), original(*inputs)
    assert outputs_agree(module(*inputs), first)
    stays = places(module)
    assert set(stays).isdisjoint(places(original))
    with torch.no_grad():
        for parameter in original.parameters():
            parameter += 0.01
    assert outputs_agree(module(*inputs), first)
    found.refresh()
    now = original(*inputs)
    assert not torch.equal(now[0], first[0]) and not torch.equal(now[1], first[1])
    assert outputs_agree(module(*inputs), now)
    assert places(module) == stays and found.generation == 0


def test_buckets_are_full_and_of_one_type(original, monkeypatch):
    """As a coalesced collective asks for."""
    original.critic.double()
    weights = attached(original, "copy")._weights
    largest = max(weight.nbytes for weight in weights)
    monkeypatch.setattr(inference_copy, "BUCKET_BYTES", 2 * largest)
    buckets = inference_copy._buckets(weights)
    assert sorted(map(id, sum(buckets, []))) == sorted(map(id, weights))
    sizes = [sum(weight.nbytes for weight in bucket) for bucket in buckets]
    types = [{weight.here.dtype for weight in bucket} for bucket in buckets]
    assert all(len(found) == 1 for found in types) and {torch.float32, torch.float64} == set.union(*types)
    assert max(sizes) <= 2 * largest
    for bucket, following, size in zip(buckets, buckets[1:], sizes, strict=False):
        assert bucket[0].here.dtype != following[0].here.dtype or size + following[0].nbytes > 2 * largest


def test_a_copy_keeps_the_memory_format(original):
    """Which picks the kernel, and so the last bits."""
    weight = original.trunk.pos_embed.proj.weight
    weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    mine = attached(original, "copy").module().trunk.pos_embed.proj.weight
    assert mine.stride() == weight.stride() and torch.equal(mine, weight)


def test_a_copy_of_frozen_weights_is_read_once(original):
    original.trunk.requires_grad_(False)
    original.trunk.proj_out.requires_grad_(True)
    found = InferenceCopy(original)
    original.requires_grad_(False)  # what rests or wakes later says nothing
    found.attach(SimpleNamespace(module=original), "copy", ALONE)
    module = found.module()
    assert follows(module, original)
    proj_out, critic = original.trunk.proj_out, original.critic
    trained = sum(parameter.nbytes for part in (proj_out, critic) for parameter in part.parameters())
    everything = sum(parameter.nbytes for parameter in original.parameters())
    mib = 2**20
    assert found.description == (
        f"copy of {everything / mib:.0f} MiB, of which {trained / mib:.0f} MiB refreshed after each update"
    )
    assert sum(weight.nbytes for bucket in found._refreshed for weight in bucket) == trained
    original.requires_grad_(True)
    with torch.no_grad():
        for parameter in original.parameters():
            parameter += 0.01
    found.refresh()
    names = {name for name, mine in module.named_parameters() if torch.equal(mine, original.get_parameter(name))}
    assert names == {name for name, _ in original.named_parameters() if name.startswith(("trunk.proj_out", "critic."))}


def test_sharded_is_the_engine_s_own_module_for_one_caller(original):
    found = attached(original, "sharded")
    assert not found.is_static and found.description == 'sharded forward: rollout.weights = "sharded"'
    assert found.module() is original
    found.refresh()
    assert found.generation == 0
    with pytest.raises(RuntimeError, match="one caller"):
        found.module()


# ------------------------------------------------------------------------------------------------------------- modules


def test_modules_are_others_over_the_same_tensors(original, inputs):
    for mode in ("auto", "copy"):
        found = attached(original, mode)
        one, other = found.module(), found.module()
        assert not {id(module) for module in one.modules()} & {id(module) for module in other.modules()}
        assert places(one) == places(other)
        assert [b.data_ptr() for b in one.buffers()] == [b.data_ptr() for b in other.buffers()]
        result = one(*inputs)
        assert not result[0].requires_grad and not result[1].requires_grad
        assert original(*inputs)[0].requires_grad  # which is trained as before


def test_each_module_has_taps_of_its_own(original, inputs):
    """The blocks keep what the critic reads: of two forwards at a time, neither reads the other's."""
    found = attached(original, "copy")
    modules = [found.module() for _ in range(2)]
    latents, timesteps, conditioning = inputs
    each = [(latents, timesteps, conditioning), (-latents, timesteps, conditioning)]
    expected = [original(*arguments) for arguments in each]
    assert not torch.equal(expected[0][1], expected[1][1])
    results = [None, None]
    meeting = threading.Barrier(2, timeout=60)

    def meet(*_) -> None:
        meeting.wait()

    def run(i: int) -> None:
        for block in modules[i].backbone.blocks(modules[i].trunk):
            block.register_forward_hook(meet)  # after the hook that keeps: both have, before either goes on
        results[i] = modules[i](*each[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert outputs_agree(results[i], expected[i])


# ------------------------------------------------------------------------------------------------------ under DeepSpeed


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_process_shares_what_deepspeed_trains(sharded, world, stage, dtype):
    """DeepSpeed casts and flattens first, and its updates write in place. Buffers follow the cast."""
    found, engine = sharded(stage, {"dtype": dtype})
    found.attach(engine, "auto", world)
    module = found.module()
    assert found.description == "shares the shards (1 process), 0 MiB more"
    assert {p.dtype for p in module.parameters()} == {getattr(torch, dtype)}
    theirs = dict(engine.module.named_buffers())
    assert all(buffer is theirs[name] for name, buffer in module.named_buffers())
    stays = places(module)
    for _ in range(2):
        before = [parameter.clone() for parameter in module.parameters()]
        train(engine, world)
        assert any(not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
        assert follows(module, engine.module)
        found.refresh()
        assert follows(module, engine.module)
    assert places(module) == places(engine.module) == stays and found.generation == 0


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_loaded_checkpoint_is_followed(sharded, world, tmp_path, stage):
    found, engine = sharded(stage)
    found.attach(engine, "auto", world)
    module = found.module()
    engine.save_checkpoint(str(tmp_path), tag="first")
    saved, stays = copy.deepcopy(list(module.parameters())), places(module)
    train(engine, world)
    assert any(not torch.equal(a, b) for a, b in zip(saved, module.parameters(), strict=True))
    engine.load_checkpoint(str(tmp_path), tag="first")
    found.refresh()
    assert all(torch.equal(a, b) for a, b in zip(saved, module.parameters(), strict=True))
    assert follows(module, engine.module)
    assert places(module) == stays and found.generation == 0


@pytest.mark.parametrize("stage", [0, 3])
def test_moved_storage_is_found(sharded, world, stage):
    found, engine = sharded(stage)
    found.attach(engine, "auto", world)
    module = found.module()
    for generation, count in ((1, 1), (2, 3)):
        for parameter in list(engine.module.parameters())[:count]:
            move(parameter)
        assert places(module) != places(engine.module) and found.generation == generation - 1
        for _ in range(2):
            found.refresh()
            assert places(module) == places(engine.module) == places(found.module())
            assert found.generation == generation
    train(engine, world)
    assert follows(module, engine.module) == (stage == 0)  # ZeRO-3 has its flat buffer's parts back after a step
    found.refresh()
    assert follows(module, engine.module)
    assert found.generation == (2 if stage == 0 else 3)


def test_a_copy_of_its_own_beside_zero_3(sharded, world):
    found, engine = sharded(3)
    found.attach(engine, "copy", world)
    module = found.module()
    assert set(places(module)).isdisjoint(places(engine.module))
    train(engine, world)
    assert not follows(module, engine.module)
    found.refresh()
    assert follows(module, engine.module)


@pytest.mark.gpu
@pytest.mark.parametrize("offloaded", [False, True])
def test_shards_on_the_cpu_are_copied_to_the_gpu(sharded, world, offloaded):
    found, engine = sharded(3, {"dtype": "bfloat16"}, **({"offload_param": {"device": "cpu"}} if offloaded else {}))
    found.attach(engine, "auto", world)
    module = found.module()
    assert found.description.startswith("copy of" if offloaded else "shares the shards")
    assert {p.ds_tensor.device.type for p in engine.module.parameters()} == {"cpu" if offloaded else "cuda"}
    stays = places(module)
    for _ in range(2):
        train(engine, world)
        found.refresh()
        for mine, theirs in zip(module.parameters(), engine.module.parameters(), strict=True):
            assert mine.device == world.device and torch.equal(mine.cpu(), here(theirs).cpu())
    assert places(module) == stays and found.generation == 0


# ------------------------------------------------------------------------------------------------------ what cannot be


def obstacles() -> dict:
    """By setting, as it makes itself felt: NVMe and quantization need ops that are not built, MiCS is gone in 0.19."""

    def on_disk(engine, patch):
        next(engine.module.trunk.parameters()).ds_tensor.final_location = OffloadDeviceEnum.nvme

    def quantized(setting):
        return lambda engine, patch: patch.setattr(engine, setting, lambda: True)

    def over_some(engine, patch):
        tensor = next(engine.module.trunk.parameters()).ds_tensor
        tensor.data = torch.cat([tensor.data, tensor.data])

    return {
        'offload_param.device = "nvme"': on_disk,
        "zero_quantized_weights": quantized("zero_quantized_weights"),
        "zero_quantized_nontrainable_weights": quantized("zero_quantized_nontrainable_weights"),
        "mics_shard_size": over_some,
    }


@pytest.mark.parametrize("setting", obstacles())
def test_shards_that_do_not_make_up_the_weights(sharded, world, monkeypatch, setting):
    found, engine = sharded(3)
    obstacles()[setting](engine, monkeypatch)
    with pytest.raises(UserError, match='rollout.weights = "copy": .*; use "sharded"') as error:
        found.attach(engine, "copy", world)
    assert f"deepspeed.zero_optimization.{setting}" in str(error.value)
    found.attach(engine, "auto", world)
    assert found.description.startswith(f"sharded forward: deepspeed.zero_optimization.{setting}")
    assert not found.is_static and found.module() is engine.module
    found.attach(engine, "sharded", world)
    assert found.description == 'sharded forward: rollout.weights = "sharded"'


@pytest.mark.parametrize("free, fits", [(2 * 5_012 * 2**20, True), (2 * 5_012 * 2**20 - 1, False)])
def test_as_much_again_must_stay_free(world, monkeypatch, free, fits):
    monkeypatch.setattr(inference_copy, "_free_bytes", lambda world: free)
    expected = "a copy needs 5,012 MiB and as much for the rest, 10,024 MiB are free (rollout.weights)"
    assert inference_copy._lack_of_memory(5_012 * 2**20, world) == (None if fits else expected)


def test_processes_on_a_cpu_share_its_memory(monkeypatch):
    available = SimpleNamespace(available=1001)
    monkeypatch.setattr(inference_copy.psutil, "virtual_memory", lambda: available)
    assert inference_copy._free_bytes(ALONE) == 1001
    assert inference_copy._free_bytes(World(1, 2, torch.device("cpu"))) == 500


@pytest.mark.gpu
def test_free_memory_of_a_gpu_is_what_torch_keeps_too(world):
    kept = torch.empty(2**32, dtype=torch.uint8, device=world.device)
    while_used = inference_copy._free_bytes(world)
    del kept  # torch keeps its memory
    # Other processes on the GPU may take some, hence half.
    assert inference_copy._free_bytes(world) - while_used > 2**31
