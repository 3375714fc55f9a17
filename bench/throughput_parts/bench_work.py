"""What is compared: one model at one size, the same work for every loop."""

from dataclasses import dataclass

STOCK, COMPILED = "stock loop", "stock loop, torch.compile"
OURS, NO_GRAPHS, WITH_CRITIC_PASSES = "ours", "ours, no graphs", "ours, with critic-only passes"
TRUNK, SHARED, SEPARATE, PIXELS = "trunk alone", "+ shared heads", "+ separate trunk", "+ pixel critic"
GROUP_SIZE = 4  # samples of a prompt in the stock loop: GRPO compares them with each other
BATCHES, UPDATES = 4, 2  # micro-batches and optimizer steps of an iteration


@dataclass(frozen=True)
class Model:
    """A model that can be built here without a download, and the size it is measured at if none is asked for."""

    resolution: int
    batch: int
    steps: int
    multiple: int  # of which a resolution must be: the autoencoder's factor times the trunk's own reductions
    largest: int  # resolution
    transition: str
    noise_level: float
    reward: str = "jpeg_incompressibility"


MODELS = {
    # An SD3's table of positions ends at its largest resolution.
    "sd35-medium": Model(512, 1, 10, multiple=16, largest=6144, transition="flow-sde", noise_level=0.7),
    "sd15": Model(512, 1, 10, multiple=64, largest=2048, transition="ddim", noise_level=1.0),
    "tiny-dit": Model(64, 64, 8, multiple=64, largest=64, transition="flow-sde", noise_level=0.7, reward="composition"),
    "tiny-unet": Model(64, 32, 8, multiple=16, largest=512, transition="ddim", noise_level=1.0),
}


@dataclass(frozen=True)
class Work:
    """The sizes of a comparison. ValueError, with what to give instead, for sizes that the model does not take."""

    model: str
    batch: int  # images in a forward, of rollouts and updates alike
    resolution: int
    steps: int  # of which the first half is trained
    rollout_batches: tuple[int, ...]  # batch sizes of rollouts that are measured alone
    rounds: int
    with_compile: bool = True
    with_iterations: bool = True

    def __post_init__(self):
        model = MODELS[self.model]
        if self.resolution % model.multiple or not 0 < self.resolution <= model.largest:
            raise ValueError(
                f"--resolution {self.resolution}: {self.model} takes multiples of {model.multiple} up to "
                f"{model.largest}; its usual one is {model.resolution}"
            )
        if not 2 <= self.steps < 1000:
            raise ValueError(f"--steps {self.steps}: give 2 or more, since half of them are trained, and at most 999")
        for option, value in (("batch", self.batch), ("rounds", self.rounds)):
            if value < 1:
                raise ValueError(f"--{option} {value}: give 1 or more")

    @property
    def images(self) -> int:
        """Of an iteration."""
        return BATCHES * self.batch

    @property
    def trained_steps(self) -> int:
        return self.steps // 2

    @property
    def transition(self) -> str:
        return MODELS[self.model].transition

    @property
    def noise_level(self) -> float:
        return MODELS[self.model].noise_level

    @property
    def reward(self) -> str:
        return MODELS[self.model].reward

    @property
    def is_random(self) -> bool:
        """Whether weights and conditioning are random; tiny-dit has its own, text encoders included."""
        return self.model != "tiny-dit"


def usual(
    model: str, rounds: int, batch: int | None = None, resolution: int | None = None, steps: int | None = None
) -> Work:
    """A model's work at its usual sizes, or at those that are given."""
    if model not in MODELS:
        raise ValueError(f"--model {model}: unknown; choose one of {', '.join(MODELS)}")
    sizes = MODELS[model]
    given = {"batch": batch, "resolution": resolution, "steps": steps}
    chosen = {name: getattr(sizes, name) if size is None else size for name, size in given.items()}
    return Work(model, rollout_batches=(chosen["batch"],), rounds=rounds, **chosen)
