"""A run's folder: what it takes for its own, and what it leaves alone."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from lit_prune import run_folder
from lit_prune.errors import BadInput
from lit_prune.modules import memory
from lit_prune.run_folder import RunFolder, require_space

CONFIG = "model:\n  checkpoint: here\n  offload: null\ndata:\n  memory_share: 0.3\n"


@pytest.fixture(autouse=True)
def _other_processes(monkeypatch):
    """Every folder is opened as by a new process."""
    monkeypatch.setattr(run_folder, "_LOCKS", {})


def begun(path: Path, rounds: int = 1) -> RunFolder:
    folder = RunFolder(path, CONFIG)
    folder.begin()
    for index in range(rounds):
        folder.metrics = {"blocks": [{}] * (index + 1), "trainings": []}
        folder.save_metrics()
        folder.save_round(index, {index: {"weight": torch.ones(3)}}, {})
    return folder


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_a_folder_of_others_is_left_as_it_is(tmp_path):
    run = begun(tmp_path / "a").path
    (run / "blocks" / ".partial-another").mkdir()
    (run / "blocks" / ".partial-another" / "file").write_text("being written")
    (tmp_path / ".partial-mine").mkdir()
    (tmp_path / ".partial-mine" / "file").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(BadInput, match="is not empty and holds no run of ours"):
        RunFolder(tmp_path, CONFIG)
    assert contents(tmp_path) == before


def test_a_config_that_no_run_has_put_there_is_left_as_it_is(tmp_path):
    (tmp_path / "config.yaml").write_text("model: {}\n")
    with pytest.raises(BadInput, match="is not empty and holds no run of ours"):
        RunFolder(tmp_path, CONFIG)
    assert (tmp_path / "config.yaml").read_text() == "model: {}\n"


@pytest.mark.parametrize("left", [["config.yaml"], [".partial-1"], ["config.yaml", ".partial-1"]])
def test_what_a_run_puts_down_first_is_its_own(tmp_path, left):
    for name in left:
        if name == "config.yaml":
            (tmp_path / name).write_text(CONFIG)
        else:
            (tmp_path / name).mkdir()
    folder = RunFolder(tmp_path, CONFIG)
    folder.begin()
    assert (folder.rounds, sorted(contents(tmp_path))) == (0, ["config.yaml", "manifest.json"])
    assert not (tmp_path / ".partial-1").exists()


def test_a_run_goes_on_with_its_weights_elsewhere(tmp_path):
    begun(tmp_path)
    elsewhere = CONFIG.replace("offload: null", "offload: true").replace("0.3", "0")
    assert RunFolder(tmp_path, elsewhere).rounds == 1
    with pytest.raises(BadInput, match=r"differs in model\.checkpoint;"):
        RunFolder(tmp_path, CONFIG.replace("here", "there"))


def test_a_run_is_one_on_the_same_sequences(tmp_path):
    folder = RunFolder(tmp_path, CONFIG)
    folder.keep_to("some")
    assert not list(tmp_path.iterdir())
    folder.begin()  # and dies before it has done anything
    RunFolder(tmp_path, CONFIG).keep_to("some")
    with pytest.raises(BadInput, match=r"^output_dir: .* holds a run on other calibration sequences: "):
        RunFolder(tmp_path, CONFIG).keep_to("others")
    RunFolder(tmp_path, CONFIG).keep_to("some")


def test_without_its_figures_a_run_begins_anew(tmp_path, caplog):
    begun(tmp_path, rounds=2)
    (tmp_path / "metrics.json").unlink()
    folder = RunFolder(tmp_path, CONFIG)
    assert (folder.rounds, folder.done, folder.metrics) == (0, 0, {})
    assert "metrics.json' is missing: all blocks are made anew" in caplog.text
    assert json.loads((tmp_path / "manifest.json").read_text())["blocks"] == {}


def test_room_is_asked_for_what_is_not_there_yet(tmp_path, monkeypatch):
    (tmp_path / "blocks").mkdir()
    (tmp_path / "blocks" / "000").write_bytes(bytes(700))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1000, 700, 300))
    require_space(tmp_path, 1000)
    with pytest.raises(BadInput, match=r"3e-07 GB are free, but the run needs 3.01e-07 GB more"):
        require_space(tmp_path, 1001)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, []),
        ({"": "max", "job": "1000"}, [1000 - (400 - 150)]),
        ({"": "900", "job": "1000", "job/step": "300"}, [300 - (400 - 150), 750, 650]),
        ({"job/step": "100"}, [0]),
    ],
)
def test_memory_that_a_container_allows(tmp_path, monkeypatch, limits, expected):
    """The limit less what is taken; files that the system has only kept in case they are read again do not count."""
    for group, most in limits.items():
        (tmp_path / group).mkdir(exist_ok=True, parents=True)
        (tmp_path / group / "memory.max").write_text(f"{most}\n")
        (tmp_path / group / "memory.current").write_text("400\n")
        (tmp_path / group / "memory.stat").write_text("anon 200\ninactive_file 150\n")
    read = Path.read_text
    own = "12:pids:/x\n0::/job/step\n"
    monkeypatch.setattr(Path, "read_text", lambda path, *a: own if path.name == "cgroup" else read(path, *a))
    assert list(memory.left_by_limits(tmp_path)) == expected
