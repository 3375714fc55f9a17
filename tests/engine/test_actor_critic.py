"""The one module that is trained: what the critic reads, whose gradient goes where, and guidance."""

import pytest
import torch

from latent_critic.engine.actor_critic import ActorCritic
from latent_critic.engine.config import CriticConfig, LoRAConfig
from latent_critic.engine.errors import UserError
from latent_critic.engine.trainable import choose_trained

STEPS = torch.tensor([900.0, 500.0, 100.0])


@pytest.fixture
def make(tiny_config, tiny_model):
    """make(guidance=, awake=, **critic) -> actor-critic and its inputs: latents, timesteps, conditioning."""

    def build(guidance=1.0, awake=True, **critic):
        model = tiny_model(tiny_config(critic=critic, rollout={"guidance_scale": guidance}), awake)
        latents = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        conditioning = model.backbone.encode_prompts(["a red circle", "two blue squares", "a green triangle"])
        return model, (latents, STEPS, conditioning)

    return build


def read_features(model, inputs, **options):
    """What the trunk's blocks return as image tokens, and what the critic is given."""
    blocks, given = {}, []
    handles = [
        block.register_forward_hook(lambda _module, _inputs, output, i=i: blocks.update({i: output[1].detach()}))
        for i, block in enumerate(model.trunk.transformer_blocks)
    ]

    def keep(_module, args, kwargs):
        given.append((args, kwargs))

    handles.append(model.critic.register_forward_pre_hook(keep, with_kwargs=True))
    outputs = model(*inputs, **options)
    for handle in handles:
        handle.remove()
    (features, condition) = given[0]
    return outputs, blocks, features, condition


def plain_prediction(model, inputs):
    latents, timesteps, conditioning = inputs
    return model.trunk(
        hidden_states=latents,
        timestep=timesteps,
        encoder_hidden_states=conditioning["prompt_embeds"],
        pooled_projections=conditioning["pooled_prompt_embeds"],
        return_dict=False,
    )[0]


@pytest.mark.parametrize("taps, expected", [("auto", [0, 1, 2]), ([1], [1]), ([2, 0], [2, 0])])
def test_taps_read_the_image_tokens_of_their_blocks(make, taps, expected):
    model, inputs = make(taps=taps)
    assert model.tap_indices == expected
    (prediction, values), blocks, features, condition = read_features(model, inputs)
    assert len(features) == len(expected)
    for tokens, index in zip(features, expected, strict=True):
        assert tokens.shape == (3, 64, 64)  # 8 x 8 patches of a trunk 64 wide
        assert torch.equal(tokens, blocks[index])
    assert torch.equal(condition["timesteps"], STEPS)
    assert torch.equal(condition["pooled_text"], inputs[2]["pooled_prompt_embeds"])
    assert torch.equal(values, model.critic(*(blocks[i] for i in expected), **condition))
    assert torch.equal(prediction, plain_prediction(model, inputs))
    assert prediction.dtype == values.dtype == torch.float32 and values.shape == (3, 2)
    assert values.std() > 0.05


@pytest.mark.parametrize("taps", [[3], [0, 7]])
def test_taps_that_the_model_has_not(make, taps):
    with pytest.raises(UserError, match=r"critic\.taps: .*blocks 0 to 2; use \"auto\" \(\[0, 1, 2\]\)"):
        make(taps=taps)


def test_values_start_at_exactly_zero(make):
    model, inputs = make(awake=False)
    prediction, values = model(*inputs)
    assert torch.equal(values, torch.zeros(3, 2))
    assert 0.3 < prediction.std() < 3


def test_one_trunk_pass(make):
    model, inputs = make(guidance=2.0)
    calls = []
    model.trunk.register_forward_pre_hook(lambda _module, args: calls.append(1))
    model(*inputs, model.backbone.encode_prompts([""]))
    assert len(calls) == 1
    assert not any(hasattr(block, "tapped") for block in model.trunk.transformer_blocks)  # no activation is kept


def test_the_critic_alone_on_features_that_were_kept(make):
    """The same bits, in float32 and with guidance; the trunk does not run, and only the critic has a gradient."""
    for guidance in (1.0, 2.0):
        model, inputs = make(guidance=guidance)
        torch.nn.init.normal_(model.critic.heads[0][-1].weight)
        inputs = *inputs, model.backbone.encode_prompts([""])
        with torch.no_grad():
            prediction, values, *features = model(*inputs, with_features=True)
            assert torch.equal(prediction, model(*inputs)[0])
        assert len(features) == len(model.tap_indices) and all(len(tap) == len(values) for tap in features)
        model.trunk.register_forward_pre_hook(lambda *_: pytest.fail("the trunk ran"))
        nothing, found = model(*inputs, values_only=True, features=features)
        assert nothing is None and torch.equal(found, values) and bool(values.any())
        found.sum().backward()
        assert with_gradient(model.critic) and not with_gradient(model.trunk)


def with_gradient(module):
    return {name for name, p in module.named_parameters() if p.grad is not None and bool(p.grad.any())}


@pytest.mark.parametrize("trunk", ["shared-detached", "shared"])
def test_value_loss_reaches_the_trunk_only_when_shared(make, trunk):
    model, inputs = make(trunk=trunk, taps=[0, 1])
    _, values = model(*inputs)
    values.square().sum().backward()
    assert with_gradient(model.critic) > {"taps.query", "taps.key_weight", "heads.0.0.weight", "heads.1.2.bias"}
    reached = {name.split(".")[0] + "." + name.split(".")[1] for name in with_gradient(model.trunk)}
    if trunk == "shared-detached":
        assert all(p.grad is None for p in model.trunk.parameters())
    else:
        assert {"transformer_blocks.0", "transformer_blocks.1", "pos_embed.proj", "time_text_embed.text_embedder"} <= (
            reached
        )
        beyond = [*model.trunk.transformer_blocks[2].parameters(), *model.trunk.proj_out.parameters()]
        assert all(p.grad is None for p in beyond)  # past the last tap


@pytest.mark.parametrize("trunk", ["shared-detached", "shared"])
def test_policy_loss_reaches_the_trunk_and_not_the_critic(make, trunk):
    model, inputs = make(trunk=trunk)
    prediction, _ = model(*inputs)
    prediction.square().sum().backward()
    assert all(p.grad is None for p in model.critic.parameters())
    assert {"proj_out.weight", "transformer_blocks.0.attn.to_q.weight", "context_embedder.weight"} <= (
        with_gradient(model.trunk)
    )


def test_a_trunk_of_its_own_starts_as_the_policys_and_learns_apart(make):
    shared, inputs = make(trunk="shared-detached")
    model, _ = make(trunk="separate")
    assert all(torch.equal(a, b) for a, b in zip(model(*inputs), shared(*inputs), strict=True))
    assert model.critic_trunk is not model.trunk and len(model.trunks) == 2
    _, values = model(*inputs)
    values.square().sum().backward()
    assert not with_gradient(model.trunk) and len(with_gradient(model.critic_trunk)) > 30
    assert {id(p) for p in model.policy_parameters} == {id(p) for p in model.trunk.parameters() if p.requires_grad}
    assert len(model.critic_parameters) == len(model.policy_parameters) + len(list(model.critic.parameters()))
    with torch.no_grad():
        for parameter in model.critic_trunk.parameters():
            parameter += 0.01
        prediction, moved = model(*inputs)
    assert torch.equal(prediction, shared(*inputs)[0]) and not torch.equal(moved, values)


def test_values_alone_need_no_policy_where_the_critic_has_a_trunk(make):
    for trunk, is_spared in (("separate", True), ("shared", False)):
        model, inputs = make(trunk=trunk)
        calls = []
        model.trunk.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        with torch.no_grad():
            prediction, values = model(*inputs, values_only=True)
            assert (prediction is None) == is_spared and len(calls) == (0 if is_spared else 1)
            assert torch.equal(values, model(*inputs)[1])


def test_guidance_is_not_for_a_trunk_of_the_critics_own(make):
    """It reads the prompt alone: the same value with guidance and without."""
    plain, inputs = make(trunk="separate")
    guided, _ = make(trunk="separate", guidance=3.0)
    with torch.no_grad():
        prediction, values = guided(*inputs, guided.backbone.encode_prompts([""]))
        expected = plain(*inputs)
    assert torch.equal(values, expected[1]) and not torch.equal(prediction, expected[0])


def test_frozen_weights_are_shared_by_both_trunks(tiny_config, tiny_model):
    model = tiny_model(tiny_config())
    choose_trained(model.trunk, LoRAConfig(rank=2), model.backbone.lora_targets(), [])
    model = ActorCritic(model.backbone, CriticConfig(trunk="separate"), ["a"])
    mine, theirs = (dict(trunk.named_parameters()) for trunk in model.trunks)
    assert {name for name in mine if mine[name] is not theirs[name]} == {name for name in mine if ".lora_" in name}


def test_without_a_critic_there_are_no_values(make, tiny_config, tiny_model):
    expected, inputs = make(trunk="separate")
    model = tiny_model(tiny_config(critic={"trunk": "separate"}, algorithm={"name": "ddpo"}))
    prediction, values = model(*inputs)
    assert torch.equal(prediction, expected(*inputs)[0]) and values.shape == (3, 0)
    assert values.dtype == torch.float32 and not values.requires_grad
    assert (model.critic, model.critic_trunk, model.pixels, model.tap_indices) == (None, None, None, [])
    assert model.critic_parameters == [] and model.units == list(model.trunk.transformer_blocks)
    assert {id(p) for p in model.policy_parameters} == {id(p) for p in model.parameters()}
    model(*inputs, values_only=True)
    assert not any(hasattr(block, "tapped") for block in model.trunk.transformer_blocks)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_reference_stays_where_the_policy_was(make, tiny_config, tiny_model, guidance):
    """The first prediction to the bit, guidance included; none of its weights is trained, none has a gradient."""
    _, inputs = make()
    model = tiny_model(tiny_config(algorithm={"kl_coef": 0.1}, rollout={"guidance_scale": guidance}))
    inputs = (*inputs, *([model.backbone.encode_prompts([""])] if guidance > 1 else []))
    prediction, _ = model(*inputs)
    assert torch.equal(model.reference_prediction(*inputs), prediction)
    with torch.no_grad():
        for parameter in model.trunk.parameters():
            parameter += 0.01
    kept, moved = model.reference_prediction(*inputs), model(*inputs)[0]
    assert torch.equal(kept, prediction) and not kept.requires_grad and (moved - kept).abs().mean() > 0.1
    assert model.trunks == [model.trunk, model.reference] and model.reference is not model.trunk
    assert not any(parameter.requires_grad for parameter in model.reference.parameters())
    trained = {id(p) for p in (*model.policy_parameters, *model.critic_parameters)}
    assert trained == {id(p) for p in (*model.trunk.parameters(), *model.critic.parameters())}


def test_a_reference_has_factors_of_its_own_beside_shared_weights(tiny_config, tiny_model):
    model = tiny_model(tiny_config())
    choose_trained(model.trunk, LoRAConfig(rank=2), model.backbone.lora_targets(), [])
    model = ActorCritic(model.backbone, CriticConfig(), ["a"], with_reference=True)
    mine, theirs = (dict(trunk.named_parameters()) for trunk in model.trunks)
    assert {name for name in mine if mine[name] is not theirs[name]} == {name for name in mine if ".lora_" in name}
    assert all(parameter.requires_grad == (".lora_" in name) for name, parameter in mine.items())
    assert not any(parameter.requires_grad for parameter in theirs.values())


@pytest.mark.parametrize("scale", [1.5, 4.0])
def test_guidance_combines_two_predictions(make, scale):
    """v = v_empty + scale (v_prompt - v_empty); the critic reads the branch with the prompt."""
    guided, inputs = make(guidance=scale)
    plain, _ = make()
    empty = guided.backbone.encode_prompts([""])
    repeated = {name: tensor.expand(3, *tensor.shape[1:]) for name, tensor in empty.items()}
    with torch.no_grad():
        (prediction, values), blocks, features, condition = read_features(guided, (*inputs, empty))
        with_prompt, expected_values = plain(*inputs)
        without, _ = plain(*inputs[:2], repeated)
    # A batch of six instead of three: 2e-6 a forward (sums in other blocks), enlarged by 2 scale - 1 at most.
    expected = without + scale * (with_prompt - without)
    torch.testing.assert_close(prediction, expected, rtol=0, atol=1e-5 * (2 * scale - 1))
    torch.testing.assert_close(values, expected_values, rtol=0, atol=2e-5)
    assert all(torch.equal(tokens, blocks[i][3:]) for i, tokens in enumerate(features))
    assert torch.equal(condition["timesteps"], STEPS)
    assert torch.equal(condition["pooled_text"], inputs[2]["pooled_prompt_embeds"])
    assert (with_prompt - without).abs().mean() > 0.1


def test_guidance_of_a_call_stands_in_for_the_trained_one(make):
    """An evaluation may be guided otherwise than the training."""
    model, inputs = make(guidance=2.0)
    plain, _ = make(guidance=1.0)
    empty = model.backbone.encode_prompts([""])
    with torch.no_grad():
        for mine, theirs in zip(model(*inputs, guidance_scale=1.0), plain(*inputs), strict=True):
            assert torch.equal(mine, theirs)
        guided = plain(*inputs, empty, guidance_scale=2.0)
        for mine, theirs in zip(guided, model(*inputs, empty), strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("trunk", ["shared-detached", "shared"])
def test_gradient_checkpointing_changes_nothing_but_memory(make, trunk):
    """Blocks run twice then, and the critic's hooks with them."""
    model, inputs = make(trunk=trunk)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.trunk.enable_gradient_checkpointing()
        model.zero_grad()
        for _ in range(2):  # the second pass must not meet what the first left
            prediction, values = model(*inputs)
            (prediction.square().mean() + values.square().mean()).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_half_precision_trunk_takes_and_gives_float32(make):
    model, inputs = make()
    expected, expected_values = model(*inputs)
    model.to(torch.bfloat16)
    prediction, values = model(*inputs)
    assert prediction.dtype == values.dtype == torch.float32
    # bfloat16 has 8 bits: 2^-8 a layer and a value, about ten of them on the way, of outputs with std 1.
    assert (prediction - expected).square().mean().sqrt() < 0.1 * expected.std()
    assert (values - expected_values).abs().max() < 0.3 * expected_values.std() + 0.1
