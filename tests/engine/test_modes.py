"""Ways to train, each through the trainer: sharding, offload, LoRA, guidance, a critic trunk, a running average."""

import pytest
import torch

from latent_critic.engine.sharding import gather_state
from latent_critic.engine.trainer import Trainer

OFFLOAD = {"device": "cpu"}
LORA = {"model": {"lora": {"rank": 2, "alpha": 4}}}
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
}


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_trains_what_it_should(tiny_config, world, tmp_path, mode):
    """Two iterations of PPO from a ratio of exactly 1: what is trained moves, what is not stays to the bit."""
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
    trainer = Trainer(tiny_config(**sections, deepspeed={"zero_optimization": zero}), world, tmp_path)
    try:
        trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
        before = gather_state(trainer.model)
        for iteration in range(2):
            row = trainer.iterate(iteration)
            assert (row["first_ratio"], row["first_ratio_deviation"], row["first_clipfrac"]) == (1.0, 0.0, 0.0)
            assert row["first_log_prob_drift_per_step"] == [0.0, 0.0]
            assert row["ratio_max_deviation"] > 0 and row["grad_norm/actor"] > 0 and row["grad_norm/critic"] > 0
        after = gather_state(trainer.model)
    finally:
        trainer.engine.destroy()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved <= trained
    # Not used: the last block's text queries; what is beyond the last block that a critic's own trunk is read at.
    unused = {name for name in trained - moved if "critic_trunk" not in name and "transformer_blocks.2" not in name}
    assert not unused and len(moved) > 20
