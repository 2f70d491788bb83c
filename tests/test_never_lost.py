"""A run that is killed at any moment goes on to what it would have become: kills at random, and inside every write."""

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from conftest import Ask
from test_forms import COMMON

KILLS = int(os.environ.get("LIT_PRUNE_KILLS", "2"))
"""At random moments, for each of the settings."""

SETTINGS = {
    "Wanda, cross_block": ["--model.mask=Wanda", "--model.reconstruction=cross_block"],
    "SparseGPT, sublayer, local": [
        "--model.mask=SparseGPT",
        "--model.reconstruction=sublayer",
        "--model.global_propagation=false",
        "--model.offload=true",
    ],
    "GBLM, block": ["--model.mask=GBLM", "--model.mask.backward=blocks", "--data.memory_share=0"],
}


@pytest.fixture(scope="module")
def fit(tmp_path_factory, tiny_tokenizer) -> Callable[..., list[str]]:
    """A function that gives the arguments of a short run in a folder."""
    folder = tmp_path_factory.mktemp("given")
    text = folder / "text.txt"
    text.write_text("In the beginning was the word, and the word was tiny, and it was so. " * 20)
    torch.manual_seed(0)
    config = tf.LlamaConfig(**COMMON, num_hidden_layers=2)
    tf.AutoModelForCausalLM.from_config(config).half().save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    given = {
        "model.checkpoint": folder / "model",
        "data.source": text,
        "data.samples": 4,
        "data.validation_samples": 2,
        "data.sequence_length": 16,
        "evaluation.texts": f"[{text}]",
        "evaluation.windows": 2,
        "evaluation.references": "false",
        "model.sparsity": 0.5,
        "trainer.max_epochs": 2,
        "trainer.accelerator": "cpu",
    }

    def arguments(run: Path, settings: list[str]) -> list[str]:
        return ["fit", *(f"--{key}={value}" for key, value in given.items()), *settings, f"--output_dir={run}"]

    return arguments


def contents(run: Path) -> dict[str, object]:
    """All of a finished run that must not depend on how often it was killed."""
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    metrics = json.loads((run / "metrics.json").read_text())
    for timed in metrics["blocks"] + metrics["trainings"]:
        del timed["seconds"]
    del metrics["seconds"], metrics["peak_memory_bytes"]
    return {
        "files": {file for file in files if not file.startswith("tensorboard/")},
        "folders": {path.name for path in run.iterdir()},
        "weights": {file: (run / file).read_bytes() for file in files if file.endswith(".safetensors")},
        "manifest": json.loads((run / "manifest.json").read_text()),
        "metrics": metrics,
    }


def assert_readable(run: Path) -> None:
    """JSON is whole at every moment."""
    for file in run.glob("*.json"):
        json.loads(file.read_text())


@pytest.mark.slow
def test_killed_inside_every_write(tmp_path, ask: Ask, fit):
    settings = SETTINGS["Wanda, cross_block"]
    whole = ask(fit(tmp_path / "whole", settings))
    assert whole["status"] == 0
    expected, run = contents(tmp_path / "whole"), tmp_path / "run"
    arguments = fit(run, settings)
    names = [re.sub(r"\d+", "", name) for name in whole["writes"]]
    kinds = [names.index(name) + 1 for name in dict.fromkeys(names)]
    # the first of every kind of file, or all, in turn before and after the file has its name
    for write in kinds if KILLS < 10 else range(1, len(names) + 1):
        assert ask(arguments, write=write, before=bool(write % 2))["status"] == -9
        assert_readable(run)
        assert ask(arguments)["status"] == 0
        assert contents(run) == expected
        shutil.rmtree(run)


@pytest.mark.slow
def test_generation_killed_at_random_moments(tmp_path, ask: Ask, fit):
    checkpoint = next(a.partition("=")[2] for a in fit(tmp_path, []) if a.startswith("--model.checkpoint"))
    settings = ["--texts=8", "--batch_size=2", "--max_tokens=24", "--language=any", "--device=cpu"]

    def generate(file: Path) -> list[str]:
        return ["generate", f"--checkpoint={checkpoint}", *settings, f"--output={file}"]

    whole = ask(generate(tmp_path / "whole.jsonl"))
    assert whole["status"] == 0
    draw, file = random.Random(0), tmp_path / "own.jsonl"
    for _ in range(KILLS):
        file.unlink(missing_ok=True)
        for _ in range(2):
            assert ask(generate(file), seconds=draw.uniform(0.01, whole["seconds"]))["status"] in (0, -9)
        assert ask(generate(file))["status"] == 0
        assert file.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_killed_at_random_moments(tmp_path, ask: Ask, fit, settings):
    whole = ask(fit(tmp_path / "whole", settings))
    assert whole["status"] == 0
    expected, draw = contents(tmp_path / "whole"), random.Random(0)
    for kill in range(KILLS):
        run = tmp_path / str(kill)
        answer = ask(fit(run, settings), seconds=draw.uniform(0.01, whole["seconds"]))
        assert answer["status"] in (0, -9)
        assert_readable(run)
        assert ask(fit(run, settings))["status"] == 0
        assert contents(run) == expected
