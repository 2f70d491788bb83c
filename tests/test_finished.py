"""Runs that are opened again: only finished ones, each refusal in a sentence."""

import json

import pytest

from lit_prune.errors import BadInput
from lit_prune.finished import FinishedRun, run_or_model


def a_run(folder, finished=True, metrics='{"checkpoint": "dense"}', config="model: {}\n"):
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({"finished": finished}))
    (folder / "metrics.json").write_text(metrics)
    (folder / "config.yaml").write_text(config)
    return folder


def test_a_finished_run_stands_for_its_model(tmp_path):
    folder = a_run(tmp_path / "run")
    model, run = run_or_model(str(folder), "model")
    assert (model, run.checkpoint, run.config) == (str(folder / "model"), "dense", "model: {}\n")


@pytest.mark.parametrize("given", ["org/model", "tiny/model"])
def test_anything_else_stands_for_itself(given):
    assert run_or_model(given, "model") == (given, None)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"finished": False}, "runs: the run in '.*' is not finished; `lit-prune fit --config .*config.yaml` goes on"),
        ({"metrics": "{"}, r"runs: '.*metrics.json' cannot be read \(Expecting"),
        ({"metrics": "[]"}, "runs: '.*metrics.json' is not what a run writes"),
    ],
)
def test_refusals(tmp_path, settings, said):
    folder = a_run(tmp_path / "run", **settings)
    with pytest.raises(BadInput, match=said):
        FinishedRun.open(folder, "runs")


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(BadInput, match=r"runs: '.*' holds no run; give"):
        FinishedRun.open(tmp_path, "runs")
