"""Tensor operations of the training loop: pure functions, no knowledge of the engine."""

from latent_critic.kernels.critic_pool import critic_pool
from latent_critic.kernels.ppo import PolicyStatistics, policy_loss, value_loss
from latent_critic.kernels.transition import transition_log_prob, transition_step

__all__ = [
    "PolicyStatistics",
    "critic_pool",
    "policy_loss",
    "transition_log_prob",
    "transition_step",
    "value_loss",
]
