"""engine/export.py: out of a checkpoint comes what the run itself exports, whatever the stage and number of ranks."""

import json
import sys

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file

from latent_critic.engine import export
from latent_critic.engine.checkpoint import CheckpointStore
from latent_critic.engine.config import save_config
from latent_critic.engine.consolidate import load_checkpoint
from latent_critic.engine.ema import WeightAverage
from latent_critic.engine.errors import UserError
from latent_critic.engine.saved_run import SavedRun
from latent_critic.engine.sharding import gather_state, shard
from latent_critic.engine.trainable import choose_trained

from . import tiny_runs

FACTORS = "lora/pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def run(tiny_pipeline, tmp_path_factory):
    """A finished LoRA run of two ranks with a critic trunk of its own and a running average."""
    config = tiny_runs.run_config(
        tiny_pipeline,
        model={"pretrained": str(tiny_pipeline), "max_sequence_length": 0, "lora": {"rank": 2, "alpha": 6}},
        critic={"trunk": "separate"},
        training={"iterations": 2, "ema_decay": 0.5, "checkpoint_every": 1},
        optimizer={"policy_lr": 3e-3},
        deepspeed={"zero_optimization": {"stage": 3}},  # small parameters stay gathered
    )
    folder = tiny_runs.prepare(tmp_path_factory.mktemp("exported"), config)
    return tiny_runs.train(folder, ranks=2).finish().folder / "run"


@pytest.fixture
def call(monkeypatch):
    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, flags)])
        export.export_run(export.arguments())

    return call


def same(a, b) -> bool:
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_newest_checkpoint_is_what_the_run_exported(run, call, tmp_path):
    call(run, "--output", tmp_path / "out")
    for name in (FACTORS, "critic.safetensors", "critic_trunk/diffusion_pytorch_model.safetensors"):
        assert same(run / name, tmp_path / "out" / name), name
    call(run, "--output", tmp_path / "last", "--no_ema")
    assert not same(run / FACTORS, tmp_path / "last" / FACTORS)
    assert same(run / "critic.safetensors", tmp_path / "last" / "critic.safetensors")


def test_an_earlier_checkpoint(run, call):
    call(run, "--iteration", 2)
    assert not same(run / FACTORS, run / "export-000002" / FACTORS)
    with pytest.raises(UserError, match="export-000002 is there already"):
        call(run, "--iteration", 2)


def test_a_checkpoint_of_lora_holds_no_base_weights(run, tiny_pipeline):
    size = sum(path.stat().st_size for path in (run / "checkpoints/iteration-000003").rglob("*model_states.pt"))
    assert size < (tiny_pipeline / "transformer/diffusion_pytorch_model.safetensors").stat().st_size / 2


def test_merged_factors_draw_what_loaded_ones_draw(run, call, tmp_path, tiny_pipeline):
    call(run, "--output", tmp_path / "out", "--merge")
    assert not (tmp_path / "out" / "lora").exists()
    merged = StableDiffusion3Pipeline.from_pretrained(tmp_path / "out/pipeline")
    loaded, base = (StableDiffusion3Pipeline.from_pretrained(tiny_pipeline) for _ in range(2))
    loaded.load_lora_weights(run / "lora")
    pictures = []
    for pipe in (merged, loaded, base):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        call_ = {"num_inference_steps": 3, "guidance_scale": 1.0, "generator": generator, "output_type": "pt"}
        pictures.append(pipe("a red circle", **call_).images)
    # W + B A in one product instead of two: float32 through three blocks and as many steps.
    torch.testing.assert_close(pictures[0], pictures[1], rtol=0, atol=1e-4)
    assert (pictures[0] - pictures[2]).abs().mean() > 1e-3


def test_half_precision_on_request(run, call, tmp_path):
    call(run, "--output", tmp_path / "out", "--dtype", "bfloat16")
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / FACTORS).values()} == {torch.bfloat16}


def test_the_model_card_tells_recipe_and_scores(run):
    card = (run / "lora/README.md").read_text()
    assert "library_name: diffusers" in card and "- lora" in card
    assert "| trained | LoRA, rank 2, alpha 6 |" in card
    assert "| rewards | tiny_rewards:brightness x 1 |" in card
    last = json.loads((run / "evaluations/iteration-000003.json").read_text())["scores"]["tiny_rewards:brightness"]
    assert f"{sum(last) / len(last):.4f} |" in card
    assert "3 held-out prompts (scenes:held-out), 2 ODE steps, guidance 1, seed 1000" in card
    assert 'pipe("a prompt", num_inference_steps=2, guidance_scale=1, max_sequence_length=0)' in card


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"model": {"lora": {"rank": 2, "alpha": 2}}},
        {"algorithm": {"name": "grpo", "kl_coef": 0.1, "group_size": 4}},
        {"critic": {"trunk": "pixels", "heads": "sum"}},
    ],
    ids=["full", "lora", "grpo, KL", "pixels, sum"],
)
def test_whole_weights_come_out_of_every_stage(tiny_config, tiny_model, world, tmp_path, stage, sections):
    """Saved while the policy rests, as after critic-only passes. A KL's reference is not in it, nor asked for."""
    zero = {"zero_optimization": {"stage": stage}}
    config = tiny_config(**sections, training={"ema_decay": 0.5}, deepspeed=zero)
    model = tiny_model(config)
    choose_trained(model.trunk, config.model.lora, model.backbone.lora_targets(), [])
    inputs = torch.ones(2, 4, 16, 16), torch.tensor([900.0, 300.0]), model.backbone.encode_prompts(["a red circle"] * 2)
    engine = shard(model, config, world)
    try:
        average = WeightAverage(engine.policy_parameters, 0.5)
        engine.set_gradient_accumulation_boundary(True)
        prediction, values = engine(*inputs)
        engine.backward(prediction.square().mean() + values.square().sum())
        engine.step()
        average.update()
        for parameter in engine.policy_parameters:
            parameter.requires_grad_(False)
        CheckpointStore(tmp_path, world, model).save(engine, 1, {"x": torch.ones(1)}, average.state_dict())
        last = gather_state(model)
        with average.applied():
            averaged = gather_state(model)
    finally:
        engine.destroy()
    save_config(config, tmp_path / "config.json")
    run = SavedRun(tmp_path)
    for expected, use_average in ((last, False), (averaged, True)):
        found = load_checkpoint(run, run.checkpoint(), use_average).state_dict()
        assert found.keys() == {name for name in expected if not name.startswith("reference.")}
        assert all(torch.equal(found[name], expected[name]) for name in found)
    assert any(not torch.equal(last[name], averaged[name]) for name in last)


def test_messages(run, call, tmp_path):
    with pytest.raises(UserError, match="no run there"):
        call(tmp_path)
    with pytest.raises(UserError, match="--iteration 7: .* has checkpoints of iterations 2, 3"):
        call(run, "--iteration", 7)
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    with pytest.raises(UserError, match="no checkpoint there yet"):
        call(tmp_path)
