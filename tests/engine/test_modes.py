"""Ways to train, each through the trainer: sharding, offload, LoRA, guidance, a critic trunk, a running average, other
algorithms, a critic on pictures, a KL to the base model."""

import pytest
import torch

from latent_critic.engine.sharding import gather_state
from latent_critic.engine.trainer import Trainer

from . import tiny_runs

OFFLOAD = {"device": "cpu"}
LORA = {"model": {"lora": {"rank": 2, "alpha": 4}}}
GRPO = {"name": "grpo", "group_size": 2}
MODES = {
    "stage 0": {"zero": {"stage": 0}},
    "stage 1": {"zero": {"stage": 1}},
    "stage 2": {"zero": {"stage": 2}},
    "stage 2, optimizer on the CPU": {"zero": {"stage": 2, "offload_optimizer": OFFLOAD}},
    "stage 3, optimizer on the CPU": {"zero": {"stage": 3, "offload_optimizer": OFFLOAD}},
    "stage 3, all on the CPU": {"zero": {"stage": 3, "offload_optimizer": OFFLOAD, "offload_param": OFFLOAD}},
    "lora, stage 1": {**LORA, "zero": {"stage": 1}},
    "lora, own trunk, guidance": {**LORA, "critic": {"trunk": "separate"}, "rollout": {"guidance_scale": 3.0}},
    "own trunk, checkpointing": {"critic": {"trunk": "separate"}, "model": {"gradient_checkpointing": True}},
    "shared trunk, guidance": {"critic": {"trunk": "shared"}, "rollout": {"guidance_scale": 2.0}},
    "frozen parts, average": {"model": {"freeze": ["*.attn"]}, "training": {"ema_decay": 0.5}},
    "grpo": {"algorithm": GRPO},
    "grpo, KL, guidance": {
        "algorithm": GRPO | {"kl_coef": 0.5},
        "rollout": {"guidance_scale": 2.0},
        "training": {"updates_per_iteration": 1},
    },
    "grpo, KL, stage 0": {"algorithm": GRPO | {"kl_coef": 0.5}, "zero": {"stage": 0}},
    "ddpo, prompt statistics": {"algorithm": {"name": "ddpo", "reward_statistics": "prompt"}},
    # Four samples a forward: with fewer rows than `LEAST` products of two steps at once may round otherwise.
    "GRPO-Guard": {
        "algorithm": GRPO | {"ratio_normalization": True},
        "rollout": {"samples_per_iteration": 8, "micro_batch_size": 4},
        "training": {"steps_per_forward": 2},
    },
    "window": {"rollout": {"num_inference_steps": 4, "sde_window": {"size": 2, "every": 1}}},
    "pixels": {"critic": {"trunk": "pixels"}},
    "one head for the sum": {"critic": {"heads": "sum"}},
    "lora with KL": {**LORA, "algorithm": {"kl_coef": 0.1}},
}


def build(tiny_config, world, run_dir, mode):
    sections = dict(MODES[mode])
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, **sections.pop("zero", {})}
    sections["model"] = {"pretrained": tiny_config().model.pretrained, "max_sequence_length": 0} | sections.get(
        "model", {}
    )
    sections["rollout"] = {"num_inference_steps": 3, "samples_per_iteration": 4, "micro_batch_size": 2} | sections.get(
        "rollout", {}
    )
    sections["training"] = {
        "value_pretraining_iterations": 0,
        "updates_per_iteration": 2,
        "critic_epochs": 1,
    } | sections.get("training", {})
    return Trainer(tiny_config(**sections, deepspeed={"zero_optimization": zero}), world, run_dir)


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_trains_what_it_should(tiny_config, world, tmp_path, mode):
    """Two iterations from a ratio of exactly 1: what is trained moves, what is not stays to the bit."""
    trainer = build(tiny_config, world, tmp_path, mode)
    config, trained_at = trainer.config, []
    step = trainer.updater._step

    def look(parts, forward, log):
        if forward.func == trainer.updater._policy_pass:
            trained_at.append({k for part in parts for k in range(part.steps.start, part.steps.stop)})
        step(parts, forward, log)

    trainer.updater._step = look
    vae = {name: tensor.clone() for name, tensor in trainer.backbone.pipe.vae.state_dict().items()}
    try:
        trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
        before = gather_state(trainer.model)
        rows = [trainer.iterate(iteration) for iteration in range(2)]
        after = gather_state(trainer.model)
    finally:
        trainer.engine.destroy()
    for iteration, row in enumerate(rows):
        assert row["phase"] == config.algorithm.name
        assert (row["first_ratio"], row["first_ratio_deviation"], row["first_clipfrac"]) == (1.0, 0.0, 0.0)
        assert row["first_log_prob_drift_per_step"] == [0.0, 0.0]
        assert (row["ratio_max_deviation"] > 0) == (config.training.updates_per_iteration > 1)
        assert row["grad_norm/actor"] > 0
        of_a_critic = {"grad_norm/critic", "value_loss", "explained_variance", "explained_variance_per_step"}
        assert of_a_critic & row.keys() == (of_a_critic if config.has_critic else set())
        if config.has_critic:
            assert row["grad_norm/critic"] > 0
        assert ("reference_kl" in row) == (config.algorithm.kl_coef > 0)
        first = iteration if config.rollout.sde_window else 0
        updates = slice(iteration * config.training.updates_per_iteration, None)
        assert trained_at[updates][0] == {first, first + 1}
    if config.algorithm.kl_coef:  # the first update finds the policy where the reference is
        is_one_update = config.training.updates_per_iteration == 1
        assert (rows[0]["reference_kl"] == 0.0) == is_one_update and rows[1]["reference_kl"] > 0
        reference = [name for name in before if name.startswith("reference.")]
        assert reference and all(torch.equal(before[name], after[name]) for name in reference)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved <= trained
    # Not used: the last block's text queries; what is beyond the last block that a critic's own trunk is read at.
    unused = {name for name in trained - moved if "critic_trunk" not in name and "transformer_blocks.2" not in name}
    assert not unused and len(moved) > 20
    parts = {name.split(".")[0] for name in moved}
    expected = {"trunk", *(["critic"] if config.has_critic else [])}
    expected |= {"separate": {"critic_trunk"}, "pixels": {"pixels"}}.get(config.critic.trunk, set())
    assert parts == expected
    assert all(torch.equal(tensor, vae[name]) for name, tensor in trainer.backbone.pipe.vae.state_dict().items())
    values = 0 if not config.has_critic else 1 if config.critic.heads == "sum" else 2
    assert len(config.value_names) == values and len({n for n in before if n.startswith("critic.heads.")}) == 4 * values


def test_two_ranks_train_as_one(tiny_pipeline, tmp_path):
    """GRPO with LoRA and a KL: the first ratios are exactly 1; the rest follows from weights that differ by rounding,
    through a picture's 8 bits, as in test_sharding."""
    runs = {}
    for name, ranks in (("two", 2), ("one", 1)):
        config = tiny_runs.run_config(
            tiny_pipeline,
            model={"pretrained": str(tiny_pipeline), "max_sequence_length": 0, **LORA["model"]},
            rollout={"num_inference_steps": 3, "samples_per_iteration": 8},
            rewards=[{"name": "tiny_rewards:brightness", "weight": 2.0}, {"name": "tiny_rewards:redness"}],
            algorithm={"name": "grpo", "group_size": 4, "kl_coef": 0.1},
        )
        folder = tiny_runs.prepare(tmp_path / name, config)
        runs[name] = tiny_runs.Run(folder, "train_and_export", config, ranks=ranks)
    seen = {name: tiny_runs.seen(run) for name, run in runs.items()}
    for i, (two, one) in enumerate(zip(seen["two"]["rows"], seen["one"]["rows"], strict=True)):
        for row in (two, one):
            assert (row["first_ratio"], row["first_ratio_deviation"], row["samples"]) == (1.0, 0.0, 8)
        for key in ("reward/tiny_rewards:brightness", "reward/tiny_rewards:redness_std", "grad_norm/actor"):
            assert two[key] == pytest.approx(one[key], rel=1e-4, abs=1e-4), key
        assert two["reference_kl"] == pytest.approx(one["reference_kl"], rel=1e-2)
        assert (two["reference_kl"] > 0) == (i > 0)
    # Latents differ by 1e-4 at most: as test_evaluate has it.
    torch.testing.assert_close(seen["two"]["pictures"], seen["one"]["pictures"], rtol=0, atol=1e-3)
    for name, run in runs.items():
        found = {path.name for path in (run.folder / "run").iterdir()}
        assert "lora" in found and not any("critic" in path for path in found), name
