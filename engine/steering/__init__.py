"""Inference-time steering with the trained critic: guidance, best-of-N, sequential Monte Carlo."""

from ..critic_file import TrainedCritic, load_critic
from .callback import GuidanceCallback
from .guidance import Guidance
from .particles import SMC, BestOfN, Particles
from .steer import Cost, Steered, Steerer, steer

__all__ = [
    "SMC",
    "BestOfN",
    "Cost",
    "Guidance",
    "GuidanceCallback",
    "Particles",
    "Steered",
    "Steerer",
    "TrainedCritic",
    "load_critic",
    "steer",
]
