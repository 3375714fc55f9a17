"""Prompts: the three sources, the message for each bad line, and an order that resumes exactly."""

from collections import Counter

import pytest

from latent_critic.engine.embedded import scenes
from latent_critic.engine.errors import UserError
from latent_critic.engine.prompts import Prompt, PromptSampler, load_prompts


@pytest.fixture
def write(tmp_path):
    def write(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def message(source: str) -> str:
    with pytest.raises(UserError) as caught:
        load_prompts(source)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------- sources


@pytest.mark.parametrize("split", ["train", "held-out"])
def test_scenes_by_split(split):
    assert [prompt.text for prompt in load_prompts(f"scenes:{split}")] == scenes.prompts(split, None)


def test_scenes_by_task():
    prompts = load_prompts("scenes:train:counting+position")
    assert [prompt.text for prompt in prompts] == scenes.prompts("train", ("counting", "position"))
    assert all(prompt.metadata == {} for prompt in prompts)


def test_text_file_has_a_prompt_a_line_and_ignores_blank_ones(write):
    source = write("p.txt", "\ufeffa cat\r\n\n  two dogs \n\t\nein Bär")
    assert load_prompts(source) == [Prompt("a cat"), Prompt("two dogs"), Prompt("ein Bär")]


def test_jsonl_file_keeps_the_other_keys_as_metadata(write):
    source = write(
        "p.jsonl", '{"prompt": "a cat", "tag": "single_object", "include": [{"class": "cat"}]}\n\n{"prompt":"b"}'
    )
    assert load_prompts(source) == [
        Prompt("a cat", {"tag": "single_object", "include": [{"class": "cat"}]}),
        Prompt("b", {}),
    ]


# --------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"prompt": "b"', "not valid JSON: Expecting ',' delimiter at column 15"),
        ('["b"]', 'expected an object {"prompt": "...", ...}, got list'),
        ('{"text": "b", "tag": 1}', 'no key "prompt"; the keys are text, tag'),
        ("{}", 'no key "prompt"'),
        ('{"prompt": 3}', '"prompt" must be a string that is not empty, got 3'),
        ('{"prompt": "  "}', '"prompt" must be a string that is not empty, got "  "'),
    ],
)
def test_a_bad_line_of_a_jsonl_file_is_named_with_its_number(write, line, expected):
    source = write("p.jsonl", '{"prompt": "a"}\n\n' + line + "\n")
    assert message(source) == f"{source}:3: {expected}"


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_a_line_that_is_no_text_is_named_with_its_number(write, name):
    source = write(name, b'{"prompt": "a"}\n{"prompt": "caf\xe9"}\n')
    assert message(source) == f"{source}:2: not UTF-8 text: invalid continuation byte at byte 15"


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
@pytest.mark.parametrize("content", ["", "\n \n"])
def test_a_file_without_prompts_is_refused(write, name, content):
    source = write(name, content)
    assert message(source) == f"{source}: holds no prompt; give one or more, a line each"


def test_a_missing_file_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message("data/p.txt") == f"data/p.txt: no such prompt file; looked in {tmp_path / 'data'}"


def test_a_folder_is_no_prompt_file(tmp_path):
    folder = tmp_path / "p.txt"
    folder.mkdir()
    assert message(str(folder)) == f"{folder}: prompt file cannot be read: Is a directory"


@pytest.mark.parametrize("source", ["p.csv", "scene:train", "drawbench"])
def test_another_source_is_refused(source):
    assert message(source) == (
        f'prompts "{source}": expected "scenes:train", "scenes:held-out", or a .txt or .jsonl file'
    )


@pytest.mark.parametrize(("source", "wrong"), [("scenes:test", "'test'"), ("scenes:train:count+text", "'count'")])
def test_an_unknown_split_or_task_of_the_scenes_is_named(source, wrong):
    assert wrong in message(source)


# ---------------------------------------------------------------------------------------------------------- sampler

PROMPTS = [Prompt(str(i)) for i in range(7)]


def texts(sampler: PromptSampler, iterations: range, n: int) -> list[str]:
    return [prompt.text for iteration in iterations for prompt in sampler.batch(iteration, n)]


def test_each_epoch_holds_every_prompt_once_also_when_batches_straddle_epochs():
    drawn = texts(PromptSampler(PROMPTS, seed=0), range(7), 5)  # 35 draws: five epochs of seven
    for epoch in range(5):
        assert sorted(drawn[7 * epoch : 7 * epoch + 7]) == [prompt.text for prompt in PROMPTS]


def test_a_batch_larger_than_the_list_repeats_prompts_evenly():
    assert set(Counter(texts(PromptSampler(PROMPTS, seed=0), range(1), 21)).values()) == {3}


def test_epochs_and_seeds_are_shuffled_apart():
    sampler = PromptSampler(PROMPTS, seed=0)
    orders = [tuple(texts(sampler, range(epoch, epoch + 1), 7)) for epoch in range(4)]
    orders.append(tuple(texts(PromptSampler(PROMPTS, seed=1), range(1), 7)))
    assert len(set(orders)) == 5


def test_a_resumed_sampler_goes_on_where_the_first_one_stopped():
    whole = texts(PromptSampler(PROMPTS, seed=3), range(9), 4)
    before = texts(PromptSampler(PROMPTS, seed=3), range(5), 4)
    after = texts(PromptSampler(PROMPTS, seed=3), range(5, 9), 4)
    assert before + after == whole


def test_the_order_does_not_depend_on_how_it_is_cut_into_batches():
    assert texts(PromptSampler(PROMPTS, seed=3), range(6), 4) == texts(PromptSampler(PROMPTS, seed=3), range(4), 6)


def test_no_prompts_is_an_error():
    with pytest.raises(UserError, match="the list of prompts is empty"):
        PromptSampler([], seed=0)
