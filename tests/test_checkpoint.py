"""Checkpoints in and out: bit for bit, and one plain sentence for whatever cannot be read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from lit_prune.errors import BadInput
from lit_prune.models import checkpoint, load_config, load_model, load_tokenizer, resolve, save_model, stored_dtype
from lit_prune.published import cache_folder

LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 258,
}
WEIGHTS = "model.safetensors"


def tiny(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return made


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A checkpoint with nothing wrong with it."""
    folder = tmp_path_factory.mktemp("sound") / "model"
    save_model(tiny(LlamaConfig(**LLAMA)), tiny_tokenizer, torch.float32, folder)
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy of it to break."""
    return Path(shutil.copytree(sound, tmp_path / "copy"))


def reconfigure(**settings: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | settings
        (folder / "config.json").write_text(json.dumps(config))

    return change


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: void((folder / name).write_bytes(data))


def cut(name: str, keep: int) -> Callable[[Path], None]:
    return lambda folder: void((folder / name).write_bytes((folder / name).read_bytes()[:keep]))


def remove(*names: str) -> Callable[[Path], None]:
    return lambda folder: void(*((folder / name).unlink() for name in names))


def void(*_: object) -> None:
    """What a lambda returns that is called for what it does."""


def retensor(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})

    return rewrite


def refusal(action: Callable[[str], object], checkpoint: Path | str) -> str:
    with pytest.raises(BadInput) as error:
        action(str(checkpoint))
    sentence = str(error.value)
    assert sentence.startswith("model.checkpoint: ")
    assert "\n" not in sentence
    assert len(sentence.replace(str(checkpoint), "")) < 420
    return sentence


# --- round trips


CONFIGS = {
    "llama": lambda: LlamaConfig(**LLAMA),
    "tied": lambda: LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "gpt2": lambda: GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=258),
    "opt": lambda: OPTConfig(
        hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32, vocab_size=258
    ),
}


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_weights_and_their_dtype_survive(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, architecture: str, dtype: torch.dtype
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    tiny(CONFIGS[architecture]()).to(dtype).save_pretrained(first)
    tiny_tokenizer.save_pretrained(first)
    assert resolve(str(first)) == str(first)
    assert stored_dtype(load_config(str(first))) == dtype
    model = load_model(str(first))
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    save_model(model, load_tokenizer(str(first)), stored_dtype(load_config(str(first))), second)
    before, after = load_file(first / WEIGHTS), load_file(second / WEIGHTS)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype == dtype
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name
    assert stored_dtype(load_config(str(second))) == dtype
    assert load_tokenizer(str(second))("héllo")["input_ids"] == tiny_tokenizer("héllo")["input_ids"]


@pytest.mark.parametrize("architecture", CONFIGS)
def test_the_model_in_memory_is_the_one_that_was_saved(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, architecture: str
) -> None:
    """Rotary frequencies are not among what is stored, and may not be rounded with it."""
    model = tiny(CONFIGS[architecture]()).eval()
    save_model(model, tiny_tokenizer, torch.bfloat16, tmp_path / "model")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    model.float()
    again = load_model(str(tmp_path / "model"))
    for (name, mine), (_, theirs) in zip(model.named_buffers(), again.named_buffers(), strict=True):
        assert torch.equal(mine, theirs), name
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens).logits, again(input_ids=tokens).logits)


def test_older_checkpoints_name_their_dtype_otherwise(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    assert stored_dtype(load_config(str(folder))) == torch.bfloat16


def test_without_a_dtype_nothing_is_rounded(folder: Path) -> None:
    reconfigure(dtype=None)(folder)
    assert stored_dtype(load_config(str(folder))) == torch.float32


def test_a_sharded_checkpoint(sound: Path, folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    load_model(str(sound)).save_pretrained(folder, max_shard_size="20KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    expected = load_model(str(sound)).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_model(str(folder)).state_dict().items())
    shards[0].unlink()
    assert "No such file or directory" in refusal(load_model, folder)


def test_save_is_whole_or_not_at_all(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(LlamaConfig(**LLAMA))

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tiny_tokenizer), "save_pretrained", fail)
    with pytest.raises(OSError, match="No space left"):
        save_model(model, tiny_tokenizer, torch.float32, tmp_path / "runs" / "model")
    assert list((tmp_path / "runs").iterdir()) == []
    monkeypatch.undo()
    save_model(model, tiny_tokenizer, torch.float32, tmp_path / "runs" / "model")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["model"]
    assert {"config.json", "generation_config.json", WEIGHTS, "tokenizer.json"} <= {
        path.name for path in (tmp_path / "runs" / "model").iterdir()
    }


# --- what cannot be read


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (remove("config.json"), "' holds no config.json; give an ordinary Hugging Face folder."),
        (remove(WEIGHTS), "' holds no weights as *.safetensors; other formats are not read, so save the model with"),
        (lambda folder: void((folder / WEIGHTS).rename(folder / "pytorch_model.bin")), "' holds no weights as"),
    ],
)
def test_folders_that_are_no_checkpoint(folder: Path, damage: Callable[[Path], None], words: str) -> None:
    damage(folder)
    assert f"model.checkpoint: the folder '{folder}{words}" in refusal(resolve, folder)


@pytest.mark.parametrize("path", ["/no/such/folder", "./nowhere", "../nowhere", "~/no/such/folder", "a/b/c", "a b"])
def test_paths_that_lead_nowhere(path: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert f"there is no folder '{path}'" in refusal(resolve, path)


def test_a_file_that_is_neither(tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    file.touch()
    assert refusal(resolve, file).endswith("' is a file, but neither a folder nor a .gguf file.")
    assert "there is no file" in refusal(resolve, tmp_path / "missing.gguf")


@pytest.mark.parametrize("name", ["no-such-model", "no-such-owner/no-such-model"])
def test_a_hub_that_cannot_be_reached(name: str) -> None:
    assert resolve(name) == name
    for action in (load_config, load_model):
        sentence = refusal(action, name)
        assert sentence.startswith(f"model.checkpoint: no checkpoint '{name}' could be loaded (")
        assert sentence.endswith("give a local Hugging Face folder, a .gguf file, or the id of a model on a hub that "
                                 "can be reached.")  # fmt: skip
    assert refusal(load_tokenizer, name).startswith(f"model.checkpoint: '{name}' has no tokenizer that can be read (")


def spoil(value: float) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"][3, 4:6].fill_(value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(folder: Path, value: float) -> None:
    retensor(spoil(value))(folder)
    assert "2 NaN or infinite values in 'model.layers.1.mlp.up_proj.weight'" in refusal(load_model, folder)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut(WEIGHTS, -100), "incomplete metadata, file not fully covered"),
        (cut(WEIGHTS, 1000), "invalid header length"),
        (cut(WEIGHTS, 4), "header too small"),
        (cut(WEIGHTS, 0), "header too small"),
        (write(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "header too large"),
        (retensor(lambda tensors: tensors.pop("model.norm.weight")), "1 of its weights are missing or not of the con"),
        (reconfigure(num_hidden_layers=3), "9 of its weights are missing or not of the configured shape, such as 'mod"),
        (reconfigure(hidden_size=64), "of its weights are missing or not of the configured shape, such as 'lm_head.we"),
        (reconfigure(hidden_size="wide"), "Field 'hidden_size' expected int, got str (value: 'wide')"),
        (reconfigure(num_attention_heads=5), "is not a multiple of the number of attention heads (5)"),
        (reconfigure(model_type="vit"), "Unrecognized configuration class"),
        (reconfigure(model_type="no-such"), "has model type `no-such`"),
        (write("config.json", "{"), "not a valid JSON file"),
        (write("config.json", "[]"), "Unrecognized model"),
        (write("config.json", b"\xff\xfe\x00"), "not a valid JSON file"),
    ],
)
def test_models_that_cannot_be_loaded(folder: Path, damage: Callable[[Path], None], words: str) -> None:
    damage(folder)
    sentence = refusal(load_model, folder)
    assert sentence.startswith(f"model.checkpoint: no checkpoint '{folder}' could be loaded (")
    assert words in sentence


def test_code_in_a_checkpoint_is_never_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reconfigure(model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})(folder)
    write("own.py", f"from pathlib import Path\nPath({str(folder / 'ran')!r}).touch()\nclass Config: pass\n")(folder)

    def ask(*_: object) -> str:
        raise AssertionError("asked on the terminal")

    monkeypatch.setattr("builtins.input", ask)
    for action in (load_config, load_model):
        assert "contains custom code" in refusal(action, folder)
    assert not (folder / "ran").exists()


def test_quantised_weights(folder: Path) -> None:
    reconfigure(quantization_config={"quant_method": "gptq", "bits": 4})(folder)
    assert refusal(load_config, folder).endswith("are quantised; give the model in floating point.")


@pytest.mark.parametrize(
    "damage",
    [
        remove("tokenizer.json", "tokenizer_config.json"),
        write("tokenizer.json", "{"),
        write("tokenizer.json", "{}"),
        write("tokenizer.json", '{"version": "1.0", "added_tokens": [], "model": {"type": "no-such"}}'),
        write("tokenizer_config.json", "{"),
    ],
)
def test_tokenizers_that_cannot_be_loaded(folder: Path, damage: Callable[[Path], None]) -> None:
    damage(folder)
    assert f"model.checkpoint: '{folder}' has no tokenizer that can be read (" in refusal(load_tokenizer, folder)


# --- GGUF


def write_gguf(path: Path, quantisation: gguf.GGMLQuantizationType | None = None) -> dict[str, np.ndarray]:
    """A tiny Llama with its tokenizer, as llama.cpp has it.

    Returns:
        The weights by llama.cpp's names, as they can be read again.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "</s>", *alphabet, "he"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(LLAMA["hidden_size"])
    writer.add_block_count(LLAMA["num_hidden_layers"])
    writer.add_feed_forward_length(LLAMA["intermediate_size"])
    writer.add_head_count(LLAMA["num_attention_heads"])
    writer.add_head_count_kv(LLAMA["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (len(tokens) - 2))
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    generator = np.random.default_rng(0)
    weights: dict[str, np.ndarray] = {}
    for name, shape in shapes(len(tokens)).items():
        values = generator.standard_normal(shape).astype(np.float32)
        if quantisation is None or len(shape) == 1:
            writer.add_tensor(name, values)
        else:
            packed = gguf.quants.quantize(values, quantisation)
            writer.add_tensor(name, packed, raw_dtype=quantisation)
            values = gguf.quants.dequantize(packed, quantisation)
        weights[name] = values
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def shapes(vocabulary: int) -> dict[str, tuple[int, ...]]:
    wide, deep = LLAMA["hidden_size"], LLAMA["intermediate_size"]
    block = dict.fromkeys(NAMES, (wide, wide)) | dict.fromkeys(["attn_k", "attn_v"], (wide // 2, wide))
    block |= {"ffn_gate": (deep, wide), "ffn_up": (deep, wide), "ffn_down": (wide, deep)}
    block |= dict.fromkeys(["attn_norm", "ffn_norm"], (wide,))
    blocks = {f"blk.{index}.{name}.weight": shape for index in range(2) for name, shape in block.items()}
    ends = {"token_embd.weight": (vocabulary, wide), "output_norm.weight": (wide,), "output.weight": (vocabulary, wide)}
    return ends | blocks


def named_as_in_transformers(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rotary pairs stand side by side in llama.cpp's query and key rows, and half a head apart in transformers'."""
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    renamed = {f"{names[name]}.weight": weights[f"{name}.weight"] for name in names}
    for index in range(2):
        for theirs, ours in NAMES.items():
            weight = weights[f"blk.{index}.{theirs}.weight"]
            if theirs in ("attn_q", "attn_k"):
                head = LLAMA["hidden_size"] // LLAMA["num_attention_heads"]
                rows = [
                    start + row for start in range(0, len(weight), head) for half in (0, 1)
                    for row in range(half, head, 2)
                ]  # fmt: skip
                weight = weight[rows]
            renamed[f"model.layers.{index}.{ours}.weight"] = weight
    return renamed


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIT_PRUNE_CACHE", str(tmp_path / "cache"))
    return cache_folder()


@pytest.mark.parametrize("quantisation", [None, gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_1])
def test_gguf(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, quantisation: gguf.GGMLQuantizationType | None
) -> None:
    expected = named_as_in_transformers(write_gguf(tmp_path / "tiny.gguf", quantisation))
    folder = resolve(str(tmp_path / "tiny.gguf"))
    assert Path(folder).is_relative_to(cache)
    weights = load_model(folder).state_dict()
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, torch.from_numpy(expected[name])), name
    assert stored_dtype(load_config(folder)) == torch.float32
    tokenizer = load_tokenizer(folder)
    ids = tokenizer("hehéh")["input_ids"]
    assert len(ids) == 5
    assert ids[0] == 258
    assert tokenizer.decode(ids) == "hehéh"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    # the second time, from wherever, nothing is converted
    monkeypatch.setattr(checkpoint, "_whole_model", None)
    (tmp_path / "moved").mkdir()
    shutil.move(tmp_path / "tiny.gguf", tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    assert resolve("tiny.gguf") == folder


def test_two_files_of_one_name_are_two_models(tmp_path: Path, cache: Path) -> None:
    folders = set()
    for quantisation in (None, gguf.GGMLQuantizationType.Q8_0):
        write_gguf(tmp_path / "tiny.gguf", quantisation)
        folders.add(resolve(str(tmp_path / "tiny.gguf")))
    assert len(folders) == len(list((cache / "converted").iterdir())) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: b"some text and no model",
        lambda content: content[: len(content) // 2],
        lambda content: content[:-10],
        lambda content: content[:500],
        lambda content: content[:8] + b"\xff" * 8 + content[16:],
        lambda content: content.replace(b"llama", b"lxama"),
        lambda content: content.replace(b"llama.embedding_length", b"llama.embedding_xength"),
        lambda content: content.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xp.weight"),
        lambda content: content.replace(b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokxns"),
    ],
    ids=["empty", "text", "half", "tail", "header", "count", "architecture", "width", "weight", "tokenizer"],
)
def test_corrupted_gguf(tmp_path: Path, cache: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    content = path.read_bytes()
    path.write_bytes(damage(content))
    assert path.read_bytes() != content
    assert f"'{path}' could not be read as GGUF (" in refusal(resolve, path)
    assert list(cache.rglob("*")) == []


@pytest.mark.parametrize("error", [MemoryError, ImportError])
def test_what_is_no_fault_of_the_checkpoint_is_not_blamed_on_it(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("lit_prune.models.checkpoint.AutoModelForCausalLM.from_pretrained", fail)
    with pytest.raises(error):
        load_model("anything")
