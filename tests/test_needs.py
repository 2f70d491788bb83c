"""What a run says that it will need, against what it is then measured to have taken."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from test_forms import IDS

from lit_prune.cli import main

TEXT = Path(__file__).parent.parent / "tiny" / "text" / "calibration.txt"
WIDE = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "max_position_embeddings": 512}
SENTENCE = r"This run needs about ([\d.]+) ([MG])B of memory, [\d.]+ [MG]B on disk, and \d passes"
RUNS = {
    "trained": (
        {"vocab_size": 258, "num_hidden_layers": 2},
        ["--data.samples=16", "--data.sequence_length=256", "--data.batch_size=16", "--trainer.max_epochs=1"],
    ),
    "perplexity of many words": (
        {"vocab_size": 40_000, "num_hidden_layers": 2},
        ["--model.reconstruction=none", f"--evaluation.texts=[{TEXT}]", "--evaluation.window_length=512"],
    ),
    "SparseGPT, on disk": (
        {"vocab_size": 258, "num_hidden_layers": 2, "hidden_size": 1024, "intermediate_size": 5120},
        ["--model.reconstruction=none", "--model.mask=SparseGPT", "--model.offload=true"],
    ),
}


@pytest.mark.parametrize(("shape", "settings"), RUNS.values(), ids=RUNS.keys())
def test_memory_is_foretold_within_a_fifth(tmp_path, tiny_tokenizer, shape, settings):
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(tf.LlamaConfig(**WIDE | IDS | shape))
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    given = {"model.checkpoint": tmp_path / "model", "output_dir": tmp_path / "run", "data.source": TEXT}
    given |= {"data.samples": 8, "data.validation_samples": 4, "data.sequence_length": 64, "model.sparsity": 0.5}
    given |= {"evaluation.windows": 8, "evaluation.texts": "[]", "evaluation.references": "false"}
    given |= {"trainer.accelerator": "cpu"}
    fit = [sys.executable, "-m", "lit_prune", "fit", *(f"--{k}={v}" for k, v in given.items()), *settings]
    said = subprocess.run(fit, check=True, capture_output=True, text=True).stderr
    peak = json.loads((tmp_path / "run" / "metrics.json").read_text())["peak_memory_bytes"]["host"] / 1e9
    number, unit = re.search(SENTENCE, said).groups()
    assert float(number) / {"M": 1000, "G": 1}[unit] == pytest.approx(peak, rel=0.2)


def test_a_dry_run_only_says_what_is_needed(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "configs/tiny.yaml", "--output_dir", str(tmp_path / "run"), "--dry_run"])
    assert stop.value.code == 0
    assert re.search(SENTENCE, capsys.readouterr().out)
    assert not list(tmp_path.iterdir())
