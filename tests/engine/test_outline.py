"""Pipelines without weights are those that are loaded, in all but the weights; and a pass over one costs what it costs
on a CPU."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from latent_critic.engine.backbones import load_backbone
from latent_critic.engine.backbones.cost import checkpoint_on_gpu, cost_of
from latent_critic.engine.backbones.known import KNOWN
from latent_critic.engine.backbones.outline import META, outline
from latent_critic.engine.errors import UserError
from latent_critic.engine.plan import count
from latent_critic.engine.transitions import trained_steps

from . import families

CLIP_L, CLIP_L_PROJECTED, CLIP_BIG_G, T5_XXL = 123_060_480, 123_650_304, 694_659_840, 4_762_310_656
# Parameters as published: trunk, autoencoder, text encoders; pixels a side.
PUBLISHED = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": (859_520_964, 83_653_863, [CLIP_L], 512),
    "stabilityai/stable-diffusion-xl-base-1.0": (2_567_463_684, 83_653_863, [CLIP_L, CLIP_BIG_G], 1024),
    "stabilityai/stable-diffusion-3.5-medium": (
        2_243_171_520,
        83_819_683,
        [CLIP_L_PROJECTED, CLIP_BIG_G, T5_XXL],
        1024,
    ),
    "stabilityai/stable-diffusion-3.5-large": (
        8_056_627_520,
        83_819_683,
        [CLIP_L_PROJECTED, CLIP_BIG_G, T5_XXL],
        1024,
    ),
    "black-forest-labs/FLUX.1-dev": (11_901_408_320, 83_819_683, [CLIP_L, T5_XXL], 1024),
}
# Name: the tokens of a prompt, the resolution to ask for, a sampler.
TINY = {
    "sd3": (0, None, ("flow-sde", 0.7)),
    "sd3 with T5": (16, None, ("flow-sde", 0.7)),
    "sd1": (0, None, ("ddim", 1.0)),
    "sdxl": (0, None, ("ddim", 1.0)),
    "flux": (16, 64, ("dance-sde", 0.3)),
    "flux2": (48, 64, ("dance-sde", 0.3)),
    "tiny-dit": (0, None, ("flow-sde", 0.7)),
    "tiny-unet": (0, None, ("ddim", 1.0)),
}


@pytest.fixture(scope="module")
def folders(request, tmp_path_factory):
    """folders(name) -> folder of a small pipeline."""
    made = {}

    def folder(name: str) -> str:
        if name not in made and name in ("sdxl", "flux", "flux2"):
            getattr(families, name)(made.setdefault(name, tmp_path_factory.mktemp(name) / name))
        fixture = {"sd3": "tiny_pipeline", "sd3 with T5": "tiny_pipeline", "sd1": "tiny_unet_pipeline"}.get(name)
        return str(request.getfixturevalue(fixture)) if fixture else str(made.get(name, name))

    return folder


@pytest.fixture(params=TINY)
def pair(request, folders):
    """The adapter with weights, and the one without."""
    tokens, resolution, _ = TINY[request.param]
    folder = folders(request.param)
    return load_backbone(folder, tokens, resolution), outline(folder, tokens, resolution)


def test_an_outline_is_the_model_that_is_loaded(pair, request):
    loaded, drawn = pair
    name = request.node.callspec.params["pair"]
    assert type(drawn) is type(loaded)
    for what in ("latent_shape", "resolution", "depth", "width", "text_width", "is_guidance_distilled"):
        assert getattr(drawn, what) == getattr(loaded, what), what
    assert drawn.default_taps() == loaded.default_taps()
    assert [drawn.tap_width(i) for i in range(drawn.depth)] == [loaded.tap_width(i) for i in range(loaded.depth)]
    assert drawn.conditioning_shapes() == loaded.conditioning_shapes()
    for part in ("trunk", "vae", "encoders"):
        for real, outlined in zip(_modules(loaded, part), _modules(drawn, part), strict=True):
            shapes, expected = ({name: p.shape for name, p in m.named_parameters()} for m in (outlined, real))
            assert shapes == expected
            assert all(tensor.is_meta for tensor in (*outlined.parameters(), *outlined.buffers()))
            assert {p.requires_grad for p in outlined.parameters()} == {part == "trunk"}
    sampler = TINY[name][2]
    for found, expected in zip(drawn.schedule(*sampler, 6), loaded.schedule(*sampler, 6), strict=True):
        assert torch.equal(found, expected)
    assert int(trained_steps(drawn.schedule(*sampler, 6).table).sum()) == 5


def _modules(backbone, part: str) -> list[nn.Module]:
    return {"trunk": [backbone.trunk], "vae": [backbone.pipe.vae], "encoders": backbone.encoders}[part]


def test_conditioning_has_the_shapes_that_prompts_are_encoded_to(pair):
    loaded, drawn = pair
    encoded = loaded.encode_prompts(["a red circle", "two blue squares"])
    expected = {name: tuple(tensor.shape[1:]) for name, tensor in encoded.items()}
    assert loaded.conditioning_shapes() == drawn.conditioning_shapes() == expected


def test_every_known_model_is_checked_here():
    assert set(PUBLISHED) == set(KNOWN)


@pytest.mark.parametrize("pretrained", PUBLISHED)
def test_known_models_have_their_published_sizes(pretrained):
    trunk, vae, encoders, resolution = PUBLISHED[pretrained]
    drawn = outline(pretrained, 256)
    assert count(drawn.trunk) == trunk
    assert count(drawn.pipe.vae) == vae
    assert [count(encoder) for encoder in drawn.encoders] == encoders
    assert drawn.resolution == resolution
    assert outline(pretrained, 256, 512).resolution == 512


# ------------------------------------------------------------------------------------------------------------ mistakes


def test_a_hub_id_that_is_not_known_takes_its_configurations_alone(tiny_pipeline, tmp_path, monkeypatch):
    """What the download leaves: no weights, no tokenizers."""
    asked = []

    def download(pretrained: str, allow_patterns: list[str]) -> str:
        asked.append(pretrained)
        for pattern in allow_patterns:
            for path in Path(tiny_pipeline).glob(pattern):
                copy = tmp_path / path.relative_to(tiny_pipeline)
                copy.parent.mkdir(exist_ok=True)
                shutil.copy(path, copy)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    drawn = outline("somebody/model", 16)
    assert asked == ["somebody/model"]
    assert not list(tmp_path.rglob("*.safetensors")) and not (tmp_path / "tokenizer").exists()
    assert count(drawn.trunk) == count(load_backbone(str(tiny_pipeline), 16).trunk)


def test_without_network_the_one_message_says_what_can_be_done(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as error:
        outline("somebody/model", 16)
    message = str(error.value)
    assert message.startswith(
        "model.pretrained: 'somebody/model' is no local folder and could not be downloaded as a hub"
    )
    assert "hf auth login" in message and "black-forest-labs/FLUX.1-dev" in message


def test_a_folder_that_is_incomplete_is_refused_as_by_the_loader(tiny_pipeline, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(tiny_pipeline, copy)
    (copy / "vae" / "config.json").unlink()
    with pytest.raises(UserError, match=r"model\.pretrained: .* is incomplete or damaged: .*vae"):
        outline(str(copy), 16)
    shutil.rmtree(copy / "vae")
    messages = []
    for read in (load_backbone, outline):
        with pytest.raises(UserError) as error:
            read(str(copy), 16)
        messages.append(str(error.value))
    assert messages[0] == messages[1] and "it has no folder vae" in messages[0]


def test_an_index_of_a_class_that_does_not_exist_is_refused(tiny_pipeline, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(tiny_pipeline, copy)
    path = copy / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "vae": ["diffusers", "NoSuchAutoencoder"]}))
    with pytest.raises(UserError, match=r"is incomplete or damaged: .*NoSuchAutoencoder"):
        outline(str(copy), 16)


# --------------------------------------------------------------------------------------------------------------- costs


def test_a_layers_operations_and_bytes():
    """x [3, 50] -> tanh -> linear of 50 x 20: 2 * 3 * 50 * 20 operations, in the backward twice as many."""
    layer = nn.Linear(50, 20, bias=False, device=META)
    x = torch.empty(3, 50, device=META)
    forward = 2 * 3 * 50 * 20
    with torch.no_grad():
        assert cost_of(lambda: [layer(x.tanh())], [x, layer.weight]) == (forward, 4 * (3 * 50 + 3 * 20))
    cost = cost_of(lambda: [layer(x.tanh())], [x, layer.weight])
    assert cost.flops == 2 * forward  # x needs no gradient
    assert layer.weight.grad is None
    x.requires_grad_()
    assert cost_of(lambda: [layer(x.tanh())], [x, layer.weight]).flops == 3 * forward
    layer.requires_grad_(False)  # what is frozen takes no gradient of its own
    assert cost_of(lambda: [layer(x.tanh())], [x, layer.weight]).flops == 2 * forward


def test_attention_keeps_no_matrix():
    """As a flash kernel: query, key, value, output, and float32 logsumexp; 4 B H Nq Nk d operations, and 2.5 times."""
    batch, heads, queries, keys, width = 2, 3, 500, 700, 16
    shapes = [(batch, heads, n, width) for n in (queries, keys, keys)]
    tensors = [torch.empty(shape, device=META, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    cost = cost_of(lambda: [functional.scaled_dot_product_attention(*tensors)], tensors)
    forward = 4 * batch * heads * queries * keys * width
    assert cost.flops == 3.5 * forward
    matrix = batch * heads * queries * keys * 2
    inputs, output = (batch * heads * n * width * 2 for n in (queries + 2 * keys, queries))
    logsumexp = 4 * batch * heads * queries
    # At the most there are the output with its gradient, logsumexp, and the gradients of the three.
    assert output + logsumexp < cost.bytes <= 2 * output + logsumexp + inputs + 100 < matrix


def test_a_norm_keeps_no_copies():
    """Of bfloat16, where its steps would keep float32: its input, which is there already, and a number a row."""
    norm = nn.RMSNorm(64, eps=1e-6, device=META, dtype=torch.bfloat16)
    x = torch.empty(1000, 64, device=META, dtype=torch.bfloat16, requires_grad=True)
    numbers, rows = 2 * x.numel(), 4 * len(x)
    cost = cost_of(lambda: [norm(x)], [x, norm.weight])
    assert 2 * numbers + rows <= cost.bytes < 3 * numbers + rows  # the result, and a gradient or two
    assert norm.weight.grad is None


def test_checkpoints_are_computed_again_and_not_kept():
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(6)).to(META)
    x = torch.empty(1000, 64, device=META, requires_grad=True)
    present = [x, *blocks.parameters()]

    def run(call):
        y = x
        for block in blocks:
            y = call(block, y)
        return [y]

    plain = cost_of(lambda: run(lambda block, y: block(y)), present)
    spared = cost_of(lambda: run(checkpoint_on_gpu), present)
    forward = 6 * 2 * 2 * 1000 * 64 * 256
    assert plain.flops == 3 * forward
    # What a block ends with need not be computed again: its result is not kept.
    assert spared.flops == 4 * forward - forward / 2
    wide, narrow = 4 * 1000 * 256, 4 * 1000 * 64
    assert plain.bytes > 6 * (2 * wide + narrow)
    # A second run ends by an exception, whose frames Python's collector may leave a while.
    assert 6 * narrow + 2 * wide < spared.bytes < 6 * narrow + 9 * wide


class _Attention(TorchFunctionMode):
    """Counts its operations, which torch does not count on a CPU."""

    flops = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is functional.scaled_dot_product_attention:
            query, key = [*args, *(kwargs or {}).values()][:2]
            self.flops += 4 * query.numel() * key.shape[2]
        return result


@pytest.mark.parametrize("name", ["sd3", "sd1", "sdxl", "flux", "flux2"])
def test_a_trunks_passes_cost_what_they_cost_on_a_cpu(folders, name):
    """Operations of a forward to the last one. And what autograd keeps: a CPU's attention keeps what a GPU's does."""
    tokens, resolution, _ = TINY[name]
    loaded, drawn = (read(folders(name), tokens, resolution) for read in (load_backbone, outline))
    forward, _ = _forward(loaded, torch.device("cpu"))
    with torch.no_grad(), FlopCounterMode(display=False) as counter, _Attention() as attention:
        forward()
    on_meta, present = _forward(drawn, META)
    with torch.no_grad():
        assert cost_of(on_meta, present).flops == counter.get_total_flops() + attention.flops
    assert attention.flops > 0

    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        results = forward()
    weights = {p.untyped_storage().data_ptr() for p in loaded.trunk.parameters()}
    bytes_kept = sum(size for place, size in kept.items() if place not in weights)
    assert results[0].requires_grad
    # On top of what is kept come the result and, of the widest layers, gradients; but of an RMSNorm a CPU keeps more.
    assert cost_of(on_meta, present).bytes == pytest.approx(bytes_kept, rel=0.05)


def _forward(backbone, device: torch.device):
    """One of the trunk for two samples, and what is there before it."""
    latents, timesteps = torch.ones(2, *backbone.latent_shape, device=device), torch.full((2,), 500.0, device=device)
    shapes = backbone.conditioning_shapes()
    conditioning = {name: torch.ones(2, *shape, device=device) for name, shape in shapes.items()}
    present = [latents, timesteps, *conditioning.values(), *backbone.trunk.parameters(), *backbone.trunk.buffers()]
    return lambda: [backbone.predict(backbone.trunk, latents, timesteps, conditioning)], present
