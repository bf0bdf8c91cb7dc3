"""open_clip's tokenizer as a Hugging Face one: byte-level BPE from its merges file, ids unchanged."""

import gzip
import zlib
from importlib.util import find_spec
from pathlib import Path

from transformers import AutoTokenizer, CLIPTokenizer, PreTrainedTokenizerBase

from vlscale.models.towers import one_line

START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = 49152 - 256 - 2  # lines of the file that make the vocabulary, after the first


def load_bpe(source: str | None, max_length: int) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder, or the one that open_clip's merges file makes."""
    if source is not None and Path(source).is_dir():
        try:
            return AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise ValueError(f"--tokenizer {source} holds no tokenizer: {one_line(error)}") from None
    path = Path(source) if source is not None else _installed_merges()
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = file.read().split("\n")[1 : 1 + MERGES]
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(
            f"--tokenizer {path}: expected a Hugging Face folder or open_clip's bpe_simple_vocab_16e6.txt.gz, "
            f"got {one_line(error)}"
        ) from None
    merges = [tuple(line.split()) for line in lines]
    characters = _byte_characters()
    words = [*characters, *(f"{c}</w>" for c in characters), *("".join(pair) for pair in merges), START, END]
    vocabulary = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_length)


def _installed_merges() -> Path:
    """Found without importing the package, which would bring torchvision along."""
    spec = find_spec("open_clip")
    if spec is None or spec.origin is None:
        raise ValueError(
            "open_clip is not installed, so its tokenizer has to be given: --tokenizer with a Hugging Face CLIP folder "
            "or open_clip's bpe_simple_vocab_16e6.txt.gz"
        )
    return Path(spec.origin).with_name("bpe_simple_vocab_16e6.txt.gz")


def _byte_characters() -> list[str]:
    """The character that stands for each of 256 bytes in byte-level BPE, printable ones first, as in GPT-2."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = len(set(range(256)) - set(printable))
    return [chr(code) for code in printable] + [chr(256 + number) for number in range(others)]
