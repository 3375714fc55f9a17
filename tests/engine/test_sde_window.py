"""The moving window of stochastic steps: what its places are tables of, and which iteration has which."""

import pytest
import torch

from latent_critic.engine.backbones import load_backbone
from latent_critic.engine.config import RolloutConfig
from latent_critic.engine.errors import UserError
from latent_critic.engine.sde_window import build_schedules, place
from latent_critic.engine.trajectory import Trajectory

STEPS = 6
SAMPLERS = {"flow-sde": 0.7, "dance-sde": 0.3, "cps": 0.8, "ddim": 1.0}


@pytest.fixture(scope="module")
def backbone_of(tiny_pipeline, tiny_unet_pipeline):
    """The flow model, or for ddim the diffusion model."""
    flow, diffusion = load_backbone(str(tiny_pipeline), 0), load_backbone(str(tiny_unet_pipeline), 0)
    return lambda transition: diffusion if transition == "ddim" else flow


def options(transition, **changes):
    return RolloutConfig.model_validate(
        {"transition": transition, "noise_level": SAMPLERS[transition], "num_inference_steps": STEPS, **changes}
    )


@pytest.mark.parametrize("transition", SAMPLERS)
@pytest.mark.parametrize("size, trained, places", [(2, None, 4), (1, None, 5), (5, None, 1), (2, 3, 2), (3, 3, 1)])
def test_steps_of_the_window_are_the_transitions_and_others_the_odes(backbone_of, transition, size, trained, places):
    """Row by row, to the bit; the window starts a step later at each place, and ends with the trained steps."""
    backbone = backbone_of(transition)
    whole = backbone.schedule(transition, SAMPLERS[transition], STEPS, trained)
    ode = backbone.schedule("ode", 0.0, STEPS)
    assert bool((whole.table[:-1] != ode.table[:-1]).any(1)[: trained or STEPS - 1].all())
    found = build_schedules(backbone, options(transition, sde_window={"size": size}, num_trained_steps=trained))
    assert len(found) == places
    for start, schedule in enumerate(found):
        for k in range(STEPS):
            expected = whole if start <= k < start + size else ode
            assert torch.equal(schedule.table[k], expected.table[k]), (start, k)
        assert schedule.table.dtype == torch.float32 and torch.equal(schedule.timesteps, whole.timesteps)
        tensors = torch.zeros(1, STEPS + 1, 4), torch.zeros(1, STEPS), torch.zeros(1, STEPS, 0)
        drawn = Trajectory(*tensors, schedule.timesteps, schedule.table, {}, [], torch.arange(1), 0)
        assert drawn.trained_steps == slice(start, start + size)
    assert places - 1 + size == (trained or STEPS - 1)


@pytest.mark.parametrize("transition", SAMPLERS)
def test_without_a_window_there_is_one_schedule(backbone_of, transition):
    backbone = backbone_of(transition)
    (found,) = build_schedules(backbone, options(transition, num_trained_steps=4))
    expected = backbone.schedule(transition, SAMPLERS[transition], STEPS, 4)
    assert torch.equal(found.table, expected.table) and torch.equal(found.timesteps, expected.timesteps)


def test_a_window_larger_than_the_noisy_steps_is_refused(backbone_of):
    """The last step of cps has no noise, whatever `num_trained_steps` says; DDIM's of Stable Diffusion 1.5 has some."""
    every = {"num_trained_steps": STEPS, "sde_window": {"size": STEPS}}
    assert len(build_schedules(backbone_of("ddim"), options("ddim", **every))) == 1
    with pytest.raises(UserError, match=rf"^rollout\.sde_window\.size = {STEPS}: at most {STEPS - 1}\b"):
        build_schedules(backbone_of("cps"), options("cps", **every))


def test_the_window_moves_on_and_starts_again():
    window = options("flow-sde", sde_window={"size": 2, "every": 3})
    assert [place(window, i, 3) for i in range(12)] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 0, 0]
    assert [place(options("flow-sde", sde_window={"every": 1}), i, 4) for i in range(6)] == [0, 1, 2, 3, 0, 1]
    assert [place(options("flow-sde", sde_window={}), i, 4) for i in (0, 3, 4, 15, 16)] == [0, 0, 1, 3, 0]
    assert [place(options("flow-sde"), i, 1) for i in range(3)] == [0, 0, 0]
