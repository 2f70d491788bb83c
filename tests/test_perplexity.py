"""Perplexity against a plain loop in float64."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lit_prune.data import EvaluationText
from lit_prune.models import Home, find_blocks
from lit_prune.modules import perplexity

LENGTH = 12


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=258
    )
    made = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    """Five windows and three, so that the last batch is uneven in both."""
    contents = {
        "one.txt": "the quick brown fox jumps over the lazy dog, and once again it",
        "two.txt": "0123456789" * 4,
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    return [tmp_path / name for name in contents]


def measure(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[Path]) -> dict[str, float]:
    data = EvaluationText([str(text) for text in texts], window_length=LENGTH, batch_size=2)
    data.tokenizer = tokenizer
    data.setup()
    return perplexity(Home(model, find_blocks(model)), data, torch.device("cpu"))


def mean_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: Path) -> float:
    """The mean negative log likelihood, a window at a time, a token at a time."""
    exact = LlamaForCausalLM(model.config).double().eval()
    exact.load_state_dict(model.state_dict())
    tokens: list[int] = tokenizer(text.read_text())["input_ids"]
    total, count = 0.0, 0
    for start in range(0, len(tokens) - LENGTH + 1, LENGTH):
        window = tokens[start : start + LENGTH]
        with torch.no_grad():
            logits: Tensor = exact(input_ids=torch.tensor([window])).logits[0]
        for position in range(LENGTH - 1):
            row = logits[position].tolist()
            greatest = max(row)
            total += greatest + math.log(sum(math.exp(x - greatest) for x in row)) - row[window[position + 1]]
            count += 1
    return total / count


def test_perplexity_of_two_texts(
    model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, texts: list[Path]
) -> None:
    measured = measure(model, tiny_tokenizer, texts)
    assert list(measured) == ["one", "two"]
    for text in texts:
        assert measured[text.stem] == pytest.approx(math.exp(mean_loss(model, tiny_tokenizer, text)), rel=1e-5)
    assert measured["one"] != pytest.approx(measured["two"], rel=1e-2)
    assert measure(model, tiny_tokenizer, texts[1:]) == {"two": pytest.approx(measured["two"], rel=1e-6)}


@pytest.mark.parametrize(("scale", "least"), [(40, 50), (100, 100)])
def test_a_token_of_vanishing_probability(
    model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, texts: list[Path], scale: float, least: float
) -> None:
    """Below what a softmax in float32 can tell from zero; at the larger scale the perplexity is beyond float32."""
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
    measured = measure(model, tiny_tokenizer, texts)
    for text in texts:
        right = mean_loss(model, tiny_tokenizer, text)
        assert right > least
        assert math.log(measured[text.stem]) == pytest.approx(right, rel=1e-5)


def test_a_broken_model_has_no_perplexity(
    model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, texts: list[Path]
) -> None:
    """One token whose embedding is NaN spoils some likelihoods; a mean over the others would look well."""
    with torch.no_grad():
        model.model.embed_tokens.weight[tiny_tokenizer("x")["input_ids"][0]] = math.nan
    measured = measure(model, tiny_tokenizer, texts)
    assert math.isnan(measured["one"])
    assert math.isfinite(measured["two"])


def test_the_model_is_left_in_its_mode(
    model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, texts: list[Path]
) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    measure(model, tiny_tokenizer, texts)
    assert not model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("bos", ["tokenizer", "none", "first", "every"])
@pytest.mark.parametrize("stride", [None, 5])
def test_start_tokens_and_strides(
    model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, texts: list[Path], bos: Any, stride: int | None
) -> None:
    """Against a loop over the text's own tokens, each of which counts once, seen with what stands before it."""
    data = EvaluationText([str(texts[0])], LENGTH, batch_size=2, stride=stride, bos=bos)
    data.tokenizer = tiny_tokenizer
    data.setup()
    start = tiny_tokenizer.bos_token_id
    assert isinstance(start, int)
    tokens: list[int] = tiny_tokenizer(texts[0].read_text())["input_ids"]
    tokens = [start, *tokens] if bos == "first" else tokens
    before = [start] if bos == "every" else []
    taken = LENGTH - len(before)
    losses, begin, seen = [], 0, 1 - len(before)
    while begin + taken <= len(tokens):
        window = torch.tensor([before + tokens[begin : begin + taken]])
        with torch.no_grad():
            logs = model.double()(input_ids=window).logits[0].log_softmax(-1)
        losses += [
            -float(logs[i - begin + len(before) - 1, tokens[i]])
            for i in range(max(seen, begin + (not before)) if stride else begin + (not before), begin + taken)
        ]
        seen = begin + taken
        begin += stride or taken
    found = perplexity(Home(model.float(), find_blocks(model)), data, torch.device("cpu"))
    assert found["one"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    said = data.conventions["one"]
    assert {"every": "before every window", "first": "before the first window only"}.get(bos, "no start") in said
