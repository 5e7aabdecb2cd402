"""The data sets that have a name. One entry says all about each; scripts, `--help` and readers take it from here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

SplitRule = Literal["share", "nanogpt", "first shard", "own", "wordings"]
"""What is held out: a share of the documents; the rows that nanoGPT holds out of OpenWebText; the first shard; the
split "validation" of the Hub; or wordings of questions whose answers are trained on."""


@dataclass(frozen=True)
class Dataset:
    """A data set: on the Hugging Face Hub, at a URL, or, without both, made from what this machine has."""

    name: str
    size: str
    licence: str
    """an SPDX identifier, or "public domain" """
    hub: str = ""
    """org/name on the Hub, from where its rows are streamed"""
    config: str | None = None
    """configuration on the Hub"""
    url: str = ""
    sha256: str = ""
    """checksum of the file at the URL"""
    split: SplitRule = "share"
    text_column: str = "text"
    label_column: str = "label"
    is_small: bool = False
    """whether `--data NAME` of a training script prepares it first, in a few minutes at most"""

    def __str__(self) -> str:
        return f"{self.name} ({self.size}, {self.licence})"


def by_name(*datasets: Dataset) -> dict[str, Dataset]:
    """Returns data sets by their names."""
    return {dataset.name: dataset for dataset in datasets}


TEXTS = by_name(  # for pre-training: `hub` has a column of text
    Dataset("openwebtext", "8 million web pages", "CC0-1.0", hub="Skylion007/openwebtext", split="nanogpt"),
    Dataset(
        "fineweb-edu",
        "10 billion tokens",
        "ODC-By-1.0",
        hub="HuggingFaceFW/fineweb-edu",
        config="sample-10BT",
        split="first shard",
    ),
    Dataset(  # the licence is that of NVIDIA's ClimbMix; the card of this shuffled copy was not read
        "climbmix",
        "400 billion tokens",
        "CC-BY-NC-4.0",
        hub="karpathy/climbmix-400b-shuffle",
        split="first shard",
    ),
    Dataset("tinystories", "2.1 million stories", "CDLA-Sharing-1.0", hub="roneneldan/TinyStories", split="own"),
    Dataset(
        "shakespeare",
        "1.1 MB",
        "public domain",
        url="https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e"
        "/data/tinyshakespeare/input.txt",
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        is_small=True,
    ),
    Dataset(
        "war-and-peace",
        "3.2 MB",
        "public domain",
        url="https://raw.githubusercontent.com/enerrio/jax-transformer/e00617e4555a0dc4d64d819307f917206aeec31c"
        "/war-and-peace.txt",
        sha256="fef5d84055533ae89c5df8f8334f5bcf9110a5d36e0a01f0e587b847c9d5444e",
        is_small=True,
    ),
    Dataset("pydocs", "Python's own documentation, 2.2 MB, no download", "PSF-2.0", is_small=True),
)
CONVERSATIONS = by_name(  # for fine-tuning: `hub` has the columns that a file of conversations has
    Dataset(
        "oasst1",
        "human conversations, 88,000 messages",
        "Apache-2.0",
        hub="OpenAssistant/oasst1",
        split="own",
        is_small=True,
    ),
    Dataset("alpaca-gpt4", "52,002 instructions", "CC-BY-NC-4.0", hub="vicgalle/alpaca-gpt4", is_small=True),
    Dataset(
        "builtins-qa",
        "small talk and questions about Python's built-ins, no download",
        "PSF-2.0",
        split="wordings",
        is_small=True,
    ),
    Dataset("pydocs-qa", "the same and the standard library, no download", "PSF-2.0", split="wordings", is_small=True),
)
LABELLED = by_name(  # for a classifier
    Dataset("sms-spam", "5,574 messages", "CC-BY-4.0", hub="ucirvine/sms_spam", text_column="sms"),
)


def small(datasets: dict[str, Dataset]) -> tuple[str, ...]:
    """Returns the names of the data sets that a training script prepares first."""
    return tuple(name for name, dataset in datasets.items() if dataset.is_small)


def listed(names: Iterable[object], last_word: str = "or") -> str:
    """Returns names as a list for a sentence: "a, b or c"."""
    *first, last = map(str, names)
    return f"{', '.join(first)} {last_word} {last}" if first else last
