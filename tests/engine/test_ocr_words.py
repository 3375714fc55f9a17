"""OCR on English words in an everyday font: read as they stand, and lower the more of their letters are wrong."""

import string
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from latent_critic.engine.rewards.ocr import Ocr

FONT = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
WORDS = ("Bakery", "Saturday", "Entrance", "Mountain", "Welcome", "Elephant", "Birthday", "Discount")
WORDS += ("Morning", "Breakfast", "Harvest", "Adventure", "Library", "Festival", "Telephone", "Chocolate")


@pytest.fixture(scope="module")
def reader():
    return Ocr(region=[0.0, 0.0, 1.0, 1.0])


def draw(words):
    """uint8 [N, 64, 320, 3]: dark letters 36 pixels high on light paper."""
    font = ImageFont.truetype(FONT, 36)
    pictures = []
    for word in words:
        picture = Image.new("RGB", (320, 64), (240, 236, 225))
        ImageDraw.Draw(picture).text((160, 32), word, (30, 40, 60), font, anchor="mm")
        pictures.append(np.asarray(picture))
    return torch.from_numpy(np.stack(pictures))


def mean_score(reader, pictures):
    prompts = [f'a sign that says "{word}"' for word in WORDS]
    return float(np.mean(reader.score(pictures, prompts, [{}] * len(WORDS))))


def misspelt(letters, seed=0):
    """The words with so many of their letters, each elsewhere in the word, replaced by letters that it has nowhere."""
    rng = np.random.default_rng(seed)
    for word in WORDS:
        changed = list(word)
        others = sorted(set(string.ascii_lowercase) - set(word.lower()))
        for place in rng.permutation(len(word))[:letters]:
            changed[place] = str(rng.choice(others))
        yield "".join(changed)


def test_words_are_read(reader):
    assert mean_score(reader, draw(WORDS)) > 0.95


def test_wrong_letters_cost_their_share(reader):
    for letters in (1, 2, 4):
        expected = np.mean([1 - letters / len(word) for word in WORDS])
        # Every letter is read here; elsewhere three of the 126 may be misread.
        assert mean_score(reader, draw(misspelt(letters))) == pytest.approx(expected, abs=3 / 126)


def test_noise_costs_the_more_the_stronger_it_is(reader):
    pictures = draw(WORDS)
    noise = torch.from_numpy(np.random.default_rng(0).normal(size=pictures.shape))
    clean, strong, stronger = (mean_score(reader, (pictures + s * noise).clamp(0, 255).byte()) for s in (0, 200, 300))
    assert clean > strong + 0.2 > stronger + 0.4
