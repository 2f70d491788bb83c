"""Text from every source, the sequences cut from it, and the streams of hidden states."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import lightning as L
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from torch.utils.data import RandomSampler
from transformers import PreTrainedTokenizerFast

from lit_prune.data import (
    BlockError,
    CalibrationText,
    EvaluationText,
    ReconstructionPairs,
    Streams,
    Text,
    alone,
    outputs,
    propagate,
    squared_errors,
)
from lit_prune.errors import BadInput


def lines(*records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def parquet(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def put(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path: Path | str) -> list[str]:
    return list(Text.read(str(path), "calibration", "data.source").documents)


# --- files


WIKI = """<doc id="1" url="https://x?curid=1" title="A > B">
A > B

First paragraph.

</doc>
<doc id="2" url="https://x?curid=2" title="C">
C

Last.
</doc>
"""


@pytest.mark.parametrize(
    ("name", "content", "documents"),
    [
        ("a.txt", "one\n\ntwo é\n", ["one\n\ntwo é\n"]),
        ("a.txt", b"\xef\xbb\xbfwith a byte order mark", ["with a byte order mark"]),
        ("a.utf8", "plain", ["plain"]),
        ("a.utf8", WIKI, ["A > B\n\nFirst paragraph.", "C\n\nLast."]),
        ("a.jsonl", lines({"text": "one"}, {"text": "two é", "url": 1}), ["one", "two é"]),
        ("a.jsonl", lines({"text": "a\u2028b"}).encode().replace(b"\\u2028", b"\xe2\x80\xa8"), ["a\u2028b"]),
        ("a.jsonl", "\n" + lines({"text": None}) + "\n" + lines({"text": "two"}), ["", "two"]),
        ("a.json", json.dumps([{"text": "one"}, {"text": "two"}], indent=2), ["one", "two"]),
        ("a.json", lines({"text": "one"}), ["one"]),
        ("a.json.gz", gzip.compress(lines({"text": "one"}, {"text": "two"}).encode(), mtime=0), ["one", "two"]),
        ("a.jsonl.gz", gzip.compress(lines({"text": "one"}).encode(), mtime=0), ["one"]),
        ("glob[1]*#/a b.jsonl", lines({"text": "one"}), ["one"]),
    ],
)
def test_files(tmp_path: Path, name: str, content: str | bytes, documents: list[str]) -> None:
    assert read(put(tmp_path / name, content)) == documents


def test_parquet(tmp_path: Path) -> None:
    assert read(parquet(tmp_path / "a.parquet", text=["one", None, "two"], other=[1, 2, 3])) == ["one", "", "two"]


def test_a_folder_of_several_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    put(tmp_path / "b.txt", "second")
    put(tmp_path / "c/d.json.gz", gzip.compress(lines({"text": "third"}, {"text": "fourth"}).encode()))
    put(tmp_path / "a.jsonl", lines({"text": "first"}))
    put(tmp_path / "a.md", "not read")
    parquet(tmp_path / "e.parquet", text=["last"])
    assert read(tmp_path) == ["first", "second", "third", "fourth", "last"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", "", "'{}' holds no text."),
        ("a.txt", " \n\n", "'{}' holds no text."),
        ("a.txt", "café".encode("latin-1"), "'{}' is not UTF-8 (byte 3); convert it first."),
        ("a.doc", "x", "'{}' is of no format that is read: .txt, .utf8, .jsonl, .json, .jsonl.gz, .json.gz, .parquet."),
        ("a.jsonl", "", "'{}' holds no text."),
        ("a.jsonl", "\n\n", "'{}' holds no text."),
        ("a.jsonl", lines({"text": ""}), "'{}' holds no text."),
        ("a.jsonl", lines({"text": "a"}, {"body": "b"}), "'{}' cannot be read (line 2 has no field named 'text')."),
        ("a.jsonl", lines("text"), "'{}' cannot be read (line 1 has no field named 'text')."),
        ("a.jsonl", lines({"text": 1}), "'{}' cannot be read ('text' in line 1 is 1, which is no string)."),
        ("a.jsonl", '{"text": "a"}\n{"text": ', "(line 2 is no JSON: Expecting value at column 10)."),
        ("a.json", '[{"text": "a"},', "'{}' cannot be read (Expecting value: "),
        ("a.json", '[{"body": "a"}]', "'{}' cannot be read (record 1 has no field named 'text')."),
        ("a.jsonl", '{"text": "café"}'.encode("latin-1"), "'{}' is not UTF-8 (byte 13); convert it first."),
        ("a.json.gz", "no gzip", "'{}' cannot be read (Not a gzipped file"),
        ("a.json.gz", gzip.compress(lines({"text": "a" * 99}).encode(), mtime=0)[:-9], "(Compressed file ended"),
        ("a.parquet", "no parquet", "'{}' cannot be read (Parquet "),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: str | bytes, words: str) -> None:
    path = put(tmp_path / name, content)
    with pytest.raises(BadInput) as refusal:
        read(path)
    sentence = str(refusal.value)
    assert sentence.startswith("data.source: '")
    assert words.format(path) in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"body": ["a"], "url": ["b"]}, "it has the columns body, url, but none named 'text'"),
        ({"text": [1, 2]}, "'text' in row 1 is 1, which is no string"),
        ({"text": pa.array([], pa.string())}, "holds no text"),
    ],
)
def test_parquet_that_cannot_be_read(tmp_path: Path, columns: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        read(parquet(tmp_path / "a.parquet", **columns))


@pytest.mark.parametrize("source", ["nowhere.txt", "", "no-such-name", "~/no/such/folder"])
def test_missing_sources(source: str) -> None:
    with pytest.raises(BadInput, match=f"data.source: there is no file or folder '{source}'; .*c4, wikitext2, ptb"):
        read(source)


def test_a_folder_without_text(tmp_path: Path) -> None:
    put(tmp_path / "readme.md", "x")
    with pytest.raises(BadInput, match=r"the folder '.*' holds no file that ends in \.txt"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("wikitext2", "wikitext2"),
        ("some/wiki.test.txt", "wiki.test"),
        ("some/c4.json.gz", "c4"),
        ("some/folder/", "folder"),
        ("package://x==1.0/data/wiki.utf8?sha256=0", "wiki"),
        ("what?.txt", "what?"),
        (".", Path.cwd().name),
    ],
)
def test_short_names(source: str, name: str) -> None:
    assert Text(source, [], "").name == name


# --- named texts


class Hub:
    """What `datasets.load_dataset` was asked for, and rows to answer with."""

    def __init__(self, **columns: list[str]) -> None:
        self.asked: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.columns = columns

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, list[str]]:
        self.asked.append((args, kwargs))
        return self.columns


@pytest.mark.parametrize(
    ("source", "purpose", "path", "arguments"),
    [
        (
            "c4",
            "calibration",
            "allenai/c4",
            {"split": "train", "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}},
        ),
        (
            "c4",
            "evaluation",
            "allenai/c4",
            {"split": "validation", "data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"}},
        ),
        ("wikitext2", "calibration", "Salesforce/wikitext", {"split": "train", "name": "wikitext-2-raw-v1"}),
        ("wikitext2", "evaluation", "Salesforce/wikitext", {"split": "test", "name": "wikitext-2-raw-v1"}),
        (
            "ptb",
            "calibration",
            "ptb-text-only/ptb_text_only",
            {"split": "train", "revision": "refs/convert/parquet"},
        ),
        (
            "ptb",
            "evaluation",
            "ptb-text-only/ptb_text_only",
            {"split": "test", "revision": "refs/convert/parquet"},
        ),
    ],
)
def test_named_texts(
    monkeypatch: pytest.MonkeyPatch, source: str, purpose: Any, path: str, arguments: dict[str, Any]
) -> None:
    hub = Hub(text=["one", "two"], sentence=["three", "four"])
    monkeypatch.setattr(datasets, "load_dataset", hub)
    text = Text.read(source, purpose, "data.source")
    assert hub.asked == [((path,), arguments)]
    published = {"ptb": "three four", "c4": "one two" if purpose == "evaluation" else "one\n\ntwo"}
    assert text.separator.join(text.documents) == published.get(source, "one\n\ntwo")
    assert text.windows == (256 if source == "c4" else None)
    assert text.name == source


def test_the_hub_that_cannot_be_reached() -> None:
    with pytest.raises(BadInput, match=r"^evaluation\.texts: 'wikitext2' could not be loaded from the hub") as refusal:
        Text.read("wikitext2", "evaluation", "evaluation.texts")
    assert str(refusal.value).endswith("connect to one, or give a local .txt, .jsonl or .parquet file.")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("error", [RuntimeError("torn\napart"), KeyError(), ConnectionError()])
def test_the_hub_that_fails_in_any_way(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(BadInput, match="'c4' could not be loaded from the hub") as refusal:
        Text.read("c4", "calibration", "data.source")
    assert "\n" not in str(refusal.value)


# --- tokens


@pytest.mark.parametrize("needed", [None, 1, 7, 40, 200, 10**6])
def test_tokens_stop_after_a_whole_document(tiny_tokenizer: PreTrainedTokenizerFast, needed: int | None) -> None:
    documents = [letter * 10 for letter in "abcdefghijklmnopqrst"]
    order = [*range(1, 20), 0]
    expected = tiny_tokenizer("--".join(documents[i] for i in order))["input_ids"]
    tokens = Text("x", documents, "--").tokens(tiny_tokenizer, needed, order)
    assert tokens.dtype == torch.long
    assert tokens.tolist() == expected[: len(tokens)]
    assert len(tokens) >= min(needed or 10**6, len(expected))
    assert (len(tokens) + 2) % 12 == 0  # ten tokens a document, two a separator


class Words:
    """Text of which every word is another token, so that a token tells its position."""

    def __init__(self, count: int) -> None:
        self.documents = [" ".join(f"w{i}" for i in range(start, start + 10)) for start in range(0, count, 10)]
        vocabulary = {f"w{i}": i for i in range(count)}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0")

    def write(self, path: Path) -> str:
        return str(put(path, lines(*({"text": document} for document in self.documents))))


def calibration(source: str, tokenizer: PreTrainedTokenizerFast, **settings: Any) -> CalibrationText:
    data = CalibrationText(source, **{"samples": 7, "sequence_length": 6, "validation_samples": 3, **settings})
    data.tokenizer = tokenizer
    data.setup()
    return data


@pytest.mark.parametrize("count", [60, 70, 200, 2000])
@pytest.mark.parametrize("held_out", [0, 1, 3])
def test_calibration_and_held_out_share_no_token(tmp_path: Path, count: int, held_out: int) -> None:
    words = Words(count)
    data = calibration(words.write(tmp_path / "a.jsonl"), words.tokenizer, validation_samples=held_out, seed=5)
    assert data.calibration.shape == (7, 6)
    assert data.held_out.shape == (held_out, 6)
    assert torch.equal(data.tokens, torch.cat([data.calibration, data.held_out]))
    assert len(data.tokens.unique()) == data.tokens.numel()  # no token twice, in no sequence, so none padded
    # never more than one document in common
    documents = [set((part // 10).flatten().tolist()) for part in (data.calibration, data.held_out)]
    assert len(documents[0] & documents[1]) <= 1
    # each sequence is a window of the text: within a document its tokens are consecutive
    steps = data.tokens.diff(dim=1)
    assert bool(((steps == 1) | (data.tokens[:, 1:] % 10 == 0)).all())


def test_the_draw_follows_its_seed(tmp_path: Path) -> None:
    words = Words(600)
    source = words.write(tmp_path / "a.jsonl")
    drawn = [calibration(source, words.tokenizer, seed=seed).tokens for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_the_draw_follows_seed_everything(tmp_path: Path) -> None:
    words = Words(600)
    source = words.write(tmp_path / "a.jsonl")
    drawn = []
    for seed in (1, 1, 2):
        L.seed_everything(seed, verbose=False)
        torch.rand(7 * len(drawn))  # what else was drawn does not matter
        drawn.append(calibration(source, words.tokenizer).tokens)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert torch.equal(drawn[2], calibration(source, words.tokenizer, seed=2).tokens)


def test_windows_are_drawn_from_all_over_a_long_document(tmp_path: Path) -> None:
    words = Words(2000)
    source = str(put(tmp_path / "a.txt", " ".join(words.documents)))
    drawn = [calibration(source, words.tokenizer, seed=seed) for seed in range(20)]
    # 333 windows, 233 of them to calibrate on
    starts = torch.stack([data.calibration[:, 0] for data in drawn])
    held_out = torch.stack([data.held_out[:, 0] for data in drawn])
    assert not (torch.cat([starts, held_out], dim=1) % 6).any()
    assert int(starts.max()) < 233 * 6 <= int(held_out.min())
    assert len(starts.unique()) > 80


def test_documents_are_drawn_from_all_over_a_long_text(tmp_path: Path) -> None:
    """Only about ten of the two hundred documents are read for one draw."""
    words = Words(2000)
    source = words.write(tmp_path / "a.jsonl")
    drawn = torch.cat([calibration(source, words.tokenizer, seed=seed).tokens for seed in range(20)]) // 10
    assert len(drawn.unique()) > 60
    assert int(drawn.max()) > 150


def test_a_text_of_just_enough_tokens_and_one_token_less(tmp_path: Path) -> None:
    words = Words(60)
    source = words.write(tmp_path / "a.jsonl")
    assert len(calibration(source, words.tokenizer).tokens) == 10
    with pytest.raises(BadInput) as refusal:
        calibration(source, words.tokenizer, samples=8)
    assert str(refusal.value) == (
        f"data.source: '{source}' holds 60 tokens, but 66 are needed for 8 + 3 sequences of 6; "
        "give more text, or lower data.samples, data.validation_samples or data.sequence_length."
    )


def test_calibration_batches(tmp_path: Path) -> None:
    words = Words(200)
    data = calibration(words.write(tmp_path / "a.jsonl"), words.tokenizer, batch_size=4)
    assert isinstance(data.train_dataloader().sampler, RandomSampler)
    train = torch.cat([tokens for (tokens,) in data.train_dataloader()])
    assert sorted(train.tolist()) == sorted(data.calibration.tolist())
    assert torch.equal(torch.cat([tokens for (tokens,) in data.val_dataloader()]), data.held_out)


@pytest.mark.parametrize(
    ("key", "value", "least"),
    [("samples", 0, 1), ("sequence_length", 1, 2), ("validation_samples", -1, 0), ("batch_size", 0, 1)],
)
def test_calibration_counts_that_cannot_work(key: str, value: int, least: int) -> None:
    with pytest.raises(BadInput, match=f"^data.{key}: {value} is too few; give at least {least}.$"):
        calibration("nowhere", Words(10).tokenizer, **{key: value})
    CalibrationText(**{key: least}).check()


@pytest.mark.parametrize("data", [CalibrationText("x"), EvaluationText(["x"], 4)], ids=lambda d: type(d).__name__)
def test_setup_without_tokenizer(data: L.LightningDataModule) -> None:
    with pytest.raises(RuntimeError, match="needs its `tokenizer`"):
        data.setup("fit")


# --- evaluation


def evaluation(tokenizer: PreTrainedTokenizerFast, *texts: Path, **settings: Any) -> EvaluationText:
    data = EvaluationText([str(text) for text in texts], **{"window_length": 5, **settings})
    data.tokenizer = tokenizer
    data.setup()
    return data


@pytest.mark.parametrize("windows", [None, 1, 3])
def test_windows_are_the_first_consecutive_ones(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, windows: int | None
) -> None:
    one = put(tmp_path / "one.txt", "abcdefghijklmnopqrs")
    two = put(tmp_path / "two.jsonl", lines({"text": "0123456"}, {"text": "789abcde"}))
    data = evaluation(tiny_tokenizer, one, two, windows=windows, batch_size=2)
    assert data.names == ["one", "two"]
    first, second = ([batch for batch, _ in loader] for loader in data.test_dataloader())
    assert [len(batch) for batch in first] == ([1] if windows == 1 else [2, 1])
    decoded = [[tiny_tokenizer.decode(window) for window in torch.cat(part)] for part in (first, second)]
    assert decoded == [["abcde", "fghij", "klmno"][:windows], ["01234", "56\n\n7", "89abc"][:windows]]


@pytest.mark.parametrize(
    ("starts", "sentence"),
    [(False, "no start token"), (True, "a start token before the first window only")],
)
def test_the_convention_in_words(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, starts: bool, sentence: str
) -> None:
    backend = Tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str())
    if starts:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    data = evaluation(tokenizer, put(tmp_path / "wiki.txt", "abcdefghijkl"), windows=2)
    batch, first = next(iter(data.test_dataloader()[0]))
    assert first.tolist() == [1] * len(batch)
    assert (batch == 256).nonzero().tolist() == ([[0, 0]] if starts else [])
    assert data.conventions == {
        "wiki": f"first 2 consecutive windows of 5 tokens, each by itself, {sentence}; "
        "exp of the mean negative log likelihood of tokens 2 to 5 of every window"
    }
    assert data.divergence_conventions == {
        "wiki": f"first 2 consecutive windows of 5 tokens, each by itself, {sentence}; "
        "mean over the predictions of tokens 2 to 5 of every window"
    }


@pytest.mark.parametrize(("windows", "needed"), [(None, 5), (3, 15)])
def test_a_text_too_short_to_measure(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, windows: int | None, needed: int
) -> None:
    path = put(tmp_path / "a.txt", "a" * (needed - 1))
    with pytest.raises(BadInput) as refusal:
        evaluation(tiny_tokenizer, path, windows=windows)
    assert str(refusal.value) == (
        f"evaluation.texts: '{path}' holds {needed - 1} tokens, but {windows or 1} windows of 5 need {needed}; "
        "give more text, or lower evaluation.windows or evaluation.window_length."
    )


def test_two_texts_of_one_name(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    paths = [put(tmp_path / folder / "test.txt", "abcdef") for folder in ("a", "b")]
    with pytest.raises(BadInput, match="two texts are called 'test'"):
        evaluation(tiny_tokenizer, *paths)


@pytest.mark.parametrize(("key", "value", "least"), [("window_length", 1, 2), ("windows", 0, 1), ("batch_size", 0, 1)])
def test_evaluation_counts_that_cannot_work(
    tiny_tokenizer: PreTrainedTokenizerFast, key: str, value: int, least: int
) -> None:
    with pytest.raises(BadInput, match=f"^evaluation.{key}: {value} is too few; give at least {least}.$"):
        evaluation(tiny_tokenizer, Path("nowhere"), **{key: value})


def test_no_texts_measure_nothing(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    data = evaluation(tiny_tokenizer)
    assert (data.names, data.conventions, data.test_dataloader()) == ([], {}, [])


# --- streams


def stream(seed: int, samples: int = 11) -> Tensor:
    return torch.randn(samples, 4, 6, generator=torch.Generator().manual_seed(seed))


def forward_by(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    def forward(hidden: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        return hidden.cumsum(1) * matrix.sum()

    return forward


@pytest.mark.parametrize("batch_size", [1, 3, 11, 50])
def test_outputs_for_any_batch_size(batch_size: int) -> None:
    hidden, weight = stream(0), torch.ones(2, requires_grad=True)
    out = torch.empty_like(hidden)
    sizes = []
    for samples, output in outputs(forward_by(weight), hidden, batch_size=batch_size):
        assert not output.requires_grad
        assert torch.is_grad_enabled()  # the caller's own state is left alone
        out[samples] = output
        sizes.append(len(output))
    assert torch.equal(out, hidden.cumsum(1) * 2)
    assert sizes[:-1] == [batch_size] * (len(sizes) - 1)
    assert sum(sizes) == 11


@pytest.mark.parametrize("samples", [1, 8, 11, 16])
def test_propagate_into_a_new_stream_and_in_place(samples: int) -> None:
    hidden, weight = stream(0, samples), torch.ones(2)
    before, expected = hidden.clone(), hidden.cumsum(1) * 2
    assert torch.equal(propagate(forward_by(weight), hidden), expected)
    assert torch.equal(hidden, before)
    assert propagate(forward_by(weight), hidden, torch.device("cpu"), out=hidden) is hidden
    assert torch.equal(hidden, expected)


def test_squared_errors() -> None:
    a, b = stream(0), stream(1)
    errors = squared_errors(a, b)
    assert errors.dtype == torch.float64
    torch.testing.assert_close(errors, (a.double() - b.double()).square().flatten(1).mean(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("learnt_from", [8, 11])
def test_errors_of_streams(learnt_from: int) -> None:
    streams = Streams(
        sparse=stream(0), dense={4: stream(1)}, share=alone(learnt_from, 11 - learnt_from), device=torch.device("cpu")
    )

    def expected(sparse: Tensor) -> BlockError:
        squares = (sparse.double() - stream(1).double()).square()
        held_out = pytest.approx(float(squares[learnt_from:].mean()), rel=1e-6) if learnt_from < 11 else None
        return BlockError(pytest.approx(float(squares[:learnt_from].mean()), rel=1e-6), held_out)

    weight = torch.ones(2)
    assert streams.error(4) == expected(stream(0))
    assert streams.error_after(forward_by(weight), stream(0), 3) == expected(stream(0).cumsum(1) * 2)
    assert torch.equal(streams.sparse, stream(0))
    assert torch.equal(streams.dense[4], stream(1))


@pytest.mark.parametrize("batch_size", [1, 3, 8, 50])
def test_pairs_to_reconstruct_from(batch_size: int) -> None:
    torch.manual_seed(0)
    inputs, targets = stream(0), stream(1)
    pairs = ReconstructionPairs(inputs, targets, samples=8, batch_size=batch_size)
    epochs = [[list(batch) for batch in pairs.train_dataloader()] for _ in range(2)]
    for epoch in epochs:
        assert [len(x) for x, _ in epoch][:-1] == [batch_size] * (len(epoch) - 1)
        seen = [torch.cat(part) for part in zip(*epoch, strict=True)]
        order = [next(i for i in range(8) if torch.equal(inputs[i], x)) for x in seen[0]]
        assert sorted(order) == list(range(8))
        assert torch.equal(seen[1], targets[order])
    assert not torch.equal(torch.cat([x for x, _ in epochs[0]]), torch.cat([x for x, _ in epochs[1]]))
    held_out = [torch.cat(part) for part in zip(*pairs.val_dataloader(), strict=True)]
    assert torch.equal(held_out[0], inputs[8:])
    assert torch.equal(held_out[1], targets[8:])


def test_pairs_without_held_out_ones() -> None:
    assert list(ReconstructionPairs(stream(0), stream(1), samples=11).val_dataloader()) == []
