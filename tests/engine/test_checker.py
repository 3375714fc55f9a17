"""The checker: real pictures pass, captions one word off and cheats do not, and every number has its meaning."""

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

from latent_critic.engine.embedded import checker, scenes

SCENES_PER_TASK = 286  # 2,002 in all
PURPLE_RIM = (160, 110, 190)


@pytest.fixture(scope="module")
def drawn():
    """Pictures with their scenes, the same number of every task."""
    pictures = {}
    for number, (task, found) in enumerate(scenes.all_scenes().items()):
        rng = np.random.default_rng([2026, number])
        chosen = [found[i] for i in rng.integers(len(found), size=SCENES_PER_TASK)]
        pictures[task] = [(scenes.draw(scene, rng), scene) for scene in chosen]
    return pictures


def one_word_off(scene, rng):
    """A caption that differs from the scene's in one number, colour, shape or relation."""
    words = scene.caption().split(' and the text "')[0].replace(" of ", "_of ").split()
    relations = [relation.replace(" ", "_") for relation in scenes.RELATIONS]
    plain = ["cross" if w.startswith("cross") else w.removesuffix("s") for w in words]
    options = []
    for i, word in enumerate(plain):
        for vocabulary in (scenes.NUMBERS, scenes.COLORS, scenes.SHAPES, relations):
            options += [(i, other) for other in vocabulary if word in vocabulary and other != word]
    i, other = options[rng.integers(len(options))]
    return " ".join([*plain[:i], other, *plain[i + 1 :]]).replace("_of", " of")


def picture(*objects, blur=0.0, background=190):
    """A flat grey picture of (shape, colour or RGB, row, column, radius), with no help from scenes.draw."""
    canvas = Image.new("RGB", (256, 256), (background,) * 3)
    pen = ImageDraw.Draw(canvas)
    for shape, color, row, column, radius in objects:
        x, y, r = column * 4, row * 4, radius * 4
        rgb = scenes.COLORS.get(color, color)
        box = (x - r, y - r, x + r, y + r)
        if shape == "circle":
            pen.ellipse(box, rgb)
        elif shape == "square":
            pen.rectangle(box, rgb)
        elif shape == "triangle":
            pen.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], rgb)
        else:
            pen.rectangle((x - 0.34 * r, y - r, x + 0.34 * r, y + r), rgb)
            pen.rectangle((x - r, y - 0.34 * r, x + r, y + 0.34 * r), rgb)
    small = np.asarray(canvas.resize((64, 64), Image.Resampling.BOX)).astype(float)
    return ndimage.gaussian_filter(small, (blur, blur, 0)).astype(np.uint8)


def seen(image):
    return sorted((d.shape, d.color) for d in checker.detect(image))


@pytest.mark.parametrize("task", scenes.TASKS)
def test_real_pictures_pass_and_captions_one_word_off_do_not(drawn, task):
    rng = np.random.default_rng(0)
    scores = []
    for image, scene in drawn[task]:
        right, wrong = checker.score(image, scene), checker.score(image, scenes.parse(one_word_off(scene, rng)))
        assert not wrong.strict
        assert wrong.dense < right.dense
        scores.append(right)
    assert np.mean([s.strict for s in scores]) >= 0.995
    assert np.mean([s.dense for s in scores]) >= 0.95


def test_pictures_as_a_small_autoencoder_returns_them_still_pass(drawn):
    """Borders blurred by a pixel and 6 levels of noise, about 30 dB."""
    rng = np.random.default_rng(1)
    verdicts = []
    for image, scene in [pair for pairs in drawn.values() for pair in pairs[:20]]:
        damaged = ndimage.gaussian_filter(image.astype(float), (1, 1, 0)) + rng.normal(0, 6, image.shape)
        verdicts.append(checker.score(damaged.clip(0, 255).astype(np.uint8), scene).strict)
    assert np.mean(verdicts) >= 0.98


@pytest.mark.parametrize("shape", scenes.SHAPES)
@pytest.mark.parametrize("color", scenes.COLORS)
def test_detection_has_the_right_values(shape, color):
    (found,) = checker.detect(picture((shape, color, 20, 40, 10)))
    assert (found.shape, found.color) == (shape, color)
    assert found.color_scores[color] == 1
    assert found.shape_scores[shape] > 0.8
    # Pixel (r, c) covers r to r + 1, so its centre is half a pixel on; a triangle's centroid lies a third of its radius
    # below the middle of its box.
    low = 10 / 3 if shape == "triangle" else 0
    assert found.center == pytest.approx((19.5 + low, 39.5), abs=0.5)
    exact = {"circle": 314.2, "square": 400, "triangle": 200, "cross": 225.8}[shape]
    assert found.area == pytest.approx(exact, rel=0.1)


@pytest.mark.parametrize("blur", [0, 1])
@pytest.mark.parametrize("pair", [("red", "blue"), ("yellow", "green"), ("purple", "red"), ("blue", "purple")])
def test_touching_objects_of_two_colours_are_two(pair, blur):
    image = picture(("square", pair[0], 30, 20, 10), ("circle", pair[1], 31, 39.5, 10), blur=blur)
    assert seen(image) == [("circle", pair[1]), ("square", pair[0])]


@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_a_rim_of_mixed_colour_is_no_object(shape):
    assert seen(picture((shape, PURPLE_RIM, 30, 30, 11), (shape, "red", 30, 30, 9.5))) == [(shape, "red")]


def test_specks_are_ignored_and_blobs_are_extras():
    scene = scenes.parse("a red circle")
    speck = picture(("circle", "red", 20, 20, 10), ("square", "blue", 50, 50, 2))
    blob = picture(("circle", "red", 20, 20, 10), ("square", "blue", 50, 50, 5))
    assert checker.score(speck, scene).strict
    assert not checker.score(blob, scene).strict
    assert checker.score(blob, scene).dense < checker.score(speck, scene).dense - 0.4  # the count term is half of it


@pytest.mark.parametrize(
    "image",
    [
        pytest.param(picture(("circle", "red", 32, 32, 5)), id="dwarf"),
        pytest.param(picture(("circle", "red", 32, 32, 20)), id="giant"),
        pytest.param(picture(("circle", (205, 120, 120), 32, 32, 10)), id="faded"),
        pytest.param(picture(("circle", (90, 10, 10), 32, 32, 10)), id="dark"),
        pytest.param(picture(("circle", "red", 32, 32, 10), ("circle", (190, 190, 190), 32, 32, 6)), id="ring"),
        pytest.param(np.full((64, 64, 3), scenes.COLORS["red"], np.uint8), id="all red"),
        pytest.param(np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8), id="noise"),
    ],
)
def test_cheats_do_not_pass(image):
    assert not checker.score(image, scenes.parse("a red circle")).strict


@pytest.mark.parametrize("level", [0, 128, 255])
def test_an_empty_picture_scores_nothing(level):
    image = np.full((64, 64, 3), level, np.uint8)
    assert checker.detect(image) == []
    assert checker.score(image, scenes.parse("a red circle left of a blue square")) == checker.Score(0.0, False)


def test_dense_score_of_a_hand_computed_case():
    """Half of the objects: count 1/2, objects about 1/2 (one perfect, one missing), relation 0."""
    image = picture(("square", "blue", 32, 48, 10))
    (found,) = checker.detect(image)
    perfect = (found.shape_scores["square"] + 1) / 2
    score = checker.score(image, scenes.parse("a red circle left of a blue square"))
    assert score.dense == pytest.approx((0.5 + perfect / 2 + 0) / 3)
    assert not score.strict


def test_relations_need_distance_and_direction():
    first, second = (32, 20), (34, 45)
    assert checker._relation_margin(first, second, "left of") == 25 - 8
    assert checker._relation_margin(second, first, "right of") == 25 - 8
    assert checker._relation_margin(first, second, "right of") == -25 - 8
    assert checker._relation_margin(first, second, "above") == 2 - 25  # further across than along
    assert checker._relation_margin((32, 20), (32, 27), "left of") == 7 - 8  # too near


def test_relation_counts_towards_dense():
    right = picture(("circle", "red", 32, 16, 10), ("square", "blue", 32, 48, 10))
    scene = scenes.parse("a red circle left of a blue square")
    mirrored = scenes.parse("a red circle right of a blue square")
    assert checker.score(right, scene).dense - checker.score(right, mirrored).dense == pytest.approx(1 / 3, abs=0.02)


@pytest.mark.parametrize("image", [np.zeros((32, 32, 3), np.uint8), np.zeros((64, 64, 3), np.float32)])
def test_other_forms_of_picture_are_refused(image):
    with pytest.raises(ValueError, match="image must be uint8"):
        checker.detect(image)
