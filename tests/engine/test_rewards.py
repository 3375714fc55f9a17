"""Rewards: values on drawn scenes, order under damage, and one clear message for everything that can go wrong."""

import io
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from latent_critic.engine import rewards
from latent_critic.engine.config import RewardConfig
from latent_critic.engine.embedded import scenes
from latent_critic.engine.errors import UserError
from latent_critic.engine.prompts import Prompt
from latent_critic.engine.rewards import (
    ANY_VALUE,
    BUILT_IN,
    Reward,
    RewardError,
    build_rewards,
    check_prompts,
    judge,
    local,
    ocr,
    score_all,
)

SCENES = ("composition", "composition_strict", "background", "ocr", "jpeg_compressibility", "jpeg_incompressibility")


def config(name, weight=1.0, device="cpu", batch_size=None, **params):
    return RewardConfig(name=name, weight=weight, params=params, device=device, batch_size=batch_size)


def draw(captions, seed):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([scenes.draw(scenes.parse(caption), rng) for caption in captions]))


@pytest.fixture(scope="module")
def world():
    """Ten drawn scenes of every task: pictures and prompts."""
    rng = np.random.default_rng(0)
    prompts = [found[i].caption() for found in scenes.all_scenes().values() for i in rng.integers(len(found), size=10)]
    return draw(prompts, 1), prompts


@pytest.fixture(scope="module")
def numbers():
    """Thirty drawn scenes with a number each."""
    found = scenes.all_scenes()["text"]
    prompts = [found[i].caption() for i in np.random.default_rng(2).integers(len(found), size=30)]
    return draw(prompts, 3), prompts


@pytest.fixture(scope="module")
def reader():
    return build_rewards([config("ocr")])


def scores(reward_or_name, images, prompts):
    built = build_rewards([config(reward_or_name)]) if isinstance(reward_or_name, str) else reward_or_name
    return score_all(built, images, prompts, [{}] * len(prompts))[:, 0]


def behind_objects(images, change):
    """`images` with `change(float pixels)` wherever no object and no text is."""
    pixels = images.numpy().astype(float)
    light = pixels.mean(axis=-1, keepdims=True)
    content = (np.linalg.norm(pixels - light, axis=-1) > 30) | (light[..., 0] < 110)
    content = ndimage.maximum_filter(content, (1, 5, 5))[..., None]
    return torch.from_numpy(np.where(content, pixels, change(pixels)).clip(0, 255).astype(np.uint8))


# ------------------------------------------------------------------------------------------------------------ values


def test_composition_of_drawn_scenes_and_of_each_others(world):
    images, prompts = world
    right = score_all(build_rewards([config("composition"), config("composition_strict")]), images, prompts, [{}] * 70)
    assert right.dtype == torch.float32 and right.shape == (70, 2)
    assert right[:, 0].min() > 0.9 and (right[:, 1] == 1).all()
    wrong = scores("composition", images, prompts[35:] + prompts[:35])
    assert wrong.mean() < right[:, 0].mean() - 0.3


def test_composition_falls_when_an_object_vanishes():
    images, prompts = draw(["a red circle left of a blue square"] * 8, 0), ["a red circle left of a blue square"] * 8
    halved = images.clone()
    halved[:, :, 32:] = 190
    assert (scores("composition", halved, prompts) < scores("composition", images, prompts) - 0.5).all()
    assert (scores("composition_strict", halved, prompts) == 0).all()


def test_background_of_drawn_scenes_is_natural_and_damage_is_ordered(world):
    images, prompts = world
    rng = np.random.default_rng(4)
    blotches = ndimage.gaussian_filter(rng.normal(0, 1, images.shape), (0, 4, 4, 0))
    blotches *= 15 / blotches.std()

    def mean(change):
        return scores("background", behind_objects(images, change), prompts).mean().item()

    natural = scores("background", images, prompts)
    assert natural.mean() > 0.95 and natural.min() > 0.6
    fading = [mean(lambda pixels, keep=keep: 192 + keep * (pixels - 192)) for keep in (1, 0.5, 0.25, 0)]
    assert fading == sorted(fading, reverse=True)
    noise = [mean(lambda pixels, level=level: pixels + rng.normal(0, level, pixels.shape)) for level in (0, 4, 16)]
    assert noise == sorted(noise, reverse=True)
    for name, value in {
        "flat grey": fading[-1],
        "noise": noise[-1],
        "white": mean(lambda pixels: np.full_like(pixels, 255)),
        "blotches": mean(lambda pixels: pixels + blotches),
        "tint": mean(lambda pixels: pixels + np.array([14, 0, -14])),
    }.items():
        assert value < 0.45, name


def test_background_of_a_picture_without_one_is_zero():
    red = torch.tensor(scenes.COLORS["red"], dtype=torch.uint8).expand(1, 64, 64, 3)
    assert scores("background", red, ["a red circle"]).item() == 0


def test_background_takes_dark_pixels_for_text_only_where_text_is_asked_for(numbers):
    images, prompts = numbers
    asked = scores("background", images, prompts)
    unasked = scores("background", images, [prompt.split(" and ")[0] for prompt in prompts])
    assert asked.mean() > 0.9
    assert unasked.mean() < 0.3


def test_jpeg_size_is_that_of_the_file(world):
    images, prompts = world
    small = scores("jpeg_compressibility", images, prompts)
    file = io.BytesIO()
    Image.fromarray(images[0].numpy()).save(file, format="JPEG", quality=95)
    assert small[0].item() == pytest.approx(-len(file.getvalue()) / 1000)
    assert torch.equal(scores("jpeg_incompressibility", images, prompts), -small)
    flat = scores("jpeg_compressibility", torch.full_like(images[:1], 190), prompts[:1])
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 256, images[:1].shape).astype(np.uint8))
    assert flat > small.max() > small.min() > scores("jpeg_compressibility", noise, prompts[:1])


def test_ocr_reads_drawn_numbers(numbers, reader):
    images, prompts = numbers
    read = scores(reader, images, prompts)
    assert read.mean() >= 0.97
    others = [f'the text "{(int(ocr.quoted_text(p)) + 11) % 100:02}"' for p in prompts]  # both digits differ
    assert scores(reader, images, others).mean() < 0.2  # "12" read as "1" shares a digit with "21"


def test_ocr_falls_with_damage(numbers, reader):
    images, prompts = numbers
    half = images.clone()
    half[:, 32:, 32:] = 190  # about the second digit
    erased = images.clone()
    erased[:, 32:] = 190
    values = [scores(reader, damaged, prompts).mean().item() for damaged in (images, half, erased)]
    assert values[0] > values[1] + 0.2 > values[2] + 0.2
    assert values[2] == 0


def test_ocr_is_the_same_for_one_picture_and_a_batch(numbers, reader):
    images, prompts = numbers
    batch = scores(reader, images[:20], prompts[:20])  # two calls of the model
    assert torch.equal(batch[17:18], scores(reader, images[17:18], prompts[17:18]))


def test_ocr_reads_the_region_it_is_given(numbers):
    images, prompts = numbers
    upside = torch.cat([images[:4, 32:], images[:4, :32]], dim=1)
    upper = build_rewards([config("ocr", region=[0.0, 0.0, 0.5, 1.0], threads=2)])
    assert scores(upper, upside, prompts[:4]).mean() > 0.9


@pytest.mark.parametrize(
    ("read", "target", "expected"),
    [
        ("47", "47", 1),
        ("4", "47", 0.5),
        ("", "47", 0),
        ("4 7", "47", 1),
        ("OPEN", "open", 1),
        ("kitten", "sitting", 4 / 7),
    ]
    + [("a much longer line", "47", 0)],
)
def test_similarity(read, target, expected):
    assert ocr.similarity(read, target) == pytest.approx(expected)


def test_ranges_hold(world, numbers, reader):
    images, prompts = numbers
    built = build_rewards([config(name) for name in SCENES if name != "ocr"]) + reader
    values = score_all(built, images, prompts, [{}] * len(prompts))
    for column, reward in zip(values.T, built, strict=True):
        low, high = reward.value_range
        assert (low <= column).all() and (column <= high).all(), reward.name


# ---------------------------------------------------------------------------------------------------------- building


def test_weights_and_order_are_the_configs():
    built = build_rewards([config("composition", 0.7), config("jpeg_compressibility", -0.3)])
    assert [(r.name, r.weight) for r in built] == [("composition", 0.7), ("jpeg_compressibility", -0.3)]
    assert score_all([], torch.zeros(2, 64, 64, 3, dtype=torch.uint8), ["a", "b"], [{}, {}]).shape == (2, 0)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (config("compositon"), "unknown reward 'compositon'; did you mean 'composition'.*built in: composition, "),
        (config("hps"), "unknown reward 'hps'.*your own: 'module:function'"),
        (config("composition", strict=True), "reward 'composition' has no param 'strict'; it takes: none"),
        (config("ocr", regions=[0, 0, 1, 1]), "reward 'ocr' has no param 'regions'; it takes: region, threads"),
        (config("ocr", region=[0.5, 0, 0.4, 1]), r"reward 'ocr': region must be \[top, left, bottom, right\]"),
        (config("ocr", region="lower"), "reward 'ocr': region must be"),
        (config("ocr", threads=0), "reward 'ocr': threads must be a whole number of at least 1, got 0"),
        (config("no_such_module:f"), "reward 'no_such_module:f': cannot import module 'no_such_module'"),
        (config("json:no_such"), r"module 'json' \(.*\) has no function or class 'no_such'"),
        (config("json:dumps"), "dumps must take .images, prompts, metadata. and its params as keywords"),
        (config("json:JSONDecoder", depth=3), "JSONDecoder must take its params as keywords .*'depth'"),
        (config("json:JSONDecoder"), r"class JSONDecoder has no method score\(images, prompts, metadata\)"),
        (config("composition", device="cuda"), "'composition' computes on the CPU; leave its device 'cuda' out"),
        (RewardConfig(name="composition", params={"device": "cuda"}), "device is no param but a key beside them"),
    ],
)
def test_bad_entries_are_named(entry, message):
    with pytest.raises(UserError, match=message):
        build_rewards([entry])


def test_devices(monkeypatch):
    seen = []

    def judge(images, prompts, metadata, device="none"):
        seen.append(device)
        return [0] * len(prompts)

    monkeypatch.setitem(sys.modules, "device_reward", SimpleNamespace(judge=judge, __file__="x"))
    given = torch.zeros(1, 8, 8, 3, dtype=torch.uint8), ["a"], [{}]
    score_all(build_rewards([config("device_reward:judge")]), *given)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)  # as the third rank of a machine has it
    for device in ("cuda", "cuda:3"):
        score_all(build_rewards([config("device_reward:judge", device=device)]), *given)
    assert seen == ["cpu", "cuda:2", "cuda:3"]
    with pytest.raises(UserError, match="device 'cuda:4' is not there; this machine has 4 GPUs"):
        build_rewards([config("device_reward:judge", device="cuda:4")])
    with pytest.raises(UserError, match="""device 'gpu' is none of "cpu", "cuda" and "cuda:1"$"""):
        build_rewards([config("device_reward:judge", device="gpu")])


def test_the_same_reward_twice_is_refused():
    with pytest.raises(UserError, match="'composition' is listed twice"):
        build_rewards([config("composition"), config("composition", 2.0)])


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(ocr.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install 'rapidocr"):
        build_rewards([config("ocr")])


def test_every_name_has_its_module():
    folder = Path(rewards.__file__).parent
    assert all((folder / f"{place[1:].split(':')[0]}.py").is_file() for place in BUILT_IN.values())


def test_a_missing_library_is_named_with_the_extra(monkeypatch):
    monkeypatch.setitem(local.BUILT_IN, "needy", ".no_such_module:Needy")
    expected = r"reward 'needy' needs more packages \(No module named .*no_such_module'\): pip install 'latent-critic"
    with pytest.raises(UserError, match=expected + r"\[rewards\]'"):
        build_rewards([config("needy")])


def test_the_readme_lists_every_reward_and_its_example_works(tmp_path, monkeypatch):
    page = (Path(rewards.__file__).parent / "README.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", page.partition("## Your own")[0], re.MULTILINE) == list(BUILT_IN)
    function, scorer = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(function.splitlines()) <= 10
    (tmp_path / "my_rewards.py").write_text(function)
    (tmp_path / "my_scorer.py").write_text(scorer)
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    warmth = build_rewards([config("my_rewards:warmth", gain=2.0)])
    (sharpness,) = build_rewards([config("my_scorer:Sharpness", side=4)])
    for module in ("my_rewards", "my_scorer"):
        monkeypatch.delitem(sys.modules, module)
    assert sys.path == path
    images = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    images[..., 0] = 51
    # gain 2 x (51 - 0) / 255
    torch.testing.assert_close(
        score_all(warmth, images, ["a", "b"], [{}, {"cold": True}]), torch.tensor([[0.4], [-0.4]])
    )
    images[1, :, ::2] = 255  # columns of light
    flat, striped = judge(sharpness, images, ["a", "b"], [{}, {}]).values
    assert flat == 0 < striped <= 1
    with pytest.raises(UserError, match="'my_scorer:Sharpness' judges what a prompt says, and this one is empty"):
        check_prompts([sharpness], [Prompt("a"), Prompt("")])


def test_a_class_is_built_once_and_says_what_it_takes(tmp_path, monkeypatch):
    (tmp_path / "class_reward.py").write_text(
        """
import numpy as np
from PIL import Image

class Judge:
    images, value_range, is_elsewhere, built = "pil", [0, 255], True, 0

    def __init__(self, channel, device="none"):
        self.channel, self.device = channel, device
        Judge.built += 1

    def score(self, images, prompts, metadata):
        assert all(isinstance(image, Image.Image) for image in images)
        values = [np.asarray(image)[0, 0, self.channel] for image in images]
        return values, {"batch": [len(prompts)] * len(images), self.device: [m["n"] for m in metadata]}
"""
    )
    monkeypatch.chdir(tmp_path)
    (built,) = build_rewards([config("class_reward:Judge", channel=2, batch_size=2)])
    module = sys.modules["class_reward"]
    monkeypatch.delitem(sys.modules, "class_reward")
    images = torch.tensor([3, 1, 4], dtype=torch.uint8)[:, None, None, None] * torch.tensor(
        [0, 0, 1], dtype=torch.uint8
    )
    found = judge(built, images, ["a", "b", "c"], [{"n": n} for n in range(3)])
    check_prompts([built], [Prompt("anything")])  # it does not mind
    assert (found.values.tolist(), module.Judge.built) == ([3, 1, 4], 1)
    assert {name: column.tolist() for name, column in found.extras.items()} == {"batch": [2, 2, 1], "cpu": [0, 1, 2]}
    assert built.value_range == (0, 255) and built.is_elsewhere


# ---------------------------------------------------------------------------------------------------------- checking


@pytest.fixture
def custom(tmp_path, monkeypatch):
    """Builds a reward from the body of a function of (images, prompts, metadata)."""

    def build(body):
        (tmp_path / "bad_rewards.py").write_text(f"import math\ndef judge(images, prompts, metadata):\n    {body}\n")
        monkeypatch.chdir(tmp_path)
        monkeypatch.delitem(sys.modules, "bad_rewards", raising=False)
        return build_rewards([config("bad_rewards:judge")])

    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # two versions of one file within a second
    yield build
    sys.modules.pop("bad_rewards", None)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "return [1 / len(p.strip('b')) for p in prompts]",
            r"'bad_rewards:judge' failed on prompt 'b': ZeroDivisionError: .*bad_rewards.py:3$",
        ),
        (
            "return [1 / (4 - len(prompts))] * 3 if len(prompts) != 3 else 1 / 0",
            r"'bad_rewards:judge' failed on prompt 'a': ZeroDivisionError",
        ),
        ("return [math.nan if p == 'c' else 1 for p in prompts]", "'bad_rewards:judge' returned nan for prompt 'c'"),
        ("return [math.inf if p == 'b' else 1 for p in prompts]", "'bad_rewards:judge' returned inf for prompt 'b'"),
        ("return [1e300] * 3", "'bad_rewards:judge' returned inf for prompt 'a'"),
        ("return [1.0, 2.0]", r"'bad_rewards:judge' returned shape \[2\] for 3 pictures.*'a'.*one number a picture"),
        ("return images.float().mean()", r"'bad_rewards:judge' returned shape \[\] for 3 pictures"),
        ("return None", "'bad_rewards:judge' returned NoneType for prompt 'a', not numbers"),
        ("return list('abc')", "'bad_rewards:judge' returned list for prompt 'a', not numbers"),
        ("return [1, 2, 3], {'x': [1, 2]}", r"'bad_rewards:judge' returned shape \[2\] as 'x' for 3 pictures"),
        ("return [1, 2, 3], {'x': [1, 2, math.inf]}", "'bad_rewards:judge' returned inf as 'x' for prompt 'c'"),
        ("return [1, 2, 3], {'x': None}", "'bad_rewards:judge' returned NoneType as 'x' for prompt 'a', not numbers"),
        ("return ([1, 2, 3], {}, 0)", "'bad_rewards:judge' returned tuple for prompt 'a', not numbers"),
    ],
)
def test_bad_rewards_are_named_with_their_prompt(custom, body, message):
    with pytest.raises(RewardError, match=message):
        score_all(custom(body), torch.zeros(3, 8, 8, 3, dtype=torch.uint8), ["a", "b", "c"], [{}] * 3)


@pytest.mark.parametrize(
    "body", ["return [1, 2, 3]", "import numpy as np; return np.array([1.0, 2, 3])", "return images[:, 0, 0, 0] + 1"]
)
def test_lists_arrays_and_tensors_are_scores(custom, body):
    images = torch.tensor([0, 1, 2], dtype=torch.uint8)[:, None, None, None].expand(3, 8, 8, 3)
    values = score_all(custom(body), images, ["a", "b", "c"], [{}] * 3)
    assert values.dtype == torch.float32
    assert values.tolist() == [[1.0], [2.0], [3.0]]


@pytest.mark.parametrize(
    ("value", "value_range", "message"),
    [
        (-0.01, (0, 1), r"returned -0.01, below its range of 0 to 1, for prompt 'c'"),
        (1.01, (0, 1), "returned 1.01, above its range of 0 to 1, for prompt 'c'"),
        (0.5, (float("-inf"), 0), "returned 0.5, above its range of -inf to 0, for"),
        (-5, (0, float("inf")), "returned -5, below its range of 0 to inf, for"),
        (-0.00001, (0, 1), None),
        (1.00001, (0, 1), None),
        (1e30, ANY_VALUE, None),
    ],
)
def test_scores_beyond_the_declared_range(value, value_range, message):
    reward = Reward("r", 1.0, value_range, lambda images, *_: [0.0, 0.0, value], lambda prompts, metadata: None)
    given = torch.zeros(3, 8, 8, 3, dtype=torch.uint8), ["a", "b", "c"], [{}] * 3
    if message is None:  # a rounding beyond it is none
        assert judge(reward, *given).values[2].item() == pytest.approx(value, rel=1e-6)
    else:
        with pytest.raises(RewardError, match=f"^reward 'r' {message}"):
            judge(reward, *given)


def test_extras_of_batches_are_joined_and_gaps_are_nan():
    def score(images, prompts, metadata):
        return [len(prompts)] * len(prompts), {prompts[0]: [7.0] * len(prompts)}

    reward = Reward("r", 1.0, ANY_VALUE, score, lambda prompts, metadata: None, batch_size=2)
    found = judge(reward, torch.zeros(3, 8, 8, 3, dtype=torch.uint8), ("a", "b", "c"), ({},) * 3)
    assert found.values.tolist() == [2, 2, 1]
    np.testing.assert_array_equal(found.extras["a"], [7, 7, np.nan])
    np.testing.assert_array_equal(found.extras["c"], [np.nan, np.nan, 7])


def test_prompts_that_a_reward_cannot_judge_are_named_before_a_run(reader):
    scene = build_rewards([config("composition"), config("background")])
    check_prompts(scene, [Prompt("a red circle"), Prompt("two blue crosses")])
    check_prompts(reader, [Prompt('a sign that says "open"')])
    with pytest.raises(UserError, match="x.txt:2: prompt 'a dog' is not a scene caption"):
        check_prompts(scene, [Prompt("a red circle"), Prompt("a dog", source="x.txt:2")])
    with pytest.raises(
        UserError, match="'ocr' needs the text to draw in double quotes; prompt 'a red circle' has none"
    ):
        check_prompts(reader, [Prompt("a red circle")])
    with pytest.raises(UserError, match="'ocr' needs the text"):
        score_all(reader, torch.zeros(1, 64, 64, 3, dtype=torch.uint8), ["a red circle"], [{}])


def test_pictures_of_another_size_are_named():
    with pytest.raises(UserError, match="'composition' judges 64 x 64 pictures.*these are 8 x 16"):
        score_all(
            build_rewards([config("composition")]), torch.zeros(1, 8, 16, 3, dtype=torch.uint8), ["a circle"], [{}]
        )
