"""The weights that sample after real updates, from real shards: those that are trained, to the last bit.

Five runs, each in processes of its own, of three updates; the second is the critic's alone. See tiny_runs for what they
keep: `rounds` before each update and after the last, and `attached` for copies of four kinds.
"""

import copy

import pytest
import torch

from latent_critic.engine import sharding

from . import tiny_runs

ZERO_3 = {"stage": 3, "stage3_param_persistence_threshold": 0, "memory_efficient_linear": False}
RUNS = {
    "one": {"ranks": 1, "dtype": "float32"},
    "two": {"ranks": 2, "dtype": "bfloat16"},
    "one lora": {"ranks": 1, "dtype": "bfloat16", "lora": True},
    # With DeepSpeed's default small weights, such as adapters, stay whole between forwards beside their shards.
    "two lora": {"ranks": 2, "dtype": "float32", "lora": True, "stage3_param_persistence_threshold": 100_000},
    "two whole": {"ranks": 2, "dtype": "float32", "stage": 2},
}
GATHERS = ("two", "two lora")  # runs in which no process holds all of a weight


@pytest.fixture(scope="module")
def runs(tiny_pipeline, tmp_path_factory):
    """All are started before the first is waited for."""

    def start(name: str, ranks: int, dtype: str, lora: bool = False, **zero) -> tiny_runs.Run:
        config = tiny_runs.run_config(
            tiny_pipeline,
            model={"pretrained": str(tiny_pipeline), "max_sequence_length": 0, "dtype": dtype},
            # Steps of more than half of bfloat16's spacing; a decay would move what has no gradient.
            optimizer={"policy_lr": 1e-2, "critic_lr": 1e-2, "weight_decay": 0.0},
            deepspeed={"zero_optimization": ZERO_3 | zero},
        )
        folder = tiny_runs.prepare(tmp_path_factory.mktemp(name.replace(" ", "-")), config)
        return tiny_runs.Run(folder, "refresh_and_look", config, lora, ranks=ranks)

    return {name: start(name, **options) for name, options in RUNS.items()}


@pytest.fixture(params=[(name, rank) for name, options in RUNS.items() for rank in range(options["ranks"])], ids=str)
def seen(request, runs):
    name, rank = request.param
    return name, tiny_runs.seen(runs[name], rank)


def trained(found) -> set[str]:
    """Names, read off the first round, in which policy and critic train."""
    return set(found["rounds"][0]["trains"])


def test_each_refresh_brings_every_weight_to_the_last_bit(seen):
    _, found = seen
    assert len(found["rounds"]) == 4
    for row in found["rounds"]:
        assert row["auto differs"] == row["copy differs"] == []


def test_weights_moved_in_between(seen):
    """Else the test above shows nothing. The second update is the critic's alone."""
    name, found = seen
    weights = [row["weights"] for row in found["rounds"]]
    for before, after, policy_rests in zip(weights, weights[1:], (False, True, False), strict=False):
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        policy = {n for n in trained(found) if n.startswith("trunk.") and not tiny_runs.UNTRAINED.search(n)}
        critic = {n for n in trained(found) if n.startswith("critic.")}
        assert critic <= changed
        assert changed - critic == (set() if policy_rests else policy)
    adapters = sum("lora" in name for name in trained(found))
    assert adapters == (18 if "lora" in name else 0)  # two factors of three projections in three blocks


def test_what_is_frozen_stays_so(seen):
    """A rest of the policy, and its end, leave a base model under adapters frozen."""
    name, found = seen
    everything = trained(found)
    critic = {n for n in everything if n.startswith("critic.")}
    assert all(n.startswith("critic.") or "lora" in n for n in everything) == ("lora" in name)
    assert [set(row["trains"]) for row in found["rounds"]] == [everything, critic, everything, everything]


def test_only_what_is_trained_is_refreshed(seen):
    """Bytes, with the padding to a whole number of shards, into what a copy owns, and through a collective."""
    name, found = seen
    sizes = found["padded"]
    everything, refreshed = sum(sizes.values()), sum(sizes[n] for n in trained(found))
    assert refreshed < everything / 10 if "lora" in name else refreshed == everything

    def counts(into_copies: int) -> dict[str, int]:
        return {"bucket": into_copies, "collective": into_copies if name in GATHERS else 0}

    for kind, first, later in (
        ("copy", everything, refreshed),
        ("auto", everything, refreshed) if name in GATHERS else ("auto", 0, 0),
        ("sharded", 0, 0),
    ):
        attached = found["attached"][kind]
        assert {what: attached[what] for what in counts(0)} == counts(first)
        for row in found["rounds"]:
            assert row["traffic"][kind] == counts(later)


def test_addresses_stay(seen):
    name, found = seen
    first = found["rounds"][0]
    for row in found["rounds"]:
        assert row["generations"] == dict.fromkeys(("auto", "copy", "scarce", "sharded"), 0)
        for key in ("places", "auto places", "copy places"):
            assert row[key] == first[key]
        assert set(row["copy places"]).isdisjoint(row["places"])
        if name in GATHERS:
            assert set(row["auto places"]).isdisjoint(row["places"])
        else:
            assert row["auto places"] == row["places"]


def test_ratio_and_values_are_exact_after_a_refresh_and_a_stale_copy_shows(seen):
    """One step of a rollout by each kind of copy, before and after its refresh, against the engine's forward."""
    name, found = seen
    follows = {"auto": name not in GATHERS, "copy": False, "scarce": True, "sharded": True}  # without a refresh
    for number, row in enumerate(found["rounds"]):
        for kind, is_current in follows.items():
            ratio, same_values = row["fresh", kind]
            assert torch.equal(ratio, torch.ones(2)) and same_values, (number, kind)
            ratio, same_values = row["stale", kind]
            assert same_values == (is_current or number == 0), (number, kind)
            policy_moved = number in (1, 3)
            assert ((ratio - 1).abs() > 1e-4).all() == (policy_moved and not is_current), (number, kind)


def test_every_rank_decides_alike(runs):
    """ "scarce" lacks one byte, on the last rank."""
    for name in GATHERS:
        for rank in range(2):
            found = tiny_runs.seen(runs[name], rank)
            needed = sum(found["padded"].values()) / 2**20
            refreshed = sum(found["padded"][n] for n in trained(found)) / 2**20
            copied = f"copy of {needed:.0f} MiB, of which {refreshed:.0f} MiB refreshed after each update"
            lacks = f"a copy needs {needed:.0f} MiB and as much for the rest, {2 * needed:.0f} MiB are free"
            assert {kind: about["description"] for kind, about in found["attached"].items()} == {
                "auto": copied,
                "copy": copied,
                "scarce": f"sharded forward: {lacks} (rollout.weights)",
                "sharded": 'sharded forward: rollout.weights = "sharded"',
            }
            assert found["theirs"] == {"auto": False, "copy": False, "scarce": True, "sharded": True}
            static = {kind: about["is_static"] for kind, about in found["attached"].items()}
            assert static == {"auto": True, "copy": True, "scarce": False, "sharded": False}


def test_no_memory_is_asked_for_where_weights_are_shared(runs):
    for name, shared in (("one", "shards (1 process)"), ("one lora", "shards (1 process)"), ("two whole", "weights")):
        attached = tiny_runs.seen(runs[name])["attached"]
        assert attached["auto"]["description"] == f"shares the {shared}, 0 MiB more"
        assert attached["scarce"] == attached["auto"]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_gradient_norm_is_that_of_what_is_trained(tiny_config, tiny_model, world, stage):
    """After a rest of the policy, which a frozen part of the trunk must not come out of."""
    model = tiny_model(tiny_config())
    inputs = torch.ones(2, 4, 16, 16), torch.tensor([900.0, 300.0]), model.backbone.encode_prompts(["a red circle"] * 2)
    model.trunk.requires_grad_(False)
    model.trunk.transformer_blocks[1].attn.requires_grad_(True)
    reference = copy.deepcopy(model)
    engine = sharding.shard(model, tiny_config(deepspeed={"zero_optimization": {"stage": stage}}), world)
    sharding.set_learning_rates(engine, 0.0, 1e-3)
    sharding.set_learning_rates(engine, 1e-4, 1e-3)
    norms = []
    for module, run in ((reference, reference), (model, engine)):
        prediction, values = run(*inputs)
        loss = prediction.square().mean() + values.square().mean()
        if run is reference:
            loss.backward()
            for part in (module.trunk, module.critic):
                squares = [p.grad.double().square().sum() for p in part.parameters() if p.grad is not None]
                norms.append(torch.stack(squares).sum().sqrt().item())
        else:
            engine.set_gradient_accumulation_boundary(True)
            engine.backward(loss)
            parts = module.policy_parameters, module.critic_parameters
            found = [sharding.gradient_norm(part, world) for part in parts]
    engine.destroy()
    assert min(norms) > 1e-3
    assert found == pytest.approx(norms, rel=1e-5)  # float32, some hundred roundings deep
    frozen = {name for name, p in model.trunk.named_parameters() if not p.requires_grad}
    assert frozen == {name for name in dict(model.trunk.named_parameters()) if "blocks.1.attn." not in name}
