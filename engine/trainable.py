"""Which of a trunk's weights are trained: all of them, or LoRA's factors (arXiv 2106.09685), less what is frozen."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from peft import LoraConfig
from torch import nn

from .config import LoRAConfig
from .errors import UserError


def choose_trained(
    trunk: nn.Module, lora: LoRAConfig | None, lora_targets: Sequence[str], freeze: Sequence[str]
) -> None:
    """Leaves a gradient to what is trained alone; with `lora`, adds the factors, which start as no change at all.

    lora_targets: layers that get factors where `lora` does not name them, as PEFT matches names. freeze: names or
    patterns of modules and parameters. Raises UserError where one of these matches nothing, or nothing would be left.
    """
    trunk.requires_grad_(True)
    if lora:
        trunk.requires_grad_(False)
        targets = list(lora_targets) if lora.target_modules == "auto" else lora.target_modules
        _check_targets(trunk, targets)
        trunk.add_adapter(LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets))
    names = [name for name, _ in trunk.named_parameters()]
    for pattern in freeze:
        frozen = [name for name in names if _matches(name, pattern)]
        if not frozen:
            parts = ", ".join(name for name, _ in trunk.named_children())
            raise UserError(
                f'model.freeze: "{pattern}" matches nothing in this model; give names or patterns such as '
                f'"{names[len(names) // 2].rpartition(".")[0]}" or "*.bias". Its parts are {parts}'
            )
        for name in frozen:
            trunk.get_parameter(name).requires_grad_(False)
    if not any(parameter.requires_grad for parameter in trunk.parameters()):
        raise UserError("model.freeze: nothing of the model is left to train; take a pattern away")


def _check_targets(trunk: nn.Module, targets: Sequence[str]) -> None:
    layers = [name for name, module in trunk.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    unmatched = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in layers)]
    if unmatched:
        ends = dict.fromkeys(name.rpartition(".")[2] for name in layers)
        named = [end for end in ends if not end.isdigit()]
        raise UserError(
            f"model.lora.target_modules: {', '.join(unmatched)} - no layer of this model has a name that ends so; "
            f'use "auto", or ends of names such as {", ".join(named)}'
        )


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")
