"""Text from named data sets and local files, as documents, and from there to tokens."""

import gzip
import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_prune.complaints import nearest
from lit_prune.errors import BadInput, reason
from lit_prune.published import SCHEME, PublishedFile

Purpose = Literal["calibration", "evaluation"]

PLAIN_SUFFIXES = (".txt", ".utf8")
JSON_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
SUFFIXES = (*PLAIN_SUFFIXES, *JSON_SUFFIXES, ".parquet")


@dataclass(frozen=True)
class NamedText:
    """A text on the hub by the name that papers use, and how its documents are joined there.

    Attributes:
        path: of the data set.
        column: that holds the documents.
        split: for each purpose.
        arguments: more of what says which part of the data set.
        separator: between documents, for each purpose.
        windows: how many windows of it papers measure perplexity on; None for the whole text.
    """

    path: str
    column: str
    split: dict[Purpose, str]
    arguments: dict[Purpose, dict[str, Any]] = field(default_factory=dict)
    separator: dict[Purpose, str] = field(default_factory=lambda: {"calibration": "\n\n", "evaluation": "\n\n"})
    windows: int | None = None

    def load(self, purpose: Purpose) -> Sequence[str]:
        """The documents, from the hub or its local cache."""
        from datasets import load_dataset

        arguments = self.arguments.get(purpose, {})
        documents: Sequence[str] = load_dataset(self.path, split=self.split[purpose], **arguments)[self.column]
        return documents


NAMED: dict[str, NamedText] = {
    "c4": NamedText(
        "allenai/c4",
        "text",
        {"calibration": "train", "evaluation": "validation"},
        {
            "calibration": {"data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}},
            "evaluation": {"data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"}},
        },
        separator={"calibration": "\n\n", "evaluation": " "},
        windows=256,
    ),
    "wikitext2": NamedText(
        "Salesforce/wikitext",
        "text",
        {"calibration": "train", "evaluation": "test"},
        {"calibration": {"name": "wikitext-2-raw-v1"}, "evaluation": {"name": "wikitext-2-raw-v1"}},
    ),
    # the data set itself is a script, which no longer loads; the hub keeps its conversion under this revision
    "ptb": NamedText(
        "ptb-text-only/ptb_text_only",
        "sentence",
        {"calibration": "train", "evaluation": "test"},
        {
            "calibration": {"revision": "refs/convert/parquet"},
            "evaluation": {"revision": "refs/convert/parquet"},
        },
        separator={"calibration": " ", "evaluation": " "},
    ),
}


@dataclass(frozen=True)
class Text:
    """Documents in order, and what joins them to one text."""

    source: str
    documents: Sequence[str]
    separator: str

    @classmethod
    def read(cls, source: str, purpose: Purpose, key: str) -> "Text":
        """Read a named data set (`c4`, `wikitext2`, `ptb`), a local file or folder, or a published file.

        Args:
            source: the name or path.
            purpose: which split of a named data set.
            key: the setting that `source` came from, for the error message.

        Raises:
            BadInput: the source is missing, empty, not UTF-8, or of a format that is not read.
        """
        if source in NAMED:
            return cls._from_hub(source, purpose, key)
        path = PublishedFile.parse(source).fetch() if source.startswith(SCHEME) else Path(source).expanduser()
        if not source or not path.exists():
            raise BadInput(
                f"{key}: there is no file or folder '{source}'"
                + (nearest(source, NAMED) or f"; give one, or one of the names {', '.join(NAMED)}.")
            )
        files = sorted(f for f in path.rglob("*") if _is_text(f)) if path.is_dir() else [path]
        if not files:
            raise BadInput(f"{key}: the folder '{source}' holds no file that ends in {', '.join(SUFFIXES)}.")
        documents: list[str] = []
        for file in files:
            documents += _read_file(file, key)
        if not any(document.strip() for document in documents):
            raise BadInput(f"{key}: '{source}' holds no text.")
        return cls(source, documents, "\n\n")

    @classmethod
    def _from_hub(cls, source: str, purpose: Purpose, key: str) -> "Text":
        try:
            return cls(source, NAMED[source].load(purpose), NAMED[source].separator[purpose])
        except Exception as error:  # of many kinds, from the network to the files
            raise BadInput(
                f"{key}: '{source}' could not be loaded from the hub ({reason(error)}); "
                "connect to one, or give a local .txt, .jsonl or .parquet file."
            ) from error

    @property
    def windows(self) -> int | None:
        """How many windows of it papers measure perplexity on; None for the whole text."""
        return NAMED[self.source].windows if self.source in NAMED else None

    @property
    def name(self) -> str:
        """A short name for tables: the data set's name or the file's without its ending."""
        if self.source in NAMED:
            return self.source
        path = self.source.split("?")[0] if self.source.startswith(SCHEME) else self.source
        file = Path(path).resolve().name
        return file.removesuffix(next(filter(file.endswith, SUFFIXES), "")) or file

    def tokens(
        self,
        tokenizer: PreTrainedTokenizerBase,
        needed: int | None = None,
        order: Sequence[int] | None = None,
        special: bool = True,
    ) -> Tensor:
        """The joined documents as tokens, shape (tokens,).

        Args:
            tokenizer: as it is: it puts a start token before the text if that is its habit.
            needed: stop after a whole document once there are that many tokens; None takes the whole text.
            order: the order of the documents, by index; None for their own.
            special: False keeps the tokenizer from adding a start token.
        """
        order = range(len(self.documents)) if order is None else order
        taken, characters, tokens = 0, 0, torch.empty(0, dtype=torch.long)
        # four to five characters make a token of English, so this first try nearly always is enough
        budget = None if needed is None else 8 * needed
        while taken < len(order) and (needed is None or len(tokens) < needed):
            while taken < len(order) and (budget is None or characters < budget):
                characters += len(self.documents[order[taken]])
                taken += 1
            text = self.separator.join(self.documents[index] for index in order[:taken])
            found = tokenizer(text, add_special_tokens=special, return_attention_mask=False, verbose=False)
            tokens = torch.tensor(found["input_ids"], dtype=torch.long)
            budget = None if budget is None else 2 * budget
        return tokens


def _is_text(path: Path) -> bool:
    return path.is_file() and path.name.endswith(SUFFIXES)


def _read_file(path: Path, key: str) -> list[str]:
    if not path.name.endswith(SUFFIXES):
        raise BadInput(f"{key}: '{path}' is of no format that is read: {', '.join(SUFFIXES)}.")
    try:
        if path.name.endswith(PLAIN_SUFFIXES):
            return _read_plain(path)
        return _read_json(path) if path.name.endswith(JSON_SUFFIXES) else _read_parquet(path)
    except UnicodeDecodeError as error:
        raise BadInput(f"{key}: '{path}' is not UTF-8 (byte {error.start}); convert it first.") from error
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise BadInput(f"{key}: '{path}' cannot be read ({getattr(error, 'strerror', None) or error}).") from error


def _read_plain(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8-sig")
    if text.startswith("<doc "):  # articles of a Wikipedia dump as WikiExtractor writes them
        return [article.strip() for article in re.findall(r"<doc [^\n]*>\n(.*?)</doc>", text, re.DOTALL)]
    return [text]


def _read_json(path: Path) -> list[str]:
    """One document a record: the records of a list, or one on each line."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as content:
        start = content.read(1)
        content.seek(0)
        if start == "[":
            return [_document(record, f"record {i}") for i, record in enumerate(json.load(content), 1)]
        lines = ((f"line {i}", line) for i, line in enumerate(content, 1) if line.strip())
        return [_document(_record(line, where), where) for where, line in lines]


def _record(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON: {error.msg} at column {error.colno}") from error


def _document(record: Any, where: str) -> str:
    if not isinstance(record, dict) or "text" not in record:
        raise ValueError(f"{where} has no field named 'text'")
    document = record["text"]
    if not isinstance(document, str | None):
        raise ValueError(f"'text' in {where} is {document!r:.40}, which is no string")
    return document or ""


def _read_parquet(path: Path) -> list[str]:
    """One document a row, from the column `text`."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as table:
        columns = table.schema_arrow.names
        if "text" not in columns:
            raise ValueError(f"it has the columns {', '.join(columns)}, but none named 'text'")
        rows = table.read(columns=["text"])["text"].to_pylist()
    return [_document({"text": row}, f"row {i}") for i, row in enumerate(rows, 1)]
