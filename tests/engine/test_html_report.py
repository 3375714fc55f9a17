"""The report of a run: one page that asks for nothing else, is well formed, escapes what it shows, and is right."""

import base64
import hashlib
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from latent_critic.engine.config import Config, save_config
from latent_critic.engine.errors import UserError
from latent_critic.engine.html_report import content, write_report

EVIL = """</ul><script>alert("x")</script><img src='https://example.org/x.png' onerror=alert(1)> & {{ 7 * 7 }}"""
PROMPTS = ["a red circle", EVIL, 'the text "47"']
VOID = {"meta", "img", "input", "br", "link"}
SETTINGS = {"prompts": "scenes:held-out", "num_inference_steps": 10, "guidance_scale": 1.0, "seed": 1000}


class Page(HTMLParser):
    """Every element with its attributes and its text; fails where elements are not nested."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self._open = [], []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attributes):
        self.elements.append({"tag": tag, "text": "", **dict(attributes)})
        assert len(dict(attributes)) == len(attributes)
        if tag not in VOID:
            self._open.append(self.elements[-1])

    def handle_endtag(self, tag):
        assert self._open.pop()["tag"] == tag

    def handle_data(self, text):
        for element in self._open:
            element["text"] += text

    def all(self, tag, **attributes):
        return [e for e in self.elements if e["tag"] == tag and attributes.items() <= e.items()]


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write({iteration: scores of the three prompts}, [rows], **sections): a run folder, its report's page and text.
    The pictures of an iteration are of its grey. plots: whether they are drawn, which takes a second."""

    def write(scores, rows=(), side=16, plots=False, **sections):
        if not plots:
            monkeypatch.setattr(content.reports, "panels_as_svg", lambda rows: {"Reward": b"<svg/>"} if rows else {})
        run = tmp_path / "my <run>"
        (run / "evaluations").mkdir(parents=True)
        rewards = {"rewards": [{"name": "composition_strict"}, {"name": "my:<b>reward</b>"}]}
        save_config(Config.model_validate({**rewards, **sections}), run / "config.json")
        for iteration, column in scores.items():
            path = run / "evaluations" / f"iteration-{iteration:06d}"
            columns = {"composition_strict": column, "my:<b>reward</b>": [x / 2 for x in column]}
            path.with_suffix(".json").write_text(
                json.dumps({"settings": SETTINGS, "prompts": PROMPTS, "scores": columns})
            )
            np.savez(path, images=np.full((3, side, side, 3), iteration % 256, np.uint8))
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        text = write_report(run).read_text(encoding="utf-8")
        return run, Page(text), text

    return write


ROWS = [
    {"iteration": 0, "eval/composition_strict": 0.3, "eval/monitor/diversity": 40.0, "eval/monitor/edge_density": 0.0},
    {"iteration": 100, "phase": "ppo", "reward/composition_strict": 0.5, "clipfrac": 0.1, "approx_kl": 1e-6},
    {"iteration": 200, "phase": "ppo", "eval/monitor/diversity": 30.0, "eval/monitor/edge_density": 0.1},
]
SCORES = {0: [0.0, 0.0, 1.0], 200: [1.0, 0.0, 1.0]}


def test_the_page_is_all_there_is(write):
    """Nothing is fetched: each picture is a data URL that decodes, nothing else has a source, and no style or script
    is named that is not in the page. The page's own policy holds a browser to it, and knows its style and script."""
    _, page, text = write(SCORES, ROWS, plots=True)
    images = page.all("img")
    assert len(images) == 2 * 3 + 4  # two evaluations of three prompts; reward, monitors, policy change, clip fraction
    for image in images:
        kind, data = re.fullmatch(r"data:image/(jpeg|svg\+xml);base64,(.+)", image["src"]).groups()
        if kind == "jpeg":
            with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
                assert picture.size == (16, 16)
        else:
            svg = ElementTree.fromstring(base64.b64decode(data))
            links = [value for element in svg.iter() for name, value in element.items() if name.endswith("href")]
            assert all(link.startswith("#") for link in links)
    for element in page.elements:
        assert not {"href", "srcset", "action", "data", "poster", "background", "style"} & element.keys(), element
        assert "src" not in element or element["tag"] == "img"
        assert not any(name.startswith("on") for name in element), element
    assert not {"link", "iframe", "object", "embed", "base", "svg"} & {element["tag"] for element in page.elements}
    (style,), (script,) = page.all("style"), page.all("script")
    assert "url(" not in style["text"] and "@import" not in style["text"]
    (policy,) = (meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    hashes = [
        base64.b64encode(hashlib.sha256(element["text"].encode()).digest()).decode() for element in (style, script)
    ]
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'"
    )


def test_what_comes_from_the_run_is_text(write):
    """A prompt, a reward's name, a folder and a path of the configuration, none of which becomes an element."""
    _, page, text = write(SCORES, ROWS, output_dir="</pre><script>alert(2)</script>")
    assert len(page.all("script")) == 1 and not page.all("b", text="reward")
    assert "alert(1)" in text and "alert(2)" in text and "49" not in page.all("ul")[0]["text"]
    captions = [e["text"].strip() for e in page.all("li") if "class" in e]
    assert [c.split(" ✓")[0].split(" ✗")[0] for c in captions] == PROMPTS * 2
    assert page.all("img", alt=f"{EVIL}, drawn after iteration 0")
    (title,), (heading,), (config,) = page.all("title"), page.all("h1"), page.all("pre")
    assert title["text"] == "my <run> · latent-critic" and heading["text"] == "my <run>"
    assert json.loads(config["text"])["output_dir"] == "</pre><script>alert(2)</script>"
    assert any(e["text"].startswith("my:<b>reward</b>") for e in page.all("th"))


def test_results_and_monitors_are_those_of_the_run(write):
    """Strict scores 0 0 1 -> 1 0 1: a third more, squared deviations 2/3, an error of sqrt(2/3 / 2 / 3) = 1/3."""
    _, page, _ = write(SCORES, ROWS)
    cells = [e["text"].strip() for e in page.all("td")]
    assert cells == [
        *("0.3333", "0.6667", "+0.3333 ± 0.3333"),
        *("0.1667", "0.3333", "+0.1667 ± 0.1667"),
        *("40", "30", "-25%"),
        *("0", "0.1", "–"),
    ]
    assert [e["text"] for e in page.all("h2")] == [
        *("Result", "Monitors", "Early stop", "Pictures", "Curves", "Configuration")
    ]
    (status,) = page.all("p", **{"class": "status"})
    assert status["text"] == "Ended after 200 iterations." or "of 115 iterations" in status["text"]


@pytest.mark.parametrize(
    ("iterations", "scores", "said"),
    [
        (200, SCORES, "Ended after 200 iterations."),
        (400, SCORES, "200 of 400 iterations done: still running, or interrupted."),
        (400, {0: [0.9, 0.8, 1.0], 200: [0.0, 0.1, 0.1]}, "Stopped early, after 200 of 400 iterations."),
    ],
)
def test_what_became_of_the_run(write, iterations, scores, said):
    training = {"iterations": iterations, "value_pretraining_iterations": 0}
    stop = {"reward": "composition_strict", "patience": 1}
    _, page, _ = write(scores, ROWS, training=training, evaluation={"early_stop": stop})
    (status,) = page.all("p", **{"class": "status"})
    assert status["text"] == said
    fired = [e["text"] for e in page.all("p") if "fired" in e["text"]]
    expected = (
        "It fired after iteration 200: held-out" if "early" in said else "It has not fired; best is iteration 200"
    )
    assert len(fired) == 1 and fired[0].startswith(expected)


def test_pictures_come_with_marks_words_and_a_slider(write):
    """Right and wrong are told by more than a colour; without its script the page shows all evaluations."""
    _, page, _ = write(SCORES, ROWS)
    assert [e["class"] for e in page.all("li") if "class" in e] == [
        "wrong",
        "wrong",
        "right",
        "right",
        "wrong",
        "right",
    ]
    assert sum(e["text"].strip().endswith("right") for e in page.all("li")) == 3
    assert [e["data-iteration"] for e in page.all("section", **{"class": "sheet"})] == ["0", "200"]
    assert not any("hidden" in e for e in page.all("section"))
    (chooser,), (slider,), (label,) = page.all("form"), page.all("input"), page.all("label")
    assert "hidden" in chooser and (slider["min"], slider["max"], slider["value"]) == ("0", "1", "1")
    assert label["for"] == slider["id"]
    assert page.all("html", lang="en") and all(e["alt"] for e in page.all("img"))


def test_many_evaluations_are_thinned_and_large_pictures_come_as_thumbnails(write):
    many = content.EVALUATIONS + 17
    run, *_ = write({10 * k: [0.0, 0.0, k / 100] for k in range(many)}, ROWS[:1], side=2)
    for path in (run / "evaluations").glob("*.npz"):
        np.savez(path, images=np.zeros((3, 300, 300, 3), np.uint8), thumbnails=np.zeros((3, 192, 100, 3), np.uint8))
    page = Page(write_report(run).read_text(encoding="utf-8"))
    shown = [int(e["data-iteration"]) for e in page.all("section", **{"class": "sheet"})]
    assert len(shown) == content.EVALUATIONS and shown[0] == 0 and shown[-1] == 10 * (many - 1)
    assert set(np.diff(shown)) == {10, 20}
    files = [base64.b64decode(e["src"].split(",")[1]) for e in page.all("img") if "jpeg" in e["src"]]
    assert {Image.open(io.BytesIO(file)).size for file in files} == {(100, 192)}
    assert {e["class"] for e in page.all("ul") if "tiles" in e["class"]} == {"tiles"}  # smoothed


def test_a_run_that_has_only_begun(write):
    _, page, _ = write({}, [])
    assert [e["text"] for e in page.all("p")].count("No evaluation yet.") == 2
    assert "No metrics yet." in [e["text"] for e in page.all("p")] and not page.all("img")


def test_the_command(write, tmp_path):
    """Without torch, so that it answers at once; a folder that holds no run is refused with exit code 2."""
    run, _, _ = write(SCORES, ROWS)
    (run / "report.html").unlink()
    check = "import runpy, sys; runpy.run_module('latent_critic.engine.html_report', run_name='__main__')"
    code = f"import sys; sys.argv = ['report', {str(run)!r}]; {check}; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert done.returncode == 0 and done.stdout == f"{run / 'report.html'}\n", done.stderr
    assert (run / "report.html").is_file() and not list(run.glob(".report*"))
    with pytest.raises(UserError, match=r"no run there \(no config.json\); give the folder that a run printed"):
        write_report(tmp_path)
