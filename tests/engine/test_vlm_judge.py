"""The judge against a real HTTP server: what it asks, what it makes of every kind of answer, and what it never does."""

import base64
import io
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from latent_critic.engine.errors import UserError
from latent_critic.engine.rewards.protocol import RewardError
from latent_critic.engine.rewards.vlm_judge import TEMPLATE, VlmJudge, mark_of

PATIENCE = 60  # seconds until a thread that should have moved on counts as hanging


def reply(text):
    """Status and body of an answer in which a model says this."""
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


class Server(ThreadingHTTPServer):
    """Answers by `answer(number of the request, its body)` -> status, body, or hangs up at None; keeps what it
    was asked."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock, self.asked, self.arrived = threading.Lock(), [], threading.Semaphore(0)
        self.answer = lambda number, body: reply("Final Score: 3")
        self.base_url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append((self.path, dict(self.headers), body))
            number = len(self.server.asked)
        self.server.arrived.release()
        answer = self.server.answer(number, body)
        if answer is None:
            self.close_connection = True
            return
        status, text = answer
        self.send_response(status)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args):
        """Nothing to the terminal."""


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server():
    found = Server()
    thread = threading.Thread(target=found.serve_forever, args=(0.01,))
    thread.start()
    yield found
    found.shutdown()
    thread.join()
    found.server_close()


@pytest.fixture
def pictures():
    """uint8 [4, 8, 8, 3], noise."""
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3)).astype(np.uint8))


PROMPTS = ["a dog", 'a sign that says "{prompt}"', "zwei Kühe", "a cat"]


def judge(server, **params):
    return VlmJudge(**{"model": "judge-7b", "base_url": server.base_url, "max_retries": 1, **params})


def score(judge_, pictures, prompts=PROMPTS):
    return judge_.score(pictures, prompts, [{}] * len(prompts))


def text_of(body):
    return body["messages"][0]["content"][1]["text"]


def test_marks_become_scores_in_the_order_of_the_pictures(server, pictures):
    marks = dict(zip(PROMPTS, ("5", "2.5", "1", "4"), strict=True))
    later = threading.Event()

    def answer(number, body):
        prompt = text_of(body).removeprefix("Judge ")
        if prompt == "a dog":
            assert later.wait(PATIENCE), "the others waited for the first"
        elif prompt == "a cat":
            later.set()
        return reply(f"Nice.\n**Final Score: {marks[prompt]}**")

    server.answer = answer
    assert score(judge(server, template="Judge {prompt}", concurrency=4), pictures) == [1.0, 0.5, 0.2, 0.8]
    assert VlmJudge.value_range == (0.2, 1.0)


def test_the_request_is_openais(server, pictures, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret\n")
    assert score(judge(server, api_key_env="JUDGE_KEY"), pictures) == [0.6] * 4
    prompts = set()
    for path, headers, body in server.asked:
        assert path == "/v1/chat/completions"
        assert headers["Content-Type"] == "application/json"
        assert headers["Authorization"] == "Bearer secret"
        assert body.keys() == {"model", "messages", "temperature"}
        assert (body["model"], body["temperature"]) == ("judge-7b", 0)
        (message,) = body["messages"]
        image, text = message["content"]
        assert (message["role"], image["type"], text["type"]) == ("user", "image_url", "text")
        prompt = next(p for p in PROMPTS if text["text"] == TEMPLATE.replace("{prompt}", p))
        prompts.add(prompt)
        head, _, png = image["image_url"]["url"].partition(",")
        assert head == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(png))) as picture:
            assert picture.format == "PNG"
            assert np.array_equal(np.asarray(picture), pictures[PROMPTS.index(prompt)])
    assert prompts == set(PROMPTS)


def test_without_a_key_none_is_sent(server, pictures):
    score(judge(server), pictures[:1], PROMPTS[:1])
    assert "Authorization" not in server.asked[0][1]


def test_a_busy_server_is_asked_again(server, pictures):
    server.answer = lambda number, body: (503, "loading") if number == 1 else reply("Final Score: 4")
    assert score(judge(server), pictures[:1], PROMPTS[:1]) == [0.8]
    assert server.asked[0][2] == server.asked[1][2]  # the same question, temperature included


def test_a_server_that_stays_busy_is_named(server, pictures):
    server.answer = lambda number, body: (503, "the model is loading")
    with pytest.raises(RewardError, match="completions answered 503 .* on prompt 'a dog': 'the model is loading'"):
        score(judge(server), pictures[:1], PROMPTS[:1])
    assert len(server.asked) == 2


def test_a_refusal_is_not_asked_again(server, pictures):
    server.answer = lambda number, body: (401, '{"error": "invalid key"}')
    with pytest.raises(RewardError, match="answered 401 Unauthorized on prompt 'a dog': .*invalid key"):
        score(judge(server), pictures[:1], PROMPTS[:1])
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "bad",
    [
        reply("I cannot judge pictures."),
        reply("Final Score: 7"),
        reply(None),
        (200, '{"choices": ['),
        (200, '{"choices": []}'),
        (200, '["Final Score: 4"]'),
        (200, "Final Score: 4"),
    ],
)
def test_an_answer_without_a_mark_is_asked_for_again_and_then_named(server, pictures, bad):
    server.answer = lambda number, body: bad if number == 1 else reply("Final Score: 2")
    assert score(judge(server), pictures[:1], PROMPTS[:1]) == [0.4]
    assert [body["temperature"] for *_, body in server.asked] == [0, 1]
    server.answer = lambda number, body: bad
    said = json.loads(bad[1])["choices"][0]["message"]["content"] if bad[1].startswith('{"choices": [{') else None
    with pytest.raises(RewardError) as caught:
        score(judge(server), pictures[:1], PROMPTS[:1])
    assert "gave prompt 'a dog' no mark from 1 to 5 after \"Final Score:\" in 2 answers" in str(caught.value)
    assert str(caught.value).endswith(f"The last answer begins: {said or bad[1]!r}")


def test_only_the_beginning_of_a_long_answer_is_shown(server, pictures):
    server.answer = lambda number, body: reply("x" * 1000)
    with pytest.raises(RewardError, match="begins: 'x{300}'$"):
        score(judge(server, max_retries=0), pictures[:1], PROMPTS[:1])


def test_a_broken_connection_is_tried_again(server, pictures):
    server.answer = lambda number, body: None if number == 1 else reply("Final Score: 5")
    assert score(judge(server), pictures[:1], PROMPTS[:1]) == [1.0]
    server.answer = lambda number, body: None
    with pytest.raises(RewardError, match="no answer from http://.* on prompt 'a dog' .*; is a server running there"):
        score(judge(server), pictures[:1], PROMPTS[:1])
    assert len(server.asked) == 4


def test_a_slow_answer_is_given_up(server, pictures):
    given_up = threading.Event()

    def answer(number, body):
        assert given_up.wait(PATIENCE), "the judge waited"

    server.answer = answer
    with pytest.raises(RewardError, match="no answer from http://.* on prompt 'a dog' .*timed out.*timeout = 0.05 s"):
        score(judge(server, timeout=0.05), pictures[:1], PROMPTS[:1])
    given_up.set()
    for _ in range(2):  # once, and once again
        assert server.arrived.acquire(timeout=PATIENCE)


def test_no_server_is_named(pictures):
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    gone = VlmJudge("judge-7b", f"http://127.0.0.1:{port}/v1", max_retries=0)
    with pytest.raises(RewardError, match="no answer from http://.* on prompt 'a dog' .*; is a server running there"):
        score(gone, pictures[:1], PROMPTS[:1])


def test_one_failure_stops_the_others(server, pictures):
    server.answer = lambda number, body: (400, "no") if "a dog" in text_of(body) else reply("Final Score: 5")
    with pytest.raises(RewardError, match="answered 400 Bad Request on prompt 'a dog'"):
        score(judge(server, concurrency=1), pictures.repeat(25, 1, 1, 1), PROMPTS * 25)
    assert len(server.asked) < 100  # one was given up while another was asked


@pytest.mark.parametrize(
    ("answer", "mark"),
    [
        ("Final Score: 4", 4),
        ("final score:3.5.", 3.5),
        ("**Final Score:** 5/5", 5),
        ("Final Score: [2]", 2),
        ("Final Score = 1", 1),
        ('You ask for "Final Score: <mark>".\nFinal Score: 2\nNo: final score: 4', 4),
        ("Final Score: 5 - a very good picture", 5),
        ("Final Score: 1-5", None),
        ("Final Score: [1.0 \u2013 5.0]", None),
        ("Final Score (1-5): 4", None),
        ("Final Score: 0", None),
        ("Final Score: 5.5", None),
        ("Final Score: 45", None),
        ("Final Score: -3", None),
        ("Final Score: four", None),
        ("4", None),
        ("", None),
    ],
)
def test_marks_are_numbers_from_1_to_5(answer, mark):
    assert mark_of(answer) == mark


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"model": ""}, "model must be the server's name for it, got ''"),
        ({"base_url": "localhost:8000/v1"}, "base_url must be an address like http://.*, got 'localhost:8000/v1'"),
        ({"template": "How good is it?"}, "template must be a text with {prompt} in it, got 'How good is it.'"),
        ({"timeout": 0}, "timeout must be seconds, above 0, got 0"),
        ({"max_retries": -1}, "max_retries must be a whole number of at least 0, got -1"),
        ({"max_retries": True}, "max_retries must be a whole number of at least 0, got True"),
        ({"concurrency": 0.5}, "concurrency must be a whole number of at least 1, got 0.5"),
    ],
)
def test_wrong_params_are_named(params, message):
    with pytest.raises(UserError, match=f"'vlm_judge': {message}"):
        VlmJudge(**{"model": "judge-7b", **params})


@pytest.mark.parametrize("value", [None, "", " \n", "a\nb", "schl\u00fcssel"])
def test_a_key_is_taken_from_the_environment_and_never_shown(monkeypatch, value):
    if value is None:
        monkeypatch.delenv("sk-1234", raising=False)
    else:
        monkeypatch.setenv("sk-1234", value)
    with pytest.raises(UserError, match="api_key_env must name an environment variable that holds the key") as caught:
        VlmJudge("judge-7b", api_key_env="sk-1234")
    assert "sk-1234" not in str(caught.value)  # a key that was written there by mistake
