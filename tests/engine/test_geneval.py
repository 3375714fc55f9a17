"""GenEval: its rules on scenes made to keep or to break one of them, and the way from pictures to its scores."""

import itertools
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor

from latent_critic.engine.config import RewardConfig
from latent_critic.engine.embedded import train_tiny_dit as tiny
from latent_critic.engine.errors import UserError
from latent_critic.engine.prompts import load_prompts
from latent_critic.engine.rewards import build_rewards, check_prompts, geneval
from latent_critic.engine.rewards import geneval_rules as rules
from latent_critic.engine.rewards.geneval_rules import CLASSES, COLORS, Found, Thresholds

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
DIRECTIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
OFFICIAL = Thresholds()


def found(score=0.95, at=(100.0, 100.0), size=20, color=None):
    """A square object around a point."""
    (x, y), half = at, size / 2
    return Found((x - half, y - half, x + half, y + half), score, color=color)


def several(count, score=0.95):
    return [found(score, (30.0 * i, 100.0)) for i in range(count)]


def scores(metadata, objects, thresholds=OFFICIAL):
    """(official, strict, dense) of detected objects by class, colours known."""
    task = rules.read_task("a photo", metadata)
    kept = rules.keep(objects, task, thresholds)
    return tuple(rules.SCORES[name](task, kept, thresholds) for name in ("official", "strict", "dense"))


# ------------------------------------------------------------------------------------------------ scenes by design
#
# Each gives what is special about it, `include` and `exclude`, the objects by class, and (official, strict, dense) as
# they follow from the rule that the scene was made for.


def single_object():
    for a, b in zip(CLASSES[::8], CLASSES[3::8], strict=True):
        asked = {"include": [{"class": a, "count": 1}]}
        yield "one, just certain enough", asked, {a: [found(0.31)]}, (1, 1, 1)
        yield "one, at the threshold", asked, {a: [found(0.3)]}, (0, 0, 0)
        yield "nothing", asked, {}, (0, 0, 0)
        yield "another class", asked, {b: [found()]}, (0, 0, 0)
        yield "another class beside it", asked, {a: [found()], b: several(3)}, (1, 1, 1)
        yield "two", asked, {a: several(2)}, (1, 0, 0)
        yield "two, one of them uncertain", asked, {a: [found(0.2), found(0.8)]}, (1, 1, 1)
        yield "five: 1 - 4/1", asked, {a: several(5)}, (1, 0, -3)
        yield "twenty, of which sixteen count", asked, {a: several(20)}, (1, 0, -14)


def two_object():
    for a, b, c in zip(CLASSES[::8], CLASSES[3::8], CLASSES[5::8], strict=True):
        asked = {"include": [{"class": a, "count": 1}, {"class": b, "count": 1}]}
        yield "both", asked, {a: [found()], b: [found(0.4)]}, (1, 1, 1)
        yield "both, and a third class", asked, {a: [found()], b: [found()], c: several(2)}, (1, 1, 1)
        yield "the first", asked, {a: [found()]}, (0, 0, 1 / 2)
        yield "the second", asked, {b: [found()], c: [found()]}, (0, 0, 1 / 2)
        yield "neither", asked, {c: several(2)}, (0, 0, 0)
        yield "the second at the threshold", asked, {a: [found()], b: [found(0.3)]}, (0, 0, 1 / 2)
        yield "two of the second", asked, {a: [found()], b: several(2)}, (1, 0, 1 / 2)
        yield "three of the first alone", asked, {a: several(3)}, (0, 0, -1 / 2)


def counting():
    for n, (a, b) in itertools.product((2, 3, 4), zip(CLASSES[::16], CLASSES[5::16], strict=True)):
        asked = {"include": [{"class": a, "count": n}], "exclude": [{"class": a, "count": n + 1}]}
        yield "so many, just certain enough", asked, {a: several(n, 0.91)}, (1, 1, 1)
        yield "so many, at the threshold", asked, {a: several(n, 0.9)}, (0, 0, 0)
        yield "one too few", asked, {a: several(n - 1)}, (0, 0, (n - 1) / n)
        yield "one too many", asked, {a: several(n + 1)}, (0, 0, (n - 1) / n)
        yield "twice as many", asked, {a: several(2 * n)}, (0, 0, 0)
        yield "twice as many and one", asked, {a: several(2 * n + 1)}, (0, 0, -1 / n)
        yield "uncertain ones beside them", asked, {a: several(3, 0.5) + several(n)}, (1, 1, 1)
        yield "another class beside them", asked, {a: several(n), b: several(n + 1)}, (1, 1, 1)


def colors():
    for color, a, b in zip(COLORS, CLASSES[1::8], CLASSES[4::8], strict=True):
        wrong = COLORS[COLORS.index(color) - 1]
        asked = {"include": [{"class": a, "count": 1, "color": color}]}
        two = {"include": [{"class": a, "count": 2, "color": color}]}
        right, other = found(0.9, color=color), found(0.8, color=wrong)
        yield "right", asked, {a: [right]}, (1, 1, 1)
        yield "wrong", asked, {a: [other]}, (0, 0, 1 / 2)
        yield "no object", asked, {}, (0, 0, 0)
        yield "the colour on another class", asked, {b: [right], a: [other]}, (0, 0, 1 / 2)
        yield "the more certain of two is right", asked, {a: [other, right]}, (1, 0, 0)
        yield "the less certain of two is right", asked, {a: [found(0.7, color=color), other]}, (0, 0, 0)
        yield "two of two are right", two, {a: [right, right]}, (1, 1, 1)
        yield "one of two is right", two, {a: [right, other]}, (0, 0, (1 + 1 / 2) / 2)


def position():
    for (relation, (x, y)), (a, b) in itertools.product(DIRECTIONS.items(), [CLASSES[:2], CLASSES[40:42]]):
        wanted = {"class": b, "count": 1, "position": [relation, 0]}
        asked = {"include": [{"class": a, "count": 1}, wanted]}
        coloured = {"include": [{"class": a, "count": 1}, {**wanted, "color": "red"}]}
        target_coloured = {"include": [{"class": a, "count": 1, "color": "red"}, wanted]}
        two = {"include": [{"class": a, "count": 1}, {**wanted, "count": 2}]}

        def at(along, across=0.0, score=0.95, size=20, color=None, x=x, y=y):
            """An object so far from (100, 100) in the relation's direction and at right angles to it."""
            return found(score, (100 + along * x + across * y, 100 + along * y + across * x), size, color)

        target = [at(0)]
        right, wrong = (1, 1, 1), (0, 0, (1 + 1 + 0 + 1) / 4)
        yield "far in its direction", asked, {a: target, b: [at(60)]}, right
        yield "far in the opposite one", asked, {a: target, b: [at(-60)]}, wrong
        yield "beside it", asked, {a: target, b: [at(0, 60)]}, wrong
        yield "in the same place", asked, {a: target, b: [at(0)]}, wrong
        # Two boxes of 20: 0.1 x 40 = 4 pixels are no distance, and d - 4 > d / 2 from 8 on. Of 60: from 24 on.
        yield "nearer than the margin", asked, {a: target, b: [at(3.5)]}, wrong
        yield "just too near", asked, {a: target, b: [at(7.5)]}, wrong
        yield "just far enough", asked, {a: target, b: [at(8.5)]}, right
        yield "large ones, just too near", asked, {a: [at(0, size=60)], b: [at(23.5, size=60)]}, wrong
        yield "large ones, just far enough", asked, {a: [at(0, size=60)], b: [at(24.5, size=60)]}, right
        yield "diagonal: in two directions", asked, {a: target, b: [at(60, 60)]}, right
        # 60 - 4 pixels are half of the distance at sqrt(112^2 - 60^2) = 94.6 pixels across.
        yield "just not too far aside", asked, {a: target, b: [at(60, 94)]}, right
        yield "just too far aside", asked, {a: target, b: [at(60, 95)]}, wrong
        yield "without the target", asked, {b: [at(60)]}, (0, 0, (0 + 1 + 0) / 3)
        yield "without the object", asked, {a: target}, (0, 0, (1 + 0 + 0) / 3)
        yield "less certain second object", asked, {a: target, b: [at(60), at(-60, score=0.5)]}, (1, 0, 1 / 3)
        yield "more certain second object", asked, {a: target, b: [at(60, score=0.5), at(-60)]}, (0, 0, 1 / 3)
        yield "less certain second target", asked, {a: [*target, at(90, score=0.5)], b: [at(60)]}, (1, 0, 1 / 3)
        yield "both of two", two, {a: target, b: [at(60), at(60, 40)]}, right
        yield "one of two", two, {a: target, b: [at(60), at(-60)]}, wrong
        yield "its colour too", coloured, {a: target, b: [at(60, color="red")]}, (1, 1, 1)
        yield "the wrong colour", coloured, {a: target, b: [at(60, color="blue")]}, (0, 0, (1 + 1 + 0) / 3)
        yield (
            "wrong target colour",
            target_coloured,
            {a: [at(0, color="blue")], b: [at(60)]},
            (0, 0, (1 + 0 + 1 + 0) / 4),
        )


def color_attr():
    for i, (a, b) in enumerate(zip(CLASSES[1::8], CLASSES[4::8], strict=True)):
        first, second = COLORS[i], COLORS[i - 3]
        asked = {"include": [{"class": a, "count": 1, "color": first}, {"class": b, "count": 1, "color": second}]}
        as_first, as_second = [found(color=first)], [found(color=second)]
        yield "right", asked, {a: as_first, b: as_second}, (1, 1, 1)
        yield "swapped", asked, {a: as_second, b: as_first}, (0, 0, (1 + 0 + 1 + 0) / 4)
        yield "both the first colour", asked, {a: as_first, b: as_first}, (0, 0, (1 + 1 + 1 + 0) / 4)
        yield "both the second colour", asked, {a: as_second, b: as_second}, (0, 0, (1 + 0 + 1 + 1) / 4)
        yield "without the first", asked, {b: as_second}, (0, 0, (0 + 0 + 1 + 1) / 4)
        yield "neither", asked, {}, (0, 0, 0)
        extra = [*as_second, found(0.5, color=first)]
        yield "a second one of the other colour", asked, {a: as_first, b: extra}, (1, 0, (1 + 1 + 0 + 0) / 4)


SCENES = {
    task: list(scenes())
    for task, scenes in zip(TASKS, (single_object, two_object, counting, colors, position, color_attr), strict=True)
}


@pytest.mark.parametrize("task", TASKS)
def test_scenes_made_to_keep_or_to_break_a_rule(task):
    for what, asked, objects, expected in SCENES[task]:
        assert scores({"tag": task, **asked}, objects) == pytest.approx(expected, abs=1e-12), (what, asked)


def test_there_are_enough_of_them():
    assert sum(map(len, SCENES.values())) >= 300
    assert min(map(len, SCENES.values())) >= 50


# ------------------------------------------------------------------------------- what must not change the scores


def random_objects(rng):
    count = rng.choice([1, 1, 2, 3])
    certain = rng.permutation(np.linspace(0.4, 0.99, count)).tolist()
    for (x, y, w, h), score in zip(rng.integers(1, 100, (count, 4)).tolist(), certain, strict=True):
        yield Found((x, y, x + w, y + h), score, color=str(rng.choice(["red", "blue"])))


def random_scenes(seed, count):
    """Requirements of all kinds, and objects that often meet them: metadata, objects."""
    rng = np.random.default_rng(seed)
    names = ("cat", "dog", "cup")
    for _ in range(count):
        include = []
        for i in range(rng.integers(1, 4)):
            include.append({"class": str(rng.choice(names)), "count": int(rng.choice([1, 1, 2]))})
            if rng.random() < 0.3:
                include[i]["color"] = str(rng.choice(["red", "blue"]))
            if i and rng.random() < 0.7:
                include[i]["position"] = [str(rng.choice(list(DIRECTIONS))), int(rng.integers(i))]
        exclude = [{"class": str(rng.choice(names)), "count": 2}] if rng.random() < 0.5 else []
        metadata = {"tag": str(rng.choice(TASKS)), "include": include, "exclude": exclude}
        yield metadata, {name: list(random_objects(rng)) for name in names}


def changed(metadata, objects, box, names=None):
    """The scene with other boxes, and other names for the relations."""
    include = [dict(required) for required in metadata["include"]]
    for required in include:
        if names and "position" in required:
            required["position"] = [names[required["position"][0]], required["position"][1]]
    moved = {name: [Found(box(*o.box), o.score, color=o.color) for o in all_] for name, all_ in objects.items()}
    return {**metadata, "include": include}, moved


def test_scores_do_not_depend_on_what_they_are_not_about():
    mirrored = {"left of": "right of", "right of": "left of", "above": "above", "below": "below"}
    turned = {"left of": "above", "above": "left of", "right of": "below", "below": "right of"}
    seen = set()
    for metadata, objects in random_scenes(seed=0, count=300):
        expected = scores(metadata, objects)
        seen.add(expected[:2])
        assert all(low <= value <= 1 for low, value in zip((0, 0, -14), expected, strict=True))
        assert (expected[1] == 1) == (expected[2] == 1)
        backwards = {name: all_[::-1] for name, all_ in reversed(objects.items())}
        assert scores(metadata, backwards) == expected
        least = 0.9 if metadata["tag"] == "counting" else 0.3
        uncertain = {name: [*all_, found(least, (5, 5), color="red")] for name, all_ in objects.items()}
        assert scores(metadata, {**uncertain, "bird": several(3)}) == expected
        assert scores(*changed(metadata, objects, lambda a, b, c, d: (200 - c, b, 200 - a, d), mirrored)) == expected
        assert scores(*changed(metadata, objects, lambda a, b, c, d: (b, a, d, c), turned)) == expected
        assert scores(*changed(metadata, objects, lambda *box: tuple(4 * x for x in box))) == expected
    assert seen == {(0, 0), (0, 1), (1, 0), (1, 1)}  # strict and not official: excluded, in no count's way


def test_overlap_drops_the_less_certain_of_a_class():
    # Boxes hold their last pixels: 100 and 50 of them, 50 in common. IoU 1/2.
    objects = {"cat": [Found((0, 0, 9, 4), 0.5), Found((0, 0, 9, 9), 0.6)], "dog": [Found((0, 0, 9, 9), 0.4)]}
    assert rules.iou((0, 0, 9, 4), (0, 0, 9, 9)) == 0.5
    assert rules.iou((0, 0, 9, 4), (10, 0, 19, 4)) == 0
    task = rules.read_task("", {"tag": "single_object", "include": [{"class": "cat", "count": 1}]})
    for max_overlap, expected in ((0.5, [0.6]), (0.51, [0.6, 0.5]), (1.0, [0.6, 0.5])):
        kept = rules.keep(objects, task, Thresholds(max_overlap=max_overlap))
        assert [o.score for o in kept["cat"]] == expected
        assert len(kept["dog"]) == 1


def test_thresholds_are_those_that_are_given():
    metadata = {"tag": "position", "include": [{"class": "cat", "count": 1}]}
    metadata["include"].append({"class": "dog", "count": 1, "position": ["right of", 0]})
    objects = {"cat": [found(0.5)], "dog": [found(0.7, (110, 100))]}  # 10 pixels apart: 6 beyond 0.1 x 40
    assert scores(metadata, objects)[0] == 1
    assert scores(metadata, objects, Thresholds(position=0.2))[0] == 0
    assert scores(metadata, objects, Thresholds(score=0.6))[0] == 0
    many = {"tag": "counting", "include": [{"class": "cat", "count": 2}]}
    assert scores(many, {"cat": several(3)}, Thresholds(max_objects=2)) == (1, 1, 1)
    assert scores(many, {"cat": several(2, 0.8)}, Thresholds(counting_score=0.7)) == (1, 1, 1)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "tag: Field required"),
        ({"tag": "colors"}, "include: Field required"),
        ({"tag": "colours", "include": [{"class": "cat", "count": 1}]}, "tag: Input should be 'single_object', "),
        ({"tag": "colors", "include": []}, "include: List should have at least 1 item"),
        ({"tag": "colors", "include": [{"class": "mouse", "count": 1}]}, r"include\[0\].class: 'mouse' is none of .*"
         "nearest: 'computer mouse'"),
        ({"tag": "colors", "include": [{"class": "cat", "count": "two"}]}, r"include\[0\].count: Input should be a"),
        ({"tag": "colors", "include": [{"class": "cat", "count": 1, "colour": "red"}]}, r"include\[0\].colour: Extra"),
        ({"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "mauve"}]}, r"include\[0\].color: Input"),
        ({"tag": "position", "include": [{"class": "cat", "count": 1, "position": ["above", 0]}]},
         r"include\[0\].position: must name an earlier requirement"),
        ({"tag": "counting", "include": [{"class": "cat", "count": 1}], "exclude": [{"class": "cow", "count": 0}]},
         r"exclude\[0\].count: Input should be greater than or equal to 1"),
    ],
)  # fmt: skip
def test_metadata_that_cannot_be_judged_are_named(metadata, message):
    with pytest.raises(UserError, match=f"'geneval' cannot judge prompt 'a red cat': {message}.* .jsonl file with"):
        rules.read_task("a red cat", metadata)


def test_the_example_of_the_errors_is_right():
    example = json.loads(rules.EXAMPLE)
    assert rules.read_task(example.pop("prompt"), example).include[1].position == ("right of", 0)


def test_a_line_that_cannot_be_judged_is_named_before_a_run(mask2former, clip, tmp_path):
    """Though another line has the same text."""
    lines = [{"prompt": "cats", "tag": "counting", "include": [{"class": "cat", "count": n}]} for n in (2, 3, 0, 0)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prompts = load_prompts(f"{tmp_path}/p.jsonl")
    scorers = build_rewards([RewardConfig(name="geneval", params={"detector": mask2former, "clip": clip})])
    check_prompts(scorers, prompts[:2])
    expected = r"p.jsonl:3: reward 'geneval' cannot judge prompt 'cats': include\[0\].count: Input should be greater"
    with pytest.raises(UserError, match=expected):
        check_prompts(scorers, prompts)


# ------------------------------------------------------------------------------------------------------------- models

COCO = [next((k for k in ("mouse", "remote", "keyboard") if rules.OTHER_NAMES[k] == name), name) for name in CLASSES]
SIZE = (48, 64)  # height and width of the pictures


def randomize(kind, config, seed=0):
    """A model whose output depends on what it is given. All of it follows from the seed, its first biases too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data = torch.randn(parameter.shape) / parameter[0].numel() ** 0.5
    return model


@pytest.fixture(scope="module")
def mask2former(tmp_path_factory):
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )

    names = [f"stage{i}" for i in (1, 2, 3, 4)]
    swin = SwinConfig(embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=2, image_size=64, out_features=names)
    config = Mask2FormerConfig(
        backbone_config=swin,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=8,
        id2label=dict(enumerate(COCO)),
        label2id={name: number for number, name in enumerate(COCO)},
    )
    folder = tmp_path_factory.mktemp("mask2former")
    randomize(Mask2FormerForUniversalSegmentation, config).save_pretrained(folder)
    Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def detr(tmp_path_factory):
    """With labels as DETR's own: other numbers than Mask2Former's, and some that mean nothing."""
    from transformers import DetrConfig, DetrForObjectDetection, DetrImageProcessor, ResNetConfig

    labels = ["N/A", *COCO, "N/A"]
    resnet = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8, 16], depths=[1] * 4, out_features=["stage4"])
    config = DetrConfig(
        backbone_config=resnet,
        use_timm_backbone=False,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=8,
        id2label=dict(enumerate(labels)),
        label2id={name: number for number, name in enumerate(labels)},
    )
    folder = tmp_path_factory.mktemp("detr")
    randomize(DetrForObjectDetection, config).save_pretrained(folder)
    DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPVisionConfig

    tokenizer = tiny.build_tokenizer()
    tokenizer.model_max_length = 77
    text = {**tiny.build_text_encoder(tokenizer, 32, 2).config.to_dict(), "max_position_embeddings": 77}
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    config = CLIPConfig(text_config=text, vision_config=vision.to_dict(), projection_dim=24)
    folder = tmp_path_factory.mktemp("clip")
    randomize(CLIPModel, config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def scorer(mask2former, clip):
    return geneval.GenEval(detector=mask2former, clip=clip)


@pytest.fixture(scope="module")
def pictures():
    """uint8 [3, 48, 64, 3]: blotches of colour."""
    coarse = np.random.default_rng(0).integers(0, 256, (3, 6, 8, 3)).astype(np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)


class Recorder:
    """A detector's network, and what went in and out of it."""

    def __init__(self, model):
        self.model, self.device = model, model.device

    def __call__(self, **inputs):
        self.inputs, self.outputs = inputs, self.model(**inputs)
        return self.outputs


def watched(folder, pictures):
    """What a detector finds, what its network returned for it, and the processor to read that by hand."""
    detector = geneval.Detector(folder, 0.02, "cpu")
    detector._model = network = Recorder(detector._model)
    found_ = detector(pictures)
    processor = AutoImageProcessor.from_pretrained(folder)
    expected = processor(images=[Image.fromarray(picture) for picture in pictures], return_tensors="pt")
    assert torch.equal(network.inputs["pixel_values"], expected["pixel_values"])
    return found_, network.outputs, processor


def test_masks_are_those_of_the_model_by_hand(mask2former, pictures):
    found_, outputs, processor = watched(mask2former, pictures)
    options = {"threshold": 0.02, "target_sizes": [SIZE] * 3}
    by_hand = processor.post_process_instance_segmentation(outputs, **options, return_binary_maps=True)
    boxes = set()
    for objects, expected in zip(found_, by_hand, strict=True):
        assert sum(map(len, objects.values())) == len(expected["segments_info"]) > 0
        left = {name: iter(all_) for name, all_ in objects.items()}
        for segment, mask in zip(expected["segments_info"], expected["segmentation"], strict=True):
            one = next(left[CLASSES[segment["label_id"]]])
            assert one.score == segment["score"] > 0.02
            assert np.array_equal(one.mask, mask.numpy() > 0) and one.mask.shape == SIZE
            y, x = np.argwhere(one.mask).T
            assert one.box == (x.min(), y.min(), x.max() + 1, y.max() + 1)
            boxes.add(one.box)
    assert len(boxes) > 3  # they do depend on the picture


def test_boxes_are_those_of_the_model_by_hand(detr, pictures):
    found_, outputs, processor = watched(detr, pictures)
    by_hand = processor.post_process_object_detection(outputs, threshold=0.02, target_sizes=[SIZE] * 3)
    for objects, expected in zip(found_, by_hand, strict=True):
        seen = {(name, o.score, tuple(o.box), o.mask) for name, all_ in objects.items() for o in all_}
        labels, boxes = expected["labels"].tolist(), map(tuple, expected["boxes"].tolist())
        rows = zip(labels, expected["scores"].tolist(), boxes, strict=True)
        # DETR's labels begin with one that means nothing.
        assert seen == {(CLASSES[label - 1], score, box, None) for label, score, box in rows if 1 <= label <= 80}
        assert len(seen) == 8


def test_nothing_is_found_above_every_score(mask2former, detr, pictures):
    for folder in (mask2former, detr):
        assert geneval.Detector(folder, 1.0, "cpu")(pictures) == [{}] * 3


def test_colors_are_clips_by_hand(clip, pictures):
    """Against CLIPModel's own forward, and pictures cut out, scaled and normalised here."""
    from transformers import AutoTokenizer, CLIPModel

    model, tokenizer = CLIPModel.from_pretrained(clip), AutoTokenizer.from_pretrained(clip)
    namer = geneval.ColorNamer(clip, "cpu")
    mask = np.zeros(SIZE, dtype=bool)
    mask[10:40, 5:50] = True
    asked = [
        (pictures[0], "dog", Found((5, 10, 50, 40), 0.9, mask)),
        (pictures[0], "cat", Found((5, 10, 50, 40), 0.9, mask)),
        (pictures[1], "dog", Found((3.4, 7.6, 35.2, 40.4), 0.9)),
        (pictures[2], "dog", Found((20, 10, 50, 13), 0.9)),
        (pictures[2], "dog", Found((20.1, 10.1, 20.2, 10.2), 0.9)),
    ]
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    for (picture, name, one), similar in zip(asked, namer.similarities(asked), strict=True):
        grey = np.full_like(picture, 153)
        whole = Image.fromarray(picture if one.mask is None else np.where(mask[..., None], picture, grey))
        left, top, right, bottom = (round(x) for x in one.box)
        cut = whole.crop((left, top, max(right, left + 1), max(bottom, top + 1)))
        scale = 32 / min(cut.size)
        width, height = (int(scale * x) for x in cut.size)
        left, top = (width - 32) // 2, (height - 32) // 2
        cut = cut.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + 32, top + 32))
        pixels = torch.tensor((np.asarray(cut) / 255 - mean) / std, dtype=torch.float32).permute(2, 0, 1)[None]
        for color, value in zip(COLORS, similar, strict=True):
            texts = [f"a photo of a {color} {name}", f"a photo of a {color}-colored {name}"]
            tokens = tokenizer([*texts, f"a photo of a {color} object"], padding=True, return_tensors="pt")
            with torch.inference_mode():
                seen = model(**tokens, pixel_values=pixels)
            described = seen.text_embeds.mean(0)
            expected = seen.image_embeds[0] @ described / described.norm()
            torch.testing.assert_close(value, expected, atol=1e-5, rtol=0)  # of cosines in float32
    namer(asked)
    likely = namer.similarities(asked).argmax(1)
    assert [one.color for *_, one in asked] == [COLORS[k] for k in likely]


class Seen:
    """In place of the detector's network: what it says of pictures is made up, (class, certainty, rectangle) each."""

    device = torch.device("cpu")

    def __init__(self, *pictures):
        self.pictures = pictures

    def __call__(self, **inputs):
        assert len(inputs["pixel_values"]) == len(self.pictures)
        logits = torch.full((len(self.pictures), 4, 81), -20.0)
        logits[..., 80] = 0.0  # no object
        masks = torch.full((len(self.pictures), 4, *SIZE), -20.0)
        for i, objects in enumerate(self.pictures):
            for j, (name, certainty, (left, top, right, bottom)) in enumerate(objects):
                logits[i, j, CLASSES.index(name)] = np.log(certainty / (1 - certainty))
                masks[i, j, top:bottom, left:right] = 20.0
        return SimpleNamespace(class_queries_logits=logits, masks_queries_logits=masks)


def test_pictures_are_scored_by_what_is_seen_in_them(scorer, monkeypatch):
    """Three scores of six pictures, each of which has a cat on its left and a dog on its right."""
    left, right = (4, 10, 20, 40), (40, 10, 60, 40)
    images = torch.full((6, *SIZE, 3), 30, dtype=torch.uint8)
    images[:, 10:40, 4:20] = torch.tensor([200, 0, 0], dtype=torch.uint8)  # the cat is red
    images[:, 10:40, 40:60] = torch.tensor([0, 0, 200], dtype=torch.uint8)  # the dog is blue
    certain = [("cat", 0.95, left), ("dog", 0.95, right)]
    seen = Seen(certain, certain, certain, certain, [("cat", 0.8, left)], [("cat", 0.8, left)])
    monkeypatch.setattr(scorer._detect, "_model", seen)

    def similarities(asked):
        """Red, blue or another by the mean of what was cut out; the class is that of the object."""
        rows = torch.zeros(len(asked), 10)
        for row, (picture, name, one) in zip(rows, asked, strict=True):
            mean = geneval.cut_out(picture, one).mean((0, 1))
            assert (name, one.box) in (("cat", left), ("dog", right))
            row[COLORS.index({0: "red", 1: "green", 2: "blue"}[int(mean.argmax())])] = 1.0
        return rows

    monkeypatch.setattr(scorer._name_colors, "similarities", similarities)
    cat, dog = {"class": "cat", "count": 1}, {"class": "dog", "count": 1}
    metadata = [
        {"tag": "color_attr", "include": [{**cat, "color": "red"}, {**dog, "color": "blue"}], "seed": 3},
        {"tag": "color_attr", "include": [{**cat, "color": "blue"}, {**dog, "color": "blue"}]},
        {"tag": "position", "include": [cat, {**dog, "position": ["right of", 0]}]},
        {"tag": "position", "include": [cat, {**dog, "position": ["left of", 0]}]},
        {"tag": "single_object", "include": [cat]},
        {"tag": "counting", "include": [cat]},  # 0.8 is not certain enough to be counted
    ]
    values, extras = scorer.score(images, ["a photo"] * 6, metadata)
    assert values == [1, 3 / 4, 1, 3 / 4, 1, 0]
    assert extras == {"strict": [1, 0, 1, 0, 1, 0], "official": [1, 0, 1, 0, 1, 0]}
    assert scorer.value_range == (-14, 1)


def test_a_whole_score_is_the_rules_on_what_the_models_find(mask2former, clip, pictures):
    options = {"threshold": 0.01, "counting_threshold": 0.02, "max_objects": 3}
    scorer = geneval.GenEval(mask2former, clip, score="official", **options)
    detector, namer = geneval.Detector(mask2former, 0.01, "cpu"), geneval.ColorNamer(clip, "cpu")
    thresholds = Thresholds(0.01, 0.02, 3)
    metadata, expected = [], {"official": [], "strict": [], "dense": []}
    for picture, objects in zip(pictures, detector(pictures), strict=True):
        name, all_ = max(objects.items(), key=lambda item: len(item[1]))
        namer([(picture, name, one) for one in all_])
        metadata.append({"tag": "colors", "include": [{"class": name, "count": 1, "color": all_[0].color}]})
        for key, value in zip(expected, scores(metadata[-1], objects, thresholds), strict=True):
            expected[key].append(value)
    values, extras = scorer.score(torch.from_numpy(pictures), ["a photo"] * 3, metadata)
    assert values == expected.pop("official")
    assert extras == expected
    assert scorer.value_range == (0, 1)


def test_pictures_without_metadata_are_named(scorer, pictures):
    metadata = [{"tag": "single_object", "include": [{"class": "cat", "count": 1}]}, {}, {}]
    with pytest.raises(UserError, match="'geneval' cannot judge prompt 'b': tag: Field required.*jsonl"):
        scorer.score(torch.from_numpy(pictures), ["a", "b", "c"], metadata)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"score": "exact"}, "score must be one of dense, strict, official, got 'exact'"),
        ({"threshold": 1.5}, "threshold must be a number from 0 to 1, got 1.5"),
        ({"position_threshold": "0.1"}, "position_threshold must be a number from 0 to 1, got '0.1'"),
        ({"max_objects": 0}, "max_objects must be a whole number of at least 1, got 0"),
    ],
)
def test_wrong_params_are_named(params, message):
    with pytest.raises(UserError, match=f"'geneval': {message}"):
        geneval.GenEval(**params)


def test_models_that_will_not_do_are_named(mask2former, clip, tmp_path):
    with pytest.raises(UserError, match="'geneval': detector '.*nowhere' cannot be loaded.*\nGive a folder or a hub"):
        geneval.GenEval(detector=str(tmp_path / "nowhere"), clip=clip)
    with pytest.raises(UserError, match="'geneval': detector '.*clip0' cannot be loaded: Unrecognized configuration"):
        geneval.GenEval(detector=clip, clip=clip)

    other = shutil.copytree(mask2former, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["id2label"] = {number: name.replace("cat", "tiger") for number, name in config["id2label"].items()}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="detector '.*other' must know COCO's 80 classes; it has no label for cat$"):
        geneval.GenEval(detector=str(other), clip=clip)

    part = shutil.copytree(clip, tmp_path / "part")
    weights = load_file(part / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, part / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="clip '.*part' cannot be loaded: it lacks 1 of .*'s weights, text_projection"):
        geneval.GenEval(detector=mask2former, clip=str(part))


@pytest.mark.gpu
def test_scores_on_a_gpu_are_those_on_the_cpu(mask2former, clip, pictures, monkeypatch):
    # Random weights score so alike that TF32's rounding, torch's default for convolutions, changes a detection.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    metadata = [{"tag": "colors", "include": [{"class": name, "count": 1, "color": "red"}]} for name in CLASSES[:3]]
    options = {"detector": mask2former, "clip": clip, "threshold": 0.01}
    images = torch.from_numpy(pictures)
    on_cpu, on_gpu = (geneval.GenEval(**options, device=device) for device in ("cpu", "cuda"))
    assert on_gpu.score(images, ["a photo"] * 3, metadata) == on_cpu.score(images, ["a photo"] * 3, metadata)
