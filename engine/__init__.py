"""The training engine: PPO on diffusion trajectories with a critic on the noisy latents."""

import os

# MKL reads this at its first product. Without it a product of few rows may take another path, with other last bits, for
# every address its inputs have modulo 64 (seen on an AMD EPYC): then the ratio of a fresh batch is not exactly 1, and a
# rollout depends on where its weights lie. It costs no time.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
