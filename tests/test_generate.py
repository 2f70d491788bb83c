"""Self-generated text: what is drawn, the file that it goes to, and the slices that are read back."""

import fcntl
import json
import random
import re
import shlex
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from lit_prune.cli import main
from lit_prune.data import CalibrationText, GeneratedTexts, Text
from lit_prune.data.self_generated import FIRST_TOKENS, Recipe, SelfGeneration, detect_language, text_generator
from lit_prune.errors import BadInput
from lit_prune.models import load_model

pytestmark = pytest.mark.usefixtures("without_plots")

ROOT = Path(__file__).parent.parent
VOCABULARY, END = 258, 257
SIZE = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3, "max_position_embeddings": 128}
SIZE |= {"vocab_size": VOCABULARY, "num_key_value_heads": 2, "intermediate_size": 48, "initializer_range": 0.5}
SIZE |= {"bos_token_id": 256, "eos_token_id": END, "pad_token_id": END}
ANY = Recipe(max_tokens=24, language=None)


def llama(dtype: torch.dtype = torch.float64) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZE)).to(dtype).eval()


def mistral() -> MistralForCausalLM:
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SIZE, sliding_window=7)).double().eval()


def gemma() -> Gemma3ForCausalLM:
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = Gemma3TextConfig(**SIZE, head_dim=8, sliding_window=7, layer_types=kinds)
    return Gemma3ForCausalLM(config).double().eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_head=4, n_layer=2, n_positions=128, vocab_size=VOCABULARY, initializer_range=0.5,
                   bos_token_id=256, eos_token_id=END)
    ).double().eval()  # fmt: skip


@torch.no_grad()
def next_logits(model, tokens: list[int]) -> torch.Tensor:
    """A full forward pass over one sequence, without a cache."""
    return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]


def slow_start(model, first: int) -> list[int]:
    tokens = [first]
    for _ in range(4):
        tokens.append(int(next_logits(model, tokens).argmax()))
    return tokens


def slow_text(model, recipe: Recipe, index: int, ends=(END,), opening=()) -> list[int]:
    """One text by the definition: token by token, each by a full pass over one sequence."""
    generator = text_generator(recipe.seed, index, torch.device("cpu"))
    for candidate in torch.randint(256, (FIRST_TOKENS,), generator=generator).tolist():
        tokens = [*opening, candidate]
        while len(tokens) < len(opening) + 5:
            tokens.append(int(next_logits(model, tokens).argmax()))
        if not set(tokens) & set(ends):
            break
    while len(tokens) < recipe.max_tokens and tokens[-1] not in ends:
        chances = (next_logits(model, tokens) / recipe.temperature).softmax(0)
        order = chances.argsort(descending=True)
        chances[order[recipe.top_k or len(order) :]] = 0
        chances /= chances.sum()
        before = chances[order].cumsum(0) - chances[order]
        chances[order[before >= recipe.top_p]] = 0
        uniform = torch.rand(len(chances), generator=generator).double()
        # which exponential clock with these rates rings first
        tokens.append(int((-uniform.log() / chances).argmin()))
    return tokens


RECIPES = {
    "as published": ANY,
    "greedy": Recipe(24, language=None, top_k=1),
    "top k": Recipe(24, seed=3, language=None, top_k=5, temperature=2.5),
    "top p": Recipe(24, seed=4, language=None, top_p=0.6, temperature=0.7),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_texts_are_those_of_the_definition(tiny_tokenizer, recipe):
    model = llama()
    texts = SelfGeneration(model, tiny_tokenizer, recipe).texts(range(2, 6))
    assert model.config._attn_implementation == "sdpa"
    assert texts == [slow_text(model, recipe, index) for index in range(2, 6)]


@pytest.mark.parametrize("make", [mistral, gemma, gpt2])
def test_other_models_and_kinds_of_cache(tiny_tokenizer, make):
    model = make()
    texts = SelfGeneration(model, tiny_tokenizer, ANY).texts(range(3))
    assert texts == [slow_text(model, ANY, index) for index in range(3)]


def test_greedy_goes_on_as_the_start_does(tiny_tokenizer):
    model = llama()
    (text,) = SelfGeneration(model, tiny_tokenizer, RECIPES["greedy"]).texts([0])
    for length in range(1, len(text)):
        assert text[length] == next_logits(model, text[:length]).argmax()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_neither_batch_nor_neighbours_matter(tiny_tokenizer, dtype):
    generation = SelfGeneration(llama(dtype), tiny_tokenizer, Recipe(40, language=None))
    generation.ends = torch.tensor([END, *range(40)])  # so that some leave early
    together = generation.texts(range(9))
    assert len(set(map(len, together))) > 1
    assert len(set(map(tuple, together))) == 9
    assert [generation.texts([index])[0] for index in range(9)] == together
    assert generation.texts([7, 2, 5]) == [together[7], together[2], together[5]]
    assert generation.texts(range(9)) == together
    other = SelfGeneration(generation.model, tiny_tokenizer, Recipe(40, seed=1, language=None)).texts(range(9))
    assert not {tuple(text) for text in other} & {tuple(text) for text in together}


def test_tokens_follow_the_models_distribution(tiny_tokenizer):
    model, draws = llama(torch.float32), 4000
    with torch.no_grad():
        model.lm_head.weight *= 0.3
    generation = SelfGeneration(model, tiny_tokenizer, Recipe(6, language=None))
    generation.ordinary = torch.tensor([65])
    texts = generation.texts(range(draws))
    expected = draws * next_logits(model, slow_start(model, 65)).softmax(0)
    counts = Counter(text[5] for text in texts)
    likely = [token for token in range(VOCABULARY) if expected[token] > 10]
    assert len(likely) > 10
    deviations = [(counts[token] - float(expected[token])) / float(expected[token]) ** 0.5 for token in likely]
    assert max(map(abs, deviations)) < 4
    assert sum(d**2 for d in deviations) / len(likely) < 1.6


def test_starts_are_greedy_and_in_the_language(tiny_tokenizer):
    model, heard = llama(), []

    def detect(text: str) -> str | None:
        heard.append(text)
        return "en" if len(heard) % 3 == 0 else "de"

    generation = SelfGeneration(model, tiny_tokenizer, Recipe(12), detect)
    texts = generation.texts([0])
    assert len(heard) == 3
    assert texts[0][:5] == slow_start(model, texts[0][0])
    assert tiny_tokenizer.decode(texts[0][:5]) == heard[-1]
    heard.clear()
    picky = SelfGeneration(model, tiny_tokenizer, Recipe(12), lambda text: "en" if text[0].isalpha() else None)
    texts = picky.texts(range(8))
    assert all(tiny_tokenizer.decode(text)[0].isalpha() for text in texts)
    assert texts == [picky.texts([index])[0] for index in range(8)]


def test_a_language_that_the_model_does_not_write(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr("lit_prune.data.self_generated.FIRST_TOKENS", 7)
    asked = []
    generation = SelfGeneration(llama(), tiny_tokenizer, Recipe(12, language="cy"), lambda text: asked.append(text))
    with pytest.raises(BadInput, match="language: 'cy' does not fit, since the model began none of 7 texts in it"):
        generation.texts([0, 1])
    assert len(asked) <= 14


def test_detector():
    assert detect_language("The quick brown fox") == "en"
    assert detect_language("Der schnelle braune Fuchs") == "de"
    assert detect_language("12.50 + 3 =") is None


def test_texts_end_at_any_end_of_sequence(tiny_tokenizer):
    model, ends = llama(), [END, *range(60)]
    model.generation_config.eos_token_id = ends
    texts = SelfGeneration(model, tiny_tokenizer, ANY).texts(range(12))
    assert texts == [slow_text(model, ANY, index, ends) for index in range(12)]
    assert len(set(map(len, texts))) > 1
    for text in texts:
        assert not set(text[:-1]) & set(ends)
        assert text[-1] in ends or len(text) == ANY.max_tokens


def test_a_start_token_where_the_tokenizer_has_that_habit(tiny_tokenizer):
    copy = tiny_tokenizer.backend_tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str())
    copy.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    tokenizer = type(tiny_tokenizer)(tokenizer_object=copy, bos_token="<s>", eos_token="</s>")
    model = llama()
    texts = SelfGeneration(model, tokenizer, ANY).texts(range(2))
    assert texts == [slow_text(model, ANY, index, opening=[256]) for index in range(2)]


# --- the verb and its file


SHORT = ["--checkpoint", "tiny/model", "--texts", "5", "--max_tokens", "20", "--batch_size", "2", "--device", "cpu"]


@pytest.fixture(autouse=True)
def in_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


def generate(output: Path, *settings: str) -> list[dict]:
    with pytest.raises(SystemExit) as stop:
        main(["generate", *SHORT, "--output", str(output), *settings])
    assert stop.value.code == 0
    return [json.loads(line) for line in output.read_text().splitlines()]


def complaint(capsys, *arguments: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["generate", *arguments])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.startswith("lit-prune: ")
    assert said.count("\n") == 1, said
    assert "<class" not in said
    return said.removeprefix("lit-prune: ")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("generated") / "whole.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        generate(file)
    return file


def test_file_holds_what_is_promised(whole):
    tokenizer = AutoTokenizer.from_pretrained("tiny/model")
    records = [json.loads(line) for line in whole.read_text().splitlines()]
    assert [record["index"] for record in records] == list(range(5))
    for record in records:
        assert record["text"] == tokenizer.decode(record["tokens"], skip_special_tokens=True)
        assert 6 <= len(record["tokens"]) <= 20
        assert detect_language(tokenizer.decode(record["tokens"][:5])) == "en"
        assert record["generated"].pop("tokenizer").startswith("1024 tokens, sha256 ")
        assert record["generated"].pop("detector").startswith("py3langid ")
        assert record["generated"] == {
            "model": "tiny/model", "max_tokens": 20, "seed": 0, "language": "en", "temperature": 1.0,
            "top_k": None, "top_p": 1.0, "device": "cpu",
        }  # fmt: skip
    assert Text.read(str(whole), "calibration", "data.source").documents == [record["text"] for record in records]


def test_the_same_again_and_other_batches(whole, tmp_path):
    for size in ("2", "3", "16"):
        generate(tmp_path / f"{size}.jsonl", "--batch_size", size)
        assert (tmp_path / f"{size}.jsonl").read_bytes() == whole.read_bytes()


def test_a_file_cut_anywhere_is_finished_to_the_same(whole, tmp_path, monkeypatch):
    model = load_model("tiny/model")
    monkeypatch.setattr("lit_prune.models.load_model", lambda _: model)
    content = whole.read_bytes()
    ends = [found.end() for found in re.finditer(b"\n", content)]
    dice = random.Random(0)
    cuts = {0, ends[0] - 1, ends[0], ends[1] + 3, len(content) - 1}
    cuts |= {dice.randrange(len(content)) for _ in range(4)}
    for cut in sorted(cuts):
        (tmp_path / "cut.jsonl").write_bytes(content[:cut])
        generate(tmp_path / "cut.jsonl")
        assert (tmp_path / "cut.jsonl").read_bytes() == content, cut


def test_what_is_finished_stays_when_a_later_batch_fails(whole, tmp_path, monkeypatch):
    draw = SelfGeneration.texts

    def fails(self, indices, advanced):
        if 2 in indices:
            raise RuntimeError("the lights went out")
        return draw(self, indices, advanced)

    monkeypatch.setattr(SelfGeneration, "texts", fails)
    with pytest.raises(RuntimeError):
        main(["generate", *SHORT, "--output", str(tmp_path / "cut.jsonl")])
    assert (tmp_path / "cut.jsonl").read_bytes() == b"".join(whole.read_bytes().splitlines(keepends=True)[:2])
    monkeypatch.setattr(SelfGeneration, "texts", draw)
    generate(tmp_path / "cut.jsonl")
    assert (tmp_path / "cut.jsonl").read_bytes() == whole.read_bytes()


def test_a_finished_file_is_left_alone_or_extended(whole, tmp_path, capsys, monkeypatch):
    file = tmp_path / "more.jsonl"
    file.write_bytes(whole.read_bytes())
    before = file.stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr("lit_prune.models.load_model", None)  # is not needed
        generate(file)
    assert "is finished already, with 5 texts; nothing was done." in capsys.readouterr().out
    assert file.stat().st_mtime_ns == before
    assert len(generate(file, "--texts", "7")) == 7
    assert file.read_bytes().startswith(whole.read_bytes())


OTHERWISE = {
    "max_tokens": (["--max_tokens", "21"], "max_tokens (max_tokens was 20, and is 21 now)"),
    "seed": (["--seed", "1"], "seed (seed was 0, and is 1 now)"),
    "two": (["--top_k", "9", "--language", "any"], "language, top_k, detector (language was en, and is None now)"),
}


@pytest.mark.parametrize(("settings", "expected"), OTHERWISE.values(), ids=OTHERWISE.keys())
def test_other_settings_are_refused(whole, capsys, settings, expected):
    before = whole.read_bytes()
    assert f"holds texts made otherwise: {expected}; give another" in complaint(
        capsys, *SHORT, "--output", str(whole), *settings
    )
    assert whole.read_bytes() == before


FOREIGN = {
    "other text": (b"once upon a time", "ends in something else than such a text"),
    "other json": (b'{"text": "once"}\n', "line 1 is no text of it (it has not the fields index, generated"),
    "not json": (b"once upon a time\n", "line 1 is no text of it"),
    "not text": (b"\xff\xfe\x00\n", "line 1 is no text of it"),
}


@pytest.mark.parametrize(("content", "expected"), FOREIGN.values(), ids=FOREIGN.keys())
def test_files_of_others_are_not_touched(capsys, tmp_path, content, expected):
    (tmp_path / "f.jsonl").write_bytes(content)
    assert expected in complaint(capsys, *SHORT, "--output", str(tmp_path / "f.jsonl"))
    assert (tmp_path / "f.jsonl").read_bytes() == content


def test_a_damaged_line_and_a_foreign_end(whole, capsys, tmp_path):
    lines = whole.read_bytes().splitlines(keepends=True)
    file = tmp_path / "f.jsonl"
    for content, expected in (
        (lines[0] + lines[2], "line 2 is no text of it (its index is 2)"),
        (lines[0] + b'{"index":1,"something', "ends in something else"),
        (lines[0].replace(b'"tokens":[', b'"tokens":["a",'), "line 1 is no text of it (its tokens are no list"),
    ):
        file.write_bytes(content)
        assert expected in complaint(capsys, *SHORT, "--output", str(file))
        assert file.read_bytes() == content


def test_two_processes_do_not_write_one_file(whole, capsys, tmp_path):
    file = tmp_path / "f.jsonl"
    file.write_bytes(whole.read_bytes()[:50])
    with file.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "another process is writing" in complaint(capsys, *SHORT, "--output", str(file))
    assert file.read_bytes() == whole.read_bytes()[:50]


BAD_SETTINGS = {
    "no verb's key": (["--text", "5"], "There is no setting 'text', did you mean 'texts'?"),
    "unknown": (["--zzz", "5"], "There is no setting 'zzz'; see lit-prune generate --help."),
    "no number": (["--texts", "many"], "texts: 'many' does not fit; give int."),
    "no texts": (["--texts", "0"], "texts: 0 is too few; give at least 1."),
    "no batch": (["--batch_size", "0"], "batch_size: 0 is too few; give at least 1."),
    "too short": (["--max_tokens", "6"], "max_tokens: 6 is too few; give at least 7."),
    "too long": (["--max_tokens", "513"], "max_tokens: 513 is more than the model's 512 positions"),
    "cold": (["--temperature", "0"], "temperature: 0.0 does not fit; give a number above 0"),
    "nan": (["--temperature", "nan"], "temperature: 'nan' does not fit"),
    "top_k": (["--top_k", "0"], "top_k: 0 is too few"),
    "top_p": (["--top_p", "1.5"], "top_p: 1.5 is outside (0, 1]"),
    "language": (["--language", "english"], "language: 'english' is not detected; give any, or a code such as en"),
    "device": (["--device", "abacus"], "device: 'abacus' cannot be used ("),
    "checkpoint": (["--checkpoint", "./nope"], "checkpoint: there is no folder './nope'"),
    "ending": (["--output", "runs/never/f.txt"], "output: 'runs/never/f.txt' does not end in .jsonl"),
    "not writable": (["--output", "/proc/f.jsonl"], "output: '/proc/f.jsonl' cannot be written ("),
}


@pytest.mark.parametrize(("settings", "expected"), BAD_SETTINGS.values(), ids=BAD_SETTINGS.keys())
def test_bad_setting(capsys, tmp_path, settings, expected):
    said = complaint(capsys, *SHORT, "--output", str(tmp_path / "made" / "f.jsonl"), *settings)
    assert said.startswith(expected)
    assert not (tmp_path / "made").exists()
    assert not (ROOT / "runs" / "never").exists()


def test_a_folder_in_the_files_place(capsys, tmp_path):
    (tmp_path / "f.jsonl").mkdir()
    assert "cannot be read (Is a directory)" in complaint(capsys, *SHORT, "--output", str(tmp_path / "f.jsonl"))


def test_missing_settings(capsys):
    said = complaint(capsys)
    assert said == "These settings are missing: checkpoint, output; see lit-prune generate --help.\n"


def test_too_little_memory(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("lit_prune.modules.memory.available_memory", lambda _: 100_000)
    said = complaint(capsys, *SHORT, "--output", str(tmp_path / "f.jsonl"), "--batch_size", "16")
    # 4 layers, keys and values, 2 heads of 32 numbers, 4 bytes: 2048 bytes a token, 40,960 a text
    assert "the keys and values of 16 texts of 20 tokens need 0.00 GB" in said
    assert "give at most 2, or a lower max_tokens" in said


def test_documented_commands(capsys):
    page = (ROOT / "docs" / "generate.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^lit-prune generate .*$", page, re.MULTILINE)
    assert commands
    for command in commands:
        with pytest.raises(SystemExit) as stop:
            main([*shlex.split(command)[1:], "--print_config"])
        assert stop.value.code in (0, None)
        assert "max_tokens" in capsys.readouterr().out


# --- slices


def windows(path: Path, samples: int = 3, length: int = 8, seed: int = 0, tokenizer=None) -> torch.Tensor:
    texts = GeneratedTexts.read(path)
    texts.require_tokenizer(tokenizer or AutoTokenizer.from_pretrained(ROOT / "tiny" / "model"))
    return texts.windows(samples, length, torch.Generator().manual_seed(seed))


def test_windows_are_slices_of_different_texts(whole):
    texts = [json.loads(line)["tokens"] for line in whole.read_text().splitlines()]
    drawn = windows(whole, 5)
    assert drawn.shape == (5, 8)
    assert drawn.dtype == torch.long
    sources = [
        {number for number, text in enumerate(texts) for at in range(len(text)) if text[at : at + 8] == slice_}
        for slice_ in drawn.tolist()
    ]
    assert sorted(number for (number,) in sources) == list(range(5))
    assert torch.equal(drawn, windows(whole, 5))
    assert not torch.equal(drawn, windows(whole, 5, seed=1))
    assert sorted(windows(whole, 5, 20).tolist()) == sorted(texts)
    begins = {texts[0].index(slice_[0]) for seed in range(40) for slice_ in windows(whole, 5, 19, seed).tolist()
              if slice_[1:18] == texts[0][1:18] or slice_[:18] == texts[0][1:19]}  # fmt: skip
    assert begins == {0, 1}


def test_windows_that_cannot_be(whole, tmp_path, tiny_tokenizer):
    def said(content: bytes | None, *arguments, **settings) -> str:
        file = tmp_path / "f.jsonl"
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(BadInput) as error:
            windows(file, *arguments, **settings)
        assert str(error.value).startswith("data.self_generated: ")
        return str(error.value)

    content = whole.read_bytes()
    assert "is empty" in said(b"")
    assert "was not made by lit-prune generate, or is damaged: line 1 is no text" in said(b'{"text": "a"}\n')
    assert "ends in a torn line; let lit-prune generate finish it" in said(content[:-3])
    assert "5 of the 5 texts in" in said(content, 6)
    assert "have at least 8 tokens, but 6 are asked for; generate more, or lower" in said(content, 6)
    assert "0 of the 5 texts in" in said(content, 1, 21)
    other = said(content, tokenizer=tiny_tokenizer)
    assert re.search(r"of another tokenizer \(1024 tokens, sha256 \w+\) than the model's \(258 tokens", other)


FIT = ["--data.samples", "6", "--data.validation_samples", "2", "--data.sequence_length", "16"]
FIT += ["--trainer.max_epochs", "1", "--evaluation.texts", "[]", "--model.sparsity", "0.5"]


def fit(folder: Path, *settings: str) -> dict:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "configs/tiny.yaml", "--output_dir", str(folder), *FIT, *settings])
    assert stop.value.code == 0
    return json.loads((folder / "metrics.json").read_text())


def refusal(capsys, folder: Path, *settings: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "configs/tiny.yaml", "--output_dir", str(folder), *FIT, *settings])
    said = [line for line in capsys.readouterr().err.splitlines() if "Loading weights" not in line]
    assert stop.value.code == 2
    assert len(said) == 1
    assert said[0].startswith("lit-prune: ")
    return said[0].removeprefix("lit-prune: ")


def masks(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "blocks" / "000.safetensors")
    return {name: tensor for name, tensor in tensors.items() if name.startswith("mask:")}


def test_own_text_is_learnt_from_and_seen_by_masks_unless_told_otherwise(whole, tmp_path):
    own = ["--data.self_generated", str(whole), "--data.self_generated_samples", "3"]
    without, unseen, seen = (tmp_path / name for name in ("without", "unseen", "seen"))
    fit(without)
    fit(unseen, *own, "--data.self_generated_statistics", "false")
    metrics = fit(seen, *own)
    same = [
        all(torch.equal(masks(without)[name], masks(other)[name]) for name in masks(without))
        for other in (unseen, seen)
    ]
    assert same == [True, False]
    results = [load_file(folder / "model" / "model.safetensors") for folder in (without, unseen)]
    assert not all(torch.equal(results[0][name], results[1][name]) for name in results[0])  # reconstruction saw it
    assert metrics["calibration"]["self_generated_samples"] == 3
    assert metrics["calibration"]["self_generated_by"] == {"model": "tiny/model", "seed": 0, "texts": 5}
    assert "self-generated samples" in (seen / "report.html").read_text()


def test_own_text_follows_the_real_sequences(whole):
    tokenizer = AutoTokenizer.from_pretrained("tiny/model")
    drawn = {}
    for count in (0, 3):
        own = {"self_generated": str(whole), "self_generated_samples": count} if count else {}
        data = CalibrationText("tiny/text/calibration.txt", 6, 16, 2, seed=0, **own)
        data.tokenizer = tokenizer
        data.setup()
        drawn[count] = data
    assert torch.equal(drawn[0].calibration, drawn[3].calibration[:6])
    assert torch.equal(drawn[0].held_out, drawn[3].held_out)
    texts = [json.loads(line)["tokens"] for line in whole.read_text().splitlines()]
    for window in drawn[3].calibration[6:].tolist():
        assert any(window == text[i : i + 16] for text in texts for i in range(len(text)))
    assert (drawn[0].observed, drawn[3].observed, len(drawn[3].tokens)) == (6, 9, 11)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["--data.self_generated_samples", "3"], "data.self_generated_samples: 3 sequences are asked for, but from no"),
        (["--data.self_generated", "own.jsonl"], "data.self_generated: 'own.jsonl' is given, but none of it"),
        (["--data.self_generated_samples", "-1"], "data.self_generated_samples: -1 is too few; give at least 0."),
        (
            ["--data.self_generated", "own.jsonl", "--data.self_generated_samples", "2"],
            "data.self_generated: there is no file 'own.jsonl'; make one",
        ),
    ],
)
def test_own_text_that_cannot_be_used(settings, expected, tmp_path, capsys):
    assert refusal(capsys, tmp_path / "run", *settings).startswith(expected)
    assert not (tmp_path / "run").exists()


OWN = {
    "empty": (lambda _: "", "is empty; make it with lit-prune generate.", True),
    "torn": (lambda content: content[:-3], "ends in a torn line; let lit-prune generate finish it.", True),
    "damaged": (lambda _: "{}\n", "was not made by lit-prune generate, or is damaged: line 1", True),
    "too few": (lambda content: content.splitlines(keepends=True)[0], "have at least 16 tokens, but 3 are", True),
    "short": (lambda content: re.sub(r'"tokens":\[(\d+),[^]]*', r'"tokens":[\1', content), "0 of the 5 texts in", True),
    "others": (lambda content: content.replace("tokens, sha256 ", "tokens, sha256 0"), "of another tokenizer", False),
}


@pytest.mark.parametrize(("change", "expected", "without_model"), OWN.values(), ids=OWN.keys())
def test_own_text_comes_before_all_that_takes_long(change, expected, without_model, whole, tmp_path, capsys):
    """Before the calibration text is read, and where no tokenizer is needed before the checkpoint is, too."""
    file = tmp_path / "own.jsonl"
    file.write_text(change(whole.read_text()))
    missing = ["--data.source", "nowhere", *(["--model.checkpoint", "./nowhere"] if without_model else [])]
    own = ["--data.self_generated", str(file), "--data.self_generated_samples", "3"]
    said = refusal(capsys, tmp_path / "run", *missing, *own)
    assert said.startswith("data.self_generated: ")
    assert f"'{file}'" in said
    assert expected in said
    assert not (tmp_path / "run").exists()


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_an_unfinished_run_does_not_go_on_with_other_text(whole, tmp_path, capsys):
    run, own, text = tmp_path / "run", tmp_path / "own.jsonl", tmp_path / "text.txt"
    shutil.copy(whole, own)
    shutil.copy("tiny/text/calibration.txt", text)
    settings = ["--data.source", str(text), "--data.self_generated", str(own), "--data.self_generated_samples", "3"]
    fit(run, *settings)
    model, manifest = (
        (run / "model" / "model.safetensors").read_bytes(),
        json.loads((run / "manifest.json").read_text()),
    )
    (run / "manifest.json").write_text(json.dumps(manifest | {"finished": False}))
    before = files(run)
    for changed, generated in ((own, True), (text, False)):
        sound = changed.read_bytes()
        if generated:
            assert len(generate(own, "--texts", "7")) == 7
        else:
            changed.write_bytes(sound.swapcase())
        said = refusal(capsys, run, *settings)
        assert said.startswith(f"output_dir: '{run}' holds a run on other calibration sequences: the text in data.sour")
        assert files(run) == before
        changed.write_bytes(sound)
    fit(run, *settings)
    assert (run / "model" / "model.safetensors").read_bytes() == model
