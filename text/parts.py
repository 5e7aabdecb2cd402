"""One corpus prepared by any number of processes, which meet in the output folder: no network between them, no torch.

A corpus is cut into parts, which depend on its files alone. Part i, counted from 0, belongs to rank i % world_size.
Each part becomes token files in `OUT/.parts-FINGERPRINT/part_NUMBER`; its `part.json` is written last and says that the
part is complete. So a process that died and starts again goes on with its first incomplete part. Rank 0 waits for all
parts, numbers their files through, and moves them into the output folder with one `meta.json`.

The fingerprint is that of all settings and files that determine the tokens. A changed file makes another folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np

from system.errors import UserError
from system.files import atomic_folder, atomic_write, claim_folder, require_no_files, write_json
from system.launch import Launch
from system.locks import locked
from system.progress import Progress
from system.untrusted import read_json
from system.wording import duration
from text.corpora import Corpus, Piece
from text.preparation import (
    SPLITS,
    hold_out_first,
    require_text,
    tokenized,
    train_tokenizer,
    write_meta,
    write_tokens,
)
from text.readers import Notes
from text.tokenizer import Tokenizer, load_tokenizer

SHARD_TOKENS = 100_000_000
"""Tokens per shard if several processes prepare a corpus, and neither the user nor the corpus says how many."""
BYTES_PER_TOKEN = 4
"""Of English text: files are grouped to parts of about one shard."""
_POLL = 0.2  # seconds between two looks at the folder
_MAX_NAMED = 4  # missing parts to name in a line


@dataclass(frozen=True)
class Parts:
    """What several processes prepare together. All of them need the same values, except for `launch` and `workers`."""

    corpus: Corpus
    out: Path
    vocabulary: Tokenizer | int
    """the tokenizer, or the number of tokens of one to train"""
    val_fraction: float
    seed: int
    shard_tokens: int
    workers: int
    launch: Launch

    def write(
        self, source: str | list[str], files: list[str], overwrite: bool
    ) -> tuple[dict[str, np.ndarray], Tokenizer] | None:
        """Writes the parts of this process; on rank 0 returns how often each id was written, int64 (ids,) by split, and
        the tokenizer, after all parts have moved into the output folder. The other ranks return None.

        `source` goes into meta.json. Raises UserError if the output folder has one of the `files` (globs), unless
        `overwrite` is set, or if a split gets no text.
        """
        missing = self._missing_own()  # before the next line: rank 0 removes the parts after it has moved them
        if self._is_prepared() and (self.launch.world_size > 1 or self.folder.exists()):
            if self.launch.rank == 0:
                shutil.rmtree(self.folder, ignore_errors=True)  # of a process that was killed as it finished
            print(f"{self.out} already holds this text, with these settings: remove it to prepare it again")
            return None
        if self.launch.rank:
            require_no_files(self.out, files, overwrite)
            self._write_own(missing)
            return None
        was_moving = self._is_moving.exists() and not (self.out / "meta.json").exists()
        claim_folder(self.out, "meta.json", files, overwrite or was_moving)
        with atomic_folder(self.out, last="meta.json") as folder:
            self._name_leftovers()
            self._write_own(missing)
            self._wait_for_parts()
            counts = self._collect(folder, source)
            self._is_moving.touch()
        shutil.rmtree(self.folder, ignore_errors=True)
        return counts, self.tokenizer

    @cached_property
    def folder(self) -> Path:
        """The staging folder, in which the processes meet."""
        vocabulary = self.vocabulary
        settings = {
            "format": 1,
            "sources": self.corpus.sources(),
            "tokenizer": vocabulary.spec if isinstance(vocabulary, Tokenizer) else vocabulary,
            "val_fraction": self.val_fraction,
            "seed": self.seed,
            "shard_tokens": self.shard_tokens,
        }
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        return self.out / f".parts-{digest[:16]}"

    @cached_property
    def parts(self) -> list[Corpus]:
        return self.corpus.parts(self.shard_tokens * BYTES_PER_TOKEN)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer. If it is to be trained, rank 0 trains it once, and the other ranks wait for it."""
        if isinstance(self.vocabulary, Tokenizer):
            return self.vocabulary
        path = self.folder / "tokenizer.json"
        if self.launch.rank == 0 and not path.exists():
            tokenizer = train_tokenizer(chain.from_iterable(map(self._pieces, range(len(self.parts)))), self.vocabulary)
            with atomic_write(path, "w") as file:
                file.write(tokenizer.spec)
        _wait_until(path.exists, lambda: f"rank {self.launch.rank} waits for the tokenizer, which rank 0 trains")
        return load_tokenizer(path)

    @property
    def _is_moving(self) -> Path:
        """A file that is there as soon as rank 0 moves the complete parts into the output folder."""
        return self.folder / "moving"

    def _folder_of(self, i: int) -> Path:
        return self.folder / f"part_{i + 1:06}"

    def _is_prepared(self) -> bool:
        """Whether the output folder holds the files that these settings give."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            meta = read_json(self.out / "meta.json")
            n_bytes = sum((self.out / name).stat().st_size for name in meta["files"] if name.endswith(".bin"))
            n_tokens = sum(split["tokens"] for split in meta["splits"].values())
            return meta["fingerprint"] == self.folder.name and n_bytes == 2 * n_tokens
        return False

    def _marker(self, i: int) -> dict | None:
        """Returns the `part.json` of a part whose files are all there, otherwise None."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            marker = read_json(self._folder_of(i) / "part.json")
            sizes = {name: (self._folder_of(i) / name).stat().st_size for name in marker["bytes"]}
            if sizes == marker["bytes"]:
                return marker
        return None

    def _pieces(self, i: int) -> Iterator[Piece]:
        """Yields the pieces of a part. Each part holds out documents of its own."""
        return self.parts[i].pieces(self.val_fraction, self.seed + i)

    def _missing_own(self) -> list[int]:
        """Returns the parts of this rank that are not complete."""
        own = range(self.launch.rank, len(self.parts), self.launch.world_size)
        missing = [i for i in own if self._marker(i) is None]
        if len(missing) < len(own):
            print(f"{self._who}{len(own) - len(missing)} of {len(own)} parts are complete already", flush=True)
        return missing

    def _write_own(self, missing: list[int]) -> None:
        for i in missing:
            self._write_part(i)
        if self.launch.world_size > 1:
            print(f"{self._who}{len(missing)} of {len(self.parts)} parts written", flush=True)

    @property
    def _who(self) -> str:
        """What begins a line of output."""
        return f"rank {self.launch.rank} of {self.launch.world_size}: " if self.launch.world_size > 1 else ""

    def _write_part(self, i: int) -> None:
        folder, part = self._folder_of(i), self.parts[i]
        label = f"part {i + 1} of {len(self.parts)}"
        refusal = f"{label} of {self.out} is being written by another run"
        with locked(folder.with_suffix(".lock"), refusal, "wait for it, or give each process another RANK"):
            if self._marker(i):
                return  # another process with this rank was faster
            shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
            folder.mkdir(parents=True)
            try:
                batches = tokenized(self._pieces(i), self.tokenizer, self.workers)
                if self.corpus.first_shard_val and i == 0:
                    batches = hold_out_first(batches, self.shard_tokens)
                shown = None if self.launch.rank else f"{label}: " if len(self.parts) > 1 else ""
                names, counts = write_tokens(batches, part, self.tokenizer, folder, self.shard_tokens, part=shown)
                with atomic_write(folder / "counts.bin") as file:
                    file.write(np.stack([counts[split] for split in SPLITS]).astype("<i8").tobytes())
                files = [*names["train"], *names["val"], "counts.bin"]
                sizes = {name: (folder / name).stat().st_size for name in files}
                write_json(folder / "part.json", {"bytes": sizes, "names": names, "notes": part.notes.as_json()})
            finally:
                if self._marker(i) is None:
                    shutil.rmtree(folder, ignore_errors=True)

    def _wait_for_parts(self) -> None:
        """Waits until all parts are complete. From time to time, a line says which are missing."""
        first, last_seen = 0, (-1, time.monotonic())

        def are_complete() -> bool:
            nonlocal first
            while first < len(self.parts) and self._marker(first):
                first += 1
            return first == len(self.parts)

        def text() -> str:
            nonlocal last_seen
            missing = [i for i in range(first, len(self.parts)) if self._marker(i) is None]
            n_done = len(self.parts) - len(missing)
            if n_done != last_seen[0]:
                last_seen = n_done, time.monotonic()
            named = [f"part {i + 1} (rank {i % self.launch.world_size})" for i in missing[:_MAX_NAMED]]
            if more := len(missing) - len(named):
                named.append(f"{more:,} more")
            idle = time.monotonic() - last_seen[1]
            since = f" (no new one for {duration(idle)})" if idle >= 60 else ""
            return f"{n_done:,} of {len(self.parts):,} parts are complete{since}; missing: {', '.join(named)}"

        _wait_until(are_complete, text)

    def _collect(self, folder: Path, source: str | list[str]) -> dict[str, np.ndarray]:
        """Puts the token files of all parts into a folder, numbered through, and `meta.json`; returns the counts."""
        total = np.zeros((len(SPLITS), self.tokenizer.n_tokens), dtype=np.int64)
        names: dict[str, list[str]] = {split: [] for split in SPLITS}
        notes = Notes()
        for i in range(len(self.parts)):
            marker, part_folder = self._marker(i), self._folder_of(i)
            if marker is None:
                raise UserError(f"{part_folder} has changed meanwhile: start again, complete parts are kept")
            total += np.fromfile(part_folder / "counts.bin", dtype="<i8").reshape(total.shape)
            for split in SPLITS:
                for name in marker["names"][split]:
                    names[split].append(f"{split}_{len(names[split]) + 1:06}.bin")
                    _link(part_folder / name, folder / names[split][-1])
            for message, note in marker["notes"].items():
                notes.add(message, note["first"], note["number"])
        self.corpus.notes = notes
        counts = dict(zip(SPLITS, total, strict=True))
        try:
            require_text(counts, self.tokenizer, notes, self.shard_tokens if self.corpus.first_shard_val else None)
        except UserError:
            shutil.rmtree(self.folder, ignore_errors=True)  # of no use
            raise
        all_names = names["train"] + names["val"]
        write_meta(folder, all_names, counts, self.tokenizer, source, notes, fingerprint=self.folder.name)
        return counts

    def _name_leftovers(self) -> None:
        for other in sorted(self.out.glob(".parts-*")):
            if other != self.folder:
                print(f"{other} holds parts of a run with other settings or files: remove it if you do not need it")


def _link(path: Path, target: Path) -> None:
    """Gives a file a second name, so that it stays complete if this process is killed; copies it where that fails."""
    try:
        os.link(path, target)
    except OSError:
        shutil.copyfile(path, target)


def _wait_until(is_done: Callable[[], bool], text: Callable[[], str]) -> None:
    """Waits, and shows a text: at once, and then as `Progress` does."""
    if is_done():
        return
    print(text(), file=sys.stderr, flush=True)
    with Progress(None) as progress:
        while not is_done():
            if progress.is_due():
                progress.show(0, text())
            time.sleep(_POLL)
