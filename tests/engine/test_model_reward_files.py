"""Files of reward models: one message that names the fix for whatever is missing, damaged, or of another model."""

import json
import re

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from latent_critic.engine.errors import UserError
from latent_critic.engine.rewards.aesthetic import Aesthetic
from latent_critic.engine.rewards.clipscore import ClipScore
from latent_critic.engine.rewards.hpsv2 import HPSv2
from latent_critic.engine.rewards.imagereward import ImageReward
from latent_critic.engine.rewards.pickscore import PickScore

from . import reward_models as small


@pytest.fixture
def clip(tmp_path):
    """Folder of a CLIP and its tokenizer."""
    small.write_clip(tmp_path / "clip")
    small.write_clip_tokenizer(tmp_path / "clip")
    return tmp_path / "clip"


@pytest.fixture
def bert(tmp_path):
    small.write_bert_tokenizer(tmp_path / "bert")
    return tmp_path / "bert"


def raises(message):
    return pytest.raises(UserError, match=f"(?s)^{message}")


def rewrite(path, change):
    """Changes the weights in a safetensors file."""
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("kind", "name", "model", "file"),
    [
        (
            PickScore,
            "pickscore",
            "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
            "",
        ),  # the tokenizer, which is looked for first
        (ClipScore, "clipscore", "openai/clip-vit-large-patch14", ""),
        (HPSv2, "hpsv2", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", ""),
        (ImageReward, "imagereward", "google-bert/bert-base-uncased", ""),
        (Aesthetic, "aesthetic", "trl-lib/ddpo-aesthetic-predictor", " aesthetic-model.pth"),
    ],
)
def test_without_network_a_hub_id_is_answered_with_how_to_get_it(kind, name, model, file, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with raises(
        rf"reward '{name}': '{model}' is no local folder and could not be downloaded as a hub id: .*\n"
        rf"Without network give a local folder: `hf download {model}{file} --local-dir FOLDER` makes one"
    ):
        kind()


def test_a_folder_that_is_not_there_is_named(clip, bert, tmp_path):
    gone = str(tmp_path / "gone")
    for name, build in {
        "pickscore": lambda: PickScore(gone, str(clip)),
        "clipscore": lambda: ClipScore(gone),
        "hpsv2": lambda: HPSv2(gone, clip=str(clip)),
        "imagereward": lambda: ImageReward(gone, tokenizer=str(bert)),
        "aesthetic": lambda: Aesthetic(str(clip), head=gone),
    }.items():
        with raises(rf"reward '{name}': '{re.escape(gone)}' is no local folder and could not be downloaded"):
            build()


def test_what_a_folder_lacks_is_named(clip, bert, tmp_path):
    (tmp_path / "empty").mkdir()
    empty = str(tmp_path / "empty")
    with raises(r"reward 'clipscore': .*empty has no tokenizer: none of tokenizer.json, vocab.json, vocab.txt"):
        ClipScore(empty)
    with raises(r"reward 'hpsv2': the folder .*empty has no HPS_v2.1_compressed.pt"):
        HPSv2(empty, clip=str(clip))
    with raises(r"reward 'imagereward': the folder .*empty has no ImageReward.pt"):
        ImageReward(empty, tokenizer=str(bert))
    with raises(r"reward 'aesthetic': the folder .*empty has no aesthetic-model.pth"):
        Aesthetic(str(clip), empty)
    with raises(r"reward 'pickscore': no configuration in .*empty.config.json"):
        PickScore(empty, str(clip))
    small.clip_config().save_pretrained(empty)
    with raises(r"reward 'pickscore': .*empty has no weights: no model\*.safetensors"):
        PickScore(empty, str(clip))
    # transformers makes a tokenizer for a CLIP's folder without one: it knows no word.
    (clip / "vocab.json").unlink()
    with raises(r"reward 'clipscore': .*clip has no tokenizer"):
        ClipScore(str(clip))


def test_a_tokenizer_or_configuration_of_another_model_is_named(clip, bert, tmp_path):
    vocabulary = json.loads((clip / "vocab.json").read_text())
    (tmp_path / "larger").mkdir()
    for name in ("merges.txt", "tokenizer_config.json"):
        (tmp_path / "larger" / name).write_text((clip / name).read_text())
    (tmp_path / "larger" / "vocab.json").write_text(json.dumps(vocabulary | {"ü": len(vocabulary)}))
    with raises(r"reward 'pickscore': the tokenizer of .*larger has 81 tokens, its CLIP 80; give the one that belongs"):
        PickScore(str(clip), str(tmp_path / "larger"))
    (tmp_path / "larger" / "vocab.json").write_text("{")
    with raises(r"reward 'pickscore': the tokenizer of .*larger cannot be read: "):
        PickScore(str(clip), str(tmp_path / "larger"))
    (bert / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with raises(r"reward 'pickscore': .*bert.config.json is of a model 'bert', not of a 'clip'"):
        PickScore(str(bert), str(clip))
    (bert / "config.json").write_text("{")
    with raises(r"reward 'pickscore': no configuration in .*bert.config.json: "):
        PickScore(str(bert), str(clip))


def test_weights_that_are_missing_unknown_or_of_another_shape_are_named_at_once(clip):
    def change(state):
        del state["visual_projection.weight"]
        state["text_projection.weight"] = torch.zeros(3, 3)
        state |= {f"extra.{i}": torch.zeros(1) for i in range(4)}

    rewrite(clip / "model.safetensors", change)
    with raises(
        r"reward 'clipscore': .*clip does not hold this model's weights: 1 missing \(visual_projection.weight\); "
        r"4 unknown \(extra.0, extra.1, extra.2, ...\); 1 of another shape \(text_projection.weight\)$"
    ):
        ClipScore(str(clip))


def test_old_clips_hold_the_numbers_of_their_positions(clip):
    rewrite(
        clip / "model.safetensors",
        lambda state: state.update({"text_model.embeddings.position_ids": torch.arange(small.TOKENS)[None]}),
    )
    ClipScore(str(clip))


@pytest.mark.parametrize(
    ("name", "shapes", "file"),
    [
        ("hpsv2", small.open_clip(), "HPS_v2.1_compressed.pt"),
        ("imagereward", small.image_reward(), "ImageReward.pt"),
        ("aesthetic", small.linear_head("", 24), "aesthetic-model.pth"),
    ],
)
def test_checkpoints_of_another_model_are_told_by_their_weights(name, shapes, file, clip, bert, tmp_path):
    build = {
        "hpsv2": lambda: HPSv2(str(tmp_path), clip=str(clip)),
        "imagereward": lambda: ImageReward(str(tmp_path), tokenizer=str(bert)),
        "aesthetic": lambda: Aesthetic(str(clip), str(tmp_path)),
    }[name]
    whole = small.checkpoint(shapes)
    missing, reshaped = list(whole)[-2:]
    wrong = {key: x for key, x in whole.items() if key != missing} | {"spare": torch.ones(1), reshaped: torch.ones(7)}
    torch.save(wrong, tmp_path / file)
    with raises(
        rf"reward '{name}': .*{file} does not hold this model's weights: "
        r"1 missing \(.+\); 1 unknown \(spare\); 1 of another shape \(.+\)$"
    ):
        build()
    torch.save({"epoch": 3}, tmp_path / file)
    with raises(rf"reward '{name}': .*{file} is no state dict$"):
        build()
    (tmp_path / file).write_bytes(b"<!doctype html>")
    with raises(rf"reward '{name}': .*{file} is damaged or no file of plain tensors: "):
        build()


def test_a_checkpoint_without_a_blip_is_told(bert, tmp_path):
    torch.save(small.checkpoint(small.open_clip()), tmp_path / "ImageReward.pt")
    with raises(
        r"reward 'imagereward': .*ImageReward.pt is no ImageReward checkpoint: it has no "
        "'blip.visual_encoder.pos_embed'$"
    ):
        ImageReward(str(tmp_path), tokenizer=str(bert))


class Trap:
    """Makes a file where a pickle that holds it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_no_code_of_a_checkpoint_is_run(clip, tmp_path):
    state = small.checkpoint(small.open_clip())
    torch.save({"state_dict": state, "options": Trap(tmp_path / "sprung")}, tmp_path / "HPS_v2.1_compressed.pt")
    with raises(r"reward 'hpsv2': .*HPS_v2.1_compressed.pt is damaged or no file of plain tensors: "):
        HPSv2(str(tmp_path), clip=str(clip))
    assert not (tmp_path / "sprung").exists()


def test_damaged_safetensors_and_unknown_dtypes_are_named(clip):
    with raises(r"reward 'clipscore': dtype 'fp16' is none of auto, float32, float16, bfloat16$"):
        ClipScore(str(clip), dtype="fp16")
    (clip / "model.safetensors").write_bytes(b"{}")
    with raises(r"reward 'clipscore': .*model.safetensors is damaged or no file of plain tensors: "):
        ClipScore(str(clip))
