"""What can only be seen on a CUDA device: run with `pytest -m gpu`."""

import pytest
import torch

from latent_critic.engine.backbones import load_backbone
from latent_critic.engine.trainer import Trainer
from latent_critic.kernels.transition import transition_log_prob, transition_step

pytestmark = pytest.mark.gpu


def test_transition_agrees_with_the_cpu():
    generator = torch.Generator().manual_seed(0)
    v, z, noise = (torch.randn(4, 4, 16, 16, generator=generator) for _ in range(3))
    table = torch.tensor([[0.9, -0.1, 0.3]])
    expected, expected_log_prob = transition_step(v, z, noise, table, 0)
    found, log_prob = transition_step(v.cuda(), z.cuda(), noise.cuda(), table.cuda(), 0)
    # Three multiply-adds of numbers of order 1 in float32: a few of its rounding errors, fused or not.
    torch.testing.assert_close(found.cpu(), expected, atol=1e-6, rtol=0)
    # A mean over 1,024 squares of order 1 divided by 2 s^2 = 0.18; each square carries about 1e-6 relative error.
    torch.testing.assert_close(log_prob.cpu(), expected_log_prob, atol=1e-4, rtol=0)
    again = transition_log_prob(v.cuda(), z.cuda(), found, table.cuda(), 0)
    assert torch.equal(again, log_prob)


def test_fused_trunk_agrees_with_the_stock_one(tiny_pipeline):
    backbone = load_backbone(str(tiny_pipeline), 0)
    trunk = backbone.trunk.cuda()
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator).cuda() for shape in ((4, 4, 16, 16), (4, 7, 96), (4, 96))]
    weights = torch.randn(4, 4, 16, 16, generator=generator).cuda()
    timesteps = torch.tensor([990.0, 700.0, 300.0, 10.0], device="cuda")

    def run() -> list[torch.Tensor]:
        latents, prompt_embeds, pooled = inputs
        conditioning = {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled}
        out = backbone.predict(trunk, latents, timesteps, conditioning)
        used = [p for n, p in trunk.named_parameters() if "transformer_blocks.0" in n or "norm_out" in n]
        return [out.detach(), *torch.autograd.grad((out * weights).sum(), used)]

    expected = run()
    backbone.fuse()
    for found, reference in zip(run(), expected, strict=True):
        # float32 on both sides, through three blocks whose matrices have unit gain: 1e-7 a rounding, some hundred deep.
        assert (found - reference).norm() <= 1e-5 * reference.norm()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_first_ratio_is_exactly_one(dtype, tiny_config, world, tmp_path):
    config = tiny_config(
        model={"dtype": dtype}, training={"value_pretraining_iterations": 0, "updates_per_iteration": 2}
    )
    trainer = Trainer(config, world, tmp_path)
    row = trainer.iterate(0)
    assert row["first_ratio_deviation"] == 0.0
    assert row["first_clipfrac"] == 0.0
    assert row["grad_norm/actor"] > 0.0
