"""Rewards over HTTP: the same scores, whatever clients send, and whoever dies meanwhile."""

import base64
import io
import json
import re
import signal
import socket
import struct
import threading
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import requests
import torch
from PIL import Image

from latent_critic.engine.config import Config, RewardConfig
from latent_critic.engine.embedded import scenes
from latent_critic.engine.errors import UserError
from latent_critic.engine.rewards import (
    ANY_VALUE,
    Reward,
    RewardError,
    build_rewards,
    judge,
    remote,
    score_all,
    serve,
    wire,
)
from latent_critic.engine.rewards.local import build_here
from latent_critic.engine.rewards.remote import build_remote
from latent_critic.engine.rewards.service import PatientProtocol
from latent_critic.engine.rewards.wire import TOKEN_VARIABLE

from . import tiny_runs
from .reward_processes import MB, PATIENCE, Served, served_here, wait_until

TOKEN = "open sesame"


def reward(score, value_range=ANY_VALUE, check=lambda prompts, metadata: None, name="r"):
    return Reward(name, 1.0, value_range, score, check)


def number(images, prompts, metadata):
    """The number that a picture's first pixel holds in two bytes."""
    return images[:, 0, 0, 0].float() * 256 + images[:, 0, 0, 1]


def pictures(*numbers):
    images = torch.zeros(len(numbers), 4, 4, 3, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.tensor(numbers) // 256
    images[:, 0, 0, 1] = torch.tensor(numbers) % 256
    return images


def png(*size, mode="RGB"):
    with io.BytesIO() as file:
        Image.new(mode, size or (4, 4)).save(file, format="PNG")
        return file.getvalue()


def asked(*images, **changes):
    """A body of /score."""
    texts = [base64.b64encode(image).decode() for image in images]
    return {"prompts": ["p"] * len(images), "metadata": [{}] * len(images), "images": texts, **changes}


def post(url, content, path="/score", token=None, **headers):
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    given = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {}) | headers
    return requests.post(url + path, data=body, headers=given, timeout=PATIENCE)


def works(url, token=None):
    answer = post(url, asked(png()), token=token)
    assert (answer.status_code, answer.json()) == (200, {"scores": [0.0], "extras": {}})


@contextmanager
def connected(url):
    """A plain socket, for what no HTTP library would send."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as link:
        yield link


HEAD = b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def status(link):
    """Of the answer that comes; None where the connection is closed without one."""
    try:
        line = link.makefile("rb").readline()
    except ConnectionResetError:
        return None
    return int(line.split()[1]) if line else None


# ------------------------------------------------------------------------------------------------------------- scores


def test_scores_are_those_of_the_reward_itself():
    """To the last bit, with extras, their gaps, and metadata."""

    def judged(images, prompts, metadata):
        brightness = images.float().mean((1, 2, 3)) / 3
        return brightness, {"seen": [m["n"] for m in metadata], "odd": [n % 2 or np.nan for n in range(len(prompts))]}

    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 12, 20, 3)).astype(np.uint8))
    given = images, ["a", "b", "ü", '"', "e"], [{"n": n} for n in range(5)]
    here = reward(judged, (0, 255), name="m:f")
    with served_here(here) as url:
        there = build_remote("m:f", url + "/", 60)
        found = judge(there, *given)
    expected = judge(here, *given)
    assert torch.equal(found.values, expected.values) and found.values.std() > 0
    assert found.extras["seen"].tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(found.extras["odd"], [np.nan, 1, np.nan, 1, np.nan])
    assert there.value_range == (0, 255) and there.is_elsewhere


def test_two_hundred_requests_at_once():
    """More than the queue holds: some come again. Each gets its own answer, and the reward one call at a time."""
    inside, together = [], []

    def counting(images, prompts, metadata):
        inside.append(1)
        together.append(len(inside))
        values = number(images, prompts, metadata)
        inside.pop()
        return values

    with served_here(reward(counting), queue=128) as url:
        gate = threading.Barrier(200)

        def ask(n):
            client = build_remote("r", url, PATIENCE)
            gate.wait(PATIENCE)
            return score_all([client], pictures(n, n + 1), ["a", "b"], [{}, {}])[:, 0].tolist()

        with ThreadPoolExecutor(200) as threads:
            found = list(threads.map(ask, range(0, 2000, 10)))
    assert found == [[n, n + 1] for n in range(0, 2000, 10)]
    assert together == [1] * 200


def test_a_full_queue_says_when_to_come_again():
    begun, go = threading.Event(), threading.Event()

    def slow(images, prompts, metadata):
        begun.set()
        assert go.wait(PATIENCE)
        return number(images, prompts, metadata)

    with served_here(reward(slow), queue=1) as url, ThreadPoolExecutor(1) as threads:
        first = threads.submit(post, url, asked(png()))
        assert begun.wait(PATIENCE)
        busy = post(url, asked(png()))
        health = requests.get(url + "/health", timeout=PATIENCE)
        go.set()
        assert (busy.status_code, busy.headers["Retry-After"]) == (503, "1")
        assert health.json() == {"reward": "r", "value_range": [None, None]}  # who looks after it is not turned away
        assert first.result().json()["scores"] == [0]
        works(url)


def test_prompts_are_checked_by_the_server_before_a_run(monkeypatch):
    def check(prompts, metadata):
        seen.append((prompts, metadata))
        if "a dog" in prompts:
            raise UserError("no dogs")

    seen = []
    monkeypatch.setattr(remote, "CHECKED", 2)
    with served_here(reward(number, check=check)) as url:
        (there,) = build_rewards([RewardConfig(name="r", url=url)])
        with pytest.raises(RewardError, match=f"^reward 'r': {url} answers HTTP 422: no dogs$"):
            there.check_prompts(["a cat", "a cow", "a pig", "a dog", "a hen"], [{"legs": 4}] * 4 + [{"legs": 2}])
        assert seen == [(["a cat", "a cow"], [{"legs": 4}] * 2), (["a pig", "a dog"], [{"legs": 4}] * 2)]
        with pytest.raises(UserError, match=f"^reward 's': {url} serves the reward 'r'; give that name, or another"):
            build_rewards([RewardConfig(name="s", url=url)])


# --------------------------------------------------------------------------------------------------- what is refused


def truncated():
    return png(64, 64)[:-30]


def bomb():
    """A PNG of 300 bytes that says it has 60,000 x 60,000 pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(10**5))) + chunk(b"IEND", b"")


def text_bomb():
    """A small picture with a comment that unfolds to 100 MB."""
    content = b"Comment\0\0" + zlib.compress(bytes(100 * MB))
    chunk = struct.pack(">I", len(content)) + b"zTXt" + content + struct.pack(">I", zlib.crc32(b"zTXt" + content))
    whole = png()
    return whole[:33] + chunk + whole[33:]  # after the header


@pytest.fixture(scope="module")
def guarded():
    """A server with a token; any request that is right scores 0."""
    with served_here(reward(lambda images, prompts, metadata: [0.0] * len(prompts)), token=TOKEN) as url:
        yield url


@pytest.mark.parametrize(
    ("content", "expected", "message"),
    [
        pytest.param(b"", 400, "not JSON", id="nothing"),
        pytest.param(b'{"prompts": ["a"', 400, "not JSON", id="half of JSON"),
        pytest.param(b"[" * 10**5, 400, "not JSON: recursion limit", id="deep JSON"),
        pytest.param(b"\x80\x04\x95", 400, "not JSON", id="pickle"),
        pytest.param([], 422, "the body: ", id="a list"),
        pytest.param({"prompts": ["p"], "images": []}, 422, "metadata: Field required", id="no metadata"),
        pytest.param(asked(png(), prompts=[7]), 422, r"prompts\[0\]: .* string", id="a number for a prompt"),
        pytest.param(asked(png(), seed=1), 422, "seed: Extra", id="unknown key"),
        pytest.param(asked(png(), prompts=[]), 422, "0 prompts, 1 metadata: it must be", id="fewer prompts"),
        pytest.param(asked(), 422, "0 images", id="no picture"),
        pytest.param(asked(images=["???"], prompts=["p"], metadata=[{}]), 422, "not base64", id="no base64"),
        pytest.param(asked(b"GIF89a"), 422, r"images\[0\] is not a PNG", id="no PNG"),
        pytest.param(asked(png(64, 64), truncated()), 422, r"images\[1\] is a damaged PNG", id="truncated PNG"),
        pytest.param(asked(png()[:20]), 422, r"images\[0\] is not a PNG", id="half a header"),
        pytest.param(asked(text_bomb()), 422, r"images\[0\] is not a PNG", id="text bomb"),
        pytest.param(asked(bomb()), 413, "at most 1000000 pixels", id="bomb"),
        pytest.param(asked(png(1001, 1000)), 413, r"images\[0\] of 1001 x 1000", id="a large picture"),
        pytest.param(asked(*[png(500, 500, mode="L")] * 5), 413, "5 images of 500 x 500", id="large together"),
        pytest.param(asked(*[png()] * 33), 413, "33 images: at most 32", id="many pictures"),
        pytest.param(asked(png(), png(4, 5)), 422, "one size", id="two sizes"),
    ],
)
def test_malformed_requests(guarded, content, expected, message):
    answer = post(guarded, content, token=TOKEN)
    assert answer.status_code == expected and re.search(message, answer.json()["error"])
    works(guarded, TOKEN)


def test_who_may_ask_and_how(guarded):
    content = asked(png())
    for token in (None, "open sesam", "open sesame!", "öpen".encode().decode("latin-1")):
        answer = post(guarded, content, token=token)
        assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
        assert post(guarded, {"prompts": ["p"]}, "/check", token).status_code == 401
    assert post(guarded, content, token=TOKEN, **{"Content-Type": "text/plain"}).status_code == 415
    assert post(guarded, content, "/other", TOKEN).status_code == 404
    assert requests.get(guarded + "/score", timeout=PATIENCE).status_code == 405
    for line in (b"nonsense\r\n\r\n", HEAD + b"Content-Length: -1\r\n\r\n", HEAD + b"Content-Length: 1e9\r\n\r\n"):
        with connected(guarded) as link:
            link.sendall(line)
            assert status(link) == 400
    works(guarded, TOKEN)


@pytest.mark.parametrize("is_declared", [True, False], ids=["declared", "streamed"])
def test_a_gigabyte_is_refused_and_never_held(is_declared):
    """A declared one before its first byte. One that is streamed beyond the limit of 4 MB is refused there, and what
    the client sends on all the same is not kept: another 40 MB pass while the server's memory stays where it was."""
    block = b"x" * 2**16
    chunk = b"10000\r\n" + block + b"\r\n"
    with served_here(reward(number)) as url, connected(url) as link:
        works(url)
        tracemalloc.start()
        try:
            if is_declared:
                link.sendall(HEAD + b"Content-Length: 1000000000\r\n\r\n")
                assert status(link) == 413
            else:
                link.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
                for _ in range(4 * MB // 2**16 + 1):
                    link.sendall(chunk)
                assert status(link) == 413
            for _ in range(40 * MB // 2**16):
                link.sendall(block if is_declared else chunk)
            works(url)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    # The 4 MB, as they grow in a bytearray (1.125 times), and one read and h11's buffer of 0.25 MB each.
    assert peak < (2 if is_declared else 8) * MB


def test_slow_clients_are_given_up():
    """With half a body: 408. With half a head, or nothing more of a body that was refused: closed without a word."""
    with served_here(reward(number), patience=1) as url:
        with connected(url) as body, connected(url) as head, connected(url) as silent, connected(url) as refused:
            refused.sendall(HEAD + b"Content-Length: 1000000000\r\n\r\n")
            body.sendall(HEAD + b"Content-Length: 100\r\n\r\n" + b'{"prompts": ')
            head.sendall(HEAD)
            assert status(refused) == 413
            assert status(body) == 408
            assert status(head) is None and status(silent) is None
            with pytest.raises(OSError):  # it is closed, though something arrives now and then
                wait_until(lambda: refused.sendall(b"x"))
        assert score_all([build_remote("r", url, PATIENCE)], pictures(7), ["p"], [{}]).tolist() == [[7]]


def test_slow_scores_are_no_slow_client(monkeypatch):
    """Its connection is looked at again and again while the reward thinks."""
    begun, go, looks, look = threading.Event(), threading.Event(), [], PatientProtocol._look

    def slow(images, prompts, metadata):
        begun.set()
        assert go.wait(PATIENCE)
        return number(images, prompts, metadata)

    def counted(self):
        looks.append(begun.is_set())
        look(self)

    monkeypatch.setattr(PatientProtocol, "_look", counted)
    with served_here(reward(slow), patience=0.5) as url, ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(score_all, [build_remote("r", url, PATIENCE)], pictures(7), ["p"], [{}])
        wait_until(lambda: sum(looks) >= 3)
        go.set()
        assert waiting.result(PATIENCE).tolist() == [[7]]


def test_nobody_scores_for_clients_that_are_gone(monkeypatch):
    second_is_decoded, go, calls, unpack = threading.Event(), threading.Event(), [], wire.unpack

    def watched(*arguments):
        asked = unpack(*arguments)
        if asked[1] == ["second"]:
            second_is_decoded.set()
        return asked

    def slow(images, prompts, metadata):
        calls.append(prompts[0])
        assert go.wait(PATIENCE)
        return number(images, prompts, metadata)

    monkeypatch.setattr(wire, "unpack", watched)
    with served_here(reward(slow)) as url, ThreadPoolExecutor(3) as threads:
        first = threads.submit(post, url, asked(png(), prompts=["first"]))
        wait_until(lambda: calls)
        second = threads.submit(post, url, asked(png(), prompts=["second"]))
        assert second_is_decoded.wait(PATIENCE)  # from now on who comes waits for both
        body = json.dumps(asked(png(), prompts=["gone"])).encode()
        with connected(url) as link:
            link.sendall(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        requests.get(url + "/health", timeout=PATIENCE)  # the server has seen it go
        third = threads.submit(post, url, asked(png(), prompts=["third"]))
        go.set()
        assert [each.result(PATIENCE).status_code for each in (first, second, third)] == [200] * 3
    assert calls == ["first", "second", "third"]


# ------------------------------------------------------------------------------------------------------------- client


@pytest.fixture
def told(monkeypatch):
    """What the client tells the user."""
    lines = []
    monkeypatch.setattr(remote, "notice", lines.append)
    return lines


def test_a_server_that_stays_away(told, monkeypatch):
    """Pauses double up to ten seconds; the user is told once, after five."""
    pauses = []
    monkeypatch.setattr(remote, "time", SimpleNamespace(monotonic=lambda: sum(pauses), sleep=pauses.append))
    url = f"http://127.0.0.1:{tiny_runs.free_port()}"
    with pytest.raises(RewardError, match=rf"^reward 'r': {url} has not answered for 90 s \(no connection\); start it"):
        build_remote("r", url, 90)
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, *[10.0] * 7])  # 82.7 s; 10 more are too many
    assert told == [
        f"reward 'r': {url} does not answer (no connection); waiting, up to 1.5 min (Ctrl-C ends the run, and "
        "--resume auto goes on from its newest checkpoint)"
    ]


def test_a_server_that_never_answers():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(RewardError, match=r"has not answered for 0.2 s \(no answer within 0.2 s\)"):
            build_remote("r", url, 0.2)


def test_a_server_of_something_else(monkeypatch):
    class Answer:
        status_code, text, headers = 200, "<html>", {}

        def json(self):
            raise requests.JSONDecodeError("no", "<html>", 0)

    monkeypatch.setattr(requests.Session, "request", lambda *_, **__: Answer())
    with pytest.raises(RewardError, match="reward 'r': http://x answers HTTP 200: <html>"):
        build_remote("r", "http://x", 60)
    monkeypatch.setattr(Answer, "json", lambda self: {"status": "ok"})
    with pytest.raises(RewardError, match="http://x is no reward server: /health answers {'status': 'ok'}"):
        build_remote("r", "http://x", 60)
    client = remote.Client("r", "http://x", 60)
    with pytest.raises(RewardError, match="http://x answers no scores but {'status': 'ok'}"):
        client.score(pictures(1), ["a"], [{}])


@pytest.mark.parametrize(
    ("error", "expected", "calls"),
    [
        (UserError("no caption"), "answers HTTP 422: no caption$", 1),
        (
            ZeroDivisionError("x"),
            r"has failed 3 times: HTTP 500: reward 'r' failed on prompt 'p': ZeroDivisionError",
            6,
        ),
    ],
)
def test_failures_are_told_apart_from_being_away(error, expected, calls):
    """What the reward says about a request is final. What it raises may pass, but not thrice; each time it is called
    once for the batch, and once to find the prompt."""
    called = []

    def failing(images, prompts, metadata):
        called.append(1)
        raise error

    with served_here(reward(failing)) as url:
        there = build_remote("r", url, 60)
        with pytest.raises(RewardError, match=expected):
            score_all([there], pictures(1), ["p"], [{}])
    assert len(called) == calls


def test_a_failure_that_passes(told, monkeypatch):
    monkeypatch.setattr(remote, "QUIET_SECONDS", 0)
    called = []

    def failing_twice(images, prompts, metadata):
        called.append(1)
        if len(called) <= 4:
            raise RuntimeError("out of memory")
        return number(images, prompts, metadata)

    with served_here(reward(failing_twice)) as url:
        there = build_remote("r", url, 60)
        assert score_all([there], pictures(7), ["p"], [{}]).tolist() == [[7]]
    assert len(told) == 2 and re.search("HTTP 500: .*out of memory", told[0]) and "answers again after" in told[1]


def test_the_token_comes_from_the_environment(guarded, monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, "wrong")
    with pytest.raises(RewardError, match=f"HTTP 401: wrong or missing token; .* variable {TOKEN_VARIABLE}"):
        build_remote("r", guarded, 60).check_prompts(["p"], [{}])
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")  # which nobody answers at: it is not asked
    assert score_all([build_remote("r", guarded, 60)], pictures(7), ["p"], [{}]).tolist() == [[0]]


# -------------------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--reward", "compositon"], "unknown reward 'compositon'; did you mean 'composition'"),
        (["--reward", "ocr", "--params", "{threads: 2}"], "--params '{threads: 2}': not JSON"),
        (["--reward", "ocr", "--params", "[2]"], r"--params '\[2\]': expected an object"),
        (["--reward", "composition", "--params", '{"strict": 1}'], "reward 'composition' has no param 'strict'"),
        (["--reward", "composition", "--device", "cuda:99"], "computes on the CPU"),
        (["--reward", "composition", "--token-env", "NO_SUCH"], "--token-env NO_SUCH: that variable .* is not set"),
        (["--reward", "composition", "--host", "no.such.host.invalid"], "no such address"),
        (["--reward", "composition", "--host", "0.0.0.0"], "lets other machines in: set a token"),
        (["--reward", "composition", "--host", "::"], "lets other machines in: set a token|no such address"),
        (["--reward", "composition", "--port", "99999999"], "--port 99999999: must be from 0 to 65535"),
    ],
)
def test_what_cannot_be_served(flags, message, monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with pytest.raises(UserError, match=message):
        serve.prepare(serve.arguments(["--port", "0", *flags]))


def test_a_token_opens_the_server_to_other_machines(monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    server, listener = serve.prepare(serve.arguments(["--reward", "composition", "--host", "0.0.0.0", "--port", "0"]))
    listener.close()


def test_a_port_in_use_and_missing_packages(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(UserError, match=rf"--port {port}: cannot listen there \(Address already in use\)"):
            serve.prepare(serve.arguments(["--reward", "composition", "--port", port]))
    monkeypatch.setitem(__import__("sys").modules, "uvicorn", None)
    with pytest.raises(UserError, match=r"needs packages \(.*uvicorn.*\): pip install 'latent-critic\[rewards\]'"):
        serve.prepare(serve.arguments(["--reward", "composition", "--port", "0"]))


# -------------------------------------------------------------------------------------------------- servers that die


def drawn(count):
    rng = np.random.default_rng(0)
    found = [scenes.random_scene(rng) for _ in range(count)]
    images = torch.from_numpy(np.stack([scenes.draw(scene, rng) for scene in found]))
    prompts = [scene.caption() for scene in found]
    return images, prompts[::2] + prompts[1::2], [{}] * count  # hardly any of them right


def test_scores_are_the_same_when_the_server_is_killed_in_the_middle(tmp_path):
    """kill -9 while it scores the third of four batches; the next one starts, and the client goes on. SIGTERM ends that
    with code 0, once the request that it has is answered."""
    given, server = drawn(8), Served(tmp_path, "--reward", "composition")
    server.start("pause_at_the_third_batch")
    with ThreadPoolExecutor(1) as threads:
        (there,) = build_rewards([RewardConfig(name="composition", url=server.url, batch_size=2)])
        found = threads.submit(score_all, [there], *given)
        server.wait_for_pause()
        server.kill()
        server.start("pause_at_each_batch")
        server.wait_for_pause()
        (tmp_path / "go").touch()
        found = found.result(PATIENCE)
        (tmp_path / "go").unlink()
        (tmp_path / "paused").unlink()
        last = threads.submit(post, server.url, asked(png(64, 64), prompts=["a red circle"]))
        server.wait_for_pause()
        threading.Timer(0.3, (tmp_path / "go").touch).start()  # after the signal, most likely; before it is right too
        assert server.end(signal.SIGTERM) == 0
        assert last.result(PATIENCE).json() == {"scores": [0.0], "extras": {}}
    assert torch.equal(found, score_all([build_here("composition", {})], *given)) and len(found.unique()) > 2
    assert server.output == 2 * f"reward 'composition' is served at {server.url}\n"


def test_a_mistake_on_the_command_line_is_one_line_and_code_2(tmp_path):
    server = Served(tmp_path, "--reward", "compositon").start()
    assert server.join() == 2
    assert server.output.startswith("error: unknown reward 'compositon'") and server.output.count("\n") == 1


def test_a_run_whose_reward_server_is_killed_in_the_middle(tiny_pipeline, tmp_path):
    """It ends with the metrics of a run that scores by itself."""
    options = {
        "prompts": {"train": "scenes:train:single_object", "eval": "scenes:held-out:single_object"},
        "training": {"iterations": 1},
        "evaluation": {"every": 0, "num_prompts": 2},
    }
    server = Served(tmp_path / "server", "--reward", "composition").start("pause_at_the_third_batch")
    runs = {}
    for name, where in (("local", {}), ("remote", {"url": server.url})):
        rewards = [{"name": "composition", "stop_if_constant": None, **where}]
        config = tiny_runs.run_config(tiny_pipeline, rewards=rewards, **options)
        runs[name] = tiny_runs.train(tiny_runs.prepare(tmp_path / name, config))
    server.wait_for_pause()
    server.kill()
    server.start()
    rows = {name: measured(run.finish().folder / "run") for name, run in runs.items()}
    server.kill()
    assert rows["remote"] == rows["local"] and [row["iteration"] for row in rows["local"]] == [0, 1, 2]


def measured(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("seconds") and k != "overhead"} for row in rows]


def test_keys_of_a_served_reward_in_a_config():
    def refused(**keys):
        with pytest.raises(ValueError) as error:
            Config.model_validate({"rewards": [{"name": "a", **keys}]})
        return str(error.value)

    assert 'reward "a": url = "localhost:8000": expected http://host:port' in refused(url="localhost:8000")
    served = {"params": ({"x": 1}, "--params"), "device": ("cuda", "--device"), "workers": (2, "one server")}
    for key, (value, instead) in served.items():
        message = f'reward "a": {key} is the server\'s own, since there is a url: {instead}'
        assert message in refused(url="http://x", **{key: value})
