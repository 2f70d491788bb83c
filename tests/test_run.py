"""The main job on the tiny model, as a user runs it."""

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from test_reporting import EVALUATION
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_prune.cli import main
from lit_prune.masks import Sparsity, bits
from lit_prune.models import find_blocks, linear_layers, weight_of
from lit_prune.reporting.board import Board

ROOT = Path(__file__).parent.parent
TINY = ROOT / "configs" / "tiny.yaml"
SHORT = ["--data.samples", "8", "--data.validation_samples", "4", "--data.sequence_length", "32"]
SHORT += ["--evaluation.windows", "16", "--trainer.max_epochs", "2"]


@pytest.fixture(autouse=True)
def in_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("lit_prune.reporting.plots.run_figures", lambda _: {})  # those of `run` are enough


def fit(folder: Path, *settings: str, config: Path = TINY) -> dict:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(config), "--output_dir", str(folder), *settings])
    assert stop.value.code == 0
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    os.chdir(ROOT)
    folder = tmp_path_factory.mktemp("runs") / "run"
    fit(folder)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def same_weights(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_folder_holds_what_is_promised(run):
    names = {path.name for path in run.iterdir()}
    assert names == {
        "config.yaml", "manifest.json", "metrics.json", "blocks", "tensorboard", "model", "report.html",
    }  # fmt: skip
    assert sorted(p.name for p in (run / "blocks").iterdir()) == [f"{i:03d}.safetensors" for i in range(4)]
    assert not list(run.rglob(".partial-*"))
    assert "<script" not in (run / "report.html").read_text()


def test_zeros_of_the_saved_model_are_those_of_the_masks(run):
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    dense = AutoModelForCausalLM.from_pretrained(ROOT / "tiny" / "model")
    assert model.dtype == dense.dtype
    for index, block in enumerate(find_blocks(model)):
        tensors = load_file(run / "blocks" / f"{index:03d}.safetensors")
        for name, layer in linear_layers(block).items():
            weight = weight_of(layer)
            mask = bits.unpack(tensors[f"mask:{name}"], weight.shape)
            assert torch.equal(weight != 0, mask)
            assert torch.all((~mask).sum(dim=1) == int(weight.shape[1] * Sparsity("0.6").share))
    assert torch.equal(model.get_input_embeddings().weight, dense.get_input_embeddings().weight)
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert tokenizer("And it came to pass").input_ids
    assert model.generation_config.eos_token_id == dense.generation_config.eos_token_id


def test_metrics_say_what_happened(run):
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["method"] == {
        "mask": "Wanda", "solver": None, "updates_weights": False, "allocation": None, "skip": [], "sparsities": {},
        "true_sequential": False,
        "reconstruction": "block", "window": 1, "stride": 1, "global_propagation": True, "independent": False,
        "loss": "mse", "trained": "all", "rank": None, "sparsity": "0.6",
    }  # fmt: skip
    assert [block["index"] for block in metrics["blocks"]] == [0, 1, 2, 3]
    for block in metrics["blocks"]:
        assert 0 < block["error"]["after"] < block["error"]["before"]
        assert 0 < block["validation_error"]["after"] < block["validation_error"]["before"]
    for block, training in zip(metrics["blocks"], metrics["trainings"], strict=True):
        assert training["blocks"] == [block["index"]]
        held_out = training["loss"]["held_out"]
        assert (len(training["loss"]["train"]), len(held_out)) == (5, 6)
        # the best epoch's held-out loss is that of the weights that were kept, before they are rounded to float16
        assert min(held_out) == pytest.approx(block["validation_error"]["after"], rel=1e-2)
        assert held_out[0] == pytest.approx(block["validation_error"]["before"], rel=1e-4)
    zeros = sum(int((t == 0).sum()) for n, t in weights(run).items() if "proj" in n)
    total = sum(t.numel() for n, t in weights(run).items() if "proj" in n)
    assert metrics["sparsity"] == zeros / total
    assert metrics["error"] == metrics["blocks"][-1]["error"]["after"]
    assert set(metrics["seconds"]) == {
        "load", "statistics", "mask", "reconstruct", "advance", "save", "evaluate", "total",
    }  # fmt: skip
    stages = sum(seconds for stage, seconds in metrics["seconds"].items() if stage != "total")
    assert 0.8 * metrics["seconds"]["total"] < stages <= metrics["seconds"]["total"]
    assert metrics["peak_memory_bytes"]["host"] > 1e8
    dense, masked, pruned = (metrics["perplexity"][stage]["held_out"] for stage in ("dense", "masked", "pruned"))
    assert dense < pruned < masked
    assert "windows of 128 tokens" in metrics["perplexity_convention"]["held_out"]


def test_reported_error_is_that_of_the_saved_model(run):
    """mean((dense block(dense stream) - sparse block(sparse stream))²), from two whole-model forward passes."""
    from lit_prune.data import CalibrationText

    settings = yaml.safe_load((run / "config.yaml").read_text())["data"]
    data = CalibrationText(**settings | {"seed": 0})
    data.tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny" / "model")
    data.setup()
    metrics = json.loads((run / "metrics.json").read_text())
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (ROOT / "tiny" / "model", run / "model")
    ]
    for tokens, key in ((data.calibration, "error"), (data.held_out, "validation_error")):
        captured: list[list[torch.Tensor]] = [[], []]
        for model, outputs in zip(models, captured, strict=True):
            hooks = [
                block.register_forward_hook(lambda _, __, out, outputs=outputs: outputs.append(out))
                for block in find_blocks(model)
            ]
            with torch.no_grad():
                model(tokens)
            for hook in hooks:
                hook.remove()
        for block, dense, sparse in zip(metrics["blocks"], *captured, strict=True):
            assert block[key]["after"] == pytest.approx(float((dense - sparse).square().mean()), rel=1e-4)


def test_tensorboard_overlays_all_blocks_under_one_tag(run):
    metrics = json.loads((run / "metrics.json").read_text())
    assert [training["name"] for training in metrics["trainings"]] == [f"block_{index:02d}" for index in range(4)]
    for training in metrics["trainings"]:
        events = EventAccumulator(str(run / "tensorboard" / training["name"])).Reload()
        assert set(events.Tags()["scalars"]) == {"reconstruction_loss/train", "reconstruction_loss/held_out"}
        for tag, name in (("reconstruction_loss/train", "train"), ("reconstruction_loss/held_out", "held_out")):
            assert [e.value for e in events.Scalars(tag)] == pytest.approx(training["loss"][name], rel=1e-6)
    for moment, name in (("before", "masked"), ("after", "reconstructed")):
        events = EventAccumulator(str(run / "tensorboard" / name)).Reload()
        for tag, key in (("block_error/calibration", "error"), ("block_error/held_out", "validation_error")):
            values = {e.step: e.value for e in events.Scalars(tag)}
            assert values == pytest.approx({b["index"]: b[key][moment] for b in metrics["blocks"]}, rel=1e-6)
    for stage, name in (("dense", "dense"), ("masked", "masked"), ("pruned", "reconstructed")):
        events = EventAccumulator(str(run / "tensorboard" / name)).Reload()
        (event,) = events.Scalars("perplexity/held_out")
        assert event.value == pytest.approx(metrics["perplexity"][stage]["held_out"], rel=1e-6)


def test_tensorboard_compares_runs_by_numbers_and_shows_the_plots(run):
    metrics = json.loads((run / "metrics.json").read_text())
    events = EventAccumulator(str(run / "tensorboard" / "reconstructed"), size_guidance={"images": 0}).Reload()
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    started = HParamsPluginData.FromString(content).session_start_info.hparams
    settings = {name: getattr(value, value.WhichOneof("kind")) for name, value in started.items()}
    assert {name: settings[name] for name in ("sparsity", "samples", "mask", "global_propagation", "solver")} == {
        "sparsity": 0.6, "samples": 64.0, "mask": "Wanda", "global_propagation": "true", "solver": "none",
    }  # fmt: skip
    assert settings.keys() == {"checkpoint", *metrics["method"], *metrics["calibration"]}
    listed = HParamsPluginData.FromString(events.SummaryMetadata("_hparams_/experiment").plugin_data.content)
    expected = {
        "summary/perplexity_held_out": metrics["perplexity"]["pruned"]["held_out"],
        "summary/error": metrics["error"],
        "summary/held_out_error": metrics["blocks"][-1]["validation_error"]["after"],
        "summary/sparsity": metrics["sparsity"],
        "summary/seconds": metrics["seconds"]["total"],
        "summary/host_memory_gb": metrics["peak_memory_bytes"]["host"] / 1e9,
    }
    assert {info.name.tag for info in listed.experiment.metric_infos} == expected.keys()
    assert {tag: events.Scalars(tag)[0].value for tag in expected} == pytest.approx(expected, rel=1e-5)
    for name in ("errors", "losses", "sparsity", "stages"):
        (picture,) = events.Images(f"plots/{name}")
        pixels = np.asarray(Image.open(io.BytesIO(picture.encoded_image_string)))
        assert pixels.shape == (picture.height, picture.width, 3)
        assert picture.width == 520
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50, "something is drawn"


def test_an_evaluation_goes_to_tensorboard(tmp_path):
    Board(tmp_path / "tensorboard").evaluated(EVALUATION)
    both = ("evaluation/perplexity_wiki", "zero_shot/rte", "zero_shot/boolq", "zero_shot/mean")
    expected = {
        "dense": dict(zip(both, (19.0, 0.5, 0.5, 0.5), strict=True)),
        "reconstructed": dict(zip(both, (30.125, 0.42, 0.48, 0.45), strict=True))
        | {"divergence/kl_wiki": 0.25, "divergence/top1_agreement_wiki": 0.75},
    }
    for name, figures in expected.items():
        events = EventAccumulator(str(tmp_path / "tensorboard" / name)).Reload()
        assert {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]} == pytest.approx(figures)


def test_zeros_are_counted_layer_by_layer(run):
    metrics = json.loads((run / "metrics.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    for block, figures in zip(find_blocks(model), metrics["blocks"], strict=True):
        assert figures["layers"] == {
            name: {"weights": weight_of(layer).numel(), "zeros": int((weight_of(layer) == 0).sum())}
            for name, layer in linear_layers(block).items()
        }


def test_a_finished_run_can_be_compared(run, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with pytest.raises(SystemExit) as stop:
        main(["report", str(run), "--output", str(tmp_path / "comparison")])
    assert stop.value.code == 0
    metrics = json.loads((run / "metrics.json").read_text())
    (table,) = csv.DictReader((tmp_path / "comparison" / "cost.csv").open())
    assert float(table["total"]) == metrics["seconds"]["total"]
    dense, pruned = csv.DictReader((tmp_path / "comparison" / "quality.csv").open())
    for row, stage in ((dense, "dense"), (pruned, "pruned")):
        assert float(row["perplexity, held_out"]) == metrics["perplexity"][stage]["held_out"]
    assert float(pruned["error, held-out"]) == metrics["blocks"][-1]["validation_error"]["after"]
    assert {path.stem for path in (tmp_path / "comparison" / "plots").glob("*.png")} == {
        "errors", "losses_run", "perplexity_held_out", "sparsity_run", "stages",
    }  # fmt: skip
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}, "the run stays as it is"


def test_repeating_the_saved_configuration_gives_the_same_weights(tmp_path):
    fit(tmp_path / "one", *SHORT)
    fit(tmp_path / "two", config=tmp_path / "one" / "config.yaml")
    fit(tmp_path / "other", *SHORT, "--seed_everything", "1")
    assert same_weights(tmp_path / "one", tmp_path / "two")
    assert not same_weights(tmp_path / "one", tmp_path / "other")


def test_zero_sparsity_gives_the_dense_model_back(tmp_path):
    fit(tmp_path / "run", *SHORT, "--model.sparsity", "0")
    dense, result = load_file(ROOT / "tiny" / "model" / "model.safetensors"), weights(tmp_path / "run")
    assert all(torch.equal(dense[name], result[name]) for name in dense)


@pytest.mark.parametrize("reconstruction", ["none", "block"])
@pytest.mark.parametrize("propagation", ["true", "false"])
def test_pattern_with_and_without_reconstruction(tmp_path, reconstruction, propagation):
    settings = ["--model.reconstruction", reconstruction, "--model.global_propagation", propagation]
    metrics = fit(tmp_path / "run", *SHORT, *settings, "--model.sparsity", "2:4")
    assert metrics["sparsity"] == 0.5
    for name, weight in weights(tmp_path / "run").items():
        if "proj" in name:
            assert torch.all((weight.view(-1, 4) == 0).sum(dim=1) == 2)
    for block in metrics["blocks"]:
        assert (block["error"]["before"] == block["error"]["after"]) == (reconstruction == "none")
    same = metrics["perplexity"]["masked"] == metrics["perplexity"]["pruned"]
    assert same == (reconstruction == "none")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_order_of_quality_at_sixty_percent(tmp_path, seed):
    """Dense < Wanda with reconstruction < Wanda < magnitude < random."""
    common = ["--seed_everything", str(seed), "--data.samples", "32", "--data.validation_samples", "8"]
    common += ["--evaluation.windows", "48", "--evaluation.errors", "false"]
    none = [*common, "--model.reconstruction", "none", "--evaluation.references", "false"]
    found = fit(tmp_path / "reconstructed", *common)["perplexity"]
    perplexities = [found["dense"]["held_out"], found["pruned"]["held_out"]]
    for mask in ("Wanda", "Magnitude", "Random"):
        found = fit(tmp_path / mask, *none, "--model.mask", mask)["perplexity"]
        perplexities.append(found["pruned"]["held_out"])
    assert perplexities == sorted(perplexities)
    assert all(worse > 1.02 * better for better, worse in pairwise(perplexities))


def test_no_evaluation_and_no_held_out_samples(tmp_path):
    metrics = fit(tmp_path / "run", *SHORT, "--data.validation_samples", "0", "--evaluation.texts", "[]")
    assert metrics["perplexity"] == {"dense": None, "masked": None, "pruned": None}
    for block in metrics["blocks"]:
        assert block["validation_error"] == {"before": None, "after": None}
    assert all(training["best_epoch"] is None for training in metrics["trainings"])


def test_without_references_only_the_result_is_measured(tmp_path):
    metrics = fit(tmp_path / "run", *SHORT, "--evaluation.references", "false")
    assert metrics["perplexity"]["dense"] is None
    assert metrics["perplexity"]["masked"] is None
    assert metrics["perplexity"]["pruned"]["held_out"] > 1
    assert "not measured" in (tmp_path / "run" / "report.html").read_text()


def test_a_finished_run_is_not_done_again(run, capsys):
    before = (run / "metrics.json").stat().st_mtime_ns
    fit(run)
    assert "is finished already" in capsys.readouterr().out
    assert (run / "metrics.json").stat().st_mtime_ns == before


def test_another_configuration_is_refused(run, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(TINY), "--output_dir", str(run), "--data.samples", "9", "--optimizer.lr", "0.1"])
    assert stop.value.code == 2
    assert "differs in data.samples, optimizer.init_args.lr" in capsys.readouterr().err


@pytest.mark.parametrize("asked", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_how_to_go_on_and_is_alone_in_its_folder(tmp_path, capsys, asked):
    command = [sys.executable, "-m", "lit_prune", "fit", "--config", str(TINY), "--trainer.max_epochs", "1000"]
    heard = signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell lets what it starts in the background ignore it
    process = subprocess.Popen([*command, "--output_dir", str(tmp_path / "run")], stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, heard)
    while not list((tmp_path / "run").glob("tensorboard/block_00/events*")):
        assert process.poll() is None
        time.sleep(0.1)
    if asked == signal.SIGTERM:  # a second process is refused, and harms nothing
        process.send_signal(signal.SIGSTOP)  # it need not work meanwhile
        before = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").glob("*.json")}
        with pytest.raises(SystemExit) as second:
            main([*command[3:], "--output_dir", str(tmp_path / "run")])
        assert second.value.code == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("lit-prune: output_dir: another process is at work")
        assert {file: file.stat().st_mtime_ns for file in before} == before
        process.send_signal(signal.SIGCONT)
    process.send_signal(asked)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert said.splitlines()[-1].startswith("lit-prune: Interrupted; the same command goes on")
    assert "Traceback" not in said


def unfinished(run: Path) -> None:
    """Let a finished run be one that died before its result was saved."""
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | {"finished": False}))
    shutil.rmtree(run / "model")


@pytest.mark.parametrize(("form", "damage"), [("block", "altered"), ("block", "gone"), ("cross_block", "truncated")])
def test_a_damaged_block_is_found_named_and_made_anew(tmp_path, caplog, form, damage):
    settings = [*SHORT, "--model.reconstruction", form, "--evaluation.texts", "[]"]
    fit(tmp_path / "run", *settings)
    sound = {file.name: file.read_bytes() for file in (tmp_path / "run" / "blocks").iterdir()}
    model = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    unfinished(tmp_path / "run")
    block = tmp_path / "run" / "blocks" / "001.safetensors"
    content = sound[block.name]
    match damage:
        case "altered":
            block.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        case "truncated":
            block.write_bytes(content[:100])
        case "gone":
            block.unlink()
    fit(tmp_path / "run", *settings)
    rounds = 1 if form == "block" else 0  # a window of blocks cannot be taken up again in the middle
    assert f"001.safetensors' is missing or was altered since it was written: made anew, from round {rounds} on" in (
        caplog.text
    )
    assert {file.name: file.read_bytes() for file in (tmp_path / "run" / "blocks").iterdir()} == sound
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == model
