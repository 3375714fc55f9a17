"""Tensor operations of the training loop: pure functions, no knowledge of the engine."""

from latent_critic.kernels.adaln import adaln_modulate, gate_residual
from latent_critic.kernels.critic_pool import critic_pool
from latent_critic.kernels.philox import NoiseKey
from latent_critic.kernels.ppo import (
    PolicyStatistics,
    PPOClips,
    PPOStatistics,
    ValueStatistics,
    policy_loss,
    ppo_loss,
    value_loss,
)
from latent_critic.kernels.transition import transition_log_prob, transition_step

__all__ = [
    "NoiseKey",
    "PPOClips",
    "PPOStatistics",
    "PolicyStatistics",
    "ValueStatistics",
    "adaln_modulate",
    "critic_pool",
    "gate_residual",
    "policy_loss",
    "ppo_loss",
    "transition_log_prob",
    "transition_step",
    "value_loss",
]
