"""Runs that are opened again: only finished ones, each refusal in a sentence."""

import json

import pytest

from lit_prune.errors import BadInput
from lit_prune.finished import FinishedRun, run_or_model


def a_run(folder, finished=True, metrics='{"checkpoint": "dense"}', config="model: {}\n"):
    (folder / "model").mkdir(parents=True)
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
        ({"metrics": "{}"}, "runs: '.*metrics.json' is not what a run writes"),
        ({"config": "a: [1"}, "runs: '.*config.yaml' is not what a run writes"),
        ({"config": "so"}, "runs: '.*config.yaml' is not what a run writes"),
    ],
)
def test_refusals(tmp_path, settings, said):
    folder = a_run(tmp_path / "run", **settings)
    with pytest.raises(BadInput, match=said):
        FinishedRun.open(folder, "runs")


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(BadInput, match=r"runs: '.*' holds no run; give"):
        FinishedRun.open(tmp_path, "runs")


def test_a_run_without_its_configuration(tmp_path):
    folder = a_run(tmp_path / "run")
    (folder / "config.yaml").unlink()
    with pytest.raises(BadInput, match=r"runs: '.*config.yaml' cannot be read"):
        FinishedRun.open(folder, "runs")


def test_a_run_without_its_model_is_not_looked_for_on_the_hub(tmp_path):
    (a_run(tmp_path / "run") / "model").rmdir()
    with pytest.raises(BadInput, match=r"model: the run in '.*' has lost its model"):
        run_or_model(str(tmp_path / "run"), "model")


def test_a_damaged_evaluation_stops_only_who_needs_it(tmp_path):
    folder = a_run(tmp_path / "run")
    (folder / "evaluation.json").write_text("{")
    run = FinishedRun.open(folder, "runs")
    with pytest.raises(BadInput, match=r"runs: '.*evaluation.json' cannot be read"):
        run.with_evaluation("runs")
    (folder / "evaluation.json").write_text('{"seconds": 1}')
    assert run.with_evaluation("runs").evaluation == {"seconds": 1}
