"""The one entry for every model that a user can name, in our format or another."""

from pathlib import Path

from system.errors import UserError
from text import tokenizer as tokenizers
from text.tokenizer import Tokenizer
from weights import huggingface, lora, nanogpt
from weights.checkpoint import Checkpoint, from_contents, grow_vocabulary, read_contents, tokenizer_of


def load_checkpoint(name: str | Path, verify: bool = False, kinds: tuple[str, ...] = ("base", "sft")) -> Checkpoint:
    """Loads the model that the user names onto the CPU; tensors are mapped from their file where possible.

    `name` is our `.pt` file, nanoGPT's `ckpt.pt`, a folder in the format of Hugging Face, or a model of the Hub, such
    as "gpt2". `verify` compares the checksums of a `.pt` file first. `kinds` are those that the caller accepts; an
    adapter, of the kind "lora", is merged with its base model unless the caller accepts "lora". Raises UserError if the
    model is missing, damaged, foreign, of another kind, or from a newer version of this project.
    """
    path = Path(name)
    checkpoint = load_file(path, verify) if path.is_file() else _load_folder(path)
    if checkpoint["kind"] == "lora" and "lora" not in kinds:
        checkpoint = lora.merge_into_base(checkpoint, load_base(checkpoint, path), path)
    if checkpoint["kind"] in kinds:
        return checkpoint
    if checkpoint["kind"] == "classifier":
        raise UserError(f"{path} is a classifier: ask it with classify.py")
    if kinds == ("classifier",):
        raise UserError(f"{path} is a language model, not a classifier: train one with train_classifier.py")
    raise UserError(f"{path} is of the kind {checkpoint['kind']!r}: choose one of the kind {' or '.join(kinds)}")


def load_tokenizer(name: str | Path) -> Tokenizer:
    """Loads a tokenizer by name: a `tokenizer.json`, "gpt2", or any model that `load_checkpoint` knows."""
    if Path(name).suffix == ".json":
        return tokenizers.load_tokenizer(name)
    if str(name) == "gpt2":
        return tokenizers.gpt2()
    return tokenizer_of(load_checkpoint(name, kinds=("base", "sft", "classifier", "lora")))


def load_base(adapter: Checkpoint, path: str | Path) -> Checkpoint:
    """Returns the base model of the adapter in the file `path`, with the vocabulary grown as for training it."""
    return grow_vocabulary(load_checkpoint(lora.find_base(adapter, path)))


def load_file(path: Path, verify: bool = False) -> Checkpoint:
    """Loads a `.pt` file, ours or nanoGPT's, of any kind; an adapter stays apart from its base model."""
    contents = read_contents(path, verify)
    return nanogpt.from_nanogpt(contents, path) if "model_args" in contents else from_contents(contents, path)


def _load_folder(path: Path) -> Checkpoint:
    if (path / "slices.json").exists():
        raise UserError(f"{path} is a checkpoint in slices, which version 0.2 was the last to read: use that version")
    folder = huggingface.find_folder(path)
    if folder is None:
        raise UserError(f"no checkpoint {path}: train one with train.py, or choose one that generate.py --list shows")
    return huggingface.read_folder(folder)
