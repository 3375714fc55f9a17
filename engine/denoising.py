"""K denoising steps on buffers at fixed addresses, so that a CUDA graph can replay them.

A step reads its number from the device: latents, noise, timestep and the sampler's row are looked up by it, results are
stored by it, and it counts itself up. So one captured step serves for all K of them, and nothing asks the host.
"""

from collections.abc import Iterator
from contextlib import suppress
from typing import Literal

import torch
from torch import Tensor, nn

from ..kernels.transition import transition_step
from .backbones.base import Conditioning
from .streams import side_stream
from .transitions import Schedule

WARM_UP_STEPS = 2  # what compiles, tunes or allocates at its first call must have done so before a capture


class DenoisingLoop:
    """One micro-batch after another through `model`, B samples at a time in buffers for `size` of them.

    model: as ActorCritic, its weights at fixed addresses if steps are captured. conditioning: float32 [any, ...], whose
    shapes count, and `unconditional` of one row if the model is guided. Not for two threads at a time.

    graph: "off" runs each step from Python; "step" captures one step and replays it K times, "loop" captures all K, for
    one replay: fewer launches, a capture K times as long. On a CPU there is nothing to capture, and the same steps run
    on the same buffers.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        latent_shape: tuple[int, ...],
        size: int,
        conditioning: Conditioning,
        unconditional: Conditioning | None = None,
        guidance_scale: float | None = None,
        graph: Literal["off", "step", "loop"] = "off",
        pool: tuple[int, int] | None = None,
        check_addresses: bool = False,
        keep_features: bool = False,
    ):
        """keep_features: what the critic reads; it is returned as well."""
        self.model, self.size, self.guidance_scale = model, size, guidance_scale
        self.schedule = schedule
        self.table, self.timesteps = schedule
        device, steps = self.table.device, len(self.timesteps)
        dtype = next(model.trunk.parameters()).dtype
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.noises = torch.zeros(steps, size, *latent_shape, device=device)
        self.latents = torch.zeros(steps + 1, size, *latent_shape, device=device)
        self.log_probs = torch.zeros(steps, size, device=device)
        self.values = torch.zeros(steps, size, len(model.reward_names), device=device)
        self.keep_features = keep_features
        self.features: list[Tensor] = []  # of each tap [K, size, N, D], once a step has shown their shapes
        # In the model's type, so that no step casts them again.
        self.conditioning = {
            name: torch.zeros(size, *tensor.shape[1:], dtype=dtype, device=device)
            for name, tensor in conditioning.items()
        }
        self.unconditional = unconditional and {name: tensor.to(dtype) for name, tensor in unconditional.items()}
        self.steps_a_replay = steps if graph == "loop" else 1
        self._graph: torch.cuda.CUDAGraph | None = None
        self._addresses: dict[str, int] | None = None
        if graph != "off" and device.type == "cuda":
            self._capture(pool)
            if check_addresses:
                self._addresses = dict(self._tensors())
        else:
            with torch.no_grad():
                self._step()  # what compiles at its first call does so before other threads run beside it

    @property
    def is_captured(self) -> bool:
        return self._graph is not None

    @torch.no_grad()
    def __call__(self, noises: Tensor, conditioning: Conditioning) -> tuple[Tensor, ...]:
        """Samples B trajectories: latents [B, K + 1, ...], log_probs [B, K] and values [B, K, M], float32; then, if
        they are kept, each tap's features [B, K, N, D] in the model's type. All new.

        noises: float32 [K + 1, B, ...], the initial latents first, B <= size; conditioning: [B, ...]. Rows that are
        left over repeat the last sample: every micro-batch has the shape that was captured.
        """
        count = noises.shape[1]
        self.step.zero_()
        self._fill(self.latents[0], noises[0])
        for buffer, noise in zip(self.noises, noises[1:], strict=True):
            self._fill(buffer, noise)
        for name, buffer in self.conditioning.items():
            self._fill(buffer, conditioning[name])
        for _ in range(0, len(self.noises), self.steps_a_replay):
            if self._graph is None:
                self._step()
            else:
                self._check_addresses()
                self._graph.replay()
        # Copies even where a transposed view is contiguous: the buffers belong to the next micro-batch.
        buffers = self.latents, self.log_probs, self.values, *self.features
        drawn = (buffer[:, :count].transpose(0, 1) for buffer in buffers)
        return tuple(tensor.clone(memory_format=torch.contiguous_format) for tensor in drawn)

    def close(self) -> None:
        """Gives the graph's memory back; a further call would run from Python."""
        if self._graph is not None:
            torch.cuda.synchronize(self.table.device)
            self._graph.reset()
            self._graph = None

    def _fill(self, buffer: Tensor, rows: Tensor) -> None:
        buffer[: len(rows)].copy_(rows, non_blocking=True)
        if len(rows) < self.size:
            buffer[len(rows) :] = buffer[len(rows) - 1]

    def _step(self) -> None:
        z, noise, timestep = (x.index_select(0, self.step)[0] for x in (self.latents, self.noises, self.timesteps))
        v, values, *features = self._predict(z, timestep)
        z, v = self._select(z, v, values)
        z_next, log_probs = transition_step(v, z, noise, self.table, self.step[0])
        self.log_probs.index_copy_(0, self.step, log_probs[None])
        self.values.index_copy_(0, self.step, values[None])
        if not self.features:
            self.features = [tap.new_zeros(len(self.noises), *tap.shape) for tap in features]
        for buffer, tap in zip(self.features, features, strict=True):
            buffer.index_copy_(0, self.step, tap[None])
        self.step += 1
        self.latents.index_copy_(0, self.step, z_next[None])

    def _predict(self, z: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        """Prediction and values, and features if they are kept."""
        inputs = z, timestep.expand(self.size), self.conditioning, self.unconditional
        options = {"with_features": True} if self.keep_features else {}
        return self.model(*inputs, guidance_scale=self.guidance_scale, **options)

    def _select(self, z: Tensor, v: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The samples that go on, latents and predictions: here each."""
        return z, v

    @torch.no_grad()
    def _capture(self, pool: tuple[int, int] | None) -> None:
        device, here = self.table.device, torch.cuda.current_stream(self.table.device)
        side = side_stream("capture", device)  # a capture may not run on the default stream, nor what prepares it
        side.wait_stream(here)
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_STEPS):
                self.step.zero_()
                self._step()
        here.wait_stream(side)
        graph, pool = torch.cuda.CUDAGraph(), pool or torch.cuda.graph_pool_handle()
        try:
            # Another thread may decode and allocate meanwhile: only what this one calls must not break the capture.
            with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                for _ in range(self.steps_a_replay):
                    self._step()
        except BaseException:
            # PyTorch leaves the side stream current, and before 2.12 its allocator within the capture (its #180395).
            torch.cuda.set_stream(here)
            with suppress(RuntimeError):  # it had left
                torch._C._cuda_endAllocateToPool(here.device_index, pool)
            raise
        self._graph = graph

    def _tensors(self) -> Iterator[tuple[str, int]]:
        """Names and addresses of all that a step reads or writes, of the graph's own memory aside."""
        for name, module in self.model.named_modules():
            for kind in (module._parameters, module._buffers, vars(module)):
                for key, tensor in kind.items():
                    if isinstance(tensor, Tensor):
                        yield f"model.{name}.{key}", tensor.data_ptr()
        for name, value in vars(self).items():
            tensors = dict(enumerate(value)) if isinstance(value, list) else value
            tensors = tensors if isinstance(tensors, dict) else {"": tensors}
            for key, tensor in tensors.items():
                if isinstance(tensor, Tensor):
                    yield f"{name} {key}".strip(), tensor.data_ptr()

    def _check_addresses(self) -> None:
        if self._addresses is not None:
            now = dict(self._tensors())
            moved = [name for name, address in self._addresses.items() if now.get(name) != address]
            if moved:
                raise RuntimeError(f"a captured step would read freed memory: {', '.join(moved)} moved since")
