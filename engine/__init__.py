"""The training engine: PPO on diffusion trajectories with a critic on the noisy latents."""
