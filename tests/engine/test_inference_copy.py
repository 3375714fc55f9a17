"""The copy that samples: the original's outputs, its own weights, the frozen parts shared."""

import pytest
import torch

from latent_critic.engine import inference_copy
from latent_critic.engine.inference_copy import InferenceCopy


@pytest.fixture
def original(tiny_config, tiny_model):
    return tiny_model(tiny_config(), True)


@pytest.fixture
def inputs(original):
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    return latents, torch.tensor([900.0, 300.0]), original.backbone.encode_prompts(["a red circle", "a green square"])


def test_it_computes_what_the_original_computes(original, inputs):
    copy = InferenceCopy(original).model
    expected, found = original(*inputs), copy(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert found[1].std() > 0 and not found[0].requires_grad and not found[1].requires_grad
    assert expected[0].requires_grad  # the original is trained as before


def test_only_trunk_and_critic_are_there_twice(original):
    copy = InferenceCopy(original).model
    assert copy.backbone is original.backbone
    theirs = {parameter.data_ptr() for parameter in original.parameters()}
    assert theirs.isdisjoint(parameter.data_ptr() for parameter in copy.parameters())


@pytest.mark.parametrize("bucket_bytes", [1, 20_000, 2**30])
def test_refresh_brings_every_weight_in_place(original, inputs, monkeypatch, bucket_bytes):
    monkeypatch.setattr(inference_copy, "BUCKET_BYTES", bucket_bytes)
    copy = InferenceCopy(original)
    places = [parameter.data_ptr() for parameter in copy.model.parameters()]
    with torch.no_grad():
        for parameter in original.parameters():
            parameter += 0.01
    before = copy.model(*inputs)
    after = copy.refresh()(*inputs)
    assert not torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])
    assert all(torch.equal(a, b) for a, b in zip(original(*inputs), after, strict=True))
    assert places == [parameter.data_ptr() for parameter in copy.model.parameters()]
