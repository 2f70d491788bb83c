"""The verb `generate`: calibration text that the dense model writes itself.

Whatever is slow to import is imported when it is needed, so that `--help` is quick.
"""

import fcntl
import os
from argparse import ArgumentError
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from jsonargparse import ArgumentParser

from lit_prune.atomic import require_writable
from lit_prune.cli import VERBS
from lit_prune.complaints import sentence
from lit_prune.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from lit_prune.data.self_generated import SelfGeneration


def generate(
    checkpoint: str,
    output: str,
    texts: int = 256,
    max_tokens: int = 2048,
    batch_size: int = 16,
    seed: int = 0,
    language: str | None = "en",
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    device: str = "auto",
) -> None:
    """Generate texts into a file, or go on with one, or say that it is finished.

    Args:
        checkpoint: the dense model: hub id, local Hugging Face folder, .gguf file, or a file in a published package
        output: the file to write, .jsonl: one text a line, with its tokens and what it was made by
        texts: number of texts; more than a finished file holds are added to it
        max_tokens: a text's greatest length; it ends earlier where the model ends it
        batch_size: texts generated at a time; more are faster as long as memory holds their keys and values
        seed: of all draws; the same seed repeats the same texts
        language: ISO 639 code of the language that the first five tokens must be in, or any
        temperature: divides the logits: below 1 for likelier tokens, above 1 for more variety
        top_k: sample among the k likeliest tokens only; null for all
        top_p: sample among the likeliest tokens that together have this probability only; 1 for all
        device: where to run, such as cpu or cuda:1; auto takes the accelerator if there is one

    Raises:
        BadInput: a setting cannot work, or the file holds something else.
    """
    for name, count in (("texts", texts), ("batch_size", batch_size)):
        if count < 1:
            raise BadInput(f"{name}: {count} is too few; give at least 1.")
    path = Path(output).expanduser()
    if path.suffix != ".jsonl":
        raise BadInput(f"output: '{output}' does not end in .jsonl; give a file that does.")

    from transformers.utils.logging import disable_progress_bar

    from lit_prune.data.generated_text import fingerprint
    from lit_prune.data.self_generated import Recipe, SelfGeneration
    from lit_prune.models import load_config, load_model, load_tokenizer, resolve
    from lit_prune.resources import named_device

    recipe = Recipe(max_tokens, seed, None if language == "any" else language, float(temperature), top_k, float(top_p))
    recipe.check()
    disable_progress_bar()  # type: ignore[no-untyped-call]
    place = named_device(device)
    resolved = resolve(checkpoint)
    _check_positions(load_config(resolved), max_tokens)
    tokenizer = load_tokenizer(resolved)
    generated = {
        "model": checkpoint,
        "tokenizer": fingerprint(tokenizer),
        **vars(recipe),
        "detector": f"py3langid {version('py3langid')}" if recipe.language else None,
        "device": place.type,  # whose kind of generator draws
    }
    file = TextFile(path, generated)
    if file.count >= texts:
        print(f"'{output}' is finished already, with {file.count} texts; nothing was done.")
        return
    model = load_model(resolved).to(place)  # type: ignore[arg-type]
    _check_memory(model, batch_size, max_tokens)
    file.write(SelfGeneration(model, tokenizer, recipe), texts, batch_size)
    print(f"'{output}' holds {file.count} texts, {file.tokens} tokens.")


class TextFile:
    """A file of generated texts, new or to be continued. Its whole lines stay as they are; a torn last one goes.

    Args:
        path: the file.
        generated: what its texts are made by.

    Raises:
        BadInput: it cannot be written, or holds something else than texts made by that.

    Attributes:
        count: whole texts in it.
        tokens: of these, in all.
    """

    def __init__(self, path: Path, generated: dict[str, Any]) -> None:
        self.path, self.generated = path, generated
        self.count = self.tokens = self._size = 0
        if path.exists():
            self._reopen()
        else:
            require_writable(path, "output")

    def _reopen(self) -> None:
        from lit_prune.data.generated_text import GeneratedText, whole_texts

        self.count = self.tokens = self._size = 0
        for text, end in whole_texts(self.path, "output"):
            keys = [*self.generated, *(text.generated.keys() - self.generated)]
            if different := [key for key in keys if text.generated.get(key) != self.generated.get(key)]:
                first = different[0]
                raise BadInput(
                    f"output: '{self.path}' holds texts made otherwise: {', '.join(different)} "
                    f"({first} was {text.generated.get(first)}, and is {self.generated.get(first)} now); "
                    "give another file, or the same settings to go on."
                )
            self.count += 1
            self.tokens += len(text.tokens)
            self._size = end
        opening = GeneratedText.opening(self.count, self.generated)
        with self.path.open("rb") as file:
            file.seek(self._size)
            torn = file.read(len(opening))
        if torn != opening[: len(torn)]:
            raise BadInput(f"output: '{self.path}' ends in something else than such a text; give another file.")

    def write(self, generation: "SelfGeneration", texts: int, batch_size: int) -> None:
        """Add texts until there are as many as asked for, batch by batch.

        Batches are cut by the texts' numbers. One that is half in the file is generated as a whole again, since its
        texts are the same to the last bit only in the same batch; the file gets those that it lacks.

        Raises:
            BadInput: another process is writing the file.
        """
        from tqdm import tqdm

        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            _lock(file, self.path)
            self._reopen()  # another process may have written meanwhile
            file.truncate(self._size)
            starts = range(self.count // batch_size * batch_size, texts, batch_size)
            longest = generation.recipe.max_tokens
            with tqdm(
                total=max(texts - starts.start, 0) * longest,
                desc="generating",
                unit="token",
                unit_scale=True,
                dynamic_ncols=True,
            ) as bar:
                for start in starts:
                    indices = range(start, min(start + batch_size, texts))
                    batch = generation.texts(indices, bar.update)
                    self._append(file, generation, indices, batch)
                    # what the model has ended early need not be waited for
                    bar.total = bar.n + (texts - indices.stop) * longest
                    bar.set_postfix_str(f"{self.count}/{texts} texts")

    def _append(
        self, file: IO[bytes], generation: "SelfGeneration", indices: Sequence[int], batch: list[list[int]]
    ) -> None:
        """Those of a batch that the file lacks, at once and onto the disk."""
        from lit_prune.data.generated_text import GeneratedText
        from lit_prune.data.self_generated import decoded

        for index, tokens in zip(indices, batch, strict=True):
            if index >= self.count:
                text = GeneratedText(index, self.generated, tokens, decoded(generation.tokenizer, tokens))
                file.write(text.line())
                self.count += 1
                self.tokens += len(tokens)
        file.flush()
        os.fsync(file.fileno())


def main(arguments: list[str]) -> None:
    """Parse and run `lit-prune generate ...`.

    Raises:
        BadInput: a setting is unknown, missing or cannot work.
    """
    parser = ArgumentParser(
        prog="lit-prune generate", description=VERBS["generate"].summary, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="a YAML file with settings")
    parser.add_function_arguments(generate, as_group=False)
    try:
        settings = parser.parse_args(arguments[1:])
    except ArgumentError as error:
        raise BadInput(sentence(str(error), parser.get_defaults().keys(), {}, "generate")) from error
    settings.pop("config")
    try:
        generate(**settings)
    except BadInput as error:  # what is `model.checkpoint` to fit is `checkpoint` here
        raise BadInput(str(error).removeprefix("model.")) from error


def _check_positions(config: "PreTrainedConfig", max_tokens: int) -> None:
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and max_tokens > positions:
        raise BadInput(f"max_tokens: {max_tokens} is more than the model's {positions} positions; give at most that.")


def _check_memory(model: "PreTrainedModel", batch_size: int, max_tokens: int) -> None:
    """Whether the keys and values of a whole batch fit, by the size of one token's."""
    import torch

    from lit_prune.modules.memory import available_memory

    with torch.inference_mode():
        cache = model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=True)
    a_token = sum(states.nbytes for keys, values, *_ in cache.past_key_values for states in (keys, values))
    needed, free = batch_size * max_tokens * a_token, available_memory(model.device)
    if needed > free:
        raise BadInput(
            f"batch_size: the keys and values of {batch_size} texts of {max_tokens} tokens need {needed / 1e9:.2f} GB, "
            f"but {free / 1e9:.2f} GB are free; give at most {max(1, batch_size * free // needed)}, "
            "or a lower max_tokens."
        )


def _lock(file: IO[bytes], path: Path) -> None:
    """Keep other processes from writing the same file; the lock goes with this one's end, whatever that is."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BadInput(f"output: another process is writing '{path}'; wait for it, or give another file.") from error
