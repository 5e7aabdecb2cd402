"""The data sets that have a name: OpenWebText, FineWeb-Edu and others of the Hub, and texts that are downloaded."""

import hashlib
from dataclasses import replace

import pytest
from conftest import expected, split_files

from prepare_data import Config, main
from system.errors import UserError
from text import sources
from text.corpus import nanogpt_held_out
from text.sources import TEXTS, Dataset, draw_held_out
from text.token_files import read_tokens


def test_openwebtext_is_split_as_nanogpt_splits_it(hub, tmp_path, monkeypatch):
    from datasets import Dataset

    texts = [f"page {i} of the web" for i in range(5000)]
    for k in range(2):
        rows = [{"text": text} for text in texts[k * 2500 : (k + 1) * 2500]]
        hub(f"Skylion007/openwebtext/plain_text/train-{k:05}-of-00002.parquet", rows)
    monkeypatch.setattr("text.corpus.OPENWEBTEXT_ROWS", 5000)
    main(Config(out=tmp_path / "data"))
    reference = Dataset.from_dict({"text": texts}).train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    held_out = set(reference["test"]["text"])
    assert len(held_out) == 3 and nanogpt_held_out(8_013_769).sum() == 4007
    assert split_files(tmp_path / "data") == expected(("val" if text in held_out else "train", text) for text in texts)


def test_fineweb_edu_holds_out_its_first_shard(hub, tmp_path):
    rows = [{"text": f"lesson {i} " * 5, "id": str(i), "score": 3.5} for i in range(600)]
    hub("HuggingFaceFW/fineweb-edu/data/CC-MAIN-2013-20/train-00000.parquet", rows[:1])
    hub("HuggingFaceFW/fineweb-edu/sample/10BT/000_00000.parquet", rows)
    (tmp_path / "HuggingFaceFW/fineweb-edu/README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: default\n  data_files:\n  - split: train\n    path: data/*/*\n"
        "- config_name: sample-10BT\n  data_files:\n  - split: train\n    path: sample/10BT/*\n---\n"
    )
    main(Config(dataset="fineweb-edu", out=tmp_path / "data", shard_tokens=1000, max_tokens=4500))
    everything = expected(("train", row["text"]) for row in rows)["train"]
    files = {path.name: read_tokens(path).tolist() for path in (tmp_path / "data").glob("*.bin")}
    assert files == {
        "val_000001.bin": everything[:1000],
        **{f"train_00000{i}.bin": everything[i * 1000 : min((i + 1) * 1000, 4500)] for i in (1, 2, 3, 4)},
    }
    with pytest.raises(UserError, match="smaller --shard-tokens"):
        main(Config(dataset="fineweb-edu", out=tmp_path / "more", max_tokens=4500))


def test_climbmix_keeps_complete_shards_after_an_interruption(hub, tmp_path, monkeypatch):
    texts = [f"page {i} " * 9 for i in range(300)]
    hub("karpathy/climbmix-400b-shuffle/shard_00000.parquet", [{"text": text} for text in texts])
    everything = expected(("train", text) for text in texts)["train"]
    config = Config(dataset="climbmix", out=tmp_path / "data", shard_tokens=1000)
    with monkeypatch.context() as patch, pytest.raises(pytest.fail.Exception):
        patch.setattr("text.prepare.count_tokens", lambda *_: pytest.fail("as if it was killed"))
        main(config)
    first = (tmp_path / "data/.meta.json.tmp/train_000001.bin").stat().st_ino
    main(config)
    assert (tmp_path / "data/train_000001.bin").stat().st_ino == first  # complete shards are not written again
    ids = split_files(tmp_path / "data")
    assert ids["val"] == everything[:1000] and ids["train"] == everything[1000:]


@pytest.mark.parametrize("name", ["tinystories", "stories"])
def test_a_named_data_set_is_one_entry_and_may_come_with_its_own_split(hub, tmp_path, monkeypatch, name):
    stories = Dataset("org/stories", held_out="own", text_column="story")
    monkeypatch.setitem(TEXTS, "stories", stories)
    for split in ("train", "validation"):
        rows = [{TEXTS[name].text_column: f"{split} {i}"} for i in range(3)]
        hub(f"{TEXTS[name].hub}/{split}.parquet", rows)
    main(Config(dataset=name, out=tmp_path / "data"))
    assert split_files(tmp_path / "data") == expected(
        (split, f"{name} {i}") for split, name in (("val", "validation"), ("train", "train")) for i in range(3)
    )


def test_any_data_set_of_the_hub_is_read_by_split_and_column(hub, tmp_path):
    for split in ("train", "test"):
        hub(f"org/name/{split}.parquet", [{"body": f"{split} {i}"} for i in range(30)])
    main(Config(dataset="org/name", split="test", text_column="body", out=tmp_path / "data"))
    assert split_files(tmp_path / "data") == expected(draw_held_out([f"test {i}" for i in range(30)], 0.1, 1337))
    for complaint, wrong in {"no column 'text', but body": {}, "Bad split": {"split": "dev"}}.items():
        with pytest.raises(UserError, match=complaint):
            main(Config(dataset="org/name", out=tmp_path / "wrong", **wrong))


def test_downloads_are_checked_and_kept(tmp_path):
    source = tmp_path / "input.txt"
    source.write_text("First Citizen")
    text = replace(TEXTS["shakespeare"], url=source.as_uri(), sha256="0" * 64)
    with pytest.raises(UserError, match="another SHA-256"):
        sources.download("shakespeare", text, tmp_path / "raw")
    assert not list(tmp_path.glob("raw/*"))
    text = replace(text, sha256=hashlib.sha256(b"First Citizen").hexdigest())
    path = sources.download("shakespeare", text, tmp_path / "raw")
    source.unlink()
    assert sources.download("shakespeare", text, tmp_path / "raw").read_text() == "First Citizen"
    path.unlink()
    with pytest.raises(UserError, match=r"cannot fetch shakespeare: cannot read .*; put it at .* by hand"):
        sources.download("shakespeare", text, tmp_path / "raw")
