"""Prompts: their sources, the message for each mistake in one, and an order that resumes exactly."""

import json
import sys
from collections import Counter
from datetime import date
from pathlib import Path

import numpy as np
import pytest

from latent_critic.engine.config import load_config
from latent_critic.engine.embedded import scenes
from latent_critic.engine.errors import UserError
from latent_critic.engine.prompts import Prompt, PromptSampler, PromptSource, load_prompts, load_sources
from latent_critic.engine.rewards.ocr import quoted_text


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
    source = write("p.jsonl", '{"prompt": "a cat", "tag": "pets", "seen": [1, {"by": null}]}\n\n{"prompt":"b"}')
    assert load_prompts(source) == [Prompt("a cat", {"tag": "pets", "seen": [1, {"by": None}]}), Prompt("b", {})]


def test_only_line_ends_end_a_line(write):
    """A form feed, U+0085 and U+2028 are no line ends, as in the JSON Lines that others write."""
    source = write("p.jsonl", '{"prompt": "a\u2028b\u0085c"}\r{"prompt": "d"}\r\n{"prompt": "e"}')
    assert [prompt.text for prompt in load_prompts(source)] == ["a\u2028b\u0085c", "d", "e"]


GENEVAL = """\
{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}
{"tag": "counting", "include": [{"class": "clock", "count": 2}], "exclude": [{"class": "clock", "count": 3}], \
"prompt": "a photo of two clocks"}
{"tag": "position", "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["above", 0]}], \
"prompt": "a photo of a dog above a cat"}
{"tag": "color_attr", "include": [{"class": "cup", "count": 1, "color": "red"}, {"class": "tv", "count": 1, \
"color": "pink"}], "prompt": "a photo of a red cup and a pink tv"}
"""


def test_genevals_own_lines_are_read_as_they_are(write):
    prompts = load_prompts(write("geneval.jsonl", GENEVAL))
    expected = [json.loads(line) for line in GENEVAL.splitlines()]
    assert [{"prompt": prompt.text, **prompt.metadata} for prompt in prompts] == expected


def test_a_prompt_with_a_text_in_quotes_reads_the_same_from_every_format(write):
    """What the reward `ocr` takes; JSON and tables have their own way to write the quotes."""
    expected = [Prompt('A sign, "OPEN"'), Prompt('"NO ENTRY" on a door')]
    assert load_prompts(write("p.txt", 'A sign, "OPEN"\n"NO ENTRY" on a door\n')) == expected
    lines = '{"prompt": "A sign, \\"OPEN\\""}\n{"prompt": "\\"NO ENTRY\\" on a door"}\n'
    assert load_prompts(write("p.jsonl", lines)) == expected
    table = 'prompt\n"A sign, ""OPEN"""\n"""NO ENTRY"" on a door"\n'
    assert load_prompts(write("p.csv", table)) == load_prompts(write("p.tsv", table)) == expected


def test_columns_of_a_table_beside_the_prompt_are_metadata_as_strings(write):
    source = write("p.csv", "\ufeffid,prompt, shots \r\n007, a cat ,1.50\r\n\r\n,two dogs,\r\n , ,\r\n")
    assert load_prompts(source) == [
        Prompt("a cat", {"id": "007", "shots": "1.50"}),
        Prompt("two dogs", {"id": "", "shots": ""}),
    ]


def test_a_column_without_a_name_is_left_out(write):
    """pandas writes its index as one, spreadsheets leave them behind."""
    assert load_prompts(write("p.csv", ",prompt,tag,\n0,a cat,pets,\n")) == [Prompt("a cat", {"tag": "pets"})]


def test_another_column_is_named_after_the_file(write):
    source = write("p.tsv", "prompt\tlong caption\nno\ta cat, asleep\n")
    assert load_prompts(f"{source}:long caption") == [Prompt("a cat, asleep", {"prompt": "no"})]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_prompts_know_the_line_where_they_begin(write, end):
    lines = write("p.txt", end.join(["a", "", "b"]))
    objects = write("p.jsonl", end.join(["", '{"prompt": "a"}', '{"prompt": "b"}']))
    table = write("p.csv", end.join(["prompt,note", '"a', "", 'b","1', '2"', "", "c,"]))
    assert [prompt.source for prompt in load_prompts(lines)] == [f"{lines}:1", f"{lines}:3"]
    assert [prompt.source for prompt in load_prompts(objects)] == [f"{objects}:2", f"{objects}:3"]
    assert [prompt.source for prompt in load_prompts(table)] == [f"{table}:2", f"{table}:7"]
    assert [prompt.text for prompt in load_prompts(table)] == [f"a{end}{end}b", "c"]


def test_the_examples_of_formats_are_read():
    folder = Path(__file__).parents[2] / "configs" / "prompts"
    geneval, ocr, table = (
        load_prompts(str(folder / name)) for name in ("geneval_format.jsonl", "ocr_format.txt", "table_format.csv")
    )
    assert [prompt.metadata["tag"] for prompt in geneval] == [
        "single_object",
        "two_object",
        "counting",
        "colors",
        "position",
        "color_attr",
    ]
    assert [quoted_text(prompt.text) for prompt in ocr[:2]] == ["FRESH AT SIX", "KEEP LEFT"] and len(ocr) == 6
    assert table[2] == Prompt('a sign that says "OPEN", in the rain', {"subject": "sign", "light": "night"})


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


@pytest.mark.parametrize(
    ("content", "line", "expected"),
    [
        ("\n\nprompt;tag\na;b\n", 3, 'no column "prompt"; the header, separated by a comma, has prompt;tag'),
        ("Prompt,tag\na,b\n", 1, 'no column "prompt"; the header, separated by a comma, has Prompt, tag'),
        ("prompt,tag, tag\na,b,c\n", 1, 'two columns are named "tag"; rename or remove one'),
        ('prompt,tag\n"a\nb",c\nd\n', 4, "1 fields, the header has 2; put a field that holds a comma or a line end"),
        ('prompt,tag\n"a\nb",c\nd, e,f\n', 4, "3 fields, the header has 2; put a field that holds a comma or a"),
        ('prompt,tag\n"a\nb",c\n  ,d\n', 4, '"prompt" must be a string that is not empty, got "  "'),
        ('prompt,tag\n"a\nb",c\n"A" sign,d\n', 4, "',' expected after '\"'; a field that begins with a double quote"),
        ('prompt,tag\n"a\nb",c\n"open,d\ne,f\n', 4, "unexpected end of data; a field that begins with a double"),
    ],
)
def test_a_mistake_in_a_table_is_named_with_the_line_where_its_record_begins(write, content, line, expected):
    source = write("p.csv", content)
    assert message(source).startswith(f"{source}:{line}: {expected}")


def test_a_missing_column_of_a_table_says_how_to_name_another(write):
    source = write("p.tsv", "Prompt\tNote\na\tb\n")
    assert message(source) == (
        f'{source}:1: no column "prompt"; the header, separated by a tab, has Prompt, Note. Name the one that holds '
        f"the prompts: {source}:COLUMN"
    )
    assert load_prompts(f"{source}:Prompt") == [Prompt("a", {"Note": "b"})]


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.csv"])
@pytest.mark.parametrize(
    ("before", "line", "byte"), [(b"", 1, 3), (b'{"prompt": "a"}\r\n', 2, 3), (b"\xef\xbb\xbfb\r\r", 3, 3)]
)
def test_bytes_that_are_no_text_are_named_with_their_line(write, name, before, line, byte):
    source = write(name, before + b"caf\xe9\n")
    assert message(source) == (
        f"{source}:{line}: not UTF-8 text: invalid continuation byte at byte {byte}; save the file as UTF-8"
    )


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


def test_a_table_without_records_is_refused(write):
    empty, header = write("empty.csv", "\n \n"), write("header.csv", "prompt,tag\n")
    assert message(empty) == f'{empty}: is empty; give a header with a column "prompt" and a record a prompt'
    assert message(header) == f"{header}: holds no prompt; give one or more, a record each, below the header"


@pytest.mark.parametrize("source", ["p.json", "p.txt:caption", "scene:train", "drawbench"])
def test_another_source_is_refused(source):
    assert message(source) == (
        f'prompts "{source}": expected "scenes:train", "scenes:held-out", a .txt, .jsonl, .csv or .tsv file, or "hf:" '
        "and a data set of the Hugging Face hub or its folder"
    )


@pytest.mark.parametrize(("source", "wrong"), [("scenes:test", "'test'"), ("scenes:train:count+text", "'count'")])
def test_an_unknown_split_or_task_of_the_scenes_is_named(source, wrong):
    assert wrong in message(source)


# ------------------------------------------------------------------------------------------------- Hugging Face data


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    """The library, offline, its cache in the test's folder."""
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return datasets


ROWS = [
    {"prompt": " a cat ", "tag": "pets", "size": 1.5, "parts": [{"name": "ear", "count": 2}]},
    {"prompt": "a dog", "tag": None, "size": None, "parts": [{"name": "tail", "count": None}]},
    {"prompt": "a fox", "tag": "wild", "size": 2.0, "parts": []},
]
READ = [
    Prompt("a cat", {"tag": "pets", "size": 1.5, "parts": [{"name": "ear", "count": 2}]}),
    Prompt("a dog", {"parts": [{"name": "tail"}]}),
    Prompt("a fox", {"tag": "wild", "size": 2.0, "parts": []}),
]


def test_a_saved_data_set_is_read_with_its_columns_as_metadata_and_without_nulls(datasets, tmp_path):
    folder = f"{tmp_path}/saved"
    datasets.Dataset.from_list(ROWS).save_to_disk(folder)
    prompts = load_prompts(f"hf:{folder}")
    assert prompts == READ
    assert [prompt.source for prompt in prompts] == [f"hf:{folder}:train[{row}]" for row in range(3)]


def test_splits_and_columns_of_a_saved_data_set_are_named(datasets, tmp_path):
    rows = datasets.Dataset.from_list(ROWS)
    folder = f"{tmp_path}/saved"
    datasets.DatasetDict({"train": rows, "test": rows.select([2])}).save_to_disk(folder)
    assert load_prompts(f"hf:{folder}") == load_prompts(f"hf:{folder}:train") == load_prompts(f"hf:{folder}::") == READ
    assert load_prompts(f"hf:{folder}:test") == READ[2:]
    assert load_prompts(f"hf:{folder}:test:tag") == [Prompt("wild", {"prompt": "a fox", "size": 2.0, "parts": []})]
    assert message(f"hf:{folder}:dev") == f'prompts "hf:{folder}:dev": no split "dev"; the splits are train, test'
    assert message(f"hf:{folder}:test:caption") == (
        f'prompts "hf:{folder}:test:caption": no column "caption"; the columns are prompt, tag, size, parts. Name the '
        f"one that holds the prompts: hf:{folder}:test:COLUMN"
    )


def test_a_folder_of_parquet_files_is_read_like_a_data_set_of_the_hub(datasets, tmp_path):
    for split, rows in {"train": ROWS, "test": ROWS[:1]}.items():
        datasets.Dataset.from_list(rows).to_parquet(f"{tmp_path}/data/{split}-00000-of-00001.parquet")
    assert load_prompts(f"hf:{tmp_path}/data") == READ
    assert load_prompts(f"hf:{tmp_path}/data:test") == READ[:1]
    assert load_prompts(f"hf:{tmp_path}/data:train[1:]") == READ[1:]
    assert load_prompts(f"hf:{tmp_path}/data:train[:1]:tag")[0].text == "pets"
    assert message(f"hf:{tmp_path}/data:dev").startswith(
        f"prompts \"hf:{tmp_path}/data:dev\": Unknown split \"dev\". Should be one of ['train', 'test'].\nGive hf: with"
    )


def test_what_json_cannot_hold_is_no_metadata(datasets, tmp_path):
    columns = {
        "prompt": ["a cat"],
        "label": [1],
        "flags": [[True]],
        "picture": [{"bytes": b"x", "path": None}],
        "bytes": [b"x"],
        "day": [date(2026, 1, 2)],
        "made": [{"by": "x", "on": date(2026, 1, 2)}],
    }
    rows = datasets.Dataset.from_dict(columns).cast_column("picture", datasets.Image())
    rows.cast_column("label", datasets.ClassLabel(names=["no", "yes"])).save_to_disk(f"{tmp_path}/saved")
    assert load_prompts(f"hf:{tmp_path}/saved") == [Prompt("a cat", {"label": 1, "flags": [True]})]


def test_genevals_lines_are_the_same_as_a_data_set(datasets, tmp_path, write):
    """`position` mixes strings and numbers, which the library keeps as JSON."""
    (tmp_path / "data").mkdir()
    expected = load_prompts(write("data/train.jsonl", GENEVAL))
    assert load_prompts(f"hf:{tmp_path}/data") == expected


@pytest.mark.parametrize("value", [None, " ", 3])
def test_a_row_without_a_prompt_is_named(datasets, tmp_path, value):
    prompts = [value, value] if isinstance(value, int) else ["a", value]  # a column has one type
    datasets.Dataset.from_dict({"prompt": prompts, "n": [1, 2]}).save_to_disk(f"{tmp_path}/saved")
    assert message(f"hf:{tmp_path}/saved") == (
        f'hf:{tmp_path}/saved:train[{prompts.index(value)}]: "prompt" must be a string that is not empty, got '
        + json.dumps(value)
    )


def test_data_without_rows_are_refused(datasets, tmp_path, write, monkeypatch):
    (tmp_path / "data").mkdir()
    write("data/train.jsonl", "")
    source = f"hf:{tmp_path}/data"
    assert message(source).startswith(f'prompts "{source}": StopIteration\nGive hf: with a data set of the hub')
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: datasets.Dataset.from_dict({"prompt": []}))
    assert message(source) == f'prompts "{source}": the data set is empty; give one with a row or more'


def test_a_data_set_that_is_neither_on_the_hub_nor_here_says_where_it_was_looked_for(datasets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = message("hf:somebody/promts")
    assert found.startswith("prompts \"hf:somebody/promts\": Couldn't reach 'somebody/promts' on the Hub")
    assert found.endswith(f"Give hf: with a data set of the hub or a folder; folders are looked for in {tmp_path}")


def test_a_file_of_a_data_set_that_cannot_be_read_is_a_mistake_with_its_cause(datasets, tmp_path, write):
    (tmp_path / "data").mkdir()
    write("data/train.jsonl", '{"prompt": \n')
    found = message(f"hf:{tmp_path}/data")
    assert found.startswith(f'prompts "hf:{tmp_path}/data": An error occurred while generating the dataset (')


@pytest.mark.parametrize("source", ["hf:", "hf::train", "hf:a:b:c:d"])
def test_a_data_set_that_is_written_wrong_says_how_to_write_it(source):
    assert message(source) == f'prompts "{source}": expected hf:NAME, hf:NAME:SPLIT or hf:NAME:SPLIT:COLUMN'


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert message("hf:somebody/prompts") == (
        'prompts "hf:somebody/prompts" need the package datasets (import of datasets halted; None in sys.modules): '
        'pip install "latent-critic[datasets]"'
    )


# ---------------------------------------------------------------------------------------------------------- sampler

PROMPTS = [Prompt(str(i)) for i in range(7)]
ALONE = [PromptSource(PROMPTS)]


def texts(sampler: PromptSampler, iterations: range, n: int) -> list[str]:
    return [prompt.text for iteration in iterations for prompt in sampler.batch(iteration, n)]


def mixed(*weights: float, sizes=(5, 2, 7), seed: int = 0) -> PromptSampler:
    """Of sources A, B and C, as many as there are weights, with the prompts A0, A1, ..."""
    lists = [[Prompt(f"{name}{i}") for i in range(size)] for name, size in zip("ABC", sizes, strict=True)]
    return PromptSampler([PromptSource(*pair) for pair in zip(lists, weights, strict=False)], seed)


def test_each_epoch_holds_every_prompt_once_also_when_batches_straddle_epochs():
    drawn = texts(PromptSampler(ALONE, seed=0), range(7), 5)  # 35 draws: five epochs of seven
    for epoch in range(5):
        assert sorted(drawn[7 * epoch : 7 * epoch + 7]) == [prompt.text for prompt in PROMPTS]


def test_a_batch_larger_than_the_list_repeats_prompts_evenly():
    assert set(Counter(texts(PromptSampler(ALONE, seed=0), range(1), 21)).values()) == {3}


def test_epochs_and_seeds_are_shuffled_apart():
    sampler = PromptSampler(ALONE, seed=0)
    orders = [tuple(texts(sampler, range(epoch, epoch + 1), 7)) for epoch in range(4)]
    orders.append(tuple(texts(PromptSampler(ALONE, seed=1), range(1), 7)))
    assert len(set(orders)) == 5


@pytest.mark.parametrize("seed", [0, 3, 2**32 - 1])
def test_the_order_of_one_source_is_the_one_that_published_runs_had(seed):
    """Permutations by numpy's default generator, seeded with (seed, epoch)."""
    expected = [str(i) for epoch in range(3) for i in np.random.default_rng((seed, epoch)).permutation(7)]
    assert texts(PromptSampler(ALONE, seed), range(3), 7) == expected


def test_no_prompts_is_an_error():
    for sources in ([], [PromptSource([])], [*ALONE, PromptSource([])]):
        with pytest.raises(UserError, match="the list of prompts is empty"):
            PromptSampler(sources, seed=0)


@pytest.mark.parametrize("sampler", [PromptSampler(ALONE, seed=3), mixed(2.0, 1.0, 0.3, seed=3)], ids=["one", "mixed"])
def test_the_order_is_a_function_of_the_position(sampler):
    """However it is cut into batches, and wherever a resumed run begins."""
    whole = texts(sampler, range(1), 4_000)
    assert texts(sampler, range(6), 4) == texts(sampler, range(4), 6) == whole[:24]
    assert texts(sampler, range(390, 400), 10) == whole[3_900:]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ((1, 1), "ABABABAB"),
        ((3, 1), "AAABAAAB"),
        ((0.1, 0.3), "ABBBABBB"),
        ((2, 2, 2), "ABCABCAB"),
        ((1, 0.5), "AABAABAA"),
    ],
)
def test_sources_take_turns_by_their_weights(weights, expected):
    assert "".join(text[0] for text in texts(mixed(*weights), range(1), 8)) == expected


@pytest.mark.parametrize("weights", [(1, 1), (0.7, 0.2, 0.1), (1, 1e-3, 3.14159)])
def test_of_any_number_of_draws_each_source_has_its_share(weights):
    """To less than the number of sources, less 1: rounding up passes on less than one draw too many, once a source."""
    drawn = np.array([text[0] for text in texts(mixed(*weights), range(1), 3000)])
    draws = np.arange(1, 3001)
    for name, weight in zip("ABC", weights, strict=False):
        missing = np.cumsum(drawn == name) - draws * weight / sum(weights)
        assert np.abs(missing).max() < len(weights) - 1 + 1e-9


def test_no_source_repeats_a_prompt_before_its_others():
    drawn = texts(mixed(0.5, 0.3, 0.2), range(20), 10)
    for name, size in zip("ABC", (5, 2, 7), strict=True):
        own = [text for text in drawn if text[0] == name]
        assert len(own) >= 2 * size
        for start in range(0, len(own) - size + 1, size):
            assert len(set(own[start : start + size])) == size


def test_the_first_source_has_the_order_that_it_has_alone_and_others_have_their_own():
    drawn = texts(mixed(1, 1, 1, sizes=(7, 7, 7)), range(1), 21)
    orders = [[int(text[1:]) for text in drawn if text[0] == name] for name in "ABC"]
    assert orders[0] == np.random.default_rng((0, 0)).permutation(7).tolist()
    assert len(set(map(tuple, orders))) == 3


def test_far_positions_and_weights_far_apart_are_exact():
    """Where floating point would lose count: batches at 10^15, and one draw of B among 10^12."""
    sampler = mixed(3, 1)
    assert [text[0] for text in texts(sampler, range(10**15, 10**15 + 1), 4)] == list("AAAB")
    assert [text[0] for text in texts(mixed(1, 1e-12), range(250_000_000_000, 250_000_000_001), 4)] == list("BAAA")


def test_all_prompts_of_all_sources_are_known():
    assert [prompt.text for prompt in mixed(1, 2).prompts] == ["A0", "A1", "A2", "A3", "A4", "B0", "B1"]


def test_sources_of_a_configuration_are_one_or_a_list_with_weights(write):
    a, b = write("a.txt", "a cat"), write("b.csv", "caption\na dog\na fox")
    sources = [{"source": a}, {"source": f"{b}:caption", "weight": 2}]

    def sources_of(train) -> list[PromptSource]:
        content = {"prompts": {"train": train}, "rewards": [{"name": "ocr"}]}
        return load_sources(load_config(write("run.json", json.dumps(content))).prompts.train)

    assert sources_of(a) == [PromptSource([Prompt("a cat")], 1.0)]
    assert sources_of(sources) == [
        PromptSource([Prompt("a cat")], 1.0),
        PromptSource([Prompt("a dog"), Prompt("a fox")], 2.0),
    ]
