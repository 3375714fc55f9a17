"""Configuration: what is accepted, and the exact message for what is not."""

import json
import re
from pathlib import Path

import pytest

from latent_critic.engine.config import (
    DERIVED_DEEPSPEED_KEYS,
    Config,
    PromptSourceConfig,
    RewardConfig,
    load_config,
    save_config,
)
from latent_critic.engine.config_text import key_table, write_key_table
from latent_critic.engine.errors import UserError

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs").glob("*.json"))


@pytest.fixture
def write(tmp_path):
    """Write a config file from sections (a reward is added) or raw text; returns its path."""

    def write(content) -> Path:
        path = tmp_path / "run.json"
        text = content if isinstance(content, str) else json.dumps({"rewards": [{"name": "r"}], **content})
        path.write_text(text, encoding="utf-8")
        return path

    return write


def message(path, overrides=()) -> str:
    """The error's text without the leading file name."""
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    return text.removeprefix(f"{path}: ")


# ------------------------------------------------------------------------------------------------ what is accepted


def test_defaults_are_those_of_the_method_for_the_embedded_model(write):
    config = load_config(write({}))
    assert (config.model.pretrained, config.prompts.train, config.prompts.eval) == (
        "tiny-dit",
        "scenes:train",
        "scenes:held-out",
    )
    assert (config.algorithm.clip_range, config.algorithm.gamma, config.algorithm.lam) == (2e-3, 1.0, 1.0)
    assert (config.optimizer.policy_lr, config.optimizer.critic_lr) == (1e-4, 1e-3)
    assert config.optimizer.betas == (0.9, 0.95)
    assert (config.training.updates_per_iteration, config.training.value_pretraining_iterations) == (4, 15)
    assert config.rewards == [RewardConfig(name="r", weight=1.0, params={})]
    assert config.deepspeed == {"zero_optimization": {"stage": 3}}


def test_values_of_the_file_replace_defaults_of_their_section_only(write):
    config = load_config(write({"rollout": {"noise_level": 1}, "critic": {"taps": [0, 2]}}))
    assert config.rollout.noise_level == 1.0 and isinstance(config.rollout.noise_level, float)
    assert config.rollout.num_inference_steps == 10
    assert config.critic.taps == [0, 2]


def test_one_config_does_not_share_mutable_defaults_with_another(write):
    path = write({})
    load_config(path).deepspeed["zero_optimization"]["stage"] = 0
    assert load_config(path).deepspeed == {"zero_optimization": {"stage": 3}}


def test_prompts_come_from_one_source_or_from_several_with_weights(write):
    sources = [{"source": "a.txt"}, {"source": "b.csv", "weight": 2}]
    config = load_config(write({"prompts": {"train": sources}}), ["prompts.train.0.weight=0.5"])
    assert config.prompts.train == [
        PromptSourceConfig(source="a.txt", weight=0.5),
        PromptSourceConfig(source="b.csv", weight=2.0),
    ]


def test_save_writes_every_key_and_reads_back_equal(write, tmp_path):
    config = load_config(
        write(
            {
                "critic": {"taps": [1]},
                "prompts": {"train": [{"source": "a.txt"}]},
                "rewards": [{"name": "m:f", "params": {"a": [1, None]}}],
            }
        )
    )
    saved = tmp_path / "resolved.json"
    save_config(config, saved)
    assert load_config(saved) == config
    assert json.loads(saved.read_text())["optimizer"]["betas"] == [0.9, 0.95]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["resolved.json", "run.json"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_load_shard_and_split_over_eight_processes(path):
    config = load_config(path)
    assert config.deepspeed["zero_optimization"]["stage"] == (3 if path.stem.startswith("zero3") else 2)
    for world_size in (1, 2, 4, 8):
        config.for_processes(world_size)


# ------------------------------------------------------------------------------------------------------- overrides


def test_overrides_take_json_and_bare_strings_and_list_items(write):
    config = load_config(
        write({"rewards": [{"name": "a"}, {"name": "b"}]}),
        [
            "training.iterations=20",
            "optimizer.policy_lr=3e-4",
            "output_dir=runs/a=b",
            "prompts.train=scenes:train:counting+position",
            "critic.taps=[0, 3]",
            "model.gradient_checkpointing=true",
            "algorithm.value_clip_range=null",
            "rewards.1.weight=0.5",
            "deepspeed.zero_optimization.stage=2",
        ],
    )
    assert config.training.iterations == 20
    assert config.optimizer.policy_lr == 3e-4
    assert config.output_dir == "runs/a=b"
    assert config.prompts.train == "scenes:train:counting+position"
    assert config.critic.taps == [0, 3]
    assert config.model.gradient_checkpointing is True
    assert config.algorithm.value_clip_range is None
    assert [reward.weight for reward in config.rewards] == [1.0, 0.5]
    assert config.deepspeed == {"zero_optimization": {"stage": 2}}


def test_a_later_override_wins_over_an_earlier_one_and_the_file(write):
    assert load_config(write({"seed": 1}), ["seed=2", "seed=3"]).seed == 3


def test_a_mistake_in_an_override_says_where_it_came_from(write):
    assert message(write({}), ["training.iterations=many"]) == (
        'training.iterations = "many" (given as an override): expected an integer >= 0'
    )


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed", "expected section.key=value, as in training.iterations=20"),
        ("=3", "expected section.key=value, as in training.iterations=20"),
        ("rollout..noise_level=1", "expected section.key=value, as in training.iterations=20"),
        ("rewards.1.weight=2", '"1" is no item of this list of 1 (counted from 0)'),
        ("rewards.first.weight=2", '"first" is no item of this list of 1 (counted from 0)'),
        ("rewards.1={}", '"1" is no item of this list of 1 (counted from 0)'),
        ("output_dir.name=x", 'output_dir holds "here", no keys'),
    ],
)
def test_an_override_that_cannot_be_applied_is_refused(write, override, expected):
    with pytest.raises(UserError) as caught:
        load_config(write({"output_dir": "here"}), [override])
    assert str(caught.value) == f'override "{override}": {expected}'


# --------------------------------------------------------------------------------------------------- wrong contents

ROLLOUT_KEYS = (
    "transition, noise_level, num_inference_steps, guidance_scale, samples_per_iteration, micro_batch_size, "
    "weights, cuda_graph, check_addresses, num_trained_steps, sde_window"
)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(
            {"rollout": {"noise_levle": 0.7}},
            "rollout.noise_levle = 0.7: unknown key; did you mean rollout.noise_level? "
            f"Keys allowed here: {ROLLOUT_KEYS}",
            id="misspelt key",
        ),
        pytest.param(
            {"rollout": {"clip_range": 0.1}},
            "rollout.clip_range = 0.1: unknown key; did you mean algorithm.clip_range? "
            f"Keys allowed here: {ROLLOUT_KEYS}",
            id="key of another section",
        ),
        pytest.param(
            {"rollout": {"batch": 8}},
            f"rollout.batch = 8: unknown key; did you mean rollout.micro_batch_size? Keys allowed here: {ROLLOUT_KEYS}",
            id="key like no other",
        ),
        pytest.param(
            {"rewards": [{"name": "a"}, {"name": "b", "wieght": 2}]},
            "rewards[1].wieght = 2: unknown key; did you mean rewards[1].weight? "
            "Keys allowed here: name, weight, params, batch_size, device, workers, url, timeout_s, stop_if_constant",
            id="key in a list item",
        ),
        pytest.param(
            {"prompts": {"train": 3}},
            "prompts.train = 3: expected a string that is not empty or a list of one or more objects with the keys "
            "source, weight",
            id="neither a source nor sources",
        ),
        pytest.param(
            {"prompts": {"train": []}},
            "prompts.train = []: expected a string that is not empty or a list of one or more objects with the keys "
            "source, weight",
            id="no source",
        ),
        pytest.param(
            {"prompts": {"train": ["a.txt"]}}, 'prompts.train[0] = "a.txt": expected an object {...}', id="bare source"
        ),
        pytest.param(
            {"prompts": {"train": [{"source": "a.txt"}, {"weight": 2}]}},
            "prompts.train[1].source: missing; expected a string that is not empty",
            id="source missing",
        ),
        pytest.param(
            {"prompts": {"train": [{"source": "a.txt", "wieght": 2}]}},
            "prompts.train[0].wieght = 2: unknown key; did you mean prompts.train[0].weight? "
            "Keys allowed here: source, weight",
            id="misspelt key of a source",
        ),
        pytest.param(
            {"prompts": {"train": [{"source": "a.txt", "weight": 0}]}},
            "prompts.train[0].weight = 0: expected a number > 0",
            id="source of no weight",
        ),
        pytest.param({"seed": "0"}, 'seed = "0": expected an integer >= 0 and < 4294967296', id="string for integer"),
        pytest.param({"seed": -1}, "seed = -1: expected an integer >= 0 and < 4294967296", id="out of range"),
        pytest.param(
            {"training": {"iterations": 1.5}}, "training.iterations = 1.5: expected an integer >= 0", id="fraction"
        ),
        pytest.param(
            {"rollout": {"noise_level": True}},
            "rollout.noise_level = true: expected a number > 0 and <= 2",
            id="boolean for number",
        ),
        pytest.param(
            {"model": {"gradient_checkpointing": 1}},
            "model.gradient_checkpointing = 1: expected true or false",
            id="number for boolean",
        ),
        pytest.param({"output_dir": 3}, "output_dir = 3: expected a string that is not empty", id="number for string"),
        pytest.param({"model": "tiny-dit"}, 'model = "tiny-dit": expected an object {...}', id="string for section"),
        pytest.param(
            {"rollout": {"transition": "flow"}},
            'rollout.transition = "flow": expected one of "flow-sde", "dance-sde", "cps", "ddim"',
            id="no such choice",
        ),
        pytest.param(
            {"algorithm": {"name": "reinforce"}},
            'algorithm.name = "reinforce": expected one of "ppo", "grpo", "ddpo"',
            id="no such algorithm",
        ),
        pytest.param(
            {"algorithm": {"reward_statistics": "group"}},
            'algorithm.reward_statistics = "group": expected one of "global", "prompt"',
            id="no such statistics",
        ),
        pytest.param(
            {"algorithm": {"group_size": 1}}, "algorithm.group_size = 1: expected an integer >= 2", id="group of one"
        ),
        pytest.param(
            {"algorithm": {"kl_coef": -0.1}}, "algorithm.kl_coef = -0.1: expected a number >= 0", id="negative weight"
        ),
        pytest.param(
            {"critic": {"heads": "mean"}},
            'critic.heads = "mean": expected one of "per-reward", "sum"',
            id="no such heads",
        ),
        pytest.param(
            {"critic": {"trunk": "pixel"}},
            'critic.trunk = "pixel": expected one of "shared-detached", "shared", "separate", "pixels"',
            id="no such trunk",
        ),
        pytest.param(
            {"rollout": {"sde_window": {"size": 10}}},
            "rollout.sde_window.size = 10: at most 9, the trained steps",
            id="window of all steps",
        ),
        pytest.param(
            {"rollout": {"sde_window": {"size": 3}, "num_trained_steps": 2}},
            "rollout.sde_window.size = 3: at most 2, the trained steps",
            id="window beyond the trained steps",
        ),
        pytest.param(
            {"rollout": {"sde_window": {"size": 0}}},
            "rollout.sde_window.size = 0: expected an integer >= 1",
            id="empty window",
        ),
        pytest.param(
            {"rollout": {"sde_window": {"evry": 2}}},
            "rollout.sde_window.evry = 2: unknown key; did you mean rollout.sde_window.every? "
            "Keys allowed here: size, every",
            id="misspelt key of the window",
        ),
        pytest.param(
            {"critic": {"taps": [0, -1]}},
            'critic.taps = [0, -1]: expected a list of integers >= 0 or "auto"',
            id="either list or word",
        ),
        pytest.param(
            {"critic": {"taps": [1, 1]}}, "critic.taps = [1, 1]: needs one block or more, each once", id="tap twice"
        ),
        pytest.param({"critic": {"taps": []}}, "critic.taps = []: needs one block or more, each once", id="no tap"),
        pytest.param(
            {"algorithm": {"value_clip_range": 0}},
            "algorithm.value_clip_range = 0: expected a number > 0 or null",
            id="number or null",
        ),
        pytest.param(
            {"optimizer": {"betas": [0.9]}},
            "optimizer.betas = [0.9]: expected a list of 2 numbers >= 0 and < 1",
            id="short list",
        ),
        pytest.param(
            {"optimizer": {"betas": [0.9, 1.0]}},
            "optimizer.betas = [0.9, 1.0]: expected a list of 2 numbers >= 0 and < 1",
            id="list item out of range",
        ),
        pytest.param(
            {"algorithm": {"clip_range": 0}},
            "algorithm.clip_range = 0: expected a number > 0 and < 1",
            id="clip range 0",
        ),
        pytest.param(
            {"rollout": {"num_inference_steps": 1}},
            "rollout.num_inference_steps = 1: expected an integer >= 2 and <= 1000",
            id="one step",
        ),
        pytest.param(
            {"training": {"value_pretraining_iterations": -1}},
            "training.value_pretraining_iterations = -1: expected an integer >= 0",
            id="negative iterations",
        ),
        pytest.param(
            {"rewards": []},
            "rewards = []: expected a list of one or more objects with the keys name, weight, params, batch_size, "
            "device, workers, url, timeout_s, stop_if_constant",
            id="no reward",
        ),
        pytest.param({"rewards": ["ocr"]}, 'rewards[0] = "ocr": expected an object {...}', id="reward by name"),
        pytest.param(
            {"rewards": [{"weight": 1}]}, "rewards[0].name: missing; expected a string that is not empty", id="missing"
        ),
        pytest.param(
            '{"rewards": [{"name": "a", "weight": NaN}]}', "rewards[0].weight = NaN: expected a number", id="NaN"
        ),
        pytest.param(
            {"rewards": [{"name": "a", "weight": 0}]},
            "rewards: each weight is 0; give one reward or more another weight",
            id="no weight",
        ),
        pytest.param(
            {"algorithm": {"lam": 0.5}, "training": {"critic_epochs": 0}},
            "training.critic_epochs = 0: algorithm.lam = 0.5 needs 1 or more: no other pass learns the values of "
            "steps that are not trained",
            id="bootstrapping from what is never learned",
        ),
        pytest.param(
            {"algorithm": {"value_lam": 0.5}, "training": {"critic_epochs": 0}},
            "training.critic_epochs = 0: algorithm.value_lam = 0.5 needs 1 or more: no other pass learns the values of "
            "steps that are not trained",
            id="targets from what is never learned",
        ),
        pytest.param(
            {"critic": {"feature_dropout": 0.2, "trunk": "shared"}},
            "critic.feature_dropout = 0.2: only critic-only passes on kept features drop any; needs critic.trunk = "
            '"shared-detached", training.keep_features and training.critic_epochs, or 0 in its place',
            id="dropout of features that are not kept",
        ),
        pytest.param(
            {"rollout": {"transition": "cps", "noise_level": 1.5}},
            'rollout.noise_level = 1.5: at most 1 for rollout.transition = "cps", whose std would exceed the noise '
            "that the latent holds",
            id="noise of cps",
        ),
        pytest.param(
            {"critic": {"dim": 64, "num_heads": 5}},
            "critic.num_heads = 5: must divide critic.dim = 64",
            id="heads and width",
        ),
        pytest.param(
            {"deepspeed": {"zero_optimisation": {"stage": 3}}},
            "deepspeed.zero_optimisation: unknown to DeepSpeed; did you mean deepspeed.zero_optimization?",
            id="misspelt key of DeepSpeed",
        ),
        pytest.param(
            {"deepspeed": {"fp16": {"enabled": True}}},
            "deepspeed.fp16: derived by the engine; set model.dtype instead",
            id="derived key of DeepSpeed",
        ),
    ],
)
def test_a_mistake_names_the_key_what_was_given_and_what_is_allowed(write, content, expected):
    assert message(write(content)) == expected


def test_rewards_are_required(write):
    assert message(write("{}")) == (
        "rewards: missing; expected a list of one or more objects with the keys name, weight, params, batch_size, "
        "device, workers, url, timeout_s, stop_if_constant"
    )


def test_several_mistakes_have_a_line_each(write):
    path = write({"seed": "a", "rollout": {"noise_level": -1}, "deepspeed": {"bf16": {}, "optimizer": {}}})
    assert message(path).splitlines() == [
        "4 mistakes",
        '  seed = "a": expected an integer >= 0 and < 4294967296',
        "  rollout.noise_level = -1: expected a number > 0 and <= 2",
        "  deepspeed.bf16: derived by the engine; set model.dtype instead",
        "  deepspeed.optimizer: derived by the engine; set optimizer.policy_lr, optimizer.critic_lr, optimizer.betas "
        "and optimizer.weight_decay instead",
    ]


def test_each_derived_deepspeed_key_is_refused_and_points_to_keys_that_exist(write):
    text = message(write({"deepspeed": dict.fromkeys(DERIVED_DEEPSPEED_KEYS)}))
    table = key_table(Config)
    for key, ours in DERIVED_DEEPSPEED_KEYS.items():
        assert f"deepspeed.{key}: derived by the engine; set {ours} instead" in text
        for dotted in ours.replace(" and ", ", ").split(", "):
            assert f"| `{dotted}` |" in table


def test_a_long_value_is_cut(write):
    text = message(write({"seed": "x" * 500}))
    assert text == 'seed = "' + "x" * 56 + "...: expected an integer >= 0 and < 4294967296"


# ------------------------------------------------------------------------------------------------------ wrong files


def test_a_syntax_error_names_line_and_column(write):
    path = write('{\n  "seed": 0,\n  "model" {}\n}')
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert str(caught.value) == f"{path}:3:11: not valid JSON: Expecting ':' delimiter"


def test_a_key_given_twice_is_refused(write):
    assert message(write('{"seed": 0, "seed": 1}')) == 'key "seed" is given twice in the same object; keep one'


def test_a_file_that_is_no_object_is_refused(write):
    assert message(write("[1]")) == "expected a JSON object of sections, got [1]"


def test_a_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "run.json"
    path.write_bytes(b'{"\xff": 0}')
    assert message(path) == "not UTF-8 text: invalid start byte at byte 2"


def test_a_missing_file_names_the_nearest_one(tmp_path):
    for name in ("zero3_dit.json", "zero3_unet.json", "notes.txt"):
        (tmp_path / name).touch()
    assert message(tmp_path / "zero3-dit.json") == f"no such file; nearest in {tmp_path}: zero3_dit.json"


def test_a_missing_file_in_an_empty_or_missing_folder_says_so(tmp_path):
    assert message(tmp_path / "a.json") == f"no such file; {tmp_path} holds no files"
    assert message(tmp_path / "no" / "a.json") == f"no such file; the folder {tmp_path / 'no'} does not exist"


def test_a_folder_is_no_file(tmp_path):
    assert message(tmp_path) == "cannot be read: Is a directory"


# --------------------------------------------------------------------------------------------------------- batching


def batching(samples: int, micro_batch: int, updates: int) -> Config:
    return Config.model_validate(
        {
            "rewards": [{"name": "r"}],
            "rollout": {"samples_per_iteration": samples, "micro_batch_size": micro_batch},
            "training": {"updates_per_iteration": updates},
        }
    )


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 16), (2, 16), (6, 16), (12, 8), (96, 1)])
def test_micro_batch_is_cut_to_a_ranks_share_of_an_update(world_size, micro_batch):
    config = batching(192, 16, 2)  # 192 = 16 * 2 * 6
    assert config.for_processes(world_size) == batching(192, micro_batch, 2)
    assert config.rollout.micro_batch_size == 16


@pytest.mark.parametrize(
    ("samples", "nearest"),
    [
        (200, "192 (or 256)"),
        (250, "256 (or 192)"),
        (65, "64 (or 128)"),
    ],
)
def test_impossible_batching_states_the_nearest_valid_number(samples, nearest):
    with pytest.raises(UserError) as caught:
        batching(samples, 16, 2).for_processes(2)
    assert str(caught.value) == (
        f"rollout.samples_per_iteration = {samples}: must be a multiple of 64 = micro-batch 16 x "
        f"training.updates_per_iteration 2 x 2 processes; nearest valid: {nearest}"
    )


def grouped(samples: int, updates: int = 2, size: int = 6, name: str = "grpo") -> Config:
    config = batching(samples, 4, updates).model_dump()
    return Config.model_validate(config | {"algorithm": {"name": name, "group_size": size}})


@pytest.mark.parametrize(
    ("samples", "nearest"),
    [
        (64, "48 (or 96)"),
        (80, "96 (or 48)"),
        (32, "48"),
    ],
)
def test_groups_are_whole_on_each_rank(samples, nearest):
    """Each is a multiple of 16, the batches' unit; a rank takes whole groups of 6 besides: 48 = lcm(16, 12)."""
    with pytest.raises(UserError) as caught:
        grouped(samples).for_processes(2)
    assert str(caught.value) == (
        f"rollout.samples_per_iteration = {samples}: must be a multiple of 48 = (micro-batch 4 x "
        f"training.updates_per_iteration 2 x 2 processes) and of 12 = algorithm.group_size 6 x 2 processes; "
        f"nearest valid: {nearest}"
    )
    assert grouped(int(nearest.split()[0])).for_processes(2).samples_per_prompt == 6
    assert grouped(samples, name="ddpo").for_processes(2).samples_per_prompt == 1  # others have no groups


def test_impossible_batching_comes_before_groups():
    with pytest.raises(UserError, match=r"= 50: must be a multiple of 16 = micro-batch 4 x [^()]*; nearest valid: 48 "):
        grouped(50).for_processes(2)


@pytest.mark.parametrize("name", ["ppo", "grpo", "ddpo"])
def test_the_critics_training_is_dropped_where_there_is_no_critic(name):
    config = grouped(48, name=name)
    training = config.for_processes(2).training
    assert (config.training.value_pretraining_iterations, config.training.critic_epochs) == (15, 2)
    found = training.value_pretraining_iterations, training.critic_epochs
    assert found == ((15, 2) if name == "ppo" else (0, 0))
    assert training.updates_per_iteration == 2 and config.has_critic == (name == "ppo")


def test_a_lambda_below_1_needs_no_critic_epochs_without_a_critic(write):
    path = write({"algorithm": {"name": "grpo", "lam": 0.5}, "training": {"critic_epochs": 0}})
    assert load_config(path).algorithm.lam == 0.5


def test_names_of_values(write):
    rewards = {"rewards": [{"name": "a"}, {"name": "b"}]}
    assert load_config(write(rewards)).value_names == ["a", "b"]
    rewards["critic"] = {"heads": "sum"}
    for name, expected in {"ppo": ["sum"], "grpo": [], "ddpo": []}.items():
        assert load_config(write({**rewards, "algorithm": {"name": name}})).value_names == expected


def test_a_window_of_all_that_is_trained_is_allowed(write):
    window = load_config(write({"rollout": {"sde_window": {}}})).rollout.sde_window
    assert (window.size, window.every) == (2, 4)
    for size, more in ((9, {}), (10, {"num_trained_steps": 10})):
        assert load_config(write({"rollout": {"sde_window": {"size": size}, **more}})).rollout.sde_window.size == size


def test_too_few_samples_for_the_processes():
    with pytest.raises(UserError, match=r"= 3: must be a multiple of 4 = micro-batch 1 x .*; nearest valid: 4$"):
        batching(3, 16, 2).for_processes(2)


# ----------------------------------------------------------------------------------------------------- documentation


def test_every_key_has_a_meaning():
    rows = key_table(Config).splitlines()[2:]
    assert all(cell.strip() for row in rows for cell in row.strip("|").split("|"))
    assert all(row.count("|") == 5 for row in rows)


def test_the_readme_of_configs_is_in_sync(tmp_path):
    page = ROOT / "configs" / "README.md"
    rewritten = tmp_path / "README.md"
    rewritten.write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
    write_key_table(Config, rewritten)
    assert rewritten.read_text(encoding="utf-8") == page.read_text(encoding="utf-8"), "run `make docs`"


def test_those_who_come_from_elsewhere_find_keys_that_exist():
    keys = set(re.findall(r"^\| `([\w.]+)`", key_table(Config), re.MULTILINE))
    page = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"`([a-z_]+(?:\.\w+)?)`", "".join(_first_cells(page, "Coming from")))
    assert len(named) > 20 and set(named) <= keys


def _first_cells(page, heading):
    section = page.split(f"## {heading}", 1)[1].split("\n## ", 1)[0]
    return [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]


def test_steps_of_a_critic_only_pass():
    def steps(depth, trunk="shared-detached", checkpointing=False, at_once=1):
        sections = {
            "critic": {"trunk": trunk},
            "model": {"gradient_checkpointing": checkpointing},
            "training": {"steps_per_forward": at_once},
            "rewards": [{"name": "composition"}],
        }
        return Config.model_validate(sections).critic_steps_per_forward(depth)

    assert steps(24) == steps(24, trunk="shared") == 24 and steps(24, at_once=30) == 30
    assert steps(24, checkpointing=True) == 3 and steps(4, checkpointing=True) == 1
    assert steps(24, trunk="pixels") == 1 and steps(24, trunk="pixels", checkpointing=True, at_once=5) == 5
    assert steps(24, trunk="separate") == 1 and steps(24, trunk="separate", checkpointing=True, at_once=2) == 2
