"""Rewards by models: the published formulas, computed anew from the same files, and which picture is judged by which
prompt. Models are small and random; their files are those that a hub id or a local folder has."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from latent_critic.engine.rewards.aesthetic import Aesthetic
from latent_critic.engine.rewards.clipscore import ClipScore
from latent_critic.engine.rewards.hpsv2 import HPSv2
from latent_critic.engine.rewards.imagereward import ImageReward
from latent_critic.engine.rewards.pickscore import PickScore

from . import reward_models as small

NAMES = ("pickscore", "clipscore", "aesthetic", "hpsv2", "imagereward")
PROMPTS, PICTURES = small.PROMPTS, small.pictures()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Folders of all models, and what was written into them."""
    root = tmp_path_factory.mktemp("models")
    found = {"root": root, "clip": small.write_clip(root / "clip")}
    small.write_clip(root / "pick")
    for folder in ("clip", "tokenizer", "base"):
        small.write_clip_tokenizer(root / folder)
    small.clip_config().save_pretrained(root / "base")
    small.write_bert_tokenizer(root / "bert")
    for name, shapes in (
        ("head", small.linear_head("", 24)),
        ("hpsv2", small.open_clip()),
        ("imagereward", small.image_reward()),
    ):
        found[name] = small.checkpoint(shapes)
        (root / name).mkdir()
    torch.save(found["head"], root / "head" / "aesthetic-model.pth")
    torch.save({"state_dict": found["hpsv2"]}, root / "hpsv2" / "HPS_v2.1_compressed.pt")
    torch.save(found["imagereward"], root / "imagereward" / "ImageReward.pt")
    return found


@pytest.fixture(scope="module")
def make(files):
    """make(name, **options): the reward of that name, from its folder."""
    root = files["root"]
    folders = {
        "pickscore": (PickScore, {"model": root / "pick", "tokenizer": root / "tokenizer"}),
        "clipscore": (ClipScore, {"model": root / "clip"}),
        "aesthetic": (Aesthetic, {"model": root / "clip", "head": root / "head"}),
        "hpsv2": (HPSv2, {"model": root / "hpsv2", "clip": root / "base"}),
        "imagereward": (ImageReward, {"model": root / "imagereward", "tokenizer": root / "bert"}),
    }

    def build(name, **options):
        kind, params = folders[name]
        return kind(**{key: str(path) for key, path in params.items()}, **options)

    return build


@pytest.fixture(scope="module")
def rewards(make):
    return {name: make(name) for name in NAMES}


def scores(reward, images=PICTURES, prompts=PROMPTS):
    return np.array(reward.score(images, prompts, [{}] * len(prompts)))


def middle(picture, start):
    """By Pillow: the shorter side resized to SIDE, and SIDE pixels of the longer one from start(too many)."""
    image = Image.fromarray(picture.numpy())
    size = [int(small.SIDE * length / min(image.size)) for length in image.size]
    left, top = (start(length - small.SIDE) for length in size)
    cut = image.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + small.SIDE, top + small.SIDE))
    return small.normalised(np.array(cut, np.float64))


def framed(picture):
    """The longer side resized to SIDE without rounding, and black beside the shorter one."""
    size = [round(small.SIDE * length / max(picture.shape)) for length in picture.shape[:2]]
    rows, columns = map(small.bicubic, picture.shape[:2], size)
    top, left = ((small.SIDE - length) // 2 for length in size)
    frame = np.zeros((small.SIDE, small.SIDE, 3))
    frame[top : top + size[0], left : left + size[1]] = np.einsum(
        "ij,jkc,lk->ilc", rows, picture.numpy().astype(np.float64), columns
    )
    return small.normalised(frame)


@torch.no_grad()
def embeddings(clip, picture, prompt):
    """Of a picture and a prompt, by the parts of a CLIP in float32: float64 [24] each."""
    pixels = middle(picture, lambda rest: rest // 2).float()
    seen = clip.vision_model.post_layernorm(clip.vision_model(pixel_values=pixels).last_hidden_state[0, 0])
    read = clip.text_model(input_ids=torch.tensor([small.clip_tokens(prompt)])).last_hidden_state[0, -1]
    return (clip.visual_projection.weight @ seen).double(), (clip.text_projection.weight @ read).double()


def formula(name, files, pictures=PICTURES, prompts=PROMPTS):
    """The scores of the pictures with their prompts, and how exactly float32 can know them."""
    pairs = list(zip(pictures, prompts, strict=True))
    if name == "hpsv2":
        read = [small.open_clip_cosine(files[name], framed(x), small.clip_tokens(text)) for x, text in pairs]
        return np.array(read), small.ROUNDING
    if name == "imagereward":
        seen = [(middle(x, lambda rest: round(rest / 2)), small.bert_tokens(text)) for x, text in pairs]
        read = np.array([small.image_reward_score(files[name], *pair) for pair in seen])
        return read, small.ROUNDING * np.abs(read).max()
    found = [embeddings(files["clip"], x, text) for x, text in pairs]
    if name == "aesthetic":
        read = np.array([small.head_score(files["head"], seen / seen.norm()) for seen, _ in found])
        return read, small.ROUNDING * np.abs(read).max()
    scale = math.exp(4.0) / {"pickscore": 26, "clipscore": 100}[name]
    read = [scale * (seen @ text / seen.norm() / text.norm()).item() for seen, text in found]
    return np.array(read), small.ROUNDING * scale


@pytest.fixture(scope="module")
def expected(files):
    return {name: formula(name, files) for name in NAMES}


# ------------------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_those_of_the_published_formula(rewards, expected, name):
    values, rounding = expected[name]
    assert np.ptp(values) > 1000 * rounding  # else the wrong picture might pass
    np.testing.assert_allclose(scores(rewards[name]), values, rtol=0, atol=rounding)
    low, high = rewards[name].value_range
    assert (low <= values).all() and (values <= high).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_judged_as_its_pictures_are_one_by_one(rewards, expected, name):
    _, rounding = expected[name]
    alone = [scores(rewards[name], PICTURES[i : i + 1], PROMPTS[i : i + 1]).item() for i in range(len(PROMPTS))]
    np.testing.assert_allclose(scores(rewards[name]), alone, rtol=0, atol=2 * rounding)


@pytest.mark.parametrize("name", NAMES)
def test_each_picture_is_judged_by_its_own_prompt(rewards, expected, name):
    _, rounding = expected[name]
    together, order = scores(rewards[name]), [3, 0, 4, 1, 2]
    moved = scores(rewards[name], PICTURES[order], [PROMPTS[i] for i in order])
    np.testing.assert_allclose(moved, together[order], rtol=0, atol=2 * rounding)
    others = scores(rewards[name], PICTURES, [PROMPTS[i] for i in order])
    if name == "aesthetic":
        np.testing.assert_array_equal(others, together)  # it reads no prompt
    else:
        assert np.abs(others - together).min() > 10 * rounding


@pytest.mark.parametrize(("name", "read"), [("pickscore", 10), ("clipscore", 10), ("hpsv2", 10), ("imagereward", 33)])
def test_what_is_beyond_the_models_tokens_is_not_read(rewards, name, read):
    separator = " " if name == "imagereward" else ""  # a token is a word or a character
    long = ["cat"] * 40 if name == "imagereward" else ["c"] * 40
    changed = [*long[: read - 1], "dog" if name == "imagereward" else "d", *long[read:]]
    beyond = [*long[:read], "dog" if name == "imagereward" else "d", *long[read + 1 :]]
    same, other, last = (
        scores(rewards[name], PICTURES[:1], [separator.join(words)]).item() for words in (long, beyond, changed)
    )
    assert same == other != last


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_the_same_score_less_exactly(make, rewards, name):
    half = make(name, dtype="bfloat16")
    exact, rough = scores(rewards[name]), scores(half)
    # bfloat16 rounds 2^16 times as coarsely.
    spread = np.abs(exact).max() if name in ("aesthetic", "imagereward") else math.exp(4.0) / 26
    assert 0 < np.abs(rough - exact).max() < 2**16 * small.ROUNDING * spread


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_on_a_gpu_models_are_float16(make, rewards, name):
    exact, rough = scores(rewards[name]), scores(make(name, device="cuda"))
    spread = np.abs(exact).max() if name in ("aesthetic", "imagereward") else math.exp(4.0) / 26
    assert 0 < np.abs(rough - exact).max() < 2**13 * small.ROUNDING * spread


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_is_kept_and_any_prompt_will_do(rewards, name):
    parts = [part for part in vars(rewards[name]).values() if isinstance(part, torch.nn.Module)]
    if judge := vars(rewards[name]).get("_judge"):
        parts = [judge._clip]
    assert parts and not any(part.training for part in parts)
    assert not any(parameter.requires_grad for part in parts for parameter in part.parameters())
    assert np.isfinite(scores(rewards[name], PICTURES[:1], [""])).all()


@pytest.mark.parametrize("name", ["clipscore", "hpsv2", "imagereward"])
def test_upright_pictures_are_seen_as_the_original_sees_them(rewards, files, name):
    upright = PICTURES[:2].transpose(1, 2)
    values, rounding = formula(name, files, upright, PROMPTS[:2])
    np.testing.assert_allclose(scores(rewards[name], upright, PROMPTS[:2]), values, rtol=0, atol=rounding)


def test_hpsv2_reads_entities_as_open_clip_does(rewards):
    plain, entity = (scores(rewards["hpsv2"], PICTURES[:1], [text]).item() for text in ("a & b", "a &amp;amp; b"))
    assert plain == entity


def test_square_pictures_of_the_models_size_are_only_normalised(rewards, files):
    picture = PICTURES[:1, :28, :28]
    pixels = small.normalised(picture[0].numpy().astype(np.float64))
    value = small.open_clip_cosine(files["hpsv2"], pixels, small.clip_tokens(PROMPTS[0]))
    assert scores(rewards["hpsv2"], picture, PROMPTS[:1]).item() == pytest.approx(value, abs=small.ROUNDING)


# ------------------------------------------------------------------------------------------------------------- files


def test_safetensors_and_sharded_weights_give_the_same_scores(files, rewards, tmp_path):
    save_file(files["hpsv2"], tmp_path / "hps.safetensors")
    again = HPSv2(str(tmp_path), "hps.safetensors", str(files["root"] / "base"))
    np.testing.assert_array_equal(scores(again), scores(rewards["hpsv2"]))
    small.write_clip(tmp_path / "clip").save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 1
    small.write_clip_tokenizer(tmp_path / "sharded")
    np.testing.assert_array_equal(scores(ClipScore(str(tmp_path / "sharded"))), scores(rewards["clipscore"]))
