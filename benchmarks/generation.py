"""Tokens per second of self-generated text on the quickstart's model: batches, against one text at a time.

One text at a time is the published recipe: `model.generate` with a cache of keys and values, `do_sample=True`. All are
measured in turn, again and again; the median counts. Ends of texts are ignored, so that every text has all its tokens;
the share of the starts (first tokens, language) is measured apart, since it does not grow with the texts' length.

    python benchmarks/generation.py [--tokens 64] [--batch-sizes 16 32] [--singles 2] [--repeat 3]
"""

import argparse
import time
from statistics import median

import torch
import transformers
import yaml
from quickstart_model import CONFIG

from lit_prune.data.self_generated import Recipe, SelfGeneration, text_generator
from lit_prune.models import load_model, load_tokenizer, resolve


def main() -> None:
    """Measure and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64, help="of a text, its start included")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--singles", type=int, default=2, help="texts of one measurement one at a time")
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    path = resolve(yaml.safe_load(CONFIG.read_text())["model"]["checkpoint"])
    model, tokenizer = load_model(path), load_tokenizer(path)
    generation = SelfGeneration(model, tokenizer, Recipe(arguments.tokens))
    generation.ends = generation.ends[:0]
    begun, single = [], []
    batched: dict[int, list[float]] = {size: [] for size in arguments.batch_sizes}
    for _ in range(arguments.repeat):
        single.append(one_at_a_time(generation, arguments.singles))
        for size, rates in batched.items():
            begun.append(seconds_of_starts(generation, size))
            rates.append(in_batches(generation, size))
    print(f"{torch.get_num_threads()} threads, {arguments.tokens} tokens a text, {arguments.repeat} repetitions\n")
    print("| texts at a time | tokens a second, median (least to most) | times one at a time |\n|---|---|---|")
    for name, rates in {"1, model.generate": single, **{str(size): rates for size, rates in batched.items()}}.items():
        figures = f"{median(rates):.1f} ({min(rates):.1f} to {max(rates):.1f})"
        print(f"| {name} | {figures} | {median(rates) / median(single):.1f} |")
    print(f"\nStarts in English: {median(begun):.2f} s a batch, which is not in the rates.")


def one_at_a_time(generation: SelfGeneration, texts: int) -> float:
    """Sampled tokens a second, as published."""
    length = generation.recipe.max_tokens
    generators = [text_generator(0, index, generation.device) for index in range(texts)]
    starts = generation._starts(generators)
    begin = time.perf_counter()
    for start in starts:
        tokens = torch.tensor([start])
        new = length - len(start)
        made = generation.model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=True,
            max_new_tokens=new,
            min_new_tokens=new,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
        )
        assert made.shape[1] == length
    return texts * new / (time.perf_counter() - begin)


def in_batches(generation: SelfGeneration, size: int) -> float:
    """Sampled tokens a second, without the starts."""
    sampled = 0
    begin = 0.0

    def advanced(tokens: int) -> None:
        nonlocal sampled, begin
        if not begin:  # the starts and the first step, which reads them, are over
            begin = time.perf_counter()
        else:
            sampled += tokens

    generation.texts(range(size), advanced)
    return sampled / (time.perf_counter() - begin)


def seconds_of_starts(generation: SelfGeneration, size: int) -> float:
    """Seconds until a batch of starts is found."""
    begin = time.perf_counter()
    with torch.inference_mode():
        generation._starts([text_generator(0, index, generation.device) for index in range(size)])
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
