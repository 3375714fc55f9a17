"""A checkpoint is complete or invisible, and belongs to one model and one number of processes; a full disk is named.

Killing and resuming whole runs is test_resume.py's subject.
"""

import errno
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import nn

from latent_critic.engine.checkpoint import KEPT, CheckpointStore, disk_errors, signature
from latent_critic.engine.errors import TrainingError, UserError
from latent_critic.engine.world import World

CPU = torch.device("cpu")
STATE = {"mean": torch.tensor([0.25, -1.5], dtype=torch.float64), "count": torch.tensor(7.0, dtype=torch.float64)}


class Engine:
    """Writes and reads one file as DeepSpeed's engine does many."""

    weights, policy_parameters = 0.0, ()

    def save_checkpoint(self, folder, tag, save_latest, exclude_frozen_parameters):
        assert not save_latest  # a file that names the newest would be wrong after a kill
        torch.save(self.weights, f"{folder}/{tag}/weights.pt")

    def load_checkpoint(self, folder, tag, load_module_strict):
        self.weights = torch.load(f"{folder}/{tag}/weights.pt")


@pytest.fixture
def engine():
    return Engine()


@pytest.fixture
def store(tmp_path, world):
    return CheckpointStore(tmp_path, world, nn.Linear(2, 3))


def names(store):
    return sorted(path.name for path in store.folder.iterdir())


def test_roundtrip(store, engine):
    assert store.latest() is None
    for iteration in (0, 5):
        engine.weights = iteration + 0.5
        store.save(engine, iteration, STATE)
    assert store.latest() == 5
    assert sorted(path.name for path in (store.folder / "iteration-000005").iterdir()) == [
        "run_state.json",
        "run_state.safetensors",
        "weights.pt",
    ]
    found, here = store.load(engine, 0)
    assert engine.weights == 0.5 and here == {}
    assert found.keys() == STATE.keys() and all(torch.equal(found[name], STATE[name]) for name in STATE)


def test_each_rank_has_tensors_of_its_own(tmp_path, engine, world):
    mine = {"average.0": torch.arange(3.0)}
    CheckpointStore(tmp_path, world, nn.Linear(2, 3)).save(engine, 4, STATE, mine)
    assert (tmp_path / "checkpoints/iteration-000004/run_state_rank0.safetensors").is_file()
    _, here = CheckpointStore(tmp_path, world, nn.Linear(2, 3)).load(engine, 4)
    assert here.keys() == mine.keys() and torch.equal(here["average.0"], mine["average.0"])
    other = World(1, 1, CPU)
    assert CheckpointStore(tmp_path, other, nn.Linear(2, 3)).load(engine, 4)[1] == {}


def test_the_newest_two_are_kept_by_number(store, engine):
    for iteration in (0, 9, 10, 100):
        store.save(engine, iteration, STATE)
    assert KEPT == 2 and names(store) == ["iteration-000010", "iteration-000100"]
    assert store.latest() == 100


def test_half_written_ones_are_invisible_and_go_with_the_next(store, engine):
    store.save(engine, 3, STATE)
    (store.folder / ".writing-000009").mkdir()
    (store.folder / ".writing-000009" / "weights.pt").write_bytes(b"half")
    assert store.latest() == 3
    store.save(engine, 9, STATE)
    assert names(store) == ["iteration-000003", "iteration-000009"]
    assert store.load(engine, 9)[0].keys() == STATE.keys()


@pytest.mark.parametrize("failing", ["save_checkpoint", "fsync"])
def test_what_fails_on_the_way_leaves_the_earlier_ones(store, engine, monkeypatch, failing):
    store.save(engine, 1, STATE)

    def fail(*_args, **_options):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(*((engine, failing) if failing == "save_checkpoint" else (os, failing)), fail)
        with pytest.raises(OSError, match="Input/output error"):
            store.save(engine, 2, STATE)
    assert store.latest() == 1
    store.load(engine, 1)


def test_every_byte_is_on_the_disk_before_the_name_is(store, engine, monkeypatch):
    """A power cut after the rename must not leave a complete name on incomplete content."""
    done = []
    fsync, replace = os.fsync, os.replace
    path_of = "/proc/self/fd/{}".format
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(os.readlink(path_of(fd)).rpartition("/")[2]), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), replace(a, b)))
    store.save(engine, 4, STATE)
    before, after = done[: done.index("rename")], done[done.index("rename") + 1 :]
    assert set(before) == {"weights.pt", "run_state.json", "run_state.safetensors", ".writing-000004"}
    assert after == ["checkpoints"]


def test_another_model_is_refused_before_anything_is_loaded(store, engine, tmp_path, world):
    store.save(engine, 2, STATE)
    other = CheckpointStore(tmp_path, world, nn.Linear(2, 4))
    with pytest.raises(UserError, match=r"iteration-000002 was written by another model .* resume with the model\."):
        other.load(None, 2)


def test_another_number_of_processes_is_refused(store, engine, tmp_path):
    store.save(engine, 2, STATE)
    other = CheckpointStore(tmp_path, World(0, 4, CPU), nn.Linear(2, 3))
    with pytest.raises(UserError, match=r"written by 1 processes, this run has 4; resume with deepspeed --num_gpus 1"):
        other.load(None, 2)


def test_signature_is_that_of_names_and_shapes_alone():
    small, same, wide = nn.Linear(2, 3), nn.Linear(2, 3), nn.Linear(3, 2)
    assert signature(small) == signature(same) != signature(wide)
    assert signature(small) != signature(nn.Sequential(small))  # other names
    shard = nn.Linear(2, 3)
    for parameter in shard.parameters():
        parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
    assert signature(shard) == signature(small)


# ------------------------------------------------------------------------------------------------------- a full disk


WRITERS = {
    "python": lambda path: path.write_text("x"),
    "torch": lambda path: torch.save(torch.zeros(10**6), path),
    "torch, a small file": lambda path: torch.save(torch.zeros(2), path),
    "numpy": lambda path: np.savez(path, x=np.zeros(10**5)),
    "pillow": lambda path: Image.new("RGB", (64, 64)).save(path),
}
FULL = r"^the disk is full \(\d+ MiB free\) while writing to {}; earlier checkpoints are untouched\. Free some space"


@pytest.mark.parametrize("writer", WRITERS)
def test_full_disk_is_one_message_whoever_meets_it(tmp_path, writer):
    """/dev/full refuses every byte as a full disk does."""
    target = tmp_path / {"numpy": "target.npz", "pillow": "target.png"}.get(writer, "target")
    target.symlink_to("/dev/full")
    with pytest.raises(TrainingError, match=FULL.format(tmp_path)) as found, disk_errors(tmp_path):
        WRITERS[writer](target)
    assert found.value.exit_code == 1


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
    ],
)
def test_full_disk_in_other_words_and_in_a_folder_that_does_not_exist_yet(tmp_path, error):
    with pytest.raises(TrainingError, match=FULL.format(tmp_path / "a" / "b")), disk_errors(tmp_path / "a" / "b"):
        raise error


@pytest.mark.parametrize(
    "error", [RuntimeError("mat1 and mat2 shapes"), OSError(errno.EACCES, "Permission denied"), KeyError("x")]
)
def test_other_errors_pass_unchanged(tmp_path, error):
    with pytest.raises(type(error)) as found, disk_errors(tmp_path):
        raise error
    assert found.value is error


def test_state_of_a_checkpoint_is_readable_json(store, engine):
    store.save(engine, 6, STATE)
    about = json.loads((store.folder / "iteration-000006" / "run_state.json").read_text())
    assert (about["iteration"], about["world_size"]) == (6, 1)
