"""Reward servers and pools for tests: in a thread of the test, or in processes that can be killed.

The processes come from the fork server of `tiny_runs`. The second half of this file runs inside them, by path.
"""

import contextlib
import json
import multiprocessing
import os
import runpy
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

PATIENCE = 600  # seconds until something that should have happened counts as hanging; a busy machine is slow
MB = 10**6


@contextlib.contextmanager
def served_here(reward, *, queue: int = 64, patience: float = 60, token: str | None = None, **limits) -> Iterator[str]:
    """The url of this reward's server, in a thread."""
    from latent_critic.engine.rewards.serve import bind, make_server
    from latent_critic.engine.rewards.wire import Limits

    limits = Limits(**{"body": 4 * MB, "images": 32, "pixels": MB, **limits})
    with bind("127.0.0.1", 0, None) as listener:
        host, port = listener.getsockname()
        server = make_server(reward, limits, queue, patience, token)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            wait_until(lambda: server.started or not thread.is_alive())
            assert thread.is_alive(), "the server did not start"
            yield f"http://{host}:{port}"
        finally:
            server.should_exit = True
            thread.join(PATIENCE)
            assert not thread.is_alive(), "the server did not stop"


class Served:
    """`python -m latent_critic.engine.rewards.serve FLAGS` in `folder`, at the same port each time it starts.

    patch: a function of this file, which comes before it.
    """

    def __init__(self, folder: Path, *flags: str):
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self.folder, self._flags, self.url = folder, flags, f"http://127.0.0.1:{self._port}"

    def start(self, patch: str = "nothing") -> "Served":
        self._process = start(self.folder, "serve", [*self._flags, "--port", str(self._port)], patch)
        return self

    def wait_for_pause(self) -> None:
        wait_until(lambda: (self.folder / "paused").exists())

    def kill(self) -> None:
        """kill -9."""
        assert self.end(signal.SIGKILL) == -signal.SIGKILL

    def end(self, number: signal.Signals) -> int:
        """Its exit code after this signal."""
        os.kill(self._process.pid, number)
        return self.join()

    def join(self) -> int:
        self._process.join(PATIENCE)
        assert self._process.exitcode is not None, "the server hangs"
        return self._process.exitcode

    @property
    def output(self) -> str:
        return (self.folder / "output.txt").read_text()


def start(folder: Path, job: str, *arguments, daemon: bool = True):
    """A process that runs `job`, a function of this file, in `folder`. Only one that is no daemon may have children."""
    from . import tiny_runs

    (folder / "paused").unlink(missing_ok=True)
    task = {"folder": str(folder), "job": job, "arguments": arguments}
    process = tiny_runs._fork_server().Process(target=runpy.run_path, args=(__file__, {"TASK": task}), daemon=daemon)
    process.start()
    return process


def wait_until(happened) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


# ---------------------------------------------------------------------------------------------- inside a process


def serve(flags: list[str], patch: str) -> None:
    with open("output.txt", "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    globals()[patch]()
    from latent_critic.engine.rewards.serve import main

    main(flags)


def go_through_a_pool(reward: dict, images: list, prompts: list[str], metadata: list[dict]) -> None:
    """What it says goes to seen.json. Then this process pauses, with a child that is to end with it; the file `alive`
    is their standard output."""
    import numpy as np
    import torch

    from latent_critic.engine.config import RewardConfig
    from latent_critic.engine.errors import UserError
    from latent_critic.engine.rewards import build_rewards, judge, pool

    (built,) = build_rewards([RewardConfig.model_validate(reward)])
    pictures, seen = torch.from_numpy(np.asarray(images, dtype=np.uint8)), {}
    seen["about"] = built.value_range, built.is_elsewhere
    for call in ("first", "second"):
        values, extras = judge(built, pictures, prompts, metadata)
        seen[call] = {"values": values.tolist(), **{name: column.tolist() for name, column in extras.items()}}
    for what, call in {
        "raised": lambda: judge(built, pictures, prompts, [*metadata[:-1], {}]),
        "checked": lambda: built.check_prompts([*prompts, "x"], [*metadata, {"n": 7}]),
        "killed": lambda: judge(built, pictures[:1], ["die"], metadata[:1]),
        "afterwards": lambda: judge(built, pictures[:1], prompts[:1], metadata[:1]),
    }.items():
        try:
            call()
        except UserError as error:
            seen[what] = f"{type(error).__name__}: {error}"
    Path("seen.json").write_text(json.dumps(seen))
    os.dup2(os.open("alive", os.O_RDWR), 1)
    multiprocessing.get_context("fork").Process(target=pool._end_with_parent).start()
    Path("paused").touch()
    time.sleep(2 * PATIENCE)


def nothing() -> None:
    pass


def pause_at_the_third_batch() -> None:
    """Composition's third call says so, and waits for kill -9."""
    from latent_critic.engine.rewards.composition import Composition

    score, calls = Composition.score, []

    def count_and_score(*arguments):
        calls.append(1)
        if len(calls) == 3:
            Path("paused").touch()
            time.sleep(2 * PATIENCE)
        return score(*arguments)

    Composition.score = count_and_score


def pause_at_each_batch() -> None:
    """Composition's calls say so, and go on when the file `go` is there."""
    from latent_critic.engine.rewards.composition import Composition

    score = Composition.score

    def wait_and_score(*arguments):
        Path("paused").touch()
        wait_until(Path("go").exists)
        return score(*arguments)

    Composition.score = wait_and_score


if "TASK" in globals():
    TASK = globals()["TASK"]
    os.chdir(TASK["folder"])
    globals()[TASK["job"]](*TASK["arguments"])
