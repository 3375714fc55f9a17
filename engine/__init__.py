"""The training engine: PPO on diffusion trajectories with a critic on the noisy latents."""

import os

# MKL reads this at its first product. Without it the last bits of a product of few rows may depend on the addresses of
# its inputs (seen on an AMD EPYC, where a rollout's values differed with sharded weights); what is reproducible here,
# the ratio of a fresh batch among it, must not. No cost was measurable.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
