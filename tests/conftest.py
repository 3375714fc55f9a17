"""What several test files need: a small but complete pipeline folder, and a world of one process."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.nn import functional

# Without a GPU the kernels run in Triton's interpreter. It is chosen when Triton is imported, so before anything else.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

LINEAR = functional.linear
DEPTH, WIDTH = 3, 64  # of the tiny pipeline's trunk
CHANNELS, SIDE = 4, 16  # of its latents; its pictures are 64 x 64


def pytest_configure(config: pytest.Config) -> None:
    # Tensors here are so small that threads only wait for each other.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def torchs_own_linear() -> Iterator[None]:
    """DeepSpeed's ZeRO-3 replaces torch.nn.functional.linear for the rest of the process: its own rounds otherwise (a
    product, then a sum) and keeps other tensors for the backward. No test leaves it to the next."""
    functional.linear = LINEAR
    yield
    functional.linear = LINEAR


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a StableDiffusion3Pipeline in float32: random weights, 64 x 64 pictures, T5 included.

    Each matrix has unit gain and no vector is zero, so that what the parts return is of order 1 and depends on all they
    are given: prompt (through CLIP and T5), time and latents.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    from latent_critic.engine.embedded import train_tiny_dit as tiny

    tokenizer = tiny.build_tokenizer()
    t5_tokenizer = tiny.build_t5_tokenizer()
    parts = {
        "text_encoder": tiny.build_text_encoder(tokenizer, 64, 2),
        "text_encoder_2": tiny.build_text_encoder(tokenizer, 32, 2),
        "text_encoder_3": tiny.build_t5(t5_tokenizer),
        "vae": _vae(mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False),
        "transformer": SD3Transformer2DModel(
            sample_size=SIDE,
            patch_size=2,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_layers=DEPTH,
            attention_head_dim=16,
            num_attention_heads=WIDTH // 16,
            caption_projection_dim=WIDTH,
            joint_attention_dim=96,
            pooled_projection_dim=96,
            pos_embed_max_size=8,
            qk_norm="rms_norm",
        ),
    }
    generator = torch.Generator().manual_seed(0)
    for part in parts.values():
        _randomize(part, generator)
    parts["vae"].register_to_config(shift_factor=0.2, scaling_factor=1.4)
    folder = tmp_path_factory.mktemp("tiny-pipeline")
    StableDiffusion3Pipeline(
        **parts,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=t5_tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_unet_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a StableDiffusionPipeline: SD1.5 in small, with its scheduler and of blocks 16 or 32 wide. Its weights
    are those of `tiny_pipeline` in kind."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    from latent_critic.engine.embedded import train_tiny_dit as tiny

    tokenizer = tiny.build_tokenizer()
    parts = {
        "text_encoder": CLIPTextModel(tiny.build_text_encoder(tokenizer, 64, 2).config),
        "vae": _vae(),
        "unet": UNet2DConditionModel(
            sample_size=SIDE,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(16, 32, 32),
            layers_per_block=1,
            attention_head_dim=2,  # the number of heads, in fact
            cross_attention_dim=64,
            norm_num_groups=4,
        ),
    }
    generator = torch.Generator().manual_seed(0)
    for part in parts.values():
        _randomize(part, generator)
    parts["vae"].register_to_config(scaling_factor=0.7)
    folder = tmp_path_factory.mktemp("tiny-unet-pipeline")
    StableDiffusionPipeline(
        **parts,
        tokenizer=tokenizer,
        scheduler=PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def _vae(**options):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 32),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=4,
        sample_size=4 * SIDE,
        **options,
    )


def _randomize(module: torch.nn.Module, generator: torch.Generator) -> None:
    for parameter in module.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 100  # vectors, norms among them, get a little noise
        noise = torch.randn(parameter.shape, generator=generator) / fan_in**0.5
        parameter.data = noise if parameter.ndim > 1 else 1.0 + noise if bool((parameter == 1).all()) else noise


@pytest.fixture(scope="session")
def world() -> Iterator:
    """This process as a world of one, on gloo or nccl.

    The environment is left as it was, but for the LOCAL_RANK that DeepSpeed asks for: processes that a test starts must
    not meet at this one's port.
    """
    from latent_critic.engine.sharding import init_distributed

    before = dict(os.environ)
    found = init_distributed()
    os.environ.clear()
    os.environ.update({**before, "LOCAL_RANK": "0"})
    yield found
    torch.distributed.destroy_process_group()


@pytest.fixture
def tiny_config(tiny_pipeline: Path) -> Callable:
    """make(section={key: value}): a valid configuration of a small run on the tiny pipeline, changed as given."""
    from latent_critic.engine.config import Config

    def make(**changes):
        sections = {
            "model": {"pretrained": str(tiny_pipeline), "max_sequence_length": 0},
            "rollout": {"num_inference_steps": 4, "samples_per_iteration": 8, "micro_batch_size": 2},
            "critic": {"dim": 32, "num_heads": 2},
            "rewards": [{"name": "jpeg_compressibility"}, {"name": "composition"}],
            "training": {"updates_per_iteration": 2},
            "deepspeed": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
        }
        for name, change in changes.items():
            sections[name] = {**sections.get(name, {}), **change} if isinstance(change, dict) else change
        return Config.model_validate(sections)

    return make


@pytest.fixture
def tiny_model() -> Callable:
    """make(config): its actor-critic on the CPU, unsharded. awake: with heads that do not start at zero."""
    from latent_critic.engine.actor_critic import ActorCritic
    from latent_critic.engine.backbones import load_backbone

    def make(config, awake: bool = True):
        torch.manual_seed(1)
        backbone = load_backbone(config.model.pretrained, config.model.max_sequence_length)
        options = config.value_names, config.rollout.guidance_scale, config.algorithm.kl_coef > 0
        model = ActorCritic(backbone, config.critic, *options).eval()
        if awake and model.critic is not None:
            for head in model.critic.heads:
                torch.nn.init.normal_(head[-1].weight)
        return model

    return make
