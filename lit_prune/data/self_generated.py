"""Calibration text that the dense model writes itself: how it is generated.

The recipe is that of LLM-QAT (Liu et al., arXiv 2305.17888, `generate_data.py` of its code): a random first token,
a few tokens extended greedily, the rest sampled from the model's full distribution.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lit_prune.errors import BadInput

GREEDY_TOKENS = 4
FIRST_TOKENS = 1000  # first tokens that a text may be begun with before the model counts as unfit for the language


@dataclass(frozen=True)
class Recipe:
    """How texts are drawn.

    Args:
        max_tokens: a text's greatest length, its start included.
        seed: of all draws.
        language: the ISO 639 code of the language that a start must be in; None takes all.
        temperature: divides the logits.
        top_k: sample among the k likeliest tokens only; None for all.
        top_p: sample among the likeliest tokens that together have this probability only; 1 for all.
    """

    max_tokens: int = 2048
    seed: int = 0
    language: str | None = "en"
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def check(self) -> None:
        """Find settings that cannot work before anything is read.

        Raises:
            BadInput: a number outside its range, or a language that is not detected.
        """
        least = 3 + GREEDY_TOKENS  # with a start token, the first one, and one that is sampled
        if self.max_tokens < least:
            raise BadInput(f"max_tokens: {self.max_tokens} is too few; give at least {least}.")
        if not 0 < self.temperature < float("inf"):
            raise BadInput(f"temperature: {self.temperature} does not fit; give a number above 0, such as 1.")
        if self.top_k is not None and self.top_k < 1:
            raise BadInput(f"top_k: {self.top_k} is too few; give at least 1, or null for all tokens.")
        if not 0 < self.top_p <= 1:
            raise BadInput(f"top_p: {self.top_p} is outside (0, 1]; give 1 for all tokens.")
        if self.language is not None and self.language not in detectable_languages():
            raise BadInput(f"language: '{self.language}' is not detected; give any, or a code such as en, de or zh.")

    @property
    def warpers(self) -> LogitsProcessorList:
        """What is done to the logits before a token is drawn; nothing by default."""
        warpers = LogitsProcessorList()
        if self.temperature != 1:
            warpers.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k is not None:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            warpers.append(TopPLogitsWarper(float(self.top_p)))
        return warpers


def detectable_languages() -> set[str]:
    """The ISO 639 codes of the languages that `detect_language` tells apart."""
    import py3langid

    return {code for code, _ in py3langid.rank("")}


def detect_language(text: str) -> str | None:
    """The ISO 639 code of the likeliest language of a text; None for a text without letters."""
    import py3langid  # its model takes a second to load

    language: str = py3langid.classify(text)[0]
    return language if any(map(str.isalpha, text)) else None


def text_generator(seed: int, index: int, device: torch.device) -> torch.Generator:
    """The source of all draws of one text: no two texts of a file share it, and other seeds have others."""
    # a CPU's generator takes 32 bits: these differ within a file, and are far apart for two seeds
    start = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "big")
    return torch.Generator(device).manual_seed((start + index) % 2**32)


class SelfGeneration:
    """Texts by a model, many at a time, each drawn as if it were alone.

    Text `index` draws from a generator of its own, in this order: `FIRST_TOKENS` candidates for its first token; then,
    for every token that is sampled, a uniform number u for each token of the vocabulary. The token with the greatest
    logit − log(−log u) is taken (Gumbel's trick), which samples from the softmax of the logits. So a text depends
    neither on the size of the batch nor on the texts beside it, except where these round logits differently and the
    two best of the sums are closer than that. The same batches on the same device repeat exactly.

    If it is the tokenizer's habit to put a start token before a text, every text starts with it; models such as Gemma
    write nonsense otherwise.

    Args:
        model: dense, in evaluation mode, on the device to be used.
        tokenizer: the model's.
        recipe: how to draw.
        detect: a text's language, None if there is none to be seen.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        recipe: Recipe,
        detect: Callable[[str], str | None] = detect_language,
    ) -> None:
        self.model, self.tokenizer, self.recipe, self.detect = model, tokenizer, recipe, detect
        self.device = model.device
        vocabulary = set(tokenizer.get_vocab().values())
        # embeddings are often padded beyond the last token that the tokenizer knows
        self.vocabulary_size = min(max(vocabulary) + 1, model.config.get_text_config().vocab_size)
        special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        special |= set(tokenizer.all_special_ids)
        ordinary = sorted(token for token in vocabulary - special if token < self.vocabulary_size)
        self.ordinary = torch.tensor(ordinary, device=self.device)
        self.opening = _start_token(tokenizer)
        self.ends = torch.tensor(sorted(_end_tokens(model, tokenizer)), device=self.device)

    def texts(self, indices: Sequence[int], advanced: Callable[[int], object] = lambda _: None) -> list[list[int]]:
        """The texts of these indices as tokens, generated as one batch.

        A text ends with its end-of-sequence token, or at `max_tokens` tokens; it then leaves the batch.

        Args:
            indices: which of the seed's texts.
            advanced: is told the number of tokens sampled, step by step.

        Raises:
            BadInput: none of a text's first tokens leads to a start in the language.
        """
        generators = [text_generator(self.recipe.seed, index, self.device) for index in indices]
        with torch.inference_mode(), _heads_grouped(self.model):
            return self._sampled(self._starts(generators), generators, advanced)

    def _sampled(
        self, starts: list[list[int]], generators: Sequence[torch.Generator], advanced: Callable[[int], object]
    ) -> list[list[int]]:
        """What the model writes after these starts, the starts included."""
        new = torch.tensor(starts, device=self.device)
        length, longest = new.shape[1], self.recipe.max_tokens
        tokens = new.new_empty(len(starts), longest)
        tokens[:, :length] = new
        noise = torch.empty(len(starts), self.vocabulary_size, device=self.device)
        cache = _cache(self.model, longest)
        warpers = self.recipe.warpers
        finished: dict[int, list[int]] = {}
        rows = list(range(len(starts)))  # of the batch, by their place among the texts
        while rows:
            logits = warpers(tokens[:, :length], self._logits(new, cache))  # type: ignore[arg-type]
            for row, place in enumerate(rows):
                noise[row].uniform_(generator=generators[place])
            gumbel = noise[: len(rows)].log_().neg_().log_()
            new = (logits - gumbel).argmax(dim=1, keepdim=True)
            tokens[:, length : length + 1] = new
            length += 1
            advanced(len(rows))
            goes_on = ~torch.isin(new[:, 0], self.ends) if length < longest else new.new_zeros(len(rows)).bool()
            if not goes_on.all():
                for row in (~goes_on).nonzero()[:, 0].tolist():
                    finished[rows[row]] = tokens[row, :length].tolist()
                kept = goes_on.nonzero()[:, 0]
                rows = [rows[row] for row in kept.tolist()]
                new, tokens = new[kept], tokens[kept]
                cache.batch_select_indices(kept)
        return [finished[place] for place in range(len(starts))]

    def _starts(self, generators: Sequence[torch.Generator]) -> list[list[int]]:
        """For each text, the first of its candidates that is extended to a start in the language."""
        candidates = [
            self.ordinary[torch.randint(len(self.ordinary), (FIRST_TOKENS,), generator=generator, device=self.device)]
            for generator in generators
        ]
        starts: dict[int, list[int]] = {}
        begin = 0
        while len(starts) < len(generators):
            waiting = [place for place in range(len(generators)) if place not in starts]
            if begin == FIRST_TOKENS:
                raise BadInput(
                    f"language: '{self.recipe.language}' does not fit, since the model began none of {FIRST_TOKENS} "
                    "texts in it; give the language that it writes, or any."
                )
            # when few are left, several candidates of each fill the batch
            end = min(begin + max(1, len(generators) // len(waiting)), FIRST_TOKENS)
            tried = self._extended(torch.cat([candidates[place][begin:end] for place in waiting])).tolist()
            for row, start in enumerate(tried):
                place = waiting[row // (end - begin)]
                if place not in starts and self._accepts(start):
                    starts[place] = start
            begin = end
        return [starts[place] for place in range(len(generators))]

    def _extended(self, first: Tensor) -> Tensor:
        """First tokens, shape (batch,), and what the model likes best after them, shape (batch, start)."""
        tokens = torch.cat([first.new_tensor(self.opening).expand(len(first), -1), first[:, None]], dim=1)
        cache = _cache(self.model, tokens.shape[1] + GREEDY_TOKENS)
        new = tokens
        for _ in range(GREEDY_TOKENS):
            new = self._logits(new, cache).argmax(dim=1, keepdim=True)
            tokens = torch.cat([tokens, new], dim=1)
        return tokens

    def _accepts(self, start: list[int]) -> bool:
        """Whether a start is in the language; one that ends already is not."""
        if set(start) & set(self.ends.tolist()):
            return False
        return self.recipe.language in (None, self.detect(decoded(self.tokenizer, start)))

    def _logits(self, new: Tensor, cache: DynamicCache) -> Tensor:
        """Of the next token, shape (batch, vocabulary), from the new tokens alone, shape (batch, new)."""
        logits: Tensor = self.model(input_ids=new, past_key_values=cache, use_cache=True).logits
        logits = logits[:, -1, : self.vocabulary_size]
        return logits if logits.dtype == torch.float64 else logits.float()


class _ReservedLayer(DynamicLayer):
    """Keys and values of a layer in memory that is reserved once; transformers' own copies them all for every token.

    Args:
        capacity: the greatest number of tokens.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._capacity = capacity

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._reserved = [
            states.new_empty(*states.shape[:2], self._capacity, states.shape[3])
            for states in (key_states, value_states)
        ]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Add states of shape (batch, heads, new, width); returns all so far, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin: int = self.get_seq_length()
        end = begin + key_states.shape[2]
        for reserved, states in zip(self._reserved, (key_states, value_states), strict=True):
            reserved[:, :, begin:end] = states
        self.keys, self.values = (reserved[:, :, :end] for reserved in self._reserved)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch, in their order."""
        end: int = self.get_seq_length()
        for reserved in self._reserved:
            reserved[: len(indices), :, :end] = reserved[indices, :, :end]
        self._reserved = [reserved[: len(indices)] for reserved in self._reserved]
        self.keys, self.values = (reserved[:, :, :end] for reserved in self._reserved)


GROUPED = "sdpa_heads_grouped"


def _grouped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """Attention of one new token, where several heads share keys and values: they are read once, not once a head.

    All else is left to transformers. Shapes are (batch, heads, tokens, width), the result's (batch, 1, heads, width).
    """
    batch, heads, new, _ = query.shape
    if new > 1 or attention_mask is not None or heads == key.shape[1] or settings.get("position_bias") is not None:
        result: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
        return result
    together = query.reshape(batch, key.shape[1], heads // key.shape[1], -1)
    seen = F.scaled_dot_product_attention(together, key, value, scale=settings.get("scaling"))
    return seen.reshape(batch, 1, heads, -1), None


AttentionInterface.register(GROUPED, _grouped_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)


@contextmanager
def _heads_grouped(model: PreTrainedModel) -> Iterator[None]:
    """On a CPU, whose kernel reads shared keys and values once a head."""
    own = model.config._attn_implementation
    if own != "sdpa" or model.device.type != "cpu":
        yield
        return
    model.set_attn_implementation(GROUPED)
    try:
        yield
    finally:
        model.set_attn_implementation(own)


def _cache(model: PreTrainedModel, capacity: int) -> DynamicCache:
    """An empty cache; layers with a sliding window or other states of their own keep transformers' layers."""
    cache = DynamicCache(config=model.config)
    cache.layers = [_ReservedLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _start_token(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that the tokenizer puts before every text, if it does."""
    first: list[int] = tokenizer("a")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """All tokens that end a text, by the model's or the tokenizer's word."""
    ends = model.generation_config.eos_token_id if model.generation_config else None
    ends = ends if isinstance(ends, list) else [ends]
    return {end for end in (*ends, tokenizer.eos_token_id) if end is not None}


def decoded(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    """Tokens as text, without the special ones."""
    text: str = tokenizer.decode(tokens, skip_special_tokens=True)  # type: ignore[assignment]
    return text
