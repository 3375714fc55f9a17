"""What can only be seen on a CUDA device: run with `pytest -m gpu`."""

import gc

import pytest
import torch
from diffusers import DDIMScheduler
from torch.nn.functional import scaled_dot_product_attention

from latent_critic.engine.backbones import load_backbone
from latent_critic.engine.backbones.attention import set_attention_backend
from latent_critic.engine.prompt_cache import PromptCache
from latent_critic.engine.prompts import Prompt
from latent_critic.engine.rollout import Rollout
from latent_critic.engine.scoring import Scoring
from latent_critic.engine.trainer import Trainer
from latent_critic.engine.transitions import Schedule, ddim_table
from latent_critic.engine.trunk_clock import TrunkClock
from latent_critic.kernels.transition import transition_log_prob, transition_step

pytestmark = pytest.mark.gpu
STEPS, SHAPE = 4, (4, 16, 16)


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


@pytest.mark.parametrize("graph", ["off", "step", "loop"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_first_ratio_is_exactly_one(dtype, graph, tiny_config, world, tmp_path):
    """In the second iteration too, whose graph reads weights that were refreshed in place."""
    config = tiny_config(
        model={"dtype": dtype},
        rollout={"cuda_graph": graph, "check_addresses": True},
        training={"value_pretraining_iterations": 0, "updates_per_iteration": 2},
    )
    trainer = Trainer(config, world, tmp_path)
    for iteration in range(2):
        row = trainer.iterate(iteration)
        assert row["first_ratio_deviation"] == 0.0
        assert row["first_clipfrac"] == 0.0
        assert row["grad_norm/actor"] > 0.0
    assert all(loop.is_captured == (graph != "off") for loop in trainer.rollout._loops.values())
    trainer.rollout.close()


# ------------------------------------------------------------------------------------------------------------ rollout


@pytest.fixture
def make_rollout(tiny_config, tiny_model):
    """make(graph, dtype, **options) -> a rollout on the GPU over one and the same model, and its prompts' call."""
    model = tiny_model(tiny_config()).cuda()
    model.backbone.fuse()
    model.backbone.to(torch.device("cuda"))
    schedules = {}

    def make(graph, dtype=torch.bfloat16, **options):
        model.to(dtype)
        device = torch.device("cuda")
        rollout = Rollout([model], PromptCache(model.backbone, device), SHAPE, 4, device, graph=graph, **options)

        def draw(transition="flow-sde", count=8, seed=3, **more):
            if transition not in schedules:
                if transition == "ddim":  # of a diffusion model; here its table alone is of interest
                    scheduler = DDIMScheduler(timestep_spacing="trailing")
                    scheduler.set_timesteps(STEPS)
                    table = ddim_table(scheduler.alphas_cumprod, scheduler.timesteps, 1.0, "v_prediction")
                    found = Schedule(table, scheduler.timesteps.float())
                else:
                    found = model.backbone.schedule(transition, 0.7, STEPS)
                schedules[transition] = found.to(device)
            prompts = [Prompt(text) for text in ("a red circle", "two blue squares")] * (count // 2)
            return rollout(prompts, torch.arange(count), schedule=schedules[transition], seed=seed, **more)

        draw.rollout, draw.model = rollout, model
        return draw

    return make


def same(left, right):
    names = ("latents", "log_probs", "values")
    return all(torch.equal(getattr(left, name), getattr(right, name)) for name in names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transition", ["flow-sde", "ddim"])
@pytest.mark.parametrize("graph", ["step", "loop"])
def test_a_graph_draws_what_the_eager_loop_draws(make_rollout, graph, transition, dtype):
    """On the same noise, to the bit; after the weights have changed in place, for a short micro-batch, and again."""
    eager, captured = make_rollout("off", dtype), make_rollout(graph, dtype, check_addresses=True)
    ends = []
    for change in (0.0, 0.01, 0.02):
        with torch.no_grad():
            for parameter in eager.model.parameters():
                parameter.mul_(1 + change)
        expected, found = eager(transition), captured(transition)
        assert same(found, expected)
        assert found.latents[:, -1].std() > 0.1 and found.values.std() > 0
        ends.append(found.latents[0, -1])
        assert same(captured(transition, count=6), eager(transition, count=6))  # the second micro-batch is filled up
    assert not torch.equal(ends[0], ends[1]) and not torch.equal(ends[1], ends[2])
    assert all(loop.is_captured for loop in captured.rollout._loops.values())
    assert not any(loop.is_captured for loop in eager.rollout._loops.values())


def test_guidance_and_two_samplers_share_a_pool(make_rollout):
    eager, captured = make_rollout("off"), make_rollout("step")
    for _ in range(2):
        for transition, guidance in (("flow-sde", None), ("ode", 2.0), ("flow-sde", 2.0)):
            found = captured(transition, guidance_scale=guidance)
            assert same(found, eager(transition, guidance_scale=guidance))
    assert len(captured.rollout._loops) == 3


@pytest.mark.parametrize("graph", ["off", "step", "loop"])
def test_the_loop_never_waits_for_the_device(make_rollout, graph):
    draw = make_rollout(graph)
    draw()
    (loop,) = draw.rollout._loops.values()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loop.step.zero_()
        for _ in range(0, STEPS, loop.steps_a_replay):
            loop._graph.replay() if loop.is_captured else loop._step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_moved_weight_is_noticed_before_a_replay(make_rollout):
    draw = make_rollout("step", check_addresses=True)
    draw()
    weight = draw.model.trunk.transformer_blocks[0].attn.to_q.weight
    weight.data = weight.data.clone()
    with pytest.raises(RuntimeError, match="transformer_blocks.0.attn.to_q.weight moved"):
        draw()


def test_closing_gives_the_memory_back(make_rollout):
    draw = make_rollout("loop")
    draw()  # workspaces of libraries stay, 32 MiB and more for each stream
    draw.rollout.close()
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    draw()
    assert torch.cuda.memory_reserved() > before
    draw.rollout.close()
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before + 8 * 2**20  # what is not whole segments of 2 MiB stays
    assert same(draw(), draw())  # and it can be used again


def test_a_step_that_asks_the_host_falls_back(make_rollout, capfd):
    draw, eager = make_rollout("step"), make_rollout("off")
    expected = eager()

    handle = draw.model.critic.register_forward_hook(lambda *_: torch.ones((), device="cuda").item() and None)
    try:
        found = draw()
    finally:
        handle.remove()
    assert same(found, expected)
    assert "rollouts run without a CUDA graph: a step cannot be captured: " in capfd.readouterr().err
    # The process goes on as if no capture had been tried.
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.cuda.empty_cache()
    assert torch.randn(8, device="cuda").isfinite().all()
    again = make_rollout("step")
    assert same(again(), expected)
    assert all(loop.is_captured for loop in again.rollout._loops.values())


def test_the_clock_counts_backwards_that_autograd_runs_in_its_own_thread():
    clock, weight = TrunkClock(torch.device("cuda")), torch.ones(64, 64, device="cuda", requires_grad=True)
    prediction = weight @ weight
    clock.watch_backward(prediction)
    prediction.sum().backward()
    clock.backward_done()
    assert clock.read() > 0.0


def test_attention_rounds_alike_with_and_without_a_gradient_to_follow(tiny_pipeline):
    trunk = load_backbone(str(tiny_pipeline), 0).trunk.to("cuda", torch.bfloat16)
    print(set_attention_backend(trunk, "auto"))
    x = torch.randn(2, 24, 1101, 64, device="cuda", dtype=torch.bfloat16)
    tracked = x.clone().requires_grad_()
    assert torch.equal(scaled_dot_product_attention(x, x, x), scaled_dot_product_attention(tracked, tracked, tracked))


def test_pictures_are_decoded_beside_the_rollout(make_rollout):
    draw = make_rollout("step")
    draw()
    scoring = Scoring(draw.model.backbone, [])
    found = draw(count=32, finished=scoring.submit)
    pictures, _ = scoring.result()
    expected = torch.cat([draw.model.backbone.decode(part).cpu() for part in found.latents[:, -1].split(4)])
    # What runs beside it may leave a convolution less memory, and so another algorithm: a pixel may round otherwise.
    assert pictures.shape == (32, 64, 64, 3)
    assert (pictures.int() - expected.int()).abs().max() <= 1 and pictures.float().std() > 5
