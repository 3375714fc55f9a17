"""Which folder a run writes to: never over another run, unless that one is resumed."""

import subprocess
import sys

import pytest

from latent_critic.engine.errors import UserError
from latent_critic.engine.run_folder import choose, taken


@pytest.fixture
def runs(tmp_path):
    """make("x", "x-2"): folders that hold a run."""

    def make(*names):
        for name in names:
            (tmp_path / "runs" / name).mkdir(parents=True)
            (tmp_path / "runs" / name / "config.json").write_text("{}")
        return tmp_path / "runs"

    return make


@pytest.mark.parametrize(
    "existing, new, newest",
    [
        ((), "x", "x"),
        (("x",), "x-2", "x"),
        (("x", "x-2"), "x-3", "x-2"),
        (("x", "x-9", "x-10"), "x-11", "x-10"),  # by number, not by spelling
        (("x-4",), "x-5", "x-4"),  # the first ones were deleted
        (("x-y", "xx", "x-2-3", "x-", "ax"), "x", "x"),  # runs of other names
    ],
)
def test_new_runs_are_numbered_and_auto_takes_the_newest(runs, existing, new, newest):
    folder = runs(*existing)
    assert choose(str(folder / "x"), None) == folder / new
    assert choose(str(folder / "x"), "auto") == folder / newest


def test_nothing_is_created(runs, tmp_path):
    choose(str(tmp_path / "runs" / "x"), None)
    assert not (tmp_path / "runs").exists()


def test_a_folder_without_config_is_no_run(runs, tmp_path):
    folder = runs()
    (folder / "x").mkdir(parents=True)
    (folder / "x-2").mkdir()
    assert choose(str(folder / "x"), None) == choose(str(folder / "x"), "auto") == folder / "x"


def test_name_is_no_pattern(runs):
    folder = runs("x[1]", "x1")
    assert choose(str(folder / "x[1]"), None) == folder / "x[1]-2"
    assert choose(str(folder / "x[1]"), "auto") == folder / "x[1]"


def test_trailing_slash_and_relative_path(runs, monkeypatch):
    monkeypatch.chdir(runs("x").parent)
    assert str(choose("runs/x/", None)) == "runs/x-2"


def test_a_given_folder_is_taken_as_it_is(runs):
    folder = runs("x", "x-2")
    assert choose("anything", str(folder / "x")) == folder / "x"


def test_a_given_folder_without_run_is_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"--resume .*/gone: no run there \(no config\.json\); give a run folder, or auto"
    ):
        choose("anything", str(tmp_path / "gone"))


def test_runs_that_start_at_once_get_a_folder_each(tmp_path):
    base = tmp_path / "runs" / "x"
    with taken(str(base), None) as first, taken(str(base), None) as second, taken(str(base), "auto") as third:
        assert [folder.name for folder in (first, second, third)] == ["x", "x-2", "x-3"]
        (first / "config.json").write_text("{}")
        (third / "config.json").write_text("{}")
        with taken(str(base), None) as fourth:
            assert fourth.name == "x-4"
    left = sorted(str(path.relative_to(base.parent)) for path in base.parent.rglob("*"))
    assert left == ["x", "x-3", "x-3/config.json", "x/config.json"]  # the others hold no run


def test_a_folder_is_free_again_when_its_process_is_killed(tmp_path):
    base = tmp_path / "x"
    script = (
        "import sys, time\nfrom latent_critic.engine.run_folder import taken\n"
        "with taken(sys.argv[1], None) as folder:\n    print(folder, flush=True)\n    time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", script, base], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline().strip() == str(base)
    with taken(str(base), None) as folder:
        assert folder.name == "x-2"
    other.kill()
    other.communicate()
    with taken(str(base), None) as folder:
        assert folder == base


def test_a_run_is_not_resumed_twice_at_once(runs):
    folder = runs("x") / "x"
    for resume in ("auto", str(folder)):
        with taken(str(folder), resume) as mine:
            assert mine == folder
            told = rf"--resume {resume}: another process is writing to .*/x; wait"
            with pytest.raises(UserError, match=told), taken(str(folder), resume):
                pass
    with taken(str(folder), "auto") as mine:  # it was given back
        assert mine == folder


def test_what_a_failed_start_leaves_is_what_was_there(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "notes.txt").write_text("mine")
    with pytest.raises(ZeroDivisionError), taken(str(tmp_path / "x"), None):
        raise ZeroDivisionError
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["notes.txt"]
