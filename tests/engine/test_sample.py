"""engine/sample.py: a run's own pictures again, stock ones, and messages."""

import json
import sys

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image

from latent_critic.engine import sample
from latent_critic.engine.errors import UserError

from . import tiny_runs

TEXTS = ["a red circle", "two blue squares"]


@pytest.fixture(scope="module", params=["full", "lora"])
def run(request, tiny_pipeline, tmp_path_factory):
    """Folder of a finished run, which keeps a running average of its weights."""
    model = {"lora": {"rank": 2, "alpha": 6}} if request.param == "lora" else {}
    config = tiny_runs.run_config(
        tiny_pipeline,
        model={"pretrained": str(tiny_pipeline), "max_sequence_length": 0, **model},
        rollout={"samples_per_iteration": 4, "micro_batch_size": 4},
        training={"iterations": 1, "ema_decay": 0.5},
        evaluation={"num_prompts": 5},
        optimizer={"policy_lr": 3e-3},
    )
    folder = tiny_runs.prepare(tmp_path_factory.mktemp(f"sampled-{request.param}"), config)
    return tiny_runs.train(folder).finish().folder / "run"


@pytest.fixture
def draw(monkeypatch, tmp_path):
    """draw(flags) -> what was handed to the grid: pictures and captions."""
    handed = []
    save_grid = sample_grid()

    def keep(images, captions, path):
        handed.append((images, list(captions)))
        save_grid(images, captions, path)

    def call(*flags):
        output = tmp_path / "grid.png"
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, flags), "--output", str(output)])
        monkeypatch.setattr("latent_critic.engine.reports.save_grid", keep)
        sample.draw(sample.arguments())
        with Image.open(output) as grid:
            grid.load()
        return handed.pop()

    return call


def sample_grid():
    from latent_critic.engine.reports import save_grid

    return save_grid


def test_a_run_is_drawn_as_it_was_evaluated(run, draw):
    """To the bit, in batches of the same size; by the weights of the last evaluation, not the first."""
    images, captions = draw("--run", run, "--count", 5, "--batch_size", 4)
    evaluations = sorted((run / "evaluations").glob("*.npz"))
    first, last = (np.load(evaluations[i])["images"] for i in (0, -1))
    assert captions == json.loads(evaluations[-1].with_suffix(".json").read_text())["prompts"]
    assert np.array_equal(images.numpy(), last)
    assert np.abs(first.astype(int) - last).max() > 1


def test_settings_of_a_run_can_be_changed(run, draw):
    usual, _ = draw("--run", run, TEXTS[0])
    for flags in (["--seed", 5], ["--num_inference_steps", 4], ["--guidance_scale", 3]):
        changed, captions = draw("--run", run, TEXTS[0], *flags)
        assert captions == TEXTS[:1] and changed.shape == usual.shape and not torch.equal(changed, usual)
    larger, _ = draw("--run", run, TEXTS[0], "--resolution", 48)
    assert larger.shape == (1, 48, 48, 3)


@pytest.mark.parametrize("flags", [[], ["--num_inference_steps", 3, "--guidance_scale", 1]], ids=["defaults", "chosen"])
def test_a_base_model_is_drawn_by_the_stock_pipeline(tiny_pipeline, draw, flags):
    images, captions = draw("--model", tiny_pipeline, *TEXTS, *flags, "--seed", 3)
    stock = StableDiffusion3Pipeline.from_pretrained(tiny_pipeline)
    stock.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 3, "guidance_scale": 1.0} if flags else {}
    generators = [torch.Generator().manual_seed(3 + i) for i in range(2)]
    expected = np.stack(stock(TEXTS, generator=generators, output_type="pil", **call).images)
    difference = images.int() - torch.from_numpy(expected).int()
    # The autoencoder's convolutions in another memory order: a pixel in a thousand may round otherwise.
    assert difference.abs().max() <= 1 and difference.bool().float().mean() < 5e-3
    assert captions == TEXTS


def test_stock_settings_of_a_run_are_its_pipelines(run, draw):
    stock, _ = draw("--run", run, "--stock", TEXTS[0], "--num_inference_steps", 2, "--guidance_scale", 1)
    evaluated, _ = draw("--run", run, TEXTS[0])
    assert stock.shape == evaluated.shape and not torch.equal(stock, evaluated)  # other noise


def test_prompts_are_repeated_or_cut(tiny_pipeline, draw, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS))
    source = ["--model", tiny_pipeline, "--prompts_from", tmp_path / "prompts.txt", "--num_inference_steps", 1]
    images, captions = draw(*source, "--count", 3)
    assert captions == [*TEXTS, TEXTS[0]] and not torch.equal(images[0], images[2])
    assert draw(*source, "--count", 1)[1] == TEXTS[:1]


def test_messages(draw, tmp_path, tiny_pipeline, run):
    with pytest.raises(UserError, match="no run there"):
        draw("--run", tmp_path)
    with pytest.raises(UserError, match="give one prompt or more, or --prompts_from"):
        draw("--model", tiny_pipeline)
    with pytest.raises(UserError, match="--count and --batch_size take 1 or more"):
        draw("--model", tiny_pipeline, "a red circle", "--count", 0)
    with pytest.raises(UserError, match="model.resolution = 60: must be a multiple of 8"):
        draw("--model", tiny_pipeline, "a red circle", "--resolution", 60)
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    with pytest.raises(UserError, match="the run has not ended, .* python engine/export.py"):
        draw("--run", tmp_path)


def test_steered_by_the_runs_critic(run, draw, tmp_path):
    """Guidance of scale 0 draws what no steering draws with the trained sampler; more of it is something else, and its
    values are higher. What was chosen by stands beside the picture."""

    def steered(*flags):
        images, captions = draw("--run", run, *TEXTS, *flags)
        return images, captions, json.loads((tmp_path / "grid.json").read_text())

    images, captions, about = steered("--steer", "guidance", "--scale", "0")
    assert captions == TEXTS == about["prompts"] and about["seed"] == 1000
    best, _, bon = steered("--steer", "bon", "--particles", "3")
    first = [chosen == 0 for chosen in bon["chosen"]]
    # Batches of other sizes round otherwise, by a level of a picture at most.
    torch.testing.assert_close(best[first].int(), images[first].int(), rtol=0, atol=1)
    assert [row[0] for row in bon["potentials"]] == pytest.approx([row[0] for row in about["potentials"]], rel=1e-4)
    assert bon["cost"]["forwards"] == 3 * about["cost"]["forwards"] and bon["cost"]["backwards"] == 0
    both, _, guided = steered("--steer", "guidance+smc", "--scale", "3", "--window", "1:", "--resample_every", "2")
    assert guided["guidance"] == {"scale": 3.0, "start": 1, "end": None, "normalize": False}
    assert guided["particles"] == {"count": 4, "by": "value", "keep": "value"} and guided["cost"]["backwards"] > 0
    assert not torch.equal(both, images)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--steer", "guidance", "--window", "2"], "--window 2: expected START:END"),
        (["--steer", "guidance", "--window", "5:900"], "guidance from step 5 to 900: there are steps 0 to"),
        (["--steer", "bon", "--particles", "0"], "particles: 0 of a prompt"),
        (["--steer", "bon", "--weight", "beauty=1"], "no value of beauty; it has"),
        (["--steer", "bon", "--weight", "beauty"], "--weight beauty: expected REWARD=NUMBER"),
        (["--scale", "2"], "--scale does nothing without --steer guidance"),
        (["--critic", "critic.safetensors"], "--critic does nothing without --steer"),
        (["--steer", "bon", "--scale", "2"], "--scale does nothing without --steer guidance"),
        (["--steer", "guidance", "--particles", "2"], "--particles does nothing without --steer bon or smc"),
        (["--steer", "bon", "--smc_scale", "2"], "--smc_scale does nothing without --steer smc"),
        (["--steer", "bon", "--stock"], "give --stock or --steer"),
        (["--steer", "smc", "--critic", "nothing.safetensors"], "nothing.safetensors: no such file"),
    ],
)
def test_steering_that_cannot_be(run, draw, flags, words):
    with pytest.raises(UserError, match=words):
        draw("--run", run, "a red circle", *flags)


def test_a_base_model_needs_a_critic(draw, tiny_pipeline):
    with pytest.raises(UserError, match="--steer needs a critic: --run FOLDER, or --critic FILE"):
        draw("--model", tiny_pipeline, "a red circle", "--steer", "guidance")
