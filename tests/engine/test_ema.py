"""The running average of weights: by hand, in half precision, over shards, and put in the weights' place."""

import pytest
import torch
from torch import nn

from latent_critic.engine.ema import WeightAverage
from latent_critic.engine.sharding import gather_state, shard


def test_average_by_hand():
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    average = WeightAverage([weight], decay=0.75)
    for value in ([2.0, -2.0], [3.0, 2.0]):
        weight.data.copy_(torch.tensor(value))
        average.update()
    # 1 -> 0.75 + 0.5 = 1.25 -> 0.9375 + 0.75; -2 -> -2 -> -1.5 + 0.5
    assert average.state_dict()["average.0"].tolist() == [1.6875, -1.0]
    with average.applied():
        assert weight.tolist() == [1.6875, -1.0] and weight.requires_grad
    assert weight.tolist() == [3.0, 2.0]


def test_weights_come_back_after_an_error():
    weight = nn.Parameter(torch.ones(2))
    average = WeightAverage([weight], decay=0.9)
    weight.data.fill_(5.0)
    with pytest.raises(RuntimeError, match="in between"), average.applied():
        assert weight.tolist() == [1.0, 1.0]
        raise RuntimeError("in between")
    assert weight.tolist() == [5.0, 5.0]


def test_average_of_half_precision_moves_by_less_than_the_weights_can():
    """1 and the next bfloat16 above it are 2^-7 apart; a thousandth of that is lost in bfloat16."""
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    average = WeightAverage([weight], decay=0.999)
    weight.data.fill_(1 + 2**-7)
    for _ in range(100):
        average.update()
    # float32: a hundred roundings of 6e-8.
    expected = 1 + 2**-7 * (1 - 0.999**100)
    assert average.state_dict()["average.0"].item() == pytest.approx(expected, abs=6e-6)
    with average.applied():
        assert weight.dtype == torch.bfloat16


def test_a_state_comes_back():
    weight = nn.Parameter(torch.zeros(3))
    first, second = (WeightAverage([weight], decay=0.5) for _ in range(2))
    weight.data += 1
    first.update()
    second.load_state_dict(first.state_dict())
    assert second.state_dict()["average.0"].tolist() == [0.5, 0.5, 0.5]
    second.restart()
    assert second.state_dict()["average.0"].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("stage, threshold", [(0, 0), (2, 0), (3, 0), (3, 10**6)])
def test_shards_are_averaged_and_exported_whole(tiny_config, tiny_model, world, stage, threshold):
    """threshold: in ZeRO-3, parameters of fewer numbers stay gathered."""
    zero = {"stage": stage, "stage3_param_persistence_threshold": threshold}
    config = tiny_config(deepspeed={"zero_optimization": zero})
    model = tiny_model(config)
    inputs = torch.ones(2, 4, 16, 16), torch.tensor([900.0, 300.0]), model.backbone.encode_prompts(["a red circle"] * 2)
    engine = shard(model, config, world)
    try:
        average = WeightAverage(engine.policy_parameters, decay=0.75)
        snapshots = [gather_state(model.trunk)]
        for _ in range(2):
            engine.set_gradient_accumulation_boundary(True)
            prediction, values = engine(*inputs)
            engine.backward(prediction.square().mean() + values.square().mean())
            engine.step()
            average.update()
            snapshots.append(gather_state(model.trunk))
        with average.applied():
            found = gather_state(model.trunk)
        after = gather_state(model.trunk)
    finally:
        engine.destroy()
    moved = 0
    for name, last in snapshots[-1].items():
        assert torch.equal(after[name], last), name
        a, b, c = (snapshot[name].double() for snapshot in snapshots)
        # Four roundings in float32.
        torch.testing.assert_close(found[name].double(), 0.5625 * a + 0.1875 * b + 0.25 * c, rtol=3e-7, atol=1e-9)
        moved += not torch.equal(found[name], last)
    assert moved > 10
