"""The configurations of the paper's tables: they have its settings, and run on a tiny model of their architecture."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from lit_prune.cli import main

pytestmark = pytest.mark.usefixtures("without_plots")

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs" / "paper").rglob("*.yaml"))
MODELS = {
    "llama-7b": "huggyllama/llama-7b",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "opt-125m": "facebook/opt-125m",
}
SMALL = ["--data.samples", "4", "--data.validation_samples", "2", "--data.sequence_length", "16"]
SMALL += ["--evaluation.window_length", "16", "--evaluation.windows", "2", "--trainer.max_epochs", "1"]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> dict[str, Path]:
    """Random models of two blocks, by architecture."""
    shape = {"vocab_size": 258, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"max_position_embeddings": 64}
    torch.manual_seed(0)
    made = {
        "llama": LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=32)),
        "opt": OPTForCausalLM(OPTConfig(**shape, ffn_dim=32, word_embed_proj_dim=16)),
    }
    folders = {}
    for name, model in made.items():
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
        tiny_tokenizer.save_pretrained(folders[name])
    return folders


def test_there_is_one_for_each_figure_of_the_tables() -> None:
    masks, forms = ("magnitude", "sparsegpt", "wanda"), ("lr", "br", "br-gp", "br-gp-cr")
    names = {f"{model}/{mask}-{form}" for model in MODELS for mask in masks for form in forms}
    assert {f"{path.parent.name}/{path.stem}" for path in CONFIGS} == names


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_it_holds_the_settings_of_the_paper(config: Path) -> None:
    settings = yaml.safe_load(config.read_text())
    mask, _, form = config.stem.partition("-")
    assert settings["model"]["checkpoint"] == MODELS[config.parent.name]
    assert settings["model"]["mask"].rsplit(".")[-1].lower() == mask
    assert settings["model"]["reconstruction"] == {"lr": "none", "br-gp-cr": "cross_block"}.get(form, "block")
    assert settings["model"]["global_propagation"] == ("gp" in form)
    assert settings["model"]["sparsity"] == 0.5
    assert settings["data"] == {
        "source": "c4", "samples": 256, "validation_samples": 32, "sequence_length": 1024, "batch_size": 8,
    }  # fmt: skip
    assert settings["optimizer"]["init_args"] == {
        "lr": 2e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.0, "fused": True,
    }  # fmt: skip
    assert (settings["lr_scheduler"], settings["trainer"]["max_epochs"]) == ("linear", 10)
    assert settings["trainer"]["precision"] == "bf16-mixed"
    assert settings["evaluation"] == {"texts": ["wikitext2"], "window_length": 2048}
    assert settings["output_dir"] == f"runs/paper/{config.parent.name}/{config.stem}"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_it_runs_on_a_tiny_model_of_its_architecture(config: Path, models: dict[str, Path], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("In the beginning was the word, and the word was tiny. " * 20)
    model = models["opt" if config.parent.name.startswith("opt") else "llama"]
    own = ["--model.checkpoint", str(model), "--data.source", str(text), "--evaluation.texts", f"[{text}]"]
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(config), *own, *SMALL, "--output_dir", str(tmp_path / "run")])
    assert stop.value.code == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["sparsity"] == pytest.approx(0.5)
    rounds = {"none": 0, "block": 2, "cross_block": 3}[metrics["method"]["reconstruction"]]
    assert len(metrics["trainings"]) == rounds
