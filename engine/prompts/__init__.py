"""Prompts: where they come from (the embedded scenes, files, data sets of the Hugging Face hub), and their endless
shuffled order."""

from .prompt import Prompt
from .sampler import PromptSampler, PromptSource
from .sources import load_prompts, load_sources

__all__ = ["Prompt", "PromptSampler", "PromptSource", "load_prompts", "load_sources"]
