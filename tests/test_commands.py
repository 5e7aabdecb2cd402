"""The commands as users type them: all steps at toy size, and every kind of bad input for every script."""

import array
import json
import os
import pty
import select
import subprocess

import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import ENVIRONMENT, REPOSITORY, command, run_script, succeed


def test_the_steps_leave_models_logs_and_plots(toy):
    for name in ("toy", "sft"):
        written = {path.name for path in (toy / "checkpoints").iterdir()}
        assert {f"{name}.pt", f"{name}.last.pt", f"{name}.jsonl"} <= written
        assert (toy / f"plots/{name}_loss.png").read_bytes().startswith(b"\x89PNG")
        log = [json.loads(line) for line in (toy / f"checkpoints/{name}.jsonl").read_text().splitlines()]
        losses = [entry["val_loss"] for entry in log if "val_loss" in entry]
        assert losses[-1] < losses[0]
    assert "bits_per_byte" in (toy / "checkpoints/toy.jsonl").read_text()
    assert not [path for path in toy.rglob(".*") if path.name.endswith(".tmp") or path.name.startswith(".prepare")]


def test_a_completion_begins_with_its_prompt_and_a_seed_repeats_it(toy):
    model = ["--model", "checkpoints/toy.pt", "--device", "cpu"]
    arguments = [*model, "--max-new-tokens", "20", "--prompt", "What is 日本"]
    first = succeed(toy, "generate.py", *arguments, "--seed", "1")
    assert first.startswith("What is 日本") and len(first) > 12
    assert succeed(toy, "generate.py", *arguments, "--seed", "1") == first
    several = succeed(toy, "generate.py", *arguments, "--seed", "1", "--num-samples", "2")
    one, other = several.removesuffix("\n").split("\n---\n")
    assert one.startswith("What is 日本") and other.startswith("What is 日本") and one != other
    piped = ["--model", "checkpoints/toy.pt", "--max-new-tokens", "20", "--device", "cpu", "--seed", "1"]
    assert succeed(toy, "generate.py", *piped, stdin="What is 日本\r\n") == first


def test_chat_answers_line_by_line_and_knows_its_commands(toy):
    result = run_script(
        toy,
        "generate.py --model checkpoints/sft.pt --chat --greedy --max-new-tokens 10",
        stdin="Hello\n/help\n/unknown\n\nHello\n/reset\nHello\n/quit\nnever reached\n",
    )
    assert result.returncode == 0, result.stderr
    answers = result.stdout.splitlines()
    assert len(answers) == 3 and answers[0] == answers[2]  # /reset starts a new conversation
    assert "/reset" in result.stderr and "/unknown" in result.stderr
    assert result.stderr.splitlines()[2:4] == ["Type a message. /help lists the commands; /quit or Ctrl-D ends."] + [
        "/reset        clear the conversation"
    ]


def test_on_a_terminal_generate_completes_one_line_after_another(toy):
    terminal, process_end = pty.openpty()
    process = subprocess.Popen(
        command("generate.py", "--model", "checkpoints/toy.pt", "--max-new-tokens", "8", "--device", "cpu"),
        cwd=toy,
        env={**ENVIRONMENT, "TERM": "dumb"},
        stdin=process_end,
        stdout=process_end,
        stderr=subprocess.DEVNULL,
    )
    os.close(process_end)

    def read_to_the_prompt():
        text = b""
        while not text.endswith(b"text> "):
            assert select.select([terminal], [], [], 60)[0], text
            text += os.read(terminal, 1024)
        return text.decode("utf-8", errors="replace")

    read_to_the_prompt()
    for line in ("What is", "Hello"):
        os.write(terminal, f"{line}\n".encode())
        typed, completed = read_to_the_prompt().split("\n", 1)
        assert typed.strip() == line and completed.startswith(line) and len(completed) > len(line) + 8
    os.write(terminal, b"/quit\n")
    assert process.wait(30) == 0
    os.close(terminal)


def test_chat_goes_on_past_the_context(toy):
    questions = [f"Question number {i}, which is rather long to fill the context?\n" for i in range(12)]
    chat = "generate.py --model checkpoints/sft.pt --chat --max-new-tokens 40"
    result = run_script(toy, chat, stdin="".join(questions) + "x" * 5000 + "\n")
    assert result.returncode == 0, result.stderr
    complete = "generate.py --model checkpoints/toy.pt --max-new-tokens 150"
    assert run_script(toy, complete, "--prompt", "x" * 5000).returncode == 0


def test_training_takes_a_text_file_as_data_and_prepares_it_again_each_time(toy):
    quick, tokens = ["--max-steps", "2", "--batch-size", "2"], []
    for n in (200, 300):
        (toy / "story.txt").write_text("Once upon a time there was a test. " * n, encoding="utf-8")
        succeed(
            toy, "train.py", "--data", "story.txt", "--vocab-size", "270", "--out", f"checkpoints/story{n}.pt",
            "--n-layer", "1", "--n-head", "1", "--n-embd", "16", "--block-size", "32", *quick,
        )  # fmt: skip
        meta = json.loads((toy / "data/story/meta.json").read_text())
        tokens.append(meta["splits"]["train"]["tokens"])
    assert meta["tokenizer"].startswith("bpe-") and tokens[1] > tokens[0]


def test_alpaca_instructions_end_to_end(toy):
    entries = [
        {"instruction": f"Add {i} and 1.", "input": "" if i % 2 else "numbers", "output": str(i + 1)} for i in range(30)
    ]
    (toy / "alpaca.json").write_text(json.dumps(entries))
    for line in (
        "prepare_sft_data.py --input alpaca.json --template alpaca --out data/alpaca "
        "--tokenizer data/toy/tokenizer.json --block-size 64",
        "train_sft.py --model checkpoints/toy.pt --data data/alpaca --out checkpoints/alpaca.pt --max-steps 2 "
        "--device cpu",
    ):
        succeed(toy, line)
    instruction = ["--instruction", "Add 2 and 1.", "--context", "numbers"]
    succeed(toy, "generate.py", "--model", "checkpoints/alpaca.pt", *instruction, "--max-new-tokens", "5")


@pytest.mark.slow
def test_the_demo_runs_through(tmp_path):
    chats = (REPOSITORY / "data/samples/chat.jsonl").read_text(encoding="utf-8")
    (tmp_path / "my.txt").write_text(chats, encoding="utf-8")
    stdout = succeed(tmp_path, "demo.py --input my.txt --vocab-size 400 --max-steps 3 --sft-steps 3")
    samples = stdout.split("what it wrote after '")[1].splitlines()[1:4]
    assert [line.split()[0] for line in samples] == ["step", "0", "3"] and max(map(len, samples)) <= 100
    pretraining, finetuning = stdout.split("=== 5. It learns to answer")
    assert "memorizes" in finetuning and "validation loss, on wordings that" in finetuning
    assert "(the best so far)" in pretraining and "(the best so far)" not in finetuning
    assert "last validation loss" in finetuning and "best validation loss" not in finetuning
    assert "=== Done in" in finetuning and " s. Now try" in finetuning
    assert "bits per byte" in stdout and stdout.count(" answered word for word (") == 2
    assert "memory, not knowledge" in stdout and "generate.py --model checkpoints/demo/sft.pt --chat" in stdout
    plots = sorted(path.name for path in (tmp_path / "plots/demo").iterdir())
    assert plots == ["pretrained_loss.png", "sft_loss.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "data", "my.txt", "plots"]


def test_help_is_quick_and_names_every_flag():
    for script, flag in (
        ("prepare_data.py", "--vocab-size"),
        ("train.py", "--grad-accum-steps"),
        ("generate.py", "--top-p"),
        ("prepare_sft_data.py", "--template"),
        ("train_sft.py", "--epochs"),
        ("train_classifier.py", "--train-layers"),
        ("classify.py", "--json"),
        ("evaluate.py", "--hellaswag"),
        ("export.py", "--out"),
        ("demo.py", "--input"),
    ):
        code = (
            "import runpy, sys\nsys.argv = ['x', '--help']\n"
            f"try: runpy.run_path({str(REPOSITORY / script)!r}, run_name='__main__')\n"
            "except SystemExit as e: assert not e.code\n"
            "assert not {'torch', 'datasets', 'transformers'} & sys.modules.keys()"
        )
        result = subprocess.run(
            [command(script)[0], "-c", code],
            env={**ENVIRONMENT, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            encoding="utf-8",
        )
        assert result.returncode == 0, result.stderr
        assert flag in result.stdout


def test_underscores_are_accepted_in_flags(toy):
    assert succeed(toy, "generate.py", "--model", "checkpoints/toy.pt", "--prompt", "x", "--max_new_tokens", "1")


SHORT = {
    "TRAIN": "train.py --data data/toy --out NEW",
    "SFT": "train_sft.py --data data/toy --out NEW --model checkpoints/toy.pt",
    "PREPARE": "prepare_data.py --out data/new",
    "PREPARE_SFT": "prepare_sft_data.py --out data/new",
    "GENERATE": "generate.py",
    "CLASSIFIER": "train_classifier.py --model checkpoints/toy.pt --out NEW",
}
BAD_INPUT = [  # exit status, a part of the message, the command
    (2, "--no-such-flag", "train.py --no-such-flag"),
    (2, "did you mean --batch-size?", "train.py --batchsize 60"),
    (2, "sixty", "train.py --batch-size sixty"),
    (2, "--batch-size needs a value", "train.py --batch-size"),
    (2, "--dtype takes auto, float32, bfloat16 or float16", "train.py --dtype float8"),
    (2, "no preset", "train.py --preset gpt5"),
    (2, "multiple of --n-head", "train.py --n-head 5"),
    (2, "at least 1", "train.py --max-steps 0"),
    (2, "exclude", "train.py --resume --overwrite"),
    (2, "must end in .pt", "train.py --data data/toy --out checkpoints/new"),
    (1, "cannot fetch shakespeare", "train.py --preset shakespeare --out NEW"),
    (1, "run prepare_data.py first", "train.py --data data/none --out NEW"),
    (1, "cannot read none.txt: No such file", "train.py --data none.txt --out NEW"),
    (1, "cannot read none.csv: No such file", "SFT --data none.csv"),
    (1, "expected an object or a row with `messages`, or with a question", "SFT --data bad/list.csv"),
    (1, "not 1", "PREPARE_SFT --input bad/header.csv"),
    (1, "the run would write to c.jsonl, which it reads", "SFT --data c.jsonl --out c.pt --overwrite"),
    (1, "in data/toy, which holds other data: rename toy.jsonl", "SFT --data toy.jsonl"),
    (1, "nothing to resume", "TRAIN --resume"),
    (1, "no checkpoint", "TRAIN --init-from checkpoints/none.pt"),
    (1, "not a checkpoint", "TRAIN --init-from bad/notes.pt"),
    (1, "too few", "TRAIN --block-size 100000 --n-layer 1 --n-embd 12 --max-steps 1"),
    (1, "no device", "TRAIN --device cuda:77 --n-layer 1 --n-embd 12"),
    (1, "no device", "TRAIN --device toaster --n-layer 1 --n-embd 12"),
    (1, "is damaged", "train.py --data bad/meta --out NEW"),
    (1, "does not have", "train.py --data bad/ids --out NEW --n-layer 1 --n-embd 12"),
    (1, "do not fit its meta.json", "train.py --data bad/short --out NEW --n-layer 1 --n-embd 12"),
    (1, "tokenizer", "train.py --data data/other --init-from checkpoints/toy.pt --out NEW"),
    (1, "no checkpoint", "SFT --model checkpoints/none.pt"),
    (1, "run prepare_sft_data.py first", "SFT --data data/other"),
    (1, "is a classifier", "SFT --model bad/classifier.pt"),
    (1, "it is missing: put that file back", "SFT --model bad/adapter.pt"),
    (1, "is of the kind 'sft', wanted base", "train.py --data data/toy --resume --out checkpoints/sft.pt"),
    (1, "is of the kind 'sft', wanted lora", "SFT --resume --out checkpoints/sft.pt --lora-rank 2"),
    (2, "at least 1", "SFT --epochs 0"),
    (1, "cannot read none.txt", "PREPARE --input none.txt"),
    (1, "no text in", "PREPARE --input bad/empty"),
    (1, "1 binary files were skipped, the first in bad/zeros.txt", "PREPARE --input bad/zeros.txt"),
    (1, "no text to train on", "PREPARE --input bad/blank.txt"),
    (1, "no text to train on", "PREPARE --input bad/empty.parquet"),
    (1, "cannot read bad/not.parquet", "PREPARE --input bad/not.parquet"),
    (1, "cannot read bad/not.txt.gz", "PREPARE --input bad/not.txt.gz"),
    (1, "bad/columns.jsonl, line 2: no column 'text', but body", "PREPARE --input bad/columns.jsonl"),
    (1, "line 1: column 'body' holds a int", "PREPARE --input bad/columns.jsonl --text-column body"),
    (1, "bad/cut.jsonl, line 2 is not JSON", "PREPARE --input bad/cut.jsonl"),
    (1, "cannot read bad/cut.json: Expecting value", "PREPARE --input bad/cut.json"),
    (1, "line 1: no column 'text', but a list", "PREPARE --input bad/list.jsonl"),
    (1, "bad/list.csv, line 2: no column 'text', but [[1]]", "PREPARE --input bad/list.csv"),
    (1, "nothing is left to validate with", "PREPARE --input my.txt --max-tokens 1"),
    (1, "run prepare_data.py first", "PREPARE --inspect bad/empty"),
    (1, "data/toy/train.bin exists: add --overwrite", "prepare_data.py --input text --out data/toy"),
    (1, "sft_train.bin exists: add --overwrite", "prepare_sft_data.py --dataset pydocs-qa --out data/toy"),
    (1, "in data/toy, which holds other data: rename toy.txt", "train.py --data toy.txt --out NEW --overwrite"),
    (1, "the run would write to t.jsonl, which it reads", "CLASSIFIER --input t.jsonl --out t.pt --overwrite"),
    (1, "the run would write to toy.jsonl, which it reads", "train.py --data toy.jsonl --out toy.pt --overwrite"),
    (1, "the run would write to checkpoints/toy.pt, which it reads", "SFT --out checkpoints/toy.pt --overwrite"),
    (1, "val.bin exists: add --overwrite", "prepare_data.py --input text --out bad/others"),
    (1, "tokenizer.json exists: add", "prepare_data.py --input text --vocab-size 300 --out bad/exported"),
    (2, "below 2^63", "TRAIN --seed 99999999999999999999"),
    (2, "--beta2 must be", "TRAIN --beta2 1.5"),
    (2, "--context belongs to --instruction", "GENERATE --prompt x --context y"),
    (2, "at least 0.001", "GENERATE --prompt x --temperature 1e-40"),
    (2, "--repetition-penalty", "GENERATE --prompt x --repetition-penalty 1e-46"),
    (1, "bad/quote.csv, line 2: unexpected end of data", "PREPARE --input bad/quote.csv"),
    (1, "perhaps 'input'", "PREPARE_SFT --input bad/input.jsonl"),
    (1, "bad/types/meta.json is damaged", "train.py --data bad/types --out NEW"),
    (1, "bad/meta/meta.json is damaged", "train.py --data bad/meta --out NEW"),
    (1, "bad/ids/val.bin holds the id", "evaluate.py --model checkpoints/toy.pt --data bad/ids/val.bin"),
    (1, "bad/ids/train.bin holds the id", "PREPARE --inspect bad/ids"),
    (2, "exclude each other", "PREPARE --input my.txt --vocab-size 300 --tokenizer data/toy/tokenizer.json"),
    (2, "belong to data sets of the Hub", "PREPARE --dataset pydocs --split test"),
    (2, "--workers must be at least 1", "PREPARE --dataset pydocs --workers 0"),
    (2, "--vocab-size", "PREPARE --input my.txt --vocab-size 100"),
    (2, "--val-fraction", "PREPARE --input my.txt --val-fraction 1.5"),
    (1, "Hub", "PREPARE --dataset openwebtext"),
    (1, "Hub", "PREPARE --dataset fineweb-edu"),
    (1, "Hub", "PREPARE --dataset org/none"),
    (1, "cannot fetch shakespeare", "PREPARE --dataset shakespeare"),
    (2, "no data set 'everything'", "PREPARE --dataset everything"),
    (1, "Hub", "PREPARE_SFT --dataset oasst1"),
    (1, "Hub", "PREPARE_SFT --dataset alpaca-gpt4"),
    (2, "no data set 'everything'", "PREPARE_SFT --dataset everything"),
    (1, "cannot read", "PREPARE_SFT --input none.jsonl"),
    (1, "not JSON", "PREPARE_SFT --input bad/text.txt"),
    (1, "do not take turns", "PREPARE_SFT --input bad/turns.jsonl"),
    (1, "1 conversations without an answer were dropped", "PREPARE_SFT --input bad/no_answer.jsonl"),
    (1, "with an empty turn were dropped", "PREPARE_SFT --input bad/empty_turn.jsonl"),
    (1, "a role other than system, user and assistant", "PREPARE_SFT --input bad/role.jsonl"),
    (1, "one exchange alone is too long", "PREPARE_SFT --dataset builtins-qa --max-conversations 9 --block-size 2"),
    (1, "expected an object", "PREPARE_SFT --input bad/other.json"),
    (1, "expected messages", "PREPARE_SFT --input bad/number.json"),
    (1, "fewer than two", "PREPARE_SFT --input bad/one.jsonl"),
    (1, "cannot read none.json: No such file", "PREPARE_SFT --dataset pydocs-qa --tokenizer none.json"),
    (1, "no checkpoint none.pt", "PREPARE --dataset pydocs --tokenizer none.pt"),
    (1, "not a byte-level BPE", "PREPARE_SFT --dataset pydocs-qa --tokenizer bad/other.json"),
    (1, "no checkpoint", "GENERATE --model checkpoints/none.pt --prompt x"),
    (1, "not a checkpoint", "GENERATE --model bad/pickle.pt --prompt x"),
    (1, "do not fit its config", "GENERATE --model bad/misfit.pt --prompt x"),
    (1, "newer version", "GENERATE --model bad/newer.pt --prompt x"),
    (1, "only completes text", "GENERATE --model checkpoints/toy.pt --chat"),
    (1, "only completes text", "GENERATE --model checkpoints/toy.pt --instruction x"),
    (1, "is a classifier", "GENERATE --model bad/classifier.pt --prompt x"),
    (1, "does not name its base model", "GENERATE --model bad/no_base.pt --prompt x"),
    (1, "cannot read none.csv", "CLASSIFIER --input none.csv"),
    (1, "no column 'text', but ham", "CLASSIFIER --input bad/labels.tsv"),
    (1, "no column 'class', but ham", "CLASSIFIER --input bad/labels.tsv --text-column ham --label-column class"),
    (1, "'rare' has fewer than three texts", "CLASSIFIER --input bad/labels.tsv --label-column 1 --text-column 2"),
    (1, "all rows have the label 'ham'", "CLASSIFIER --input bad/one_label.tsv --label-column 1 --text-column 2"),
    (1, "holds no labelled text", "CLASSIFIER --input bad/blank.txt"),
    (1, "Hub", "CLASSIFIER --dataset sms-spam"),
    (2, "no data set 'everything'", "CLASSIFIER --dataset everything"),
    (2, "together below 1", "CLASSIFIER --val-fraction 0.5 --test-fraction 0.5"),
    (1, "not a classifier", "classify.py --model checkpoints/toy.pt x"),
    (1, "no checkpoint", "classify.py --model checkpoints/none.pt x"),
    (1, "line 1 is not UTF-8", "classify.py --model bad/classifier.pt --input bad/latin1.txt"),
    (2, "exclude each other", "classify.py x --input bad/latin1.txt"),
    (2, "--temperature", "generate.py --temperature -1"),
    (2, "--top-p", "generate.py --top-p 0"),
    (2, "exclude", "generate.py --chat --prompt x"),
    (1, "prepare_data.py failed", "demo.py --input none.txt"),
]


def bad_command(i: int) -> list[str]:
    """Returns a line of BAD_INPUT as a command; each has an output folder of its own, since two run at a time."""
    words = BAD_INPUT[i][2].split()
    line = " ".join([SHORT.get(words[0], words[0]), *words[1:]])
    return line.replace("NEW", "checkpoints/new.pt").replace("data/new", f"data/new{i}").split()


TURN = {"role": "user", "content": "x"}
BAD_FILES = {
    "notes.pt": b"hello",
    "not.parquet": b"no table",
    "not.txt.gz": b"not compressed",
    "columns.jsonl": b'{"text": "a", "body": 1}\n{"body": "b"}\n',
    "cut.jsonl": b'{"text": "a"}\n{"text": "b\n',
    "cut.json": b'[{"text": "a"}, {"text": ',
    "list.jsonl": b"[1]\n",
    "list.csv": b"[[1]]\n2\n",
    "zeros.txt": b"a\0b",
    "blank.txt": b"",
    "text.txt": b"not json",
    "meta/meta.json": b"{",
    "types/meta.json": b'{"files": 3, "tokenizer": "gpt2", "splits": []}',
    "header.csv": b"1\n2\n",
    "quote.csv": b'text\nfine\n"and so on',
    "input.jsonl": json.dumps({"messages": [{**TURN, "input": 5}]}).encode(),
    "other.json": b'[{"a": 1}]',
    "number.json": b'[{"messages": 3}]',
    "turns.jsonl": json.dumps({"messages": [TURN, TURN, {"role": "assistant", "content": "y"}]}).encode(),
    "no_answer.jsonl": json.dumps({"messages": [TURN]}).encode(),
    "empty_turn.jsonl": json.dumps({"messages": [TURN, {"role": "assistant", "content": " "}]}).encode(),
    "role.jsonl": json.dumps({"messages": [TURN, {"role": "tool", "content": "y"}]}).encode(),
    "labels.tsv": b"ham\tsee you\nspam\twin\nham\tbye\nspam\tfree\nham\thome\nspam\tnow\nrare\tx\n",
    "one_label.tsv": b"ham\tsee you\nham\tbye\n",
    "others/val.bin": b"somebody's",
    "exported/tokenizer.json": b"somebody's",
    "latin1.txt": "naïve".encode("latin-1"),
    "one.jsonl": json.dumps({"messages": [TURN, {"role": "assistant", "content": "y"}]}).encode(),
}


@pytest.fixture(scope="module")
def bad(toy):
    """Adds damaged and foreign files to the toy's folder."""
    folder = toy / "bad"
    for name in ("empty", "meta", "types", "others", "exported"):
        (folder / name).mkdir(parents=True)
    for name, content in BAD_FILES.items():
        (folder / name).write_bytes(content)
    table = pyarrow.table({"text": pyarrow.array([], pyarrow.string())})
    pyarrow.parquet.write_table(table, folder / "empty.parquet")
    write_bad_checkpoints(folder, toy / "checkpoints/toy.pt")
    (toy / "my.txt").write_text("some text")
    (toy / "toy.txt").write_text("not what data/toy was made of")
    for name in ("c", "toy"):
        (toy / f"{name}.jsonl").write_text(json.dumps({"prompt": "x", "response": "y"}) + "\n")
    (toy / "t.jsonl").write_text('{"text": "x", "label": "y"}\n')
    succeed(toy, "prepare_data.py", "--input", "text", "--vocab-size", "300", "--out", "data/other")
    for name, tokens in (("ids", [60_000] * 5000), ("short", [1] * 5000)):  # GPT-2's ids end before 60,000
        (folder / name).mkdir()
        for split in ("train", "val"):
            (folder / name / f"{split}.bin").write_bytes(array.array("H", tokens).tobytes())
    (folder / "short/meta.json").write_text(
        json.dumps(
            {"files": ["train.bin", "val.bin"], "tokenizer": "gpt2", "splits": {"train": {"tokens": 6000, "bytes": 1}}}
        )
    )
    return toy


def write_bad_checkpoints(folder, good_path):
    """Writes variations of a good checkpoint that must not load."""
    good = torch.load(good_path, weights_only=True)
    torch.save({**good, "config": {**good["config"], "n_embd": 64}}, folder / "misfit.pt")
    torch.save({**good, "format_version": 99}, folder / "newer.pt")
    config = {**good["config"], "n_classes": 2, "tie_weights": False}
    head = {"lm_head.weight": torch.zeros(2, config["n_embd"])}
    torch.save(
        {**good, "kind": "classifier", "labels": ["a", "b"], "config": config, "model": good["model"] | head},
        folder / "classifier.pt",
    )
    torch.save({**good, "kind": "lora"}, folder / "no_base.pt")
    adapter = torch.load(REPOSITORY / "tests/samples/lora.pt", weights_only=True)
    torch.save({**adapter, "lora": {**adapter["lora"], "base": "gone.pt"}}, folder / "adapter.pt")
    torch.save({"model": os.system}, folder / "pickle.pt")  # an unsafe loader would run it


@pytest.fixture(scope="module")
def bad_results(bad):
    """The finished process of each line of BAD_INPUT."""
    return [run_script(bad, *bad_command(i)) for i in range(len(BAD_INPUT))]


@pytest.mark.parametrize("i", range(len(BAD_INPUT)), ids=lambda i: BAD_INPUT[i][2][:70])
def test_bad_input_gets_one_line_and_the_right_status(bad_results, i):
    status, message, _ = BAD_INPUT[i]
    result = bad_results[i]
    assert result.returncode == status, result.stderr
    assert "Traceback" not in result.stderr and message in result.stderr.splitlines()[-1]
    assert result.stderr.splitlines()[-1].startswith("error: ") and result.stderr.count("error: ") <= 2


def test_bad_input_leaves_nothing_half_written(bad_results, bad):
    assert not (bad / "checkpoints/new.pt").exists() and not (bad / "checkpoints/new.last.pt").exists()
    assert not list((bad / "data").glob("new*"))  # a failed run removes the folder that it created


def test_output_into_a_closed_pipe_is_no_error(toy):
    long = "generate.py --model checkpoints/toy.pt --prompt x --max-new-tokens 300 --num-samples 20 --device cpu"
    process = subprocess.Popen(command(long), cwd=toy, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(5)
    process.stdout.close()
    stderr = process.stderr.read().decode()
    process.wait(60)
    assert "Traceback" not in stderr and "Exception" not in stderr
