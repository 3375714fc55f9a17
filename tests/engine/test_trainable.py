"""What of a trunk is trained: all of it, LoRA's factors, less what is frozen; messages for what matches nothing."""

import pytest
import torch

from latent_critic.engine.backbones import load_backbone
from latent_critic.engine.config import LoRAConfig
from latent_critic.engine.errors import UserError
from latent_critic.engine.trainable import choose_trained

LORA = LoRAConfig(rank=4, alpha=8)


@pytest.fixture
def backbone(tiny_pipeline):
    return load_backbone(str(tiny_pipeline), 0)


def choose(backbone, lora=None, freeze=()) -> set[str]:
    """Names of what is trained then."""
    choose_trained(backbone.trunk, lora, backbone.lora_targets(), freeze)
    return {name for name, parameter in backbone.trunk.named_parameters() if parameter.requires_grad}


def test_without_a_choice_everything_is_trained(backbone):
    backbone.trunk.requires_grad_(False)
    assert choose(backbone) == dict(backbone.trunk.named_parameters()).keys()


@torch.no_grad()
def test_lora_trains_its_factors_and_starts_as_no_change(backbone):
    inputs = torch.ones(2, 4, 16, 16), torch.tensor([900.0, 300.0]), backbone.encode_prompts(["a red circle"] * 2)
    before = backbone.predict(backbone.trunk, *inputs)
    trained = choose(backbone, LORA)
    # Two factors for each of the attention's eight projections in three blocks; the last has no to_add_out.
    assert len(trained) == 2 * (8 * 3 - 1) and all(".lora_A." in name or ".lora_B." in name for name in trained)
    assert {name.split(".lora_")[0].rpartition("attn.")[2] for name in trained} == {
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"
    }  # fmt: skip
    assert torch.equal(backbone.predict(backbone.trunk, *inputs), before)
    factor = backbone.trunk.transformer_blocks[0].attn.to_q
    assert factor.lora_A["default"].weight.shape == (4, 64) and factor.scaling["default"] == 2.0
    factor.lora_B["default"].weight.fill_(0.1)
    assert not torch.equal(backbone.predict(backbone.trunk, *inputs), before)


def test_lora_on_named_layers(backbone):
    trained = choose(backbone, LoRAConfig(rank=2, alpha=2, target_modules=["ff.net.2", "proj_out"]))
    assert {name.split(".lora_")[0] for name in trained} == {
        "proj_out", *(f"transformer_blocks.{i}.ff.net.2" for i in range(3))
    }  # fmt: skip


@pytest.mark.parametrize(
    "freeze, is_frozen",
    [
        (["transformer_blocks.1"], lambda name: name.startswith("transformer_blocks.1.")),
        (["transformer_blocks.*.attn"], lambda name: ".attn." in name),
        (["*.bias", "pos_embed"], lambda name: name.endswith(".bias") or name.startswith("pos_embed.")),
        (["proj_out.weight"], lambda name: name == "proj_out.weight"),
    ],
)
def test_frozen_modules_and_parameters(backbone, freeze, is_frozen):
    everything = dict(backbone.trunk.named_parameters()).keys()
    assert choose(backbone, freeze=freeze) == {name for name in everything if not is_frozen(name)}
    assert any(is_frozen(name) for name in everything)


def test_factors_of_some_blocks_can_be_frozen(backbone):
    trained = choose(backbone, LORA, freeze=["transformer_blocks.0", "transformer_blocks.1"])
    assert trained and all(name.startswith("transformer_blocks.2.") for name in trained)


def test_messages(backbone, tiny_unet_pipeline):
    with pytest.raises(
        UserError, match=r"model\.lora\.target_modules: to_w - no layer .* ends of names such as .*to_q"
    ):
        choose(backbone, LoRAConfig(target_modules=["to_q", "to_w"]))
    with pytest.raises(UserError, match=r'model\.freeze: "blocks\.0" matches nothing .* parts are pos_embed, '):
        choose(backbone, freeze=["blocks.0"])
    with pytest.raises(UserError, match=r"model\.freeze: nothing of the model is left to train"):
        choose(backbone, freeze=["*"])
    with pytest.raises(UserError, match=r"model\.lora\.target_modules: attn\.add_q_proj - no layer"):
        choose(load_backbone(str(tiny_unet_pipeline), 0), LoRAConfig(target_modules=["attn.add_q_proj"]))
