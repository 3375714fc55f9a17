"""Which folder a run writes to: never over another run, unless that one is resumed."""

import pytest

from latent_critic.engine.errors import UserError
from latent_critic.engine.run_folder import choose


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
