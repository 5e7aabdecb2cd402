"""Token files: their format, the `meta.json` that lists them, and statistics of their content."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from system.cli import printable, progress, shorten
from system.errors import UserError
from system.files import read_json
from text.tokenizer import Tokenizer, load_tokenizer, require_same_tokenizer, tokenizer_of_data

SPLITS = ("train", "val")
_SHARD_MAGIC, _LLAMA_SHARD_MAGIC, _HEADER = 20240520, 20240801, 512  # of llm.c; the header's length in uint16
# train.bin; train_000001.bin; fineweb_train_000001.bin (llm.c, modded-nanogpt); train_00000_shuffled.ds (datatrove)
_NAME = re.compile(r"(train|val)\.bin|(?:.+_)?(train|val)_\d+\.bin|(train|val)_\d+_\w*shuffled\.ds")


def files_by_split(names: Iterable[str]) -> dict[str, list[str]]:
    """Returns the token files among file names by split, "train" and "val", sorted. Other names are left out."""
    files: dict[str, list[str]] = {split: [] for split in SPLITS}
    for name in sorted(names):
        if match := _NAME.fullmatch(name):
            files[next(filter(None, match.groups()))].append(name)
    return files


def read_meta(path: str | Path, command: str) -> dict[str, Any]:
    """Reads a `meta.json` or `sft_meta.json`, which has at least `tokenizer` (its name) and `splits` (counts by split).

    Raises UserError, naming the command that writes the file, if it is missing or damaged.
    """
    path = Path(path)
    try:
        meta = read_json(path)
        if not isinstance(meta["tokenizer"], str) or any(n["tokens"] < 0 for n in meta["splits"].values()):
            raise ValueError
    except FileNotFoundError:
        raise UserError(f"no prepared data in {path.parent} ({path.name} is missing): run {command} first") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged: run {command} again") from None
    return meta


def read_sft_meta(folder: Path) -> dict[str, Any]:
    """Reads the `sft_meta.json` of a folder, which has a `template`. Raises UserError as `read_meta` does."""
    return read_meta(folder / "sft_meta.json", "prepare_sft_data.py")


def read_token_meta(folder: Path) -> dict[str, Any]:
    """Reads the `meta.json` of pre-training data; `files` maps "train" and "val" to names of token files.

    Token files without a `meta.json` (nanoGPT, llm.c, datatrove) have the tokenizer in `tokenizer.json`, or GPT-2's.
    Raises UserError if there are none, if `meta.json` is damaged, or if nanoGPT's `meta.pkl` says that ids are
    characters.
    """
    found = files_by_split(path.name for path in folder.glob("*"))
    path = folder / "meta.json"
    if not path.exists() and (folder / "meta.pkl").exists():
        remedy = "prepare the text itself with prepare_data.py --input TEXT"
        raise UserError(f"{folder} holds characters, not tokens, as its meta.pkl of nanoGPT says: {remedy}")
    if not path.exists() and all(found.values()):
        own = folder / "tokenizer.json"
        return {"files": found, "tokenizer": load_tokenizer(own).name if own.exists() else "gpt2", "splits": {}}
    meta = read_meta(path, "prepare_data.py")
    files: Any = meta.get("files")
    if isinstance(files, list):  # up to version 0.2
        files = files_by_split(map(str, files))
    if not isinstance(files, dict) or not all(files.get(split) for split in SPLITS):
        raise UserError(f"{path} is damaged (files): run prepare_data.py again")
    meta["files"] = {split: [Path(name).name for name in files[split]] for split in SPLITS}
    return meta


def read_prepared_tokens(path: Path, tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """Returns the ids of one token file (.bin), or of the validation split in a folder, uint16 (n,).

    Raises UserError if they were prepared with another tokenizer, or if a vocabulary lacks them.
    """
    paths, remedy = [path], "prepare the text with the model's tokenizer"
    if path.suffix != ".bin":
        meta = read_token_meta(path)
        require_same_tokenizer(tokenizer.name, tokenizer_of_data(path, meta).name, path, remedy)
        paths = [path / name for name in meta["files"]["val"]]
    ids = np.concatenate([read_tokens(path) for path in paths])
    require_ids_below(ids, vocab_size, path, remedy)
    return ids


def read_tokens(path: Path) -> np.ndarray:
    """Opens a token file as a read-only memory map, uint16 (n,), without the header of a llm.c or modded-nanogpt shard.

    Raises UserError if it is missing, if its size is wrong, or if its tokens have another width.
    """
    tokens = memory_map(path, np.uint16)
    header = tokens[:_HEADER].view("<i4") if len(tokens) >= _HEADER else [0]
    if header[0] not in (_SHARD_MAGIC, _LLAMA_SHARD_MAGIC):
        return tokens
    if header[0] == _LLAMA_SHARD_MAGIC or header[1] != 1:
        raise UserError(f"{path} has another format of llm.c (version {header[1]}): prepare the text again")
    tokens = tokens[_HEADER:]
    if len(tokens) != header[2]:
        announced = f"its header announces {header[2]:,} tokens, it holds {len(tokens):,}"
        raise UserError(f"{path} is damaged: {announced}; copy or prepare it again")
    return tokens


def memory_map(path: Path, dtype: type[np.unsignedinteger]) -> np.ndarray:
    """Opens a file of little-endian numbers read-only, (n,). Raises UserError if it is missing or cut short."""
    little_endian = np.dtype(dtype).newbyteorder("<")
    try:
        if path.stat().st_size == 0:  # an empty file cannot be mapped
            return np.zeros(0, little_endian)
        return np.memmap(path, dtype=little_endian, mode="r")
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): prepare the data again") from None
    except ValueError:  # half a number at the end
        raise UserError(f"{path} is damaged: prepare the data again") from None


def require_ids_below(ids: np.ndarray, vocab_size: int, where: str | Path, remedy: str) -> None:
    """Raises UserError, naming the place, unless all ids (n,) are below `vocab_size`.

    `where` names the file, `remedy` tells the user what to do. `ids` may be a memory map of any size.
    """
    if len(ids) and ids.max() >= vocab_size:
        i = int(np.argmax(ids >= vocab_size))
        raise UserError(
            f"{where} holds the id {ids[i]} (token {i:,}), which a vocabulary of {vocab_size:,} does not have: {remedy}"
        )


def append_tokens(folder: Path, split: str, ids: np.ndarray, n_before: int, shard_tokens: int | None) -> None:
    """Appends ids, uint16 (n,), to the token file of a split, or to its shards of `shard_tokens` tokens.

    `n_before` is the number of tokens that the split has already.
    """
    while len(ids):
        name, room = f"{split}.bin", len(ids)
        if shard_tokens:
            name = f"{split}_{n_before // shard_tokens + 1:06}.bin"
            room = shard_tokens - n_before % shard_tokens
        with open(folder / name, "ab") as file:
            file.write(ids[:room].tobytes())
        n_before += len(ids[:room])
        ids = ids[room:]


def count_tokens(folder: Path, files: dict[str, list[str]], tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """Returns how often each id occurs in token files, int64 (ids,) by split.

    Raises UserError if they hold ids that the tokenizer does not have.
    """
    counts = {}
    for split in SPLITS:
        counts[split] = np.zeros(tokenizer.n_tokens, dtype=np.int64)
        for name in files[split]:
            ids = read_tokens(folder / name)
            require_ids_below(ids, tokenizer.n_tokens, folder / name, "prepare the data again")
            for start in progress(range(0, len(ids), 2**24), desc=name):  # 128 MiB as 64-bit integers
                counts[split] += np.bincount(ids[start : start + 2**24], minlength=tokenizer.n_tokens)
    return counts


def statistics(counts: np.ndarray, tokenizer: Tokenizer) -> dict[str, int]:
    """Returns the numbers of documents, characters, UTF-8 bytes, tokens (separators included) and different tokens.

    They follow from how often each id occurs, `counts` (ids,): every document ends with a separator, and the bytes of
    every token are fixed.
    """
    text, (lengths, characters) = counts[: tokenizer.end_of_text], tokenizer.token_sizes()
    return {
        "documents": int(counts[tokenizer.end_of_text]),
        "characters": int(text @ characters),
        "bytes": int(text @ lengths),
        "tokens": int(counts.sum()),
        "unique": int(np.count_nonzero(text)),
    }


def inspect(folder: Path) -> list[str]:
    """Returns `report` for a folder. Raises UserError as `read_token_meta`, `read_tokens` and `count_tokens` do."""
    meta = read_token_meta(folder)
    tokenizer = tokenizer_of_data(folder, meta)
    return report(folder, meta["files"], count_tokens(folder, meta["files"], tokenizer), tokenizer)


def report(folder: Path, files: dict[str, list[str]], counts: dict[str, np.ndarray], tokenizer: Tokenizer) -> list[str]:
    """Returns the lines of a table of what token files hold, and the beginning of the training text.

    `counts` is how often each id occurs, (ids,) by split.
    """
    columns = [
        statistics(count, tokenizer) for count in (counts["train"], counts["val"], counts["train"] + counts["val"])
    ]
    lines = [f"{'':16}{'train':>17}{'val':>17}{'total':>17}"]
    for name in ("documents", "characters", "bytes", "tokens", "unique"):
        lines.append(f"{name:16}" + "".join(f"{column[name]:>17,}" for column in columns))
    ratios = (column["bytes"] / max(1, column["tokens"] - column["documents"]) for column in columns)
    lines.append(f"{'bytes per token':16}" + "".join(f"{ratio:>17.3f}" for ratio in ratios))
    text = printable(tokenizer.decode(read_tokens(folder / files["train"][0])[:1500].tolist()))
    return [
        *lines,
        f"tokenizer {tokenizer.name}: {tokenizer.n_tokens:,} tokens, 3 of them control tokens",
        f"the training text begins: {shorten(text, 74)}",
    ]
