"""The pictures of a run: right size, the colours that the data asks for, and no failure on rows that lack keys."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from latent_critic.engine.reports import comparison, plot_critic, plot_curves, save_grid

BLUE, VERMILION, ORANGE, SHADE = (0, 114, 178), (213, 94, 0), (230, 159, 0), (236, 236, 236)
GREEN_BORDER, RED_BORDER, WHITE = (26, 152, 80), (215, 48, 39), (255, 255, 255)
STEPS = 5


def read(path) -> np.ndarray:
    """Decode the whole file: uint8 [height, width, 3]."""
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB"))


def count(picture: np.ndarray, color: tuple[int, int, int]) -> int:
    return int((picture == color).all(-1).sum())


def metrics_rows(iterations: int, pretraining: int) -> list[dict]:
    rows = []
    for i in range(1, iterations + 1):
        learned = 1 - math.exp(-i / 10)
        row = {
            "iteration": i,
            "phase": "value_pretraining" if i <= pretraining else "ppo",
            "reward/composition": 0.5 + 0.3 * learned,
            "reward/composition_std": 0.2,
            "explained_variance": 0.4 * learned,
            "explained_variance_per_step": list(np.linspace(0.0, 0.8, STEPS) * learned),
            "value_loss": 1.0 - 0.5 * learned,
            "grad_norm/critic": 2.0 - learned,
            "seconds": 10.0,
            "seconds/rollout": 3.0,
            "seconds/rewards": 1.0,
            "seconds/update": 5.0,
        }
        if i > pretraining:
            row |= {"approx_kl": 2e-6, "clipfrac": 0.1, "policy_loss": -0.001, "grad_norm/actor": 0.1}
            row |= {"ratio_max_deviation": 0.01, "first_ratio_deviation": 0.0}
        rows.append(row)
    rows[-1] |= {
        "eval/composition": 0.6,
        "eval/composition_stderr": 0.02,
        "eval/counting": 0.4,
        "eval/quality": 5.2,
        "eval/explained_variance_per_step": list(np.linspace(0.0, 0.6, STEPS)),
    }
    return rows


def test_curves_show_training_held_out_and_shaded_pretraining(tmp_path):
    plot_curves(metrics_rows(12, pretraining=4), tmp_path / "curves.png")
    picture = read(tmp_path / "curves.png")
    # 11 panels (reward, held-out scores, quality, and 8 of training) in 3 columns and 4 lines, at 110 dots an inch
    assert picture.shape == (round((3.3 * 4 + 0.3) * 110), round(4.8 * 3 * 110), 3)
    for color in (BLUE, VERMILION, ORANGE):
        assert count(picture, color) > 500
    # a third of each panel's width is pretraining
    assert 0.05 < count(picture, SHADE) / (picture.shape[0] * picture.shape[1]) < 0.25
    assert (picture[:, -3:] == 255).all()  # nothing is cut off at the right edge


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"iteration": 0, "eval/composition": 0.5, "eval/composition_stderr": 0.01}],
        [{"iteration": 1, "phase": "ppo", "reward/jpeg": -4.7, "reward/jpeg_std": 0.5, "seconds": 3.0}],
        [{"iteration": 1, "explained_variance": None, "reward/jpeg": None, "clipfrac": 0.0, "grad_norm/actor": 0.0}],
    ],
    ids=["none", "evaluation only", "one iteration", "nulls"],
)
def test_curves_of_few_rows_and_missing_keys(tmp_path, rows):
    plot_curves(rows, tmp_path / "curves.png")
    assert read(tmp_path / "curves.png").std() > 1


def test_critic_colours_follow_explained_variance(tmp_path):
    good = [{"iteration": i, "explained_variance_per_step": [1.0] * STEPS} for i in (1, 2)]
    bad = [{"iteration": i, "explained_variance_per_step": [-3.0] * STEPS} for i in (1, 2)]
    unknown = [{"iteration": i, "explained_variance_per_step": [None] * STEPS} for i in (1, 2)]
    for rows, color in ((good, (8, 48, 107)), (bad, (200, 85, 61)), (unknown, (216, 216, 216))):
        plot_critic(rows, None, tmp_path / "critic.png")
        picture = read(tmp_path / "critic.png")
        assert picture.shape == (round(4.4 * 110), round(12.5 * 110), 3)
        assert count(picture, color) > 0.3 * picture.shape[0] * picture.shape[1]  # the heat map takes most of it


def test_critic_with_scatter_of_three_steps(tmp_path):
    rewards = torch.linspace(-1, 1, 64)
    values = rewards[:, None] * torch.linspace(0, 1, STEPS)
    plot_critic(metrics_rows(6, pretraining=2), {"values": values, "rewards": rewards}, tmp_path / "critic.png")
    picture = read(tmp_path / "critic.png")
    assert picture.shape == (round(9.2 * 110), round(12.5 * 110), 3)
    bottom = picture[picture.shape[0] // 2 :].astype(int)
    red, blue = bottom[..., 0], bottom[..., 2]
    thirds = np.array_split(red - blue > 80, 3, axis=1)  # half-transparent vermilion on white
    assert all(third.sum() > 200 for third in thirds)
    # values are 0 at the first step (a vertical line of points) and the rewards at the last (a diagonal)
    extents = [np.ptp(np.flatnonzero(third[: third.shape[0] - 60].any(0))) for third in thirds]
    assert extents[0] < 20 and extents[2] > 200


def test_critic_without_any_data(tmp_path):
    plot_critic([], {"values": np.zeros((3, 1)), "rewards": np.zeros(3)}, tmp_path / "critic.png")
    assert read(tmp_path / "critic.png").std() > 1


def flat(colors) -> torch.Tensor:
    """One 64 x 64 picture of each colour."""
    return torch.tensor(colors, dtype=torch.uint8)[:, None, None].expand(-1, 64, 64, -1)


# Layout of a grid: 10 px margin, a 4 px border around each 128 px picture, 10 px between cells, captions of two lines
CELL, ROW = 128 + 8 + 10, 128 + 8 + 4 + 30 + 10


def test_grid_places_enlarges_and_marks_pictures(tmp_path):
    colors = [(10, 20, 30), (200, 100, 0), (0, 0, 255)]
    save_grid(flat(colors), ["one", "two", "three"], tmp_path / "grid.png", columns=2, marks=[True, False, True])
    picture = read(tmp_path / "grid.png")
    assert picture.shape == (2 * ROW + 10, 2 * CELL + 10, 3)
    for i, (color, border) in enumerate(zip(colors, (GREEN_BORDER, RED_BORDER, GREEN_BORDER), strict=True)):
        left, top = 10 + i % 2 * CELL, 10 + i // 2 * ROW
        tile = picture[top : top + 136, left : left + 136]
        assert (tile[4:-4, 4:-4] == color).all()
        for edge in (tile[:4], tile[-4:], tile[:, :4], tile[:, -4:]):
            assert (edge == border).all()
        caption = picture[top + 136 : top + ROW - 10, left : left + 136]
        assert (caption.min(-1) < 100).sum() > 20  # dark ink
    assert (picture[ROW + 10 :, CELL + 10 :] == 255).all()  # the fourth cell is empty


def test_grid_keeps_pixels_sharp_and_has_no_border_without_marks(tmp_path):
    image = np.zeros((1, 64, 64, 3), dtype=np.uint8)
    image[0, ::2, ::2] = 255
    save_grid(image, [""], tmp_path / "grid.png")
    picture = read(tmp_path / "grid.png")
    np.testing.assert_array_equal(picture[14:142, 14:142], image[0].repeat(2, 0).repeat(2, 1))
    assert (picture[10:14] == 255).all()


def test_grid_leaves_large_pictures_as_they_are(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (1, 160, 200, 3), dtype=np.uint8)
    save_grid(image, ["noise"], tmp_path / "grid.png")
    np.testing.assert_array_equal(read(tmp_path / "grid.png")[14:174, 14:214], image[0])


def test_long_captions_stay_inside_their_cell(tmp_path):
    long = "a green triangle left of a yellow circle and a Donaudampfschifffahrtsgesellschaft with a number " * 3
    save_grid(flat([(9, 9, 9)] * 2), [long, ""], tmp_path / "grid.png")
    picture = read(tmp_path / "grid.png")
    assert picture.shape[0] == ROW + 10
    assert (picture[10 + 136 :, 10 + CELL :] == 255).all()  # the second cell's caption is empty
    assert (picture[-10:] == 255).all()


@pytest.mark.parametrize(
    "images", [np.zeros((2, 64, 64, 3)), np.zeros((2, 3, 64, 64), np.uint8), np.zeros((0, 64, 64, 3), np.uint8)]
)
def test_wrong_images_are_refused(tmp_path, images):
    with pytest.raises(ValueError, match="images must"):
        save_grid(images, ["a", "b"], tmp_path / "grid.png")


def test_wrong_number_of_captions_is_refused(tmp_path):
    with pytest.raises(ValueError, match="shorter"):
        save_grid(flat([(1, 2, 3)] * 2), ["only one"], tmp_path / "grid.png")


def find(picture: np.ndarray, color: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Bounding box (top, bottom, left, right) of a colour."""
    rows, columns = np.nonzero((picture == color).all(-1))
    return rows.min(), rows.max() + 1, columns.min(), columns.max() + 1


@pytest.mark.parametrize("columns", [3, 2])
def test_comparison_puts_after_below_before(tmp_path, columns):
    before, after = [(10, 0, 0), (20, 0, 0), (30, 0, 0)], [(0, 0, 10), (0, 0, 20), (0, 0, 30)]
    marks_before, marks_after = [False, False, True], [True, False, True]
    path = tmp_path / "comparison.png"
    captions = ["one", "two", "three"]
    comparison(flat(before), flat(after), captions, marks_before, marks_after, path, "Before and after", columns)
    picture = read(path)
    for i in range(3):
        first, second = find(picture, before[i]), find(picture, after[i])
        assert first[2:] == second[2:]  # the same column
        assert second[0] - first[1] == 4 + 6 + 4  # border, gap, border
        for (top, bottom, left, right), mark in ((first, marks_before[i]), (second, marks_after[i])):
            assert (bottom - top, right - left) == (128, 128)
            border = GREEN_BORDER if mark else RED_BORDER
            assert (picture[top - 4 : top, left - 4 : right + 4] == border).all()
            assert (picture[top - 4 : bottom + 4, right : right + 4] == border).all()
    tops = [find(picture, color)[0] for color in before]
    assert (tops[2] > tops[1]) == (columns == 2)
    assert (picture[:40].min(-1) < 100).sum() > 100  # the title


def test_comparison_without_marks(tmp_path):
    comparison(flat([(1, 1, 1)]), flat([(2, 2, 2)]), ["one"], None, None, tmp_path / "c.png", "Title")
    picture = read(tmp_path / "c.png")
    assert count(picture, GREEN_BORDER) == count(picture, RED_BORDER) == 0
    assert count(picture, (1, 1, 1)) == count(picture, (2, 2, 2)) == 128 * 128
