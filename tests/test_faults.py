"""What goes wrong in the middle of a run: one sentence, and nothing that was finished is lost."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from conftest import files_up_to
from safetensors.torch import load_file, save_file
from test_forms import COMMON, command

from lit_prune.cli import main
from lit_prune.data import alone, propagate, sound
from lit_prune.errors import BadInput
from lit_prune.models import BlockCall, Window
from lit_prune.rounds import Round
from lit_prune.walk import Walk

pytestmark = pytest.mark.usefixtures("without_plots")

ROOT = Path(__file__).parent.parent
QUICK = ["--trainer.max_epochs=1", "--evaluation.texts=[]"]


@pytest.fixture
def text(tmp_path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("In the beginning was the word, and the word was tiny, and it was so. " * 20)
    return file


@pytest.fixture
def checkpoint(tmp_path, tiny_tokenizer) -> Callable[..., Path]:
    """A function that saves a random model of three blocks with some of its weights multiplied."""

    def save(**factors: float) -> Path:
        torch.manual_seed(0)
        folder = tmp_path / "model"
        tf.AutoModelForCausalLM.from_config(tf.LlamaConfig(**COMMON, num_hidden_layers=3)).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        weights = load_file(folder / "model.safetensors")
        for name, factor in factors.items():
            weights[name.replace("__", ".")].mul_(factor)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return folder

    return save


@pytest.mark.parametrize("offload", ["true", "false"])
@pytest.mark.parametrize(
    ("huge", "layer"), [("mlp.down_proj", "mlp.down_proj"), ("self_attn.v_proj", "self_attn.o_proj")]
)
def test_activations_that_are_no_numbers_are_named(tmp_path, capsys, checkpoint, text, huge, layer, offload):
    made = checkpoint(**{f"model__layers__1__{huge.replace('.', '__')}__weight": 1e38})
    weights = load_file(made / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    status, said = command(capsys, tmp_path / "run", made, text, *QUICK, f"--model.offload={offload}")
    assert status == 2
    assert f"lit-prune: block_01: layer '{layer}' puts out NaN or infinite values, first for calibration sample" in said
    assert list(json.loads((tmp_path / "run" / "manifest.json").read_text())["blocks"]) == ["0"]
    assert len(load_file(tmp_path / "run" / "blocks" / "000.safetensors")) > 7


@pytest.mark.parametrize("method", ["nothing seen", "independent"])
def test_a_block_that_puts_out_no_numbers_is_refused_where_nobody_learns_from_it(
    tmp_path, capsys, checkpoint, text, method
):
    """Even of a training that leaves weights which are numbers until they are stored in float16."""
    settings = [*QUICK, "--evaluation.errors=false", "--model.mask=Magnitude"]
    if method == "independent":
        settings += ["--model.independent=true", "--optimizer=SGD", "--optimizer.lr=1e9", "--lr_scheduler=constant"]
        settings += ["--data.batch_size=8", "--data.validation_samples=0"]
        made, block = checkpoint(), 0
        config = json.loads((made / "config.json").read_text())
        (made / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    else:
        settings += ["--model.reconstruction=none"]
        made, block = checkpoint(model__layers__1__mlp__down_proj__weight=1e38), 1
    status, said = command(capsys, tmp_path / "run", made, text, *settings)
    assert status == 2, said
    assert re.search(rf"lit-prune: block_0{block}: layer '[a-z_.]+' puts out NaN or infinite values", said)
    assert len(json.loads((tmp_path / "run" / "manifest.json").read_text())["blocks"]) == block
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("mask", [["Wanda", "--model.allocation=OWL"], ["GBLM"]], ids=["OWL", "GBLM"])
def test_activations_that_are_no_numbers_are_named_before_the_first_block_is_pruned(
    tmp_path, capsys, checkpoint, text, mask
):
    made = checkpoint(model__layers__1__mlp__down_proj__weight=1e38)
    status, said = command(capsys, tmp_path / "run", made, text, *QUICK, "--model.mask", *mask)
    assert status == 2
    assert "lit-prune: block_01: no linear layer, but what lies between them, puts out NaN or infinite values" in said


def test_of_a_window_the_block_is_named(tmp_path, capsys, monkeypatch, checkpoint, text):
    """The second of two is broken after it was pruned, so that only their training, or the pass after it, shows it."""
    train = Walk.train

    def broken(walk: Walk, rounds: list[Round]) -> None:
        if rounds[0].index == 1:
            walk.blocks[1].mlp.up_proj.weight.data.mul_(float("inf"))
        else:
            train(walk, rounds)

    monkeypatch.setattr(Walk, "train", broken)
    settings = [*QUICK, "--model.reconstruction=cross_block"]
    status, said = command(capsys, tmp_path / "run", checkpoint(), text, *settings)
    assert status == 2
    assert "lit-prune: block_01: layer 'mlp.up_proj' puts out NaN or infinite values, first for" in said


def test_a_held_out_sample_is_called_so(tmp_path):
    linear = torch.nn.Linear(2, 2)
    part = Window([linear], [BlockCall((), {})])
    hidden = torch.ones(10, 1, 2)
    hidden[7] = float("nan")
    with pytest.raises(BadInput, match=r"^block_03: .* first for held-out sample 1; "), sound("block_03", alone(6, 4)):
        propagate(part, hidden[4:], first=4)
    with (
        pytest.raises(BadInput, match=r"^block_00: .* first for calibration sample 7; "),
        sound("x", alone(8, 2), [linear]),
    ):
        propagate(part, hidden)


def test_too_little_memory_in_the_middle(tmp_path, capsys, monkeypatch, checkpoint, text):
    made, train = checkpoint(), Walk.train

    def starved(walk: Walk, rounds: list[Round]) -> None:
        if rounds[0].index == 1:
            torch.empty(2**60)
        train(walk, rounds)

    with monkeypatch.context() as patch:
        patch.setattr(Walk, "train", starved)
        status, said = command(capsys, tmp_path / "run", made, text, *QUICK)
    assert status == 1
    assert said.splitlines()[-1].startswith("lit-prune: Out of memory; what is finished stays: the same")
    assert list(json.loads((tmp_path / "run" / "manifest.json").read_text())["blocks"]) == ["0"]
    advised = ["--model.offload=true", "--data.memory_share=0"]
    assert command(capsys, tmp_path / "run", made, text, *QUICK, *advised)[0] == 0
    assert command(capsys, tmp_path / "other", made, text, *QUICK)[0] == 0
    results = [load_file(tmp_path / name / "blocks" / "002.safetensors") for name in ("run", "other")]
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[1])


def test_a_full_disk_in_the_middle(tmp_path, capsys, checkpoint, text):
    """A limit on the size of a file stands for it; more room, and the same command goes on."""
    made, run = checkpoint(), tmp_path / "run"
    given = {"model.checkpoint": made, "output_dir": run, "data.source": text, "data.samples": 6}
    given |= {"data.validation_samples": 2, "data.sequence_length": 16, "model.sparsity": 0.5}
    fit = ["fit", *(f"--{k}={v}" for k, v in given.items()), *QUICK]
    with files_up_to(20_000), pytest.raises(SystemExit) as full:
        main(fit)
    assert full.value.code == 1
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("lit-prune: The disk is full; what is finished stays: free some")
    assert not list((run / "blocks").glob("*"))
    assert json.loads((run / "manifest.json").read_text())["rounds"] == 0
    with pytest.raises(SystemExit) as stop:
        main(fit)
    assert stop.value.code == 0
    assert len(list((run / "blocks").glob("*.safetensors"))) == 3


@pytest.mark.parametrize("held_out", [0, 2])
def test_a_training_that_diverges_falls_back_and_the_report_says_so(tmp_path, capsys, checkpoint, text, held_out):
    settings = ["--optimizer=SGD", "--optimizer.lr=1e30", "--lr_scheduler=constant", "--trainer.max_epochs=3"]
    settings += [f"--data.validation_samples={held_out}", "--evaluation.texts=[]"]
    status, said = command(capsys, tmp_path / "run", checkpoint(), text, *settings)
    assert status == 0, said
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert "Training diverged in block_00, block_01" in (tmp_path / "run" / "report.html").read_text()


def test_a_training_whose_last_step_diverges_falls_back(tmp_path, capsys, checkpoint, text):
    """Its loss was measured before that step."""
    settings = ["--optimizer=SGD", "--optimizer.lr=1e30", "--trainer.max_epochs=1", "--data.batch_size=8"]
    settings += ["--data.validation_samples=0", "--evaluation.texts=[]", "--lr_scheduler=constant"]
    status, said = command(capsys, tmp_path / "run", checkpoint(), text, *settings)
    assert status == 0, said
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
