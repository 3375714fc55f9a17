"""A reward behind HTTP: pictures go out as PNG, scores come back, and a server that is away is waited for."""

import os
import random
import time
from collections.abc import Mapping, Sequence
from typing import Any

import requests
from torch import Tensor

from . import wire
from .notice import notice
from .protocol import Reward, RewardError

CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 300.0  # for a batch to be scored, before it is asked for again
QUIET_SECONDS = 5.0  # of waiting, before the user is told
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0  # seconds between two attempts; each is twice the one before
FAILURES = 3  # answers 500 in a row: then it is the reward that fails, not its server or what is between
CHECKED = 1000  # prompts of one request


def build_remote(name: str, url: str, timeout_s: float) -> Reward:
    """The reward `name` that is served at `url`, which is waited for.

    timeout_s: seconds that it may be away, now or later, before that is a RewardError.
    """
    client = Client(name, url, timeout_s)
    about = client.ask("GET", "/health")
    try:
        served, (low, high) = about["reward"], about["value_range"]
        bounds = float("-inf") if low is None else float(low), float("inf") if high is None else float(high)
    except (TypeError, ValueError, KeyError):
        raise RewardError(f"reward {name!r}: {url} is no reward server: /health answers {str(about)[:200]}") from None
    if served != name:
        raise RewardError(f"reward {name!r}: {url} serves the reward {served!r}; give that name, or another url")
    return Reward(name, 1.0, bounds, client.score, client.check_prompts, is_elsewhere=True)


class Client:
    """Asks the server at `url` until it answers, for `timeout_s` seconds at most. For one thread at a time."""

    def __init__(self, name: str, url: str, timeout_s: float):
        self._name, self._url, self._timeout = name, url.rstrip("/"), timeout_s
        self._session = requests.Session()
        # No proxy, which may not know the way back to this machine, and no .netrc, which would replace the token.
        self._session.trust_env = False
        if token := os.environ.get(wire.TOKEN_VARIABLE):
            self._session.headers["Authorization"] = f"Bearer {token}"

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping]) -> Any:
        found = self.ask("POST", "/score", wire.pack(images, prompts, metadata))
        try:
            return wire.read_answer(found)
        except (TypeError, KeyError, AttributeError):
            raise RewardError(f"reward {self._name!r}: {self._url} answers no scores but {str(found)[:200]}") from None

    def check_prompts(self, prompts: Sequence[str], metadata: Sequence[Mapping]) -> None:
        for first in range(0, len(prompts), CHECKED):
            cut = slice(first, first + CHECKED)
            self.ask("POST", "/check", wire.pack_prompts(prompts[cut], metadata[cut]))

    def ask(self, method: str, path: str, body: bytes | None = None) -> Any:
        """What the server answers, from JSON. RewardError where it refuses, fails, or stays away too long."""
        who, began = f"reward {self._name!r}: {self._url}", time.monotonic()
        pause, failures, is_told = FIRST_PAUSE, 0, False
        while True:
            try:
                answer = self._ask_once(method, path, body)
                break
            except _NotNow as not_now:
                problem = not_now
            failures = failures + 1 if problem.status == 500 else 0
            if failures == FAILURES:
                raise RewardError(f"{who} has failed {FAILURES} times: {problem}")
            waited = time.monotonic() - began
            # A busy server says how long; not all of those that it sent away need come at the same moment.
            wait = problem.pause * random.uniform(0.5, 1.5) or pause
            if waited + wait > self._timeout:
                raise RewardError(
                    f"{who} has not answered for {self._timeout:g} s ({problem}); start it again and go on with "
                    "--resume auto"
                )
            if waited > QUIET_SECONDS and not is_told:
                is_told = True
                notice(
                    f"{who} does not answer ({problem}); waiting, up to {self._timeout / 60:.3g} min (Ctrl-C ends the "
                    "run, and --resume auto goes on from its newest checkpoint)"
                )
            time.sleep(wait)
            pause = min(2 * pause, LONGEST_PAUSE)
        if is_told:
            notice(f"{who} answers again after {time.monotonic() - began:.0f} s")
        return answer

    def _ask_once(self, method: str, path: str, body: bytes | None) -> Any:
        patience = min(ANSWER_SECONDS, self._timeout)
        try:
            answer = self._session.request(
                method,
                self._url + path,
                data=body,
                headers={"Content-Type": "application/json"},
                timeout=(min(CONNECT_SECONDS, patience), patience),
                allow_redirects=False,
            )
        except requests.ConnectTimeout:
            raise _NotNow("no connection") from None
        except requests.Timeout:
            raise _NotNow(f"no answer within {patience:g} s") from None
        except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError):
            raise _NotNow("no connection") from None
        try:
            found = answer.json()
        except requests.JSONDecodeError:
            found = None
        said = found["error"] if isinstance(found, dict) and "error" in found else answer.text[:200]
        if answer.status_code >= 500:
            after = answer.headers.get("Retry-After", "")
            message = f"HTTP {answer.status_code}: {said}"
            raise _NotNow(message, answer.status_code, float(after) if after.isdecimal() else 0.0)
        if answer.status_code != 200 or found is None:
            raise RewardError(f"reward {self._name!r}: {self._url} answers HTTP {answer.status_code}: {said}")
        return found


class _NotNow(Exception):
    """A problem that may pass. pause: seconds that the server asks to wait for."""

    def __init__(self, problem: str, status: int = 0, pause: float = 0.0):
        super().__init__(problem)
        self.status, self.pause = status, pause
