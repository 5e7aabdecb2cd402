"""Files by strangers: whatever they hold, a file loads, or costs one line, within seconds and without much memory."""

import copy
import functools
import json
import math
import os
import random
import shutil
import struct
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import run_script
from safetensors.torch import load_file, save_file

from model import GPTConfig
from system.errors import UserError
from system.untrusted import MAX_JSON_BYTES
from text.token_files import count_tokens, read_meta, read_sft_meta, read_token_meta
from text.tokenizer import from_spec, load_tokenizer
from training.checkpointing import restore
from training.config import TrainerConfig
from training.distributed import Processes
from training.evaluation import mean_loss, read_hellaswag
from training.loader import Conversations, Windows
from training.plots import draw_losses
from training.run_log import read_log
from training.state import TrainingState
from weights import checkpoint
from weights.huggingface import write_folder
from weights.loading import load_checkpoint

SAMPLES = Path(__file__).parent / "samples"
CHECKPOINTS = ["base.pt", "sft.pt", "lora.pt", "classifier.pt", "adamw.last.pt", "base.last.pt"]
KINDS = ("base", "sft", "classifier")
SECONDS, MEGABYTES = 20, 500  # of the slowest processor that was tried: four times what the worst case needs
pytestmark = pytest.mark.usefixtures("bounded_memory")
MISSING = object()


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


PLAIN_VALUES = [
    MISSING, None, True, False, 0, 1, -1, 7, 2**31, 10**7, 10**9, 2**63, -(10**30), 0.5, 128.5, 1.0, -0.0, 1e308,
    math.nan, math.inf, "", "x", "gpt2", "chat", "../../etc/passwd", "a\0b", "\ud800", "line\nline", "x" * 5000,
    [], [1], ["a", "b"], ["a", "a"], [None], [{}], [[]], {}, {"a": 1}, {"tokens": -1}, nested(80),
]  # fmt: skip
"""Values of JSON that no field expects, or only some fields."""

TENSOR_VALUES = [
    torch.zeros(1).expand(10**12),
    torch.zeros(1, 1).expand(10**6, 10**6),
    torch.zeros(10**13, device="meta"),
    torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.int64), torch.ones(1), (10**7, 10**7), check_invariants=True),
    torch.zeros(8, dtype=torch.int64),
    torch.zeros(8, dtype=torch.complex64),
    torch.zeros(8).to(torch.float8_e4m3fn),
    torch.zeros(0),
    torch.tensor(3),
    torch.nn.Parameter(torch.zeros(8, 8)),
]
"""Tensors that a file can hold in a few bytes."""


def paths(value: Any, depth: int = 4) -> list[tuple]:
    """Returns the keys and indices that lead to each field inside nested dicts and lists, down to a depth."""
    if depth == 0 or not isinstance(value, dict | list):
        return []
    items = value.items() if isinstance(value, dict) else enumerate(value[:3])
    return [path for key, inner in items for path in [(key,), *((key, *rest) for rest in paths(inner, depth - 1))]]


def mutate(value: Any, rng: random.Random, values: list) -> Any:
    """Returns a copy of nested dicts and lists in which one to three fields are replaced, missing or added."""
    for _ in range(rng.randint(1, 3)):
        value = copy.copy(value)
        container, choices = value, paths(value)
        *way, last = rng.choice([path for path in choices if len(path) == rng.randint(1, 4)] or choices or [("x",)])
        for key in way:
            container[key] = copy.copy(container[key])
            container = container[key]
        if rng.random() < 0.1 and isinstance(container, dict):
            last = rng.choice(["extra", 3, None, "lm_head.weight", "n_classes", "model_args"])
        replacement = rng.choice(values)
        if replacement is not MISSING:
            container[last] = replacement
        elif isinstance(container, dict):
            container.pop(last, None)
        else:
            del container[last]
    return value


def require_harmless(read: Callable[[], object], case: object) -> bool:
    """Whether a file loads. Fails the test if it ends in anything but success or one line, or takes too long."""
    start = time.process_time()  # the time of this process alone: the machine may be busy
    is_loaded = True
    try:
        read()
    except UserError as error:
        is_loaded = False
        assert "\n" not in str(error) and len(str(error)) < 1000, case
    except Exception as error:
        pytest.fail(f"case {case}: {type(error).__name__}: {error}")
    seconds = time.process_time() - start
    assert seconds < SECONDS, f"case {case} took {seconds:.1f} s"
    return is_loaded


def use(path: Path) -> None:
    """Loads a model, computes with it, and shows it, as the scripts do."""
    state = load_checkpoint(path, kinds=KINDS)
    model = checkpoint.build(state)
    checkpoint.describe(state)
    tokenizer = checkpoint.tokenizer_of(state)
    with torch.inference_mode():
        ids = tokenizer.encode("a fox")[: model.config.block_size]
        logits = model(torch.tensor([ids]))
    if not model.config.n_classes:
        tokenizer.decode([int(logits[0, -1, : model.config.n_tokens].argmax()), model.config.n_tokens - 1])


def resume(path: Path, optimizer: str) -> None:
    """Continues a run from a file, by one step."""
    resumed = load_checkpoint(path, kinds=("base",))
    config = TrainerConfig(
        out=path.with_name("run.pt"), optimizer=optimizer, device="cpu", grad_accum_steps=1, batch_size=1
    )
    state = TrainingState.create(checkpoint.build(resumed), config, Processes.join("cpu"))
    restore(state, resumed)
    state.model(torch.ones(1, 4, dtype=torch.int64), torch.ones(1, 4, dtype=torch.int64)).backward()
    for each in state.optimizers:
        each.step()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_with_other_fields(tmp_path, name):
    shutil.copy(SAMPLES / "base.pt", tmp_path)
    contents, path = torch.load(SAMPLES / name, weights_only=True), tmp_path / f"x_{name}"
    contents["model"] = dict(contents["model"])
    rng = random.Random(name)
    read = functools.partial(resume, path, "adamw") if name == "adamw.last.pt" else functools.partial(use, path)
    if name == "base.last.pt":
        read = functools.partial(resume, path, "muon")
    torch.save(contents, path)
    read()  # the unchanged file loads; what is imported now costs no case its time
    is_loaded = []
    for i in range(40):
        changed = mutate(contents, rng, PLAIN_VALUES + TENSOR_VALUES)
        if i % 4 == 0:
            changed = {**contents, "config": mutate(contents["config"], rng, PLAIN_VALUES)}
        torch.save(changed, path)
        is_loaded.append(require_harmless(read, (name, i)))
    assert not all(is_loaded)


@pytest.mark.parametrize("field", ["optimizer", "lora", "config", "history", "model"])
def test_a_checkpoint_with_one_other_field_inside(tmp_path, field):
    name = {"optimizer": "adamw.last.pt", "lora": "lora.pt"}.get(field, "base.pt")
    shutil.copy(SAMPLES / "base.pt", tmp_path)
    contents, path = torch.load(SAMPLES / name, weights_only=True), tmp_path / "x.last.pt"
    contents["model"] = dict(contents["model"])
    rng = random.Random(field)
    read = functools.partial(resume, path, "adamw") if field == "optimizer" else functools.partial(use, path)
    torch.save(contents, path)
    read()
    for i in range(25):
        torch.save({**contents, field: mutate(contents[field], rng, PLAIN_VALUES + TENSOR_VALUES)}, path)
        require_harmless(read, (field, i))


@pytest.mark.parametrize("history", [[{"step": 2}], [{"step": 2, "loss": 1.0}], [{}], [{"step": 2, "val_loss": "1"}]])
def test_a_history_holds_evaluations_only(tmp_path, history):
    torch.save({**torch.load(SAMPLES / "base.pt", weights_only=True), "history": history}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="its history is not a list of evaluations"):
        load_checkpoint(tmp_path / "x.pt")


def as_nanogpt(state: dict) -> dict:
    config = state["config"]
    names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "bias", "dropout")
    weights = {f"transformer.{name}": tensor for name, tensor in state["model"].items()}
    return {"model": weights, "model_args": {name: getattr(config, name) for name in names}, "iter_num": 5}


@pytest.fixture(scope="module")
def with_gpt2s_vocabulary() -> dict:
    """A tiny model with GPT-2's tokenizer."""
    torch.manual_seed(0)
    config = GPTConfig(block_size=8, vocab_size=50257, n_tokens=50257, n_layer=1, n_head=1, n_embd=2)
    model = checkpoint.GPT(config)
    return checkpoint.pack(model, kind="base", tokenizer="gpt2", template=None)


def test_nanogpts_checkpoint_with_other_fields(tmp_path, with_gpt2s_vocabulary):
    contents, path, rng = as_nanogpt(with_gpt2s_vocabulary), tmp_path / "ckpt.pt", random.Random(1)
    torch.save(contents, path)
    assert require_harmless(lambda: use(path), "unchanged")
    for i in range(60):
        torch.save(mutate(contents, rng, PLAIN_VALUES + TENSOR_VALUES), path)
        require_harmless(lambda: use(path), i)


def test_a_hugging_face_folder_with_other_fields(tmp_path):
    folder, rng = tmp_path / "hf", random.Random(2)
    write_folder(load_checkpoint(SAMPLES / "sft.pt"), folder)
    assert require_harmless(lambda: use(folder), "unchanged")
    texts = {name: (folder / name).read_text() for name in ("config.json", "tokenizer_config.json")}
    values = PLAIN_VALUES + ["model.safetensors", {"x": "model.safetensors"}, {"x": "../hf/config.json"}]
    for i in range(60):
        name = rng.choice(["config.json", "config.json", "tokenizer_config.json"])
        (folder / name).write_text(json.dumps(mutate(json.loads(texts[name]), rng, values)))
        require_harmless(lambda: use(folder), i)
        (folder / name).write_text(texts[name])
    for i in range(20):
        index = {"metadata": {}, "weight_map": {"wte.weight": "model.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(mutate(index, rng, values)))
        require_harmless(lambda: use(folder), f"index {i}")


def test_a_hugging_face_folder_with_other_tensors(tmp_path):
    folder, rng = tmp_path / "hf", random.Random(3)
    write_folder(load_checkpoint(SAMPLES / "base.pt"), folder)
    weights = load_file(folder / "model.safetensors")
    tensors = [torch.zeros(8, 8, 8), torch.zeros(0), torch.zeros(8, dtype=torch.int8), torch.zeros(320, 9), MISSING]
    for i in range(30):
        changed = {name: tensor for name, tensor in mutate(weights, rng, tensors).items() if isinstance(name, str)}
        save_file({name: tensor.clone() for name, tensor in changed.items()}, folder / "model.safetensors")
        require_harmless(lambda: use(folder), i)


def test_a_meta_file_with_other_fields(tmp_path):
    folder, rng = tmp_path / "data", random.Random(4)
    shutil.copytree(SAMPLES / "data", folder)
    values = [*PLAIN_VALUES, ["train.bin", "../val.bin"], ["train.bin", "val.bin", ""], ["train", "val"], ["val.bin"]]
    shape = GPTConfig(block_size=8, vocab_size=320, n_tokens=260)

    def read() -> None:
        meta = read_token_meta(folder)
        count_tokens(folder)
        for split in ("train", "val"):
            Windows.from_folder(folder, meta, split, shape, 2, 0).batch(0)
        read_meta(folder / "meta.json", "prepare_data.py")
        read_sft_meta(folder)

    assert require_harmless(read, "unchanged")
    for i in range(90):
        name = ("meta.json", "sft_meta.json")[i % 3 == 0]
        text = (SAMPLES / "data" / name).read_text()
        (folder / name).write_text(json.dumps(mutate(json.loads(text), rng, values)))
        require_harmless(read, i)
        (folder / name).write_text(text)


def test_a_tokenizer_file_with_other_fields(tmp_path):
    path, rng = tmp_path / "tokenizer.json", random.Random(5)
    good = json.loads((SAMPLES / "data/tokenizer.json").read_text())
    load_tokenizer(SAMPLES / "data/tokenizer.json").encode("a fox")
    for i in range(40):
        vocabulary = mutate(good["model"]["vocab"], rng, PLAIN_VALUES) if i % 2 else good["model"]["vocab"]
        whole = {"model": {"vocab": vocabulary}} if i % 2 else mutate(good, rng, PLAIN_VALUES)
        path.write_text(json.dumps(whole))
        require_harmless(lambda: load_tokenizer(path).encode("a fox"), i)


JSON_BOMBS = {
    "brackets": "[" * 100_000,
    "closed brackets": "[" * 100_000 + "]" * 100_000,
    "braces": '{"model":' * 100_000,
    "lists": "[" + "[]," * (MAX_JSON_BYTES // 3 - 2) + "[]]",
    "fewer lists": "[" + "[]," * (2**18 - 2) + "[]]",
    "too long": " " * (MAX_JSON_BYTES + 1) + "{}",
    "a long number": "9" * 5000,
    "a long key": json.dumps({"model": {"vocab": {"a" * 4_000_000: 0}}}),
    "not UTF-8": "\ud800",
    "nothing": "",
}


@pytest.mark.parametrize("bomb", JSON_BOMBS.values(), ids=JSON_BOMBS)
def test_json_that_is_deep_or_huge(tmp_path, bomb):
    for name in ("tokenizer.json", "config.json", "meta.json", "sft_meta.json"):
        (tmp_path / name).write_bytes(bomb.encode(errors="surrogatepass"))
    for read in (
        lambda: load_tokenizer(tmp_path / "tokenizer.json"),
        lambda: load_checkpoint(tmp_path),
        lambda: read_token_meta(tmp_path),
        lambda: read_sft_meta(tmp_path),
        lambda: from_spec(bomb),
    ):
        assert not require_harmless(read, read)


def global_(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


FIVE_BILLION = b"\x8a\x09" + (5 * 10**9).to_bytes(9, "little")
PICKLE_BOMBS = {
    "bytearray": global_("builtins", "bytearray") + FIVE_BILLION + b"\x85R",
    "python 2": global_("__builtin__", "bytearray") + FIVE_BILLION + b"\x85R",
    "tensor": global_("torch", "FloatTensor") + FIVE_BILLION + b"\x85R",
    "lists": b"](" + b"]" * 10_000_000 + b"e",
    "numbers": b"](" + b"K\x01" * 10_000_000 + b"e",
    "sets": b"](" + b"\x8f" * 1_000_000 + b"e",
    "a long text": b"X" + struct.pack("<I", 40_000_000) + b"a" * 40_000_000,
    "a text without end": b"X" + struct.pack("<I", 2**32 - 1) + b"a",
    "nested": b"]" * 1_000_000 + b"a" * 999_999,
    "a call": global_("os", "system") + b"X\x02\0\0\0ls\x85R",
}


@pytest.mark.parametrize("bomb", PICKLE_BOMBS.values(), ids=PICKLE_BOMBS)
def test_pickle_that_fills_memory(tmp_path, bomb):
    entries = [(name, b"\x80\x02" + bomb + b"." if "data.pkl" in name else content) for name, content in unzipped()]
    write_zip(tmp_path / "x.pt", entries)
    assert not require_harmless(lambda: load_checkpoint(tmp_path / "x.pt"), "pickle")


def unzipped() -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(SAMPLES / "base.pt") as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def write_zip(path: Path, entries: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> None:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", compression) as archive:
        warnings.simplefilter("ignore")  # two entries of one name
        for name, content in entries:
            archive.writestr(name, content)


def with_size(path: Path, entry: bytes, size: int) -> None:
    """Makes the directory of a zip file announce another size of an entry."""
    content, position = bytearray(path.read_bytes()), 0
    while (position := content.find(b"PK\x01\x02", position) + 4) > 3:
        if entry in content[position + 42 : position + 80]:
            struct.pack_into("<II", content, position + 16, size, size)
    path.write_bytes(content)


def test_archives_that_torch_would_not_write(tmp_path):
    path, entries = tmp_path / "x.pt", unzipped()
    write_zip(path, entries)
    assert require_harmless(lambda: use(path), "the same entries")
    write_zip(path, entries, zipfile.ZIP_DEFLATED)
    assert not require_harmless(lambda: load_checkpoint(path), "deflated")
    assert not require_harmless(lambda: load_checkpoint(path, verify=True), "deflated, checksums compared")
    bomb = b"\x80\x02" + PICKLE_BOMBS["bytearray"] + b"."
    for name in ("base/data.pkl", "base/DATA.PKL"):
        for both in ([*entries, (name, bomb)], [(name, bomb), *entries]):
            write_zip(path, both)
            assert not require_harmless(lambda: load_checkpoint(path), name)
    for entry, size in ((b"data.pkl", 2**32 - 2), (b"data/0", 2**32 - 2), (b"data/0", 10), (b"byteorder", 2**31)):
        write_zip(path, entries)
        with_size(path, entry, size)
        require_harmless(lambda: load_checkpoint(path), (entry, size))
    for length in (0, 1, 100, 10_000, 24_000):
        path.write_bytes((SAMPLES / "base.pt").read_bytes()[:length])
        assert not require_harmless(lambda: load_checkpoint(path), f"cut to {length}")


def test_a_safetensors_file_with_a_huge_header(tmp_path):
    write_folder(load_checkpoint(SAMPLES / "base.pt"), tmp_path / "hf")
    tensors = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(200_000)}
    header = json.dumps(tensors).encode()
    (tmp_path / "hf/model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(UserError, match="its header has .* bytes"):
        load_checkpoint(tmp_path / "hf")


LOGGED = [
    {"step": 0, "val_loss": 5.5, "seconds": 0.1, "examples": [{"input": "a", "expected": "b", "output": "c"}]},
    {"step": 1, "loss": 5.0, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens": 64, "seconds": 0.2},
    {"step": 2, "val_loss": 4.5, "seconds": 0.3, "examples": [{"input": "a", "expected": "b", "output": "d"}]},
]
LINES = {
    "no step": '{"loss": 1}',
    "a step of text": '{"step": "x", "loss": 1, "tokens": 3, "learning_rate": 1}',
    "step 0": '{"step": 0, "learning_rate": 1, "tokens": 5}',
    "no tokens": '{"step": 1, "learning_rate": 1}',
    "infinite": '{"step": 1, "loss": Infinity, "tokens": NaN, "seconds": NaN, "learning_rate": NaN}',
    "huge": '{"step": 1, "loss": 1e308, "val_loss": -1e308, "learning_rate": 1e308, "tokens": 1}',
    "30 digits": '{"step": 1, "loss": ' + "9" * 30 + "}",
    "no loss beside examples": '{"step": 3, "examples": []}',
    "fewer examples": '{"step": 3, "val_loss": 1, "examples": []}',
    "examples of numbers": '{"step": 3, "val_loss": 1, "examples": [{"input": 1, "expected": 2, "output": 3}]}',
    "half a surrogate": '{"step": 3, "val_loss": 1, "examples": [{"input": "\\ud800", "expected": "", "output": ""}]}',
    "deep": '{"step":' + "[" * 100_000,
    "long": '{"step": 1, "x": "' + "y" * 30_000_000 + '"}',
    "line breaks": "\n" * 1_000_000,
}


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_a_log_with_an_odd_line_is_drawn(tmp_path, line):
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join([*map(json.dumps, LOGGED), line, ""]))
    assert require_harmless(lambda: draw_losses(path, tmp_path / "x.png"), "a line")
    assert sum(entry in LOGGED for entry in read_log(path)) == (0 if line == LINES["long"] else 3)


def test_a_log_with_other_fields_is_drawn(tmp_path):
    path, rng = tmp_path / "x.jsonl", random.Random(6)
    draw_losses(path, tmp_path / "x.png")
    for i in range(15):
        path.write_text("".join(json.dumps(entry) + "\n" for entry in mutate(LOGGED, rng, PLAIN_VALUES)))
        assert require_harmless(lambda: draw_losses(path, tmp_path / "x.png"), i)


def test_a_run_with_a_name_that_is_not_utf8(tmp_path):
    out = os.fsdecode(b"caf\xe9.pt")
    shape = ["--n-layer", 1, "--n-head", 1, "--n-embd", 8, "--block-size", 32, "--batch-size", 2, "--max-steps", 1]
    result = run_script(tmp_path, "train.py", "--data", SAMPLES / "data", "--out", out, "--device", "cpu", *shape)
    assert result.returncode == 0, result.stderr
    use(tmp_path / out)
    assert read_log(tmp_path / os.fsdecode(b"caf\xe9.jsonl")) and (tmp_path / os.fsdecode(b"caf\xe9_loss.png")).exists()


def test_what_is_no_log_counts_as_none(tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path in [*tmp_path.iterdir(), tmp_path / "missing.jsonl"]:
        assert read_log(path) == []


def damaged_index(change: Callable[[np.ndarray], object]) -> Callable[[Path], object]:
    return lambda folder: edit(folder / "sft_train_index.bin", "<u8", change)


def edit(path: Path, dtype: str, change: Callable[[np.ndarray], object]) -> None:
    numbers = np.fromfile(path, dtype)
    changed = change(numbers)
    (numbers if changed is None else np.asarray(changed, dtype)).tofile(path)


DAMAGED_CONVERSATIONS = {
    "an index that goes back": damaged_index(lambda index: index[[0, 3, 2, 1, *range(4, len(index))]]),
    "an empty conversation": damaged_index(lambda index: index[[0, 0, *range(1, len(index))]]),
    "an index that starts late": damaged_index(lambda index: index[1:]),
    "an index beyond the end": damaged_index(lambda index: index.__setitem__(2, 2**63)),
    "an index of -1": damaged_index(lambda index: index.__setitem__(0, 2**64 - 1)),
    "no index": damaged_index(lambda index: index[:0]),
    "noise": damaged_index(lambda index: np.random.default_rng(0).integers(2**63, size=len(index))),
    "no loss": lambda folder: edit(folder / "sft_train_mask.bin", "u1", lambda mask: mask * 0),
    "loss everywhere": lambda folder: edit(folder / "sft_train_mask.bin", "u1", lambda mask: mask * 0 + 1),
    "a short mask": lambda folder: edit(folder / "sft_train_mask.bin", "u1", lambda mask: mask[:-1]),
    "foreign ids": lambda folder: edit(folder / "sft_train.bin", "<u2", lambda ids: ids * 0 + 65_535),
    "foreign held-out ids": lambda folder: edit(folder / "sft_val.bin", "<u2", lambda ids: ids * 0 + 65_535),
}


@pytest.mark.parametrize("damage", DAMAGED_CONVERSATIONS.values(), ids=DAMAGED_CONVERSATIONS)
def test_damaged_conversations_cost_one_line(tmp_path, damage):
    shutil.copytree(SAMPLES / "data", tmp_path / "data")
    model = checkpoint.build(load_checkpoint(SAMPLES / "base.pt"))

    def read() -> None:
        for split in ("train", "val"):
            data = Conversations(tmp_path / "data", split, model.config.block_size, 2, 0)
            mean_loss(model, data.in_order(), 2)

    assert require_harmless(read, "unchanged")
    damage(tmp_path / "data")
    assert not require_harmless(read, "damaged")


def test_foreign_ids_in_held_out_text_cost_one_line(tmp_path):
    shutil.copytree(SAMPLES / "data", tmp_path / "data")
    edit(tmp_path / "data/val.bin", "<u2", lambda ids: ids.__setitem__(700, 65_535))
    model = checkpoint.build(load_checkpoint(SAMPLES / "base.pt"))
    meta = read_token_meta(tmp_path / "data")
    data = Windows.from_folder(tmp_path / "data", meta, "val", model.config, 2, 0)
    with pytest.raises(UserError, match="holds ids that the model does not have"):
        mean_loss(model, data.in_order(), 2)


@pytest.mark.parametrize("label", ["Infinity", "NaN", "1e400", "9" * 30, '"x"', "null", "[]", "true", "-1", "4"])
def test_hellaswags_labels_are_checked(tmp_path, label):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"ctx": "a", "endings": ["a", "b", "c", "d"], "label": ' + label + "}\n")
    require_harmless(lambda: list(read_hellaswag(path)), label)


WORST = {
    "ten million layers": {"n_layer": 10**7},
    "a billion wide": {"n_embd": 10**9},
    "a fraction": {"n_embd": 128.5},
    "a text": {"n_head": "x"},
    "no head": {"n_head": 0},
    "one terabyte of a few bytes": {"vocab_size": 10**11},
}


@pytest.mark.parametrize("change", WORST.values(), ids=WORST)
def test_the_worst_configs_cost_one_line(tmp_path, change):
    contents = torch.load(SAMPLES / "base.pt", weights_only=True)
    torch.save({**contents, "config": {**contents["config"], **change}}, tmp_path / "x.pt")
    [name] = change
    with pytest.raises(UserError, match=rf"x\.pt is damaged: .*({name}|do not fit its config)"):
        load_checkpoint(tmp_path / "x.pt")


def test_memory_that_tensors_share_is_not_multiplied(tmp_path):
    contents = torch.load(SAMPLES / "base.pt", weights_only=True)
    weights = dict(contents["model"])
    weights["h.0.ln_1.weight"] = weights["h.0.ln_2.weight"]
    torch.save({**contents, "model": weights}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="several tensors share their memory"):
        load_checkpoint(tmp_path / "x.pt")


def test_half_precision_becomes_float32(tmp_path):
    contents = torch.load(SAMPLES / "base.pt", weights_only=True)
    weights = {name: tensor.half() for name, tensor in contents["model"].items()}
    torch.save({**contents, "model": weights}, tmp_path / "x.pt")
    assert {tensor.dtype for tensor in load_checkpoint(tmp_path / "x.pt")["model"].values()} == {torch.float32}


def test_real_processes_end_with_one_line(tmp_path):
    contents = torch.load(SAMPLES / "adamw.last.pt", weights_only=True)
    shape = contents["config"]
    torch.save({**contents, "config": {**shape, "n_layer": 10**7}}, tmp_path / "x.pt")
    torch.save({**contents, "tokenizer": "[" * 100_000}, tmp_path / "y.pt")
    torch.save({**contents, "recent_losses": "x"}, tmp_path / "z.last.pt")
    write = ["--prompt", "x", "--max-new-tokens", "1", "--device", "cpu"]
    for command in (
        ["generate.py", "--model", "x.pt", *write],
        ["generate.py", "--model", "y.pt", *write],
        ["train.py", "--data", SAMPLES / "data", "--out", "z.pt", "--batch-size", "2", "--device", "cpu", "--resume"],
    ):
        result = run_script(tmp_path, *command, timeout=30)
        assert result.returncode == 1, result.stderr
        announcement, error = result.stderr.splitlines()
        assert error.startswith("error: ") and announcement.startswith(command[0])
