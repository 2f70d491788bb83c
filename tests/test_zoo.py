"""The zoo: every configuration says what it needs, and runs on a tiny model of its architecture."""

import json
import re
import runpy
from pathlib import Path

import pytest
import torch
import transformers as tf
import yaml
from torch._subclasses import FakeTensorMode

from lit_prune.cli import main
from lit_prune.models import BlockCall, Window, capture_calls, embed, find_blocks
from lit_prune.modules import window_memory

pytestmark = pytest.mark.usefixtures("without_plots")

ROOT = Path(__file__).parent.parent
ZOO = {path.stem: path for path in sorted((ROOT / "configs" / "zoo").glob("*.yaml"))}
SCRIPT = runpy.run_path(str(ROOT / "benchmarks" / "zoo.py"))
FIGURES = r"about ([\d.]+) GB of memory and ([\d.]+) GB of disk, or ([\d.]+) GB and ([\d.]+) GB with .* ([\d.]+) GB:"

TINY = {"vocab_size": 258, "hidden_size": 16, "num_hidden_layers": 2, "max_position_embeddings": 64, "head_dim": 8}
TINY |= {"intermediate_size": 32, "ffn_dim": 32, "word_embed_proj_dim": 16, "num_attention_heads": 2}
TINY |= {"original_max_position_embeddings": 64, "no_rope_layers": [1, 0]}
SMALL = ["--data.samples", "4", "--data.validation_samples", "2", "--data.sequence_length", "16"]
SMALL += ["--evaluation.window_length", "16", "--evaluation.windows", "2", "--trainer.max_epochs", "1"]
SMALL += ["--evaluation.references", "false"]


def tiny(shape: tf.PreTrainedConfig) -> tf.PreTrainedConfig:
    """The same architecture with two small blocks, one of each kind where there are two."""
    settings = shape.to_dict()
    smaller = {key: value for key, value in TINY.items() if key in settings}
    if (groups := settings.get("num_key_value_heads")) is not None:
        smaller["num_key_value_heads"] = 2 if groups == shape.num_attention_heads else 1
    if kinds := settings.get("layer_types"):
        smaller["layer_types"] = (sorted(set(kinds)) * 2)[-2:]
    smaller |= {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": None}
    return type(shape)(**settings | smaller)


def test_every_family_is_there() -> None:
    families = ("llama-2", "llama-3", "qwen3", "mistral", "gemma-3", "phi", "opt", "pythia", "smollm2", "smollm3")
    assert not [family for family in families if not any(name.startswith(family) for name in ZOO)]
    assert set(SCRIPT["SHAPES"]) == set(ZOO)


@pytest.mark.parametrize("name", ZOO)
def test_its_comment_says_what_it_needs(name: str) -> None:
    comment = re.sub(r"\s*\n#\s*", " ", ZOO[name].read_text())
    said = [float(figure) for figure in re.search(FIGURES, comment).groups()]
    assert said == pytest.approx(SCRIPT["needs"](name), rel=0.2)
    assert f"configs/zoo/{name}.yaml" in comment
    assert "not checked against the hub" in comment
    lines = (ROOT / "docs" / "zoo.md").read_text().splitlines()
    (row,) = (line for line in lines if line.startswith("|") and f"zoo/{name}.yaml" in line)
    assert [float(figure) for figure in re.findall(r"\| ([\d.]+) GB", row)] == said


@pytest.mark.parametrize("name", ZOO)
def test_it_runs_on_a_tiny_model_of_its_architecture(name: str, tmp_path: Path, tiny_tokenizer) -> None:
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(tiny(SCRIPT["SHAPES"][name]))
    assert {type(block) for block in find_blocks(model)} == {type(find_blocks(model)[0])}
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("In the beginning was the word, and the word was tiny. " * 20)
    own = ["--model.checkpoint", str(tmp_path / "model"), "--data.source", str(text), "--evaluation.texts", f"[{text}]"]
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(ZOO[name]), *own, *SMALL, "--output_dir", str(tmp_path / "run")])
    assert stop.value.code == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["sparsity"] == pytest.approx(0.5)
    assert len(metrics["trainings"]) == 2
    assert yaml.safe_load(ZOO[name].read_text())["output_dir"] == f"runs/zoo/{name}"


@pytest.mark.parametrize("name", ["llama-3.2-1b", "gemma-3-1b", "pythia-1.4b"])
def test_a_block_without_weights_is_estimated_like_one_with_them(name: str) -> None:
    """What a backward pass keeps does not depend on whether tensors have values."""
    model = tf.AutoModelForCausalLM.from_config(tiny(SCRIPT["SHAPES"][name])).eval()
    blocks, tokens = find_blocks(model), torch.arange(16)[None]
    call, entering = capture_calls(model, blocks, tokens)[0], embed(model, blocks, tokens)
    sized = (2, 1, False, "all", 16)
    real = window_memory(blocks, [Window([blocks[0]], [call])], entering, *sized)
    fake = SCRIPT["fake"]
    with FakeTensorMode(allow_non_fake_inputs=True):
        SCRIPT["get_fake_weights"](blocks[0])
        call = BlockCall(fake(call.args), fake(dict(call.kwargs)))
        assert window_memory(blocks, [Window([blocks[0]], [call])], fake(entering), *sized) == real
