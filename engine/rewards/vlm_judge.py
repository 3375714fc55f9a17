"""A vision-language model behind an OpenAI-style endpoint marks each picture from 1 to 5.

vLLM, SGLang, llama.cpp and the hosted services all answer POST {base_url}/chat/completions. The request holds the
picture as a PNG and the question; the mark is the number after the answer's last "Final Score:", as UnifiedReward gives
it (arXiv 2503.05236). That model was trained on a question of its own, which `template` takes.
"""

import base64
import io
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import numpy as np
import requests
from PIL import Image
from requests.adapters import HTTPAdapter
from torch import Tensor
from urllib3.util import Retry

from ..errors import UserError
from .protocol import RewardError

TEMPLATE = (
    "This picture was generated from the caption below. Judge two things together: whether it shows what the caption "
    "says - every object, number, attribute, relation and text - and whether it is a good picture: clear, free of "
    "artefacts and pleasing. Explain in a sentence or two, then give one mark from 1 (wrong or broken) to 5 (right in "
    'everything, and flawless) on a last line of the form "Final Score: <mark>".\n'
    "Caption: {prompt}"
)
BEST = 5

# In Markdown or brackets or not, and no part of a scale like "1-5".
_MARK = re.compile(r"final score[\s*:=\[]*(\d+(?:\.\d+)?)(?![\d.]*\s*[-\u2013]\s*\d)", re.IGNORECASE)
_BUSY = (408, 429, 500, 502, 503, 504)  # answers after which the same request may succeed
_BEGINNING = 300  # characters of an answer that an error shows


class VlmJudge:
    """The mark / 5. Without a usable answer the run ends: no picture is scored by default.

    model: the name that the server knows it by. base_url: up to and with /v1. template: the question, with {prompt} for
    the picture's. api_key_env: environment variable that holds the key, if one is needed. timeout: seconds without a
    byte. max_retries: further attempts while a server is busy or a connection breaks (after 0, 1, 2, 4, ... seconds, or
    when the server says), and further questions after answers without a mark. concurrency: requests at a time.
    """

    name = "vlm_judge"
    value_range = (1 / BEST, 1.0)
    is_elsewhere = True

    def __init__(
        self,
        model: str,
        base_url: str = "http://127.0.0.1:8000/v1",
        template: str = TEMPLATE,
        api_key_env: str | None = None,
        timeout: float = 120.0,
        max_retries: int = 4,
        concurrency: int = 16,
    ):
        _require("model", model, "the server's name for it", isinstance(model, str) and model != "")
        address = urlsplit(base_url) if isinstance(base_url, str) else urlsplit("")
        is_address = address.scheme in ("http", "https") and address.netloc != ""
        _require("base_url", base_url, "an address like http://127.0.0.1:8000/v1", is_address)
        _require(
            "template", template, "a text with {prompt} in it", isinstance(template, str) and "{prompt}" in template
        )
        _require("timeout", timeout, "seconds, above 0", _is_number(timeout) and timeout > 0)
        _require("max_retries", max_retries, "a whole number of at least 0", _is_whole(max_retries, 0))
        _require("concurrency", concurrency, "a whole number of at least 1", _is_whole(concurrency, 1))
        self.model, self.template = model, template
        self._url = base_url.rstrip("/") + "/chat/completions"
        self._timeout, self._max_retries, self._concurrency = timeout, max_retries, concurrency
        self._session = requests.Session()
        retry = Retry(
            max_retries, allowed_methods=None, status_forcelist=_BUSY, backoff_factor=0.5, raise_on_status=False
        )
        adapter = HTTPAdapter(pool_maxsize=concurrency, max_retries=retry)
        self._session.mount(f"{address.scheme}://", adapter)
        if api_key_env is not None:
            self._session.auth = _Bearer(api_key_env)

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict]) -> list[float]:
        """images: uint8 [N, H, W, 3]. RewardError names the prompt and shows how the server's answer begins."""
        with ThreadPoolExecutor(self._concurrency, "vlm-judge") as pool:
            marks = [pool.submit(self._mark, *pair) for pair in zip(np.asarray(images), prompts, strict=True)]
            try:
                return [mark.result() / BEST for mark in marks]
            finally:
                pool.shutdown(wait=False, cancel_futures=True)  # of those not yet asked, once one has failed

    def _question(self, picture: np.ndarray, prompt: str) -> dict:
        with io.BytesIO() as file:
            Image.fromarray(picture).save(file, format="PNG")
            png = base64.b64encode(file.getvalue()).decode()
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png}"}},
            {"type": "text", "text": self.template.replace("{prompt}", prompt)},
        ]
        return {"model": self.model, "messages": [{"role": "user", "content": content}]}

    def _mark(self, picture: np.ndarray, prompt: str) -> float:
        question = self._question(picture, prompt)
        for attempt in range(1 + self._max_retries):
            # Deterministic at first; asked again so, a model would only repeat itself.
            response = self._ask({**question, "temperature": 1 if attempt else 0}, prompt)
            message = _message(response)
            if message is not None and (mark := mark_of(message)) is not None:
                return mark
        answer = response.text if message is None else message
        raise RewardError(
            f"reward 'vlm_judge': {self.model!r} at {self._url} gave prompt {prompt!r} no mark from 1 to {BEST} after "
            f'"Final Score:" in {1 + self._max_retries} answers; the template must ask for one. The last answer '
            f"begins: {answer[:_BEGINNING]!r}"
        )

    def _ask(self, question: dict, prompt: str) -> requests.Response:
        try:
            response = self._session.post(self._url, json=question, timeout=self._timeout)
        except requests.RequestException as error:
            raise RewardError(
                f"reward 'vlm_judge': no answer from {self._url} on prompt {prompt!r} ({error}); is a server running "
                f"there, and is timeout = {self._timeout} s enough?"
            ) from error
        if not response.ok:
            raise RewardError(
                f"reward 'vlm_judge': {self._url} answered {response.status_code} {response.reason} on prompt "
                f"{prompt!r}: {response.text[:_BEGINNING]!r}"
            )
        return response


def _message(response: requests.Response) -> str | None:
    """What the model said; None if the answer is none of the protocol's."""
    try:
        message = response.json()["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        return None
    return message if isinstance(message, str) else None


def mark_of(answer: str) -> float | None:
    """The number after the last "Final Score:", if it is one from 1 to 5."""
    marks = [float(number) for number in _MARK.findall(answer)]
    return marks[-1] if marks and 1 <= marks[-1] <= BEST else None


class _Bearer(requests.auth.AuthBase):
    """Sends the key that an environment variable holds."""

    def __init__(self, variable: str):
        self._key = os.environ.get(variable, "").strip() if isinstance(variable, str) else ""
        if not self._key or not self._key.isascii() or not self._key.isprintable():
            # Whoever wrote the key itself into the config shall not find it in a log, too.
            raise UserError(
                "reward 'vlm_judge': api_key_env must name an environment variable that holds the key (export it); the "
                "one that is named holds none"
            )

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self._key}"
        return request


def _require(param: str, value: object, expected: str, right: bool) -> None:
    if not right:
        raise UserError(f"reward 'vlm_judge': {param} must be {expected}, got {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
