"""The prompt cache: each text is encoded once, and always to the same bits."""

import pytest
import torch

from latent_critic.engine.backbones import load_backbone
from latent_critic.engine.prompt_cache import PromptCache

CPU = torch.device("cpu")
TEXTS = [f"a {color} {shape}" for color in ("red", "blue", "green") for shape in ("circle", "square", "triangle")]


class Encoder:
    """Keeps account of where it was sent."""

    def __init__(self):
        self.device, self.moves = "cpu", 0

    def parameters(self):
        yield torch.empty(1, device=self.device)

    def to(self, device):
        self.device, self.moves = torch.device(device).type, self.moves + 1


class Counting:
    """A backbone that keeps account of what it was asked to encode."""

    def __init__(self, backbone):
        self.backbone, self.asked = backbone, []
        self.encoders = [Encoder()]

    def encode_prompts(self, texts):
        assert self.encoders[0].moves % 2 == 1  # on its way back after each round
        self.asked.append(list(texts))
        return self.backbone.encode_prompts(texts)

    @property
    def distinct(self):
        return [text for batch in self.asked for text in dict.fromkeys(batch)]


@pytest.fixture(scope="module", params=[0, 16], ids=["without T5", "with T5"])
def backbone(tiny_pipeline, request):
    return load_backbone(str(tiny_pipeline), request.param)


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("home", ["cpu", "meta"])
def test_encoders_go_back_to_where_they_were(backbone, home):
    """A pipeline of the user's may have them on its GPU."""
    counting = Counting(backbone)
    counting.encoders[0].device = home
    PromptCache(counting, CPU)(TEXTS[:2])
    assert counting.encoders[0].device == home and counting.encoders[0].moves == 2


def test_each_text_is_encoded_once(backbone):
    counting = Counting(backbone)
    encode = PromptCache(counting, CPU, batch_size=4)
    encode([TEXTS[0], TEXTS[1], TEXTS[0]])
    assert counting.distinct == TEXTS[:2]
    encode(TEXTS)
    assert sorted(counting.distinct) == sorted(TEXTS)
    calls = len(counting.asked)
    encode(TEXTS[::-1])
    assert len(counting.asked) == calls
    assert all(len(batch) == 4 for batch in counting.asked)


def test_what_was_not_used_for_longest_goes_first(backbone):
    row = sum(tensor.nbytes for tensor in PromptCache(backbone, CPU)(TEXTS[:1]).values())
    counting = Counting(backbone)
    encode = PromptCache(counting, CPU, max_bytes=3 * row)
    whole = PromptCache(backbone, CPU)(TEXTS)
    for texts, encoded in (
        (TEXTS[:3], 3),
        (TEXTS[:1], 0),
        (TEXTS[3:4], 1),
        (TEXTS[:1], 0),
        (TEXTS[1:2], 1),
        (TEXTS, 6),
    ):
        before = len(counting.distinct)
        found = encode(texts)
        assert len(counting.distinct) - before == encoded
        assert equal(found, {n: torch.stack([t[TEXTS.index(x)] for x in texts]) for n, t in whole.items()})


@pytest.mark.parametrize("fits", [9, 5])
def test_prepares_what_fits(backbone, fits):
    row = sum(tensor.nbytes for tensor in PromptCache(backbone, CPU)(TEXTS[:1]).values())
    counting = Counting(backbone)
    encode = PromptCache(counting, CPU, batch_size=2, max_bytes=fits * row)
    encode.prepare([*TEXTS[:8], *TEXTS[:8]])
    ready = min(fits // 2 * 2, 8)
    assert counting.distinct == TEXTS[:ready]
    found = encode(TEXTS[:ready])
    assert counting.distinct == TEXTS[:ready]  # nothing was encoded again
    assert equal(found, PromptCache(backbone, CPU, batch_size=2)(TEXTS[:ready]))


def test_equals_direct_encoding_in_order(backbone):
    texts = [TEXTS[4], TEXTS[0], TEXTS[4], ""]
    found = PromptCache(backbone, CPU)(texts)
    direct = backbone.encode_prompts(texts)
    assert found.keys() == direct.keys() == {"prompt_embeds", "pooled_prompt_embeds"}
    for name in found:
        assert found[name].shape == direct[name].shape and found[name].dtype == torch.float32
        # Batches of other sizes: sums of up to 256 products of order 1 in another order, through 2 layers.
        torch.testing.assert_close(found[name], direct[name], rtol=0, atol=2e-5)
    assert not torch.allclose(found["pooled_prompt_embeds"][0], found["pooled_prompt_embeds"][1], atol=0.1)


def test_a_text_has_the_same_bits_whatever_was_asked_before(backbone):
    """A resumed run, and each of several ranks, fills its cache in another order than one uninterrupted process."""
    whole = PromptCache(backbone, CPU)(TEXTS)
    single = PromptCache(backbone, CPU)
    parts = [single([text]) for text in TEXTS[::-1]][::-1]
    assert equal(whole, {name: torch.cat([part[name] for part in parts]) for name in whole})
    pairs = PromptCache(backbone, CPU)
    pairs([TEXTS[8], TEXTS[3]])
    assert equal(whole, pairs(TEXTS))


def test_callers_cannot_spoil_the_cache(backbone):
    encode = PromptCache(backbone, CPU)
    before = {name: tensor.clone() for name, tensor in encode(TEXTS[:1]).items()}
    for tensor in encode(TEXTS[:1]).values():
        tensor.zero_()
    assert equal(before, encode(TEXTS[:1]))


def test_encoders_are_on_the_device_while_they_encode_only(backbone, monkeypatch):
    counting = Counting(backbone)
    encoder = counting.encoders[0]
    seen = []
    monkeypatch.setattr(
        counting, "encode_prompts", lambda texts: seen.append(encoder.device) or {"x": torch.ones(2, 1)}
    )
    encode = PromptCache(counting, torch.device("meta"), batch_size=2)
    encode.prepare(TEXTS[:6])
    assert seen == ["meta"] * 3 and encoder.device == "cpu" and encoder.moves == 4  # the first two tell what fits
    encode(TEXTS[:6])
    assert encoder.moves == 4  # known texts need none
