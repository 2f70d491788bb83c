"""Exports: the same weights bit for bit in every format, sizes as the formula says, refusals that leave nothing."""

import json
import re
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig

import lit_prune
from lit_prune.cli import main
from lit_prune.errors import BadInput
from lit_prune.export import hub, measure
from lit_prune.export.codes import Encoded, decode, encode
from lit_prune.export.layouts import CSRLinear, to_semi_structured, two_of_four
from lit_prune.export.source import files_bytes
from lit_prune.models import linear_layers, weight_of

pytestmark = pytest.mark.usefixtures("without_plots")

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tiny" / "model"
WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
DTYPES += [torch.int64, torch.uint8, torch.bool]
FLOATS = DTYPES[:4]


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    whole = WHOLE[one.itemsize]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one.view(whole), other.view(whole))


def random_bits(shape, dtype, seed: int, share: float, negative_zeros: float, pattern: bool) -> torch.Tensor:
    """Any bits at all, NaN payloads and subnormal numbers among them; some of the values zeroed, to 0 and to -0."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel()
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) >= share
    whole = WHOLE[dtype.itemsize]
    limits = torch.iinfo(whole)
    values = torch.randint(limits.min, limits.max, (count,), generator=generator, dtype=whole)
    gone = torch.rand(count, generator=generator) < share
    if pattern and count % 4 == 0:
        ranks = torch.rand(count // 4, 4, generator=generator).argsort(1).argsort(1)
        gone |= (ranks < 2).flatten()
    zeros = torch.where(torch.rand(count, generator=generator) < negative_zeros, limits.min, 0).to(whole)
    return torch.where(gone, zeros, values).view(dtype).view(shape)


@given(
    shape=st.one_of(
        st.lists(st.integers(0, 9), max_size=3),
        st.tuples(st.integers(1, 20), st.integers(1, 20).map(lambda n: 4 * n)),
    ),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32),
    share=st.sampled_from([0, 0.1, 0.5, 0.9, 1]),
    negative_zeros=st.sampled_from([0, 0.01, 0.5, 1]),
    pattern=st.booleans(),
)
def test_codes_give_back_every_bit(shape, dtype, seed, share, negative_zeros, pattern):
    tensor = random_bits(shape, dtype, seed, share, negative_zeros, pattern)
    encoded = encode(tensor)
    assert same_bits(decode(encoded, tensor.shape), tensor)
    assert sum(part.nbytes for part in encoded.parts.values()) <= tensor.nbytes


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_a_bitmask_costs_one_bit_a_weight(dtype, share):
    tensor = random_bits((48, 50), dtype, 1, share, 0, pattern=False)
    kept = int((tensor != 0).sum())
    encoded = encode(tensor)
    assert encoded.code == "bitmask"
    assert sum(part.nbytes for part in encoded.parts.values()) == 48 * 50 // 8 + kept * dtype.itemsize


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("share", [0, 0.003])
def test_two_of_four_cost_three_bits_a_group(dtype, share):
    """Also where a few groups keep fewer than two."""
    tensor = random_bits((48, 64), dtype, 2, share, 0, pattern=True)
    encoded = encode(tensor)
    assert encoded.code == "2:4"
    assert sum(part.nbytes for part in encoded.parts.values()) == 48 * 16 * 3 / 8 + 48 * 32 * dtype.itemsize
    assert same_bits(decode(encoded, tensor.shape), tensor)


def test_a_negative_zero_costs_a_bit_of_every_pruned_weight():
    tensor = random_bits((64, 64), torch.float16, 3, 0.75, 0, pattern=False)
    without = sum(part.nbytes for part in encode(tensor).parts.values())
    row, column = (tensor == 0).nonzero()[7].tolist()
    tensor[row, column] = -0.0
    zeros = int((tensor == 0).sum())
    assert sum(part.nbytes for part in encode(tensor).parts.values()) == without + -(-zeros // 8)


def test_parts_that_do_not_belong_together():
    tensor = random_bits((8, 8), torch.float32, 4, 0.5, 0.5, pattern=False)
    encoded = encode(tensor)
    for part in encoded.parts:
        damaged = Encoded(encoded.code, {**encoded.parts, part: encoded.parts[part][:-1]})
        with pytest.raises(ValueError, match=r"bytes|values are kept"):
            decode(damaged, tensor.shape)
    with pytest.raises(ValueError, match="no code 'zip'"):
        decode(Encoded("zip", encoded.parts), tensor.shape)
    seven = Encoded("2:4", {"mask": torch.tensor([255, 255, 255], dtype=torch.uint8), "kept": torch.zeros(16)})
    with pytest.raises(ValueError, match="other than two of four"):
        decode(seven, torch.Size([8, 4]))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run: the tiny model at 2:4, by magnitude."""
    folder = tmp_path_factory.mktemp("export") / "run"
    settings = ["--model.sparsity", "2:4", "--model.mask", "Magnitude", "--model.reconstruction", "none"]
    settings += ["--data.samples", "2", "--data.validation_samples", "1", "--evaluation.windows", "2"]
    paths = ["--model.checkpoint", str(TINY), "--data.source", str(ROOT / "tiny" / "text" / "calibration.txt")]
    paths += ["--evaluation.texts", f"[{ROOT / 'tiny' / 'text' / 'held_out.txt'}]", "--output_dir", str(folder)]
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(ROOT / "configs" / "tiny.yaml"), *settings, *paths])
    assert stop.value.code == 0
    return folder


@pytest.fixture(scope="module")
def sparse(tmp_path_factory) -> Path:
    """The tiny model with 80 % of each linear layer set to zero, in float32."""
    folder = tmp_path_factory.mktemp("export") / "sparse"
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    for layer in linear_layers(model.model).values():
        weight = weight_of(layer)
        weight[weight.abs() < weight.abs().quantile(0.8)] = 0
    model.save_pretrained(folder)
    for file in TINY.glob("token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def export(*arguments: object) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["export", *map(str, arguments)])
    assert stop.value.code == 0


def complaint(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["export", *map(str, arguments)])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.count("\n") == 1, said
    return said


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same_weights(one: Path, other: Path) -> bool:
    left, right = tensors(one), tensors(other)
    return left.keys() == right.keys() and all(same_bits(left[name], right[name]) for name in left)


def logits(model, seed: int = 0) -> torch.Tensor:
    tokens = torch.randint(1024, (2, 24), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(input_ids=tokens).logits


def test_a_run_leaves_no_negative_zeros(run):
    for name, tensor in tensors(run / "model").items():
        assert not ((tensor == 0) & tensor.signbit()).any(), name


def test_an_ordinary_folder_again(run, tmp_path):
    export(run, "--output", tmp_path / "again")
    assert same_weights(tmp_path / "again", run / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    files = {file.name for file in (run / "model").iterdir()}
    assert {file.name for file in (tmp_path / "again").iterdir()} == files | {"README.md"}


def test_another_dtype_in_several_files(run, tmp_path):
    export(run, "--output", tmp_path / "wide", "--dtype", "float32", "--shard_size", "700KB")
    before, after = tensors(run / "model"), tensors(tmp_path / "wide")
    assert all(torch.equal(before[name].double(), after[name].double()) for name in before)
    sizes = [file.stat().st_size for file in (tmp_path / "wide").glob("*.safetensors")]
    assert len(sizes) > 4
    assert max(sizes) < 710e3
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "wide")
    assert model.dtype == torch.float32
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"
    export(tmp_path / "wide", "--output", tmp_path / "narrow", "--dtype", "float16")
    assert same_weights(tmp_path / "narrow", run / "model")
    assert not (tmp_path / "narrow" / "model.safetensors.index.json").exists()


def test_a_dtype_that_does_not_reach(sparse, tmp_path, capsys):
    export(sparse, "--output", tmp_path / "large")
    weights = load_file(tmp_path / "large" / "model.safetensors")
    weights["model.norm.weight"][3] = 1e5
    save_file(weights, tmp_path / "large" / "model.safetensors", {"format": "pt"})
    said = complaint(capsys, tmp_path / "large", "--output", tmp_path / "half", "--dtype", "float16")
    assert "dtype: 1 values of 'model.norm.weight' are too large for float16" in said
    assert not (tmp_path / "half").exists()


def theory(folder: Path) -> float:
    """Bytes by the formula: p/8 + k·b with a bitmask, 3p/32 + p·b/2 at 2:4, p·b dense."""
    total = 0.0
    for weight in tensors(folder).values():
        count, size, kept = weight.numel(), weight.itemsize, int((weight != 0).sum())
        costs = [count * size, count / 8 + kept * size]
        if weight.ndim == 2 and two_of_four(weight):
            costs.append(3 * count / 32 + count * size / 2)
        total += min(costs)
    return total


@pytest.mark.parametrize("files", [1, 4])
@pytest.mark.parametrize("made", ["run", "sparse"])
def test_packed_is_exact_and_as_small_as_the_formula_says(made, files, request, tmp_path):
    origin = request.getfixturevalue(made)
    plain = origin / "model" if made == "run" else origin
    size = ["--shard_size", "350KB"] if files > 1 else []
    export(origin, "--format", "packed", "--output", tmp_path / "packed", *size)
    written = [*(tmp_path / "packed").glob("*.safetensors"), *(tmp_path / "packed").glob("packed*.json")]
    assert len(written) > files
    assert theory(plain) <= sum(file.stat().st_size for file in written) <= 1.03 * theory(plain)
    export(tmp_path / "packed", "--format", "huggingface", "--output", tmp_path / "back")
    assert same_weights(tmp_path / "back", plain)
    dtype = load_file(plain / "model.safetensors")["model.norm.weight"].dtype
    loaded = lit_prune.load(tmp_path / "packed", dtype=dtype)
    ordinary = AutoModelForCausalLM.from_pretrained(plain, dtype=dtype)
    for (name, one), other in zip(loaded.named_parameters(), ordinary.parameters(), strict=True):
        assert same_bits(one.detach(), other.detach()), name
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert loaded.generation_config.to_dict() == ordinary.generation_config.to_dict()
    assert not loaded.training


def test_packed_keeps_what_only_bits_tell(sparse, tmp_path):
    """Negative zeros, NaN payloads and infinities in a checkpoint from elsewhere."""
    export(sparse, "--output", tmp_path / "odd")
    weights = load_file(tmp_path / "odd" / "model.safetensors")
    odd = weights["model.layers.1.mlp.up_proj.weight"].view(torch.int32)
    odd[:, :5] = torch.tensor([-(2**31), 0x7FC12345, 0x7F800001, -0x00800000, 1], dtype=torch.int32)
    save_file(weights, tmp_path / "odd" / "model.safetensors", {"format": "pt"})
    export(tmp_path / "odd", "--format", "packed", "--output", tmp_path / "packed")
    export(tmp_path / "packed", "--output", tmp_path / "back")
    assert same_weights(tmp_path / "back", tmp_path / "odd")


def test_a_packed_folder_that_is_damaged(run, tmp_path, capsys):
    export(run, "--format", "packed", "--output", tmp_path / "packed")
    file = tmp_path / "packed" / "packed.safetensors"
    parts = load_file(file)
    name = next(name for name in parts if name.startswith("kept/"))
    save_file({**parts, name: parts[name][:-1].clone()}, file)
    said = complaint(capsys, tmp_path / "packed", "--output", tmp_path / "back")
    assert f"model: '{name.removeprefix('kept/')}' in" in said
    assert "is damaged" in said
    save_file({other: parts[other] for other in parts if other != name}, file)
    assert "is damaged" in complaint(capsys, tmp_path / "packed", "--output", tmp_path / "back")
    contents = tmp_path / "packed" / "packed.json"
    contents.write_text(contents.read_text().replace('"version":1', '"version":2'))
    assert "is of version 2" in complaint(capsys, tmp_path / "packed", "--output", tmp_path / "back")
    contents.write_text("{")
    assert "packed.json' cannot be read" in complaint(capsys, tmp_path / "packed", "--output", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_other_verbs_say_how_to_unpack(run, tmp_path, capsys):
    export(run, "--format", "packed", "--output", tmp_path / "packed")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["generate", "--checkpoint", str(tmp_path / "packed"), "--output", str(tmp_path / "text.jsonl")])
    assert f"lit-prune export {tmp_path / 'packed'} --format huggingface" in capsys.readouterr().err


def test_load_of_runs_and_folders(run, sparse):
    ordinary = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    assert torch.equal(logits(lit_prune.load(run)), logits(ordinary))
    assert lit_prune.load(run).dtype == torch.float32
    assert lit_prune.load(str(sparse), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_compressed_rows_compute_the_same(sparse):
    dense, rows = lit_prune.load(sparse), lit_prune.load(sparse, layout="csr")
    layers = [module for module in rows.modules() if isinstance(module, CSRLinear)]
    assert len(layers) == 4 * 7  # all but the head, which is the embedding
    assert all(int(layer.weight.values().count_nonzero()) == layer.weight.values().numel() for layer in layers)
    torch.testing.assert_close(logits(rows), logits(dense), rtol=1e-4, atol=1e-4)
    tokens = torch.arange(5)[None]
    assert torch.equal(*(m.generate(tokens, max_new_tokens=8, do_sample=False) for m in (rows, dense)))
    assert measure_bytes(rows) < 0.8 * measure_bytes(dense)


def measure_bytes(model) -> int:
    from lit_prune.export.loading import weights_bytes

    return weights_bytes(model)


def test_a_compressed_row_layer_by_itself():
    torch.manual_seed(0)
    weight, bias, inputs = torch.randn(6, 10).double(), torch.randn(6).double(), torch.randn(2, 3, 10).double()
    weight[torch.rand(6, 10) < 0.7] = 0
    weight[2] = 0
    for some_bias in (bias, None):
        layer = CSRLinear(weight, some_bias)
        torch.testing.assert_close(layer(inputs), linear(inputs, weight, some_bias), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer(inputs[0, 0]), linear(inputs[0, 0], weight, some_bias), rtol=1e-12, atol=1e-12)


def test_transposed_layers_in_compressed_rows(tmp_path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_head=4, n_layer=2, n_positions=64, vocab_size=64))
    for layer in linear_layers(model.transformer).values():
        weight_of(layer).mul_(torch.rand_like(weight_of(layer)) > 0.8)
        torch.nn.init.normal_(layer.bias)
    model.save_pretrained(tmp_path / "gpt2")
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        rows = lit_prune.load(tmp_path / "gpt2", layout="csr")(tokens).logits
        torch.testing.assert_close(rows, model.eval()(tokens).logits, rtol=1e-4, atol=1e-5)
    export(tmp_path / "gpt2", "--format", "packed", "--output", tmp_path / "packed")
    export(tmp_path / "packed", "--output", tmp_path / "back")
    assert same_weights(tmp_path / "back", tmp_path / "gpt2")


def test_layouts_that_do_not_fit(run, sparse):
    with pytest.raises(BadInput, match="layout: no layer of this model would be smaller in csr"):
        lit_prune.load(run, layout="csr")
    with pytest.raises(BadInput, match=r"layout: csr has no fast product in torch\.bfloat16"):
        lit_prune.load(sparse, layout="csr", dtype=torch.bfloat16)
    with pytest.raises(BadInput, match="layout: semi_structured needs an NVIDIA GPU with CUDA, which 'cpu' is not"):
        lit_prune.load(run, layout="semi_structured", device="cpu")
    with pytest.raises(BadInput, match="layout: there is no '2:4'; give dense, semi_structured or csr"):
        lit_prune.load(run, layout="2:4")
    with pytest.raises(BadInput, match=r"path: there is no folder '\./nowhere'"):
        lit_prune.load("./nowhere")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is said without a GPU")
@pytest.mark.parametrize("device", ["abacus", "cuda"])
def test_a_device_that_is_not_there(run, device):
    with pytest.raises(BadInput, match=f"device: '{device}' cannot be used"):
        lit_prune.load(run, device=device)


def test_only_what_belongs_together_is_measured(run, tmp_path, capsys):
    said = complaint(capsys, run, "--measure", "--prompt_tokens", "500")
    assert "prompt_tokens: with new_tokens they are 532, but" in said
    tiny = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    AutoModelForCausalLM.from_config(tiny).save_pretrained(tmp_path / "other")
    said = complaint(capsys, run, "--measure", "--dense", tmp_path / "other")
    assert "dense: " in said
    assert "is no model of the same shape as" in said


def test_other_weights_beside_a_model_are_not_its_size(sparse, tmp_path):
    shutil.copytree(sparse, tmp_path / "model")
    before = files_bytes(tmp_path / "model")
    shutil.copy(sparse / "model.safetensors", tmp_path / "model" / "consolidated.safetensors")
    assert files_bytes(tmp_path / "model") == before > 1e6


def test_semi_structured_without_a_gpu(run):
    with pytest.raises(BadInput, match="an NVIDIA GPU with CUDA, which this machine lacks; give dense"):
        lit_prune.load(run, layout="semi_structured")


def test_the_layers_that_pytorch_refuses_are_told_with_its_reason(caplog):
    """It takes none on a CPU, as it takes some shapes and types on no GPU."""
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = AutoModelForCausalLM.from_config(config)
    for layer in linear_layers(model.model).values():
        layer.weight.data[:, ::2] = 0
    with pytest.raises(BadInput, match=r"^layout: semi_structured does not work for any layer here \(.*CUDA.*\); give"):
        to_semi_structured(model)
    assert "7 layers that are 2:4 stay dense: " in caplog.text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch's semi-structured tensors need an NVIDIA GPU")
def test_semi_structured_on_a_gpu(run, sparse):
    half = {"dtype": torch.float16, "device": "cuda"}
    dense, semi = lit_prune.load(run, **half), lit_prune.load(run, layout="semi_structured", **half)
    assert measure_bytes(semi) < measure_bytes(dense)
    tokens = torch.randint(1024, (2, 64), device="cuda")
    with torch.no_grad():
        torch.testing.assert_close(semi(tokens).logits, dense(tokens).logits, rtol=1e-2, atol=5e-2)
    with pytest.raises(BadInput, match="layout: semi_structured needs layers with two of every four"):
        lit_prune.load(sparse, layout="semi_structured")


def test_what_counts_as_two_of_four():
    weight = torch.tensor([[1.0, 0, 2, 0, 0, 0, 0, 3], [0, 0, 0, 0, 4, 5, 0, 0]])
    assert two_of_four(weight)
    assert not two_of_four(weight[:, 1:7])
    assert not two_of_four(weight.T.contiguous())
    weight[0, 1] = 1
    assert not two_of_four(weight)


def test_settings_that_would_do_nothing(run, tmp_path, capsys):
    out = ["--output", tmp_path / "out"]
    assert "converter: this setting does nothing without --format gguf" in complaint(capsys, run, *out, "--converter=x")
    assert "private: this setting does nothing without --push_to_hub" in complaint(capsys, run, *out, "--private=true")
    assert not (tmp_path / "out").exists()


def test_without_a_converter_the_command_is_named(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("LIT_PRUNE_GGUF_CONVERTER", raising=False)
    said = complaint(capsys, run, "--format", "gguf", "--output", tmp_path / "out")
    wanted = f"python llama.cpp/convert_hf_to_gguf.py {run / 'model'} --outfile {tmp_path / 'out' / 'out.gguf'}"
    assert f"{wanted} --outtype f16\n" in said
    monkeypatch.setenv("LIT_PRUNE_GGUF_CONVERTER", "nowhere.py")
    said = complaint(capsys, run, "--format", "gguf", "--output", tmp_path / "out")
    assert "LIT_PRUNE_GGUF_CONVERTER: there is no file 'nowhere.py'" in said
    assert not (tmp_path / "out").exists()


CONVERTER = """
import argparse, pathlib, shutil
parser = argparse.ArgumentParser()
parser.add_argument("model", type=pathlib.Path)
parser.add_argument("--outfile")
parser.add_argument("--outtype", choices=["f32", "f16", "bf16"])
given = parser.parse_args()
assert (given.model / "config.json").is_file()
if given.outtype == "bf16":
    raise NotImplementedError("no such tokenizer")
shutil.copy(given.model / "model.safetensors", given.outfile)
"""


@pytest.mark.parametrize("packed", [False, True])
def test_a_converter_gets_an_ordinary_folder(run, tmp_path, capsys, packed):
    """A stand-in for llama.cpp's, which copies the weights that it finds."""
    (tmp_path / "convert_hf_to_gguf.py").write_text(CONVERTER)
    given = ["--format", "gguf", "--converter", tmp_path / "convert_hf_to_gguf.py"]
    if packed:
        export(run, "--format", "packed", "--output", tmp_path / "packed")
    export(tmp_path / "packed" if packed else run, *given, "--output", tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"out.gguf", "README.md"}
    written, before = load_file(tmp_path / "out" / "out.gguf"), tensors(run / "model")
    assert written.keys() == before.keys()
    assert all(same_bits(written[name], before[name]) for name in before)
    said = complaint(capsys, run, *given, "--dtype", "bfloat16", "--output", tmp_path / "not")
    assert "could not convert this model (NotImplementedError: no such tokenizer)" in said
    assert not (tmp_path / "not").exists()


def test_the_card_says_what_the_run_says(run, tmp_path):
    asked = {"convention": "lm-eval 9, all questions", "samples": 200}
    boolq = {**asked, "metric": "acc", "dense": None, "pruned": {"value": 0.5, "stderr": 0.03}}
    wikitext = {**asked, "metric": "word_perplexity", "dense": None, "pruned": {"value": 23.5, "stderr": None}}
    figures = {
        "dense": "org/model",
        "perplexity": {"held_out": {"convention": "as they do", "dense": 9.87, "pruned": 12.34}},
        "divergence": {"held_out": {"convention": "every token", "kl": 0.4567, "top1_agreement": 0.75}},
        "zero_shot": {"limit": 200, "tasks": {"boolq": boolq, "wikitext": wikitext}, "mean": {}},
    }
    (run / "evaluation.json").write_text(json.dumps(figures))
    export(run, "--output", tmp_path / "small")
    (run / "evaluation.json").unlink()
    card = (tmp_path / "small" / "README.md").read_text()
    metrics = json.loads((run / "metrics.json").read_text())
    assert card.startswith("---\npipeline_tag: text-generation\n")
    assert "base_model" not in card  # a folder is no name that means anything elsewhere
    for said in (
        "# small",
        "Method: 2 of every 4 weights kept (2:4), chosen by Magnitude, not reconstructed",
        "Sparsity: 50% of the weights",
        f"| {metrics['perplexity']['dense']['held_out']:.2f} | {metrics['perplexity']['pruned']['held_out']:.2f} |",
        metrics["perplexity_convention"]["held_out"],
        "| perplexity, held_out | 9.87 | 12.34 |",
        "| KL from the dense model, held_out | - | 0.457 |",
        "| boolq (acc) | not measured | 50.0 ± 3.0% |",
        "| wikitext (word_perplexity) | not measured | 23.5 |",
        "Perplexity, held_out: as they do.",
        "Divergence, held_out: every token.",
        "Tasks: lm-eval 9, all questions.",
        "Questions: boolq 200 and wikitext 200.",
        (run / "config.yaml").read_text().strip(),
        f"transformers {metrics['versions']['transformers']}",
    ):
        assert said in card, said
    export(tmp_path / "small", "--output", tmp_path / "next")
    assert (tmp_path / "next" / "README.md").read_text() == card


def test_a_hub_id_is_the_cards_base_model(run, tmp_path):
    metrics = json.loads((run / "metrics.json").read_text())
    before = (run / "metrics.json").read_text()
    for local in (True, False):
        found = metrics | {"checkpoint": "org/model-7b", "checkpoint_is_local": local}
        (run / "metrics.json").write_text(json.dumps(found))
        export(run, "--output", tmp_path / str(local))
        (run / "metrics.json").write_text(before)
        assert ("\nbase_model: org/model-7b\n" in (tmp_path / str(local) / "README.md").read_text()) != local
    assert metrics["checkpoint_is_local"]


def test_a_model_that_is_no_run_claims_nothing(sparse, tmp_path):
    export(sparse, "--output", tmp_path / "out")
    assert "base model, method and figures are not known" in (tmp_path / "out" / "README.md").read_text()


class Hub:
    """Stands for the hub: remembers what it is asked to do."""

    repositories: dict[str, list[str]]
    uploads: list[tuple[str, list[str], bool]]
    broken = False

    def whoami(self):
        return {"name": "me"}

    def repo_exists(self, name):
        return name in self.repositories

    def list_repo_files(self, name):
        return self.repositories[name]

    def create_repo(self, name, *, private, exist_ok):
        assert exist_ok  # it may be there and empty
        self.private = private
        return f"https://hub/{name}"

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        if self.broken:
            raise ConnectionError("no route")
        self.uploads.append((repo_id, sorted(f.name for f in Path(folder_path).iterdir()), self.private))


@pytest.fixture
def fake_hub(monkeypatch):
    Hub.repositories, Hub.uploads, Hub.broken = (
        {"me/empty": [".gitattributes"], "me/full": ["model.safetensors"]},
        [],
        False,
    )
    monkeypatch.setattr(hub, "HfApi", Hub)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    return Hub


@pytest.mark.parametrize(("name", "whole"), [("new", "me/new"), ("me/empty", "me/empty"), ("org/new", "org/new")])
def test_push(run, tmp_path, fake_hub, capsys, name, whole):
    export(run, "--output", tmp_path / "out", "--push_to_hub", name, "--private", "true")
    ((where, files, private),) = fake_hub.uploads
    assert (where, private) == (whole, True)
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert f"https://hub/{whole}" in capsys.readouterr().out
    assert (tmp_path / "out" / "README.md").read_text().count(f"# {whole.split('/')[1]}\n") == 1


def test_pushes_that_cannot_be(run, tmp_path, fake_hub, capsys, monkeypatch):
    out = ["--output", tmp_path / "out", "--push_to_hub"]
    assert "'me/full' holds 1 files already; give another name" in complaint(capsys, run, *out, "me/full")
    assert "push_to_hub: 'a b' is no repository's name" in complaint(capsys, run, *out, "a b")
    monkeypatch.setattr(hub, "get_token", lambda: None)
    assert "there is no token for the hub; set HF_TOKEN" in complaint(capsys, run, *out, "new")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(hub, "get_token", lambda: "hf_of_a_test")
    fake_hub.broken = True
    said = complaint(capsys, run, *out, "new")
    assert f"is whole, but could not be uploaded (no route); to try again: hf upload me/new {tmp_path / 'out'}" in said
    assert same_weights(tmp_path / "out", run / "model")
    assert fake_hub.uploads == []


def test_a_hub_that_cannot_be_reached(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    said = complaint(capsys, run, "--output", tmp_path / "out", "--push_to_hub", "me/new")
    assert "push_to_hub: the hub cannot be asked about 'me/new'" in said
    assert not (tmp_path / "out").exists()


def test_measure(run, sparse, tmp_path, capsys):
    settings = ["--device", "cpu", "--prompt_tokens", "16", "--new_tokens", "2", "--repeats", "3"]
    export(run, "--measure", "--output", tmp_path / "out", *settings)
    report = json.loads((tmp_path / "out" / "measured.json").read_text())
    dense, pruned = report["measured"]
    assert (dense["model"], pruned["model"], dense["layout"], pruned["layout"]) == ("dense", "pruned", "dense", "dense")
    assert report["left_out"].keys() == {"semi_structured", "csr"}
    assert (dense["packed_bytes"], pruned["packed_bytes"] < 0.7 * pruned["file_bytes"]) == (None, True)
    for one in report["measured"]:
        assert [len(one["speeds"][kind]) for kind in ("prompt", "generation")] == [3, 3]
        with safe_open(TINY / "model.safetensors", "pt") as file:
            parameters = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118 - no mapping
        assert 4 * parameters <= one["memory_bytes"] <= 4 * parameters + 1000
    assert (tmp_path / "out" / "measured.md").read_text() in capsys.readouterr().out
    export(sparse, "--measure", "--dense", TINY, *settings)
    assert "| pruned | csr | " in capsys.readouterr().out


def test_measurements_take_turns(monkeypatch):
    class Config:
        vocab_size = 9

        def get_text_config(self):
            return self

    class Model:
        config, device = Config(), torch.device("cpu")

    order, prompts = [], []

    def seconds(model, tokens, new_tokens):
        order.append(model)
        prompts.append(tokens)
        return 2.0, 4.0

    monkeypatch.setattr(measure, "_seconds", seconds)
    loaded = [(measure.Measured(str(number), "dense", 0, 0, 0), Model()) for number in range(3)]
    measure._take_turns(loaded, prompt_tokens=6, new_tokens=8, repeats=3)
    one, two, three = (model for _, model in loaded)
    assert order == [three, one, two, one, two, three, two, three, one, three, one, two]
    assert all(torch.equal(prompts[3 * turn], prompts[3 * turn + 2]) for turn in range(4))
    assert [measured.speeds for measured, _ in loaded] == 3 * [{"prompt": [3.0] * 3, "generation": [2.0] * 3}]
    assert measure._speed([3.0, 1.0, 2.0], [4.0]) == "2.0 (1.0 to 3.0; 0.50×)"


REFUSED = {
    "no output": ([], "These settings are missing: output"),
    "unknown format": (["--format", "hugginface"], "there is no 'hugginface', did you mean 'huggingface'?"),
    "strange format": (["--format", "zip"], "there is no 'zip'; give huggingface or packed or gguf."),
    "layout": (["--format", "semi_structured"], 'load that with lit_prune.load(FOLDER, layout="semi_structured")'),
    "dtype": (["--dtype", "int8"], "dtype: 'int8' does not fit; give float32 or float16 or bfloat16 or null"),
    "shard size": (["--shard_size", "big"], "shard_size: 'big' is no size"),
    "no room": (["--shard_size", "0MB"], "shard_size: '0MB' is no size"),
    "unknown setting": (["--shard_sise", "5MB"], "no setting 'shard_sise', did you mean 'shard_size'?"),
    "measure without measuring": (["--repeats", "3"], "repeats: this setting is for --measure alone"),
    "measuring into a format": (["--measure", "--format", "packed"], "format: this setting cannot be given with --mea"),
    "too few": (["--measure", "--repeats", "0"], "repeats: 0 is too few"),
    "no device": (["--measure", "--device", "abacus"], "device: 'abacus' cannot be used"),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "expected"), REFUSED.values(), ids=REFUSED.keys())
def test_refusals(settings, expected, run, tmp_path, capsys):
    output = [] if expected.endswith("missing: output") else ["--output", tmp_path / "out"]
    assert expected in complaint(capsys, run, *output, *settings)
    assert not (tmp_path / "out").exists()


def test_models_that_cannot_be_exported(run, sparse, tmp_path, capsys):
    out = ["--output", tmp_path / "out"]
    assert "model: there is no folder './nowhere'" in complaint(capsys, "./nowhere", *out)
    assert "model" in complaint(capsys, *out)
    assert "format: packed would save nothing" in complaint(capsys, TINY, "--format", "packed", *out)
    assert "is no run, which would name its dense model" in complaint(capsys, sparse, "--measure")
    assert "dense: there is no folder './nowhere'" in complaint(capsys, sparse, "--measure", "--dense", "./nowhere")
    manifest = json.loads((run / "manifest.json").read_text())
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "manifest.json").write_text(json.dumps(manifest | {"finished": False}))
    assert "is not finished; `lit-prune fit" in complaint(capsys, tmp_path / "unfinished", *out)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("settings", [[], ["--format", "packed"], ["--measure"]], ids=str)
def test_nothing_is_overwritten(settings, run, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("here first")
    said = complaint(capsys, run, "--output", tmp_path / "out", *settings)
    assert f"output: '{tmp_path / 'out'}' exists already, and nothing is overwritten" in said
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_import_and_help_are_quick():
    code = "import sys, lit_prune; assert not {'torch', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime  # which other work on the machine does not change
    answer = subprocess.run(
        [sys.executable, "-m", "lit_prune", "export", "--help"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 2
    assert "--push_to_hub" in answer.stdout
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = lit_prune.lode


COMMANDS = [
    line
    for page in (ROOT / "README.md", ROOT / "docs" / "export.md")
    for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("lit-prune export")
]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_documented_commands_parse(command, capsys, monkeypatch, tmp_path):
    """They name runs that are not there, which is all that may be wrong with them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "free_name", lambda name: name)
    monkeypatch.setenv("LIT_PRUNE_GGUF_CONVERTER", __file__)
    said = complaint(capsys, *shlex.split(command.partition("#")[0])[2:])
    assert said.startswith("lit-prune: model: no checkpoint 'runs/")
