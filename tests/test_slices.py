"""Saves in slices: a folder equals the file, changes in one moment, is written while training goes on, cannot harm."""

import json
import math
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, run_script
from safetensors import safe_open
from safetensors.torch import save_file
from test_hostile_files import MISSING, PLAIN_VALUES

import export
from model import GPT, GPTConfig
from system.background import Background
from system.errors import UserError
from system.locks import releases_locks
from training import slice_writer
from training.checkpointing import Checkpointer, claim_output, restore
from training.config import TrainerConfig
from training.distributed import Processes
from training.loader import Windows
from training.slice_writer import SliceWriter
from training.state import TrainingState
from training.trainer import Trainer
from weights import checkpoint, slices
from weights.loading import load_checkpoint

MEGABYTES = 300
SHARD = "shard-0000{}-model-00001-of-00001.safetensors"


def new_trainer(toy: Path, folder: Path) -> Trainer:
    torch.manual_seed(0)
    shape = GPTConfig(block_size=32, vocab_size=448, n_tokens=403, n_layer=1, n_head=2, n_embd=32)
    config = TrainerConfig(out=folder / "a.pt", device="cpu", batch_size=4)
    data = Windows([toy / "data/toy/train.bin"], 32, 4, 0)
    return Trainer(TrainingState.create(GPT(shape), config, Processes()), data, data)


def take_step(trainer: Trainer) -> None:
    batch = trainer.load_batch(trainer.state.step)
    trainer.forward_backward(batch.micro_batches, batch.total_weight)
    trainer.update_weights(0.1)
    trainer.state.step += 1


def new_checkpointer(toy: Path, in_slices: bool) -> Checkpointer:
    tokenizer = load_checkpoint(toy / "checkpoints/toy.pt")["tokenizer"]
    metadata = {"kind": "base", "tokenizer": tokenizer, "template": None}
    return Checkpointer(metadata, Background(), SliceWriter(Processes()) if in_slices else None)


@pytest.fixture()
def run(toy, tmp_path) -> tuple[Trainer, Checkpointer]:
    """A run that has saved step 1 in slices."""
    trainer, checkpointer = new_trainer(toy, tmp_path), new_checkpointer(toy, in_slices=True)
    take_step(trainer)
    checkpointer.on_save(trainer.state)
    checkpointer.background.wait()
    return trainer, checkpointer


def claim(config: TrainerConfig) -> dict | None:
    """What a script does first: it locks its output and reads what to resume. Its end frees the lock."""
    found = []
    releases_locks(lambda config: found.append(claim_output(config, Processes(), "base")))(config)
    return found[0]


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def as_json(state: dict, *without: str) -> dict:
    """A checkpoint without its tensors."""
    kept = {name: value for name, value in state.items() if name not in ("model", "optimizer", "config", *without)}
    return json.loads(json.dumps(kept))


def test_slices_hold_what_the_file_holds_and_one_replaces_the_other(toy, run):
    trainer, _ = run
    folder = trainer.config.slices_path
    assert names(folder) == {"slices.json", f"step_1/{SHARD.format(1)}"}
    sliced = load_checkpoint(folder, verify=True)
    to_file = new_checkpointer(toy, in_slices=False)
    to_file.on_save(trainer.state)
    to_file.close()
    assert not folder.exists()
    whole = load_checkpoint(trainer.config.last_path, verify=True)
    assert as_json(sliced, "created") == as_json(whole, "created") and sliced["config"] == whole["config"]
    torch.testing.assert_close(sliced["model"], whole["model"], rtol=0, atol=0)
    for ours, theirs in zip(sliced["optimizer"], whole["optimizer"], strict=True):
        torch.testing.assert_close(ours["state"], theirs["state"], rtol=0, atol=0)
        assert as_json(ours, "state") == as_json(theirs, "state")


def test_a_large_part_is_written_to_several_files(run, monkeypatch):
    trainer, checkpointer = run
    before = load_checkpoint(trainer.config.slices_path)["model"]
    monkeypatch.setattr(slice_writer, "MAX_FILE_BYTES", 100_000)
    trainer.state.step += 1
    checkpointer.on_save(trainer.state)
    checkpointer.close()
    sizes = [path.stat().st_size for path in (trainer.config.slices_path / "step_2").iterdir()]
    assert len(sizes) > 2 and max(sizes) < 200_000  # the token embedding and its neighbours
    torch.testing.assert_close(load_checkpoint(trainer.config.slices_path)["model"], before, rtol=0, atol=0)


def test_the_folder_is_resumed_and_exported_as_one_file(run, toy, tmp_path):
    trainer, _ = run
    resumed = load_checkpoint(trainer.config.slices_path, verify=True)
    other = new_trainer(toy, tmp_path)
    other.state.model.load_state_dict(checkpoint.build(resumed).state_dict())
    restore(other.state, resumed)
    export.main(export.Config(tmp_path / "x.pt", trainer.config.slices_path))
    with pytest.raises(UserError, match="--overwrite"):
        export.main(export.Config(tmp_path / "x.pt", trainer.config.slices_path))
    exported = load_checkpoint(tmp_path / "x.pt", verify=True)
    assert exported["step"] == 1 and not exported.keys() & set(checkpoint.RESUME_KEYS)
    torch.testing.assert_close(exported["model"], resumed["model"], rtol=0, atol=0)
    take_step(trainer)
    take_step(other)
    ours, theirs = other.state.model.state_dict(), trainer.state.model.state_dict()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)  # the same process, the same numbers


def test_training_goes_on_before_slices_are_written_and_does_not_change_them(run):
    trainer, checkpointer = run
    folder = trainer.config.slices_path
    before = {name: tensor.clone() for name, tensor in trainer.state.model.state_dict().items()}
    disk = threading.Event()
    checkpointer.background.start(disk.wait)  # the disk is slow
    checkpointer.on_save(trainer.state)
    take_step(trainer)
    take_step(trainer)
    assert slices.read_step(folder) == 1
    disk.set()
    checkpointer.on_save(trainer.state)
    assert slices.read_step(folder) == 1  # a second save waits for the first
    checkpointer.close()
    saved = load_checkpoint(folder, verify=True)
    assert saved["step"] == 3 and names(folder) == {"slices.json", f"step_3/{SHARD.format(1)}"}
    assert not torch.equal(saved["model"]["wte.weight"], before["wte.weight"])


def test_a_save_that_fails_is_reported_and_leaves_the_old_one(run):
    trainer, checkpointer = run
    folder = trainer.config.slices_path
    take_step(trainer)
    (folder / "step_2").write_text("in the way")
    checkpointer.on_save(trainer.state)
    with pytest.raises(UserError, match="step_2: .*; the older save, if any, is unchanged"):
        checkpointer.background.wait()
    with pytest.raises(UserError, match="step_2"):
        checkpointer.on_step(trainer.state, None, 0.0)
    assert load_checkpoint(folder, verify=True)["step"] == 1


def test_a_full_disk_leaves_no_slices(toy, tmp_path):
    """A limit on the size of files stands for the full disk: both end in an error while the file is being written."""
    script = (
        "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)); "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    (tmp_path / "limited.py").write_text(script)
    shape = ["--n-layer", 1, "--n-head", 1, "--n-embd", 32, "--block-size", 32, "--batch-size", 1]
    result = run_script(
        toy, str(tmp_path / "limited.py"), REPOSITORY / "train.py", "--data", "data/toy", *shape,
        "--out", "checkpoints/full.pt", "--max-steps", 2,
        "--eval-tokens", 64, "--device", "cpu", "--sharded-saves", "on",
    )  # fmt: skip
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert "cannot write checkpoints/full.last/step_2: File too large" in result.stderr.splitlines()[-1]
    assert not names(toy / "checkpoints/full.last")


def test_resume_takes_the_newer_of_the_folder_and_the_file(run, toy):
    trainer, checkpointer = run
    config = TrainerConfig(out=trainer.config.out, resume=True)
    folder, file = config.slices_path, config.last_path
    shutil.copytree(folder, kept := folder.with_name("kept"))
    take_step(trainer)
    to_file = new_checkpointer(toy, in_slices=False)
    to_file.on_save(trainer.state)
    to_file.close()
    shutil.copytree(kept, folder)  # as if a kill had come before the folder was removed
    assert claim(config)["step"] == 2
    shutil.copy(file, kept)
    take_step(trainer)
    checkpointer.on_save(trainer.state)
    checkpointer.close()
    assert not file.exists()
    shutil.copy(kept / file.name, file)
    assert claim(config)["step"] == 3


def test_what_a_kill_leaves_is_removed_and_nothing_else_is(run):
    trainer, _ = run
    folder, whole = trainer.config.slices_path, f"step_1/{SHARD.format(1)}"
    (folder / "step_2").mkdir()
    shutil.copy(folder / whole, folder / "step_2" / SHARD.format(2))
    for name in ("notes.txt", "step_2/notes.txt"):
        (folder / name).write_text("mine")
    (folder / ".slices.json.1.tmp").write_text("{")
    slices.remove_unfinished(folder)
    mine = {"notes.txt", "step_2/notes.txt"}
    assert names(folder) == {"slices.json", whole, ".slices.json.1.tmp"} | mine
    claim(TrainerConfig(out=trainer.config.out, resume=True))
    assert names(folder) >= {"slices.json", whole} | mine
    with pytest.raises(UserError, match="exists: add --resume to continue that run, --overwrite"):
        claim(TrainerConfig(out=trainer.config.out))
    slices.remove(folder)
    assert names(folder) - {".slices.json.1.tmp"} == mine


# ---- hostile folders


def change_meta(change: Callable[[dict], object]) -> Callable[[Path], object]:
    """Returns a function that changes what `slices.json` holds."""

    def damage(folder: Path) -> None:
        meta = json.loads((folder / "slices.json").read_text())
        change(meta)
        (folder / "slices.json").write_text(json.dumps(meta))

    return damage


def change_shards(change: Callable[[list, list], object], **metadata: str) -> Callable[[Path], object]:
    """Returns a function that cuts the shard into two by rows, changes both, and lists them with correct checksums.

    A shard is a list of [name, offset, tensor]. Without a change, the folder stays valid.
    """

    def damage(folder: Path) -> None:
        step = folder / "step_1"
        with safe_open(step / SHARD.format(1), framework="pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        first = [[name, [0] * t.dim(), t[: len(t) // 2].clone() if t.dim() else t] for name, t in tensors.items()]
        second = [
            [name, [len(t) // 2] + [0] * (t.dim() - 1), t[len(t) // 2 :].clone()]
            for name, t in tensors.items()
            if t.dim()
        ]
        change(first, second)
        meta = json.loads((folder / "slices.json").read_text())
        for i, shard in enumerate((first, second), 1):
            path = step / SHARD.format(i)
            info = json.dumps({name: {"saved_offsets": offset} for name, offset, _ in shard})
            save_file({name: t for name, _, t in shard}, path, {"DCP_SHARDING_INFO": info, **metadata})
            meta["slices"]["files"][path.name] = slices.file_facts(path)
        (folder / "slices.json").write_text(json.dumps(meta))

    return damage


def rewrite_shard(content: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    """Returns a function that changes the bytes of the shard, and lists it with its correct checksum."""

    def damage(folder: Path) -> None:
        path = folder / "step_1" / SHARD.format(1)
        path.write_bytes(content(path.read_bytes()))
        change_meta(lambda meta: meta["slices"]["files"].update({path.name: slices.file_facts(path)}))(folder)

    return damage


def listed(meta: dict) -> dict:
    return meta["slices"]["files"][SHARD.format(1)]


HOSTILE: dict[str, Callable[[Path], object]] = {
    "a shard is missing": lambda folder: (folder / "step_1" / SHARD.format(1)).unlink(),
    "a shard is a folder": lambda folder: [
        (folder / "step_1" / SHARD.format(1)).unlink(),
        (folder / "step_1" / SHARD.format(1)).mkdir(),
    ],
    "a shard is cut off": lambda folder: os.truncate(folder / "step_1" / SHARD.format(1), 5000),
    "a shard is cut off and listed so": rewrite_shard(lambda content: content[:-100]),
    "a shard is empty": rewrite_shard(lambda content: b""),
    "a shard is a pickle": rewrite_shard(lambda content: b"cos\nsystem\n(S'touch owned'\ntR."),
    "a header is endless": rewrite_shard(lambda content: (2**40).to_bytes(8, "little") + content[8:]),
    "a header is nested": rewrite_shard(lambda content: (5000).to_bytes(8, "little") + b"[" * 5000),
    "a header claims terabytes": rewrite_shard(lambda content: content.replace(b'"shape":[448,32]', b'"shape":[9**9]')),
    "a bit is flipped": lambda folder: flip_last_bit(folder / "step_1" / SHARD.format(1)),
    "the checksum is another": change_meta(lambda meta: listed(meta).update(sha256="0" * 64)),
    "the size is another": change_meta(lambda meta: listed(meta).update(bytes=1)),
    "no files": change_meta(lambda meta: meta["slices"].update(files={})),
    "a folder outside": change_meta(lambda meta: meta["slices"].update(folder="../a.last/step_1")),
    "a file outside": change_meta(lambda meta: meta["slices"]["files"].update({"../../x.safetensors": listed(meta)})),
    "no optimizer": change_meta(lambda meta: meta.update(optimizer=[])),
    "meta is no JSON": lambda folder: (folder / "slices.json").write_text("{"),
    "meta is endless": lambda folder: os.truncate(folder / "slices.json", 2**40),
    "meta is nested": lambda folder: (folder / "slices.json").write_text("[" * 10**6),
    "slices overlap": change_shards(lambda a, b: b[0][1].__setitem__(0, 1)),
    "slices leave a gap": change_shards(lambda a, b: b[0][1].__setitem__(0, 10**9)),
    "a slice begins below 0": change_shards(lambda a, b: a[0][1].__setitem__(0, -1)),
    "an offset is no number": change_shards(lambda a, b: b[0][1].__setitem__(0, True)),
    "an offset has too many dimensions": change_shards(lambda a, b: b[0][1].append(0)),
    "an offset is endless": change_shards(lambda a, b: b[0].__setitem__(1, 10**30)),
    "offsets are missing": change_shards(lambda a, b: None, DCP_SHARDING_INFO="{}"),
    "offsets are nested": change_shards(lambda a, b: None, DCP_SHARDING_INFO="[" * 5000),
    "a slice is missing": change_shards(lambda a, b: b.pop()),
    "a slice is twice as wide": change_shards(lambda a, b: b[0].__setitem__(2, torch.zeros(224, 64))),
    "a slice has another type": change_shards(lambda a, b: b[0].__setitem__(2, b[0][2].half())),
    "a slice holds integers": change_shards(lambda a, b: b[0].__setitem__(2, b[0][2].int())),
    "a number is there twice": change_shards(lambda a, b: b.append(next(part for part in a if not part[1]))),
    "a tensor without a part": change_shards(lambda a, b: b.append(["x", [0], torch.zeros(1)])),
    "a tensor of nothing": change_shards(lambda a, b: b.append(["other.x", [0], torch.zeros(1)])),
    "a tensor of no parameter": change_shards(lambda a, b: b.append(["optimizer.0.9.9.x", [0], torch.zeros(1)])),
    "a tensor of no optimizer": change_shards(lambda a, b: b.append(["optimizer.7.0.x", [0], torch.zeros(1)])),
    "a tensor that no model has": change_shards(lambda a, b: b.append(["model.x", [0], torch.zeros(1)])),
    "a tensor with a hundred dimensions": change_shards(lambda a, b: b.append(["model.x", [0] * 99, ones(99)])),
}


def ones(dimensions: int) -> torch.Tensor:
    return torch.ones([1] * dimensions)


def flip_last_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def whole_folder(toy, tmp_path_factory) -> Path:
    trainer = new_trainer(toy, tmp_path_factory.mktemp("slices"))
    take_step(trainer)
    checkpointer = new_checkpointer(toy, in_slices=True)
    checkpointer.on_save(trainer.state)
    checkpointer.close()
    return trainer.config.slices_path


@pytest.fixture()
def folder(whole_folder, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole_folder, tmp_path / "a.last"))


def resume(toy: Path, folder: Path) -> None:
    trainer = new_trainer(toy, folder.parent)
    restore(trainer.state, load_checkpoint(folder, verify=True, kinds=("base",)))
    take_step(trainer)


def test_two_shards_make_one_checkpoint(toy, folder, whole_folder):
    change_shards(lambda a, b: b.reverse())(folder)
    assert len(names(folder)) == 3
    ours, theirs = load_checkpoint(folder, verify=True), load_checkpoint(whole_folder)
    torch.testing.assert_close(ours["model"], theirs["model"], rtol=0, atol=0)
    torch.testing.assert_close(ours["optimizer"][0]["state"], theirs["optimizer"][0]["state"], rtol=0, atol=0)
    resume(toy, folder)


@pytest.mark.usefixtures("bounded_memory")
@pytest.mark.parametrize("damage", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_folder_costs_one_line(toy, folder, damage):
    damage(folder)
    with pytest.raises(UserError) as error:
        resume(toy, folder)
    assert len(str(error.value).splitlines()) == 1 and str(folder) in str(error.value)
    assert len(str(error.value)) < 600 and not Path("owned").exists()


@pytest.mark.usefixtures("bounded_memory")
@pytest.mark.parametrize("key", ["slices", "folder", "files", "step", "optimizer"])
def test_any_value_in_the_meta_file_resumes_or_costs_one_line(toy, folder, key):
    original = json.loads((folder / "slices.json").read_text())
    for value in PLAIN_VALUES:
        if isinstance(value, float) and not math.isfinite(value):
            continue  # other tests show what becomes of them
        meta = json.loads(json.dumps(original))
        place = {"folder": meta["slices"], "files": meta["slices"], "bytes": listed(meta)}.get(key, meta)
        place.pop(key) if value is MISSING else place.update({key: value})
        (folder / "slices.json").write_text(json.dumps(meta))
        try:
            resume(toy, folder)
        except UserError as error:
            assert len(str(error).splitlines()) == 1
