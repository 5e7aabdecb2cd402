"""README.md, CONTRIBUTING.md and docs/: every command of this project runs, all Python runs, all links lead somewhere.

Commands run in the order of the pages, README first, in one folder, as a reader would type them. The tests add flags
for small sizes, and local files in place of downloads: `reduced` has all of them.
"""

import importlib
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, REPOSITORY, command_server, run_in_processes
from test_house import PACKAGES, SCRIPTS
from torch.distributed import run as torchrun

from model import GPT, GPTConfig
from system import cli
from text.tokenizer import gpt2
from weights import checkpoint, to_huggingface

DOCS = sorted(f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md"))
PAGES = ["README.md", *DOCS, "CONTRIBUTING.md", "CHANGELOG.md"]
TEXT = {page: (REPOSITORY / page).read_text(encoding="utf-8") for page in PAGES}
OURS = ("python", "make", "torchrun", "streamlit")
NEW_FLAG = "--parallel-residual"  # of the worked example in docs/how-it-works.md

SMALL = {  # flags for small sizes; they replace those on the page
    "demo.py": "--vocab-size 400 --max-steps 3 --sft-steps 3",
    "train.py": "--n-layer 2 --n-head 2 --n-embd 32 --block-size 64 --max-steps 3 --batch-size 2 --eval-every 3 "
    "--warmup-steps 1 --eval-tokens 1000 --device cpu",
    "prepare_sft_data.py": "--block-size 64",
    "train_sft.py": "--max-steps 2 --batch-size 4 --warmup-steps 1 --device cpu",
    "train_classifier.py": "--max-steps 2 --batch-size 4 --warmup-steps 1 --device cpu",
    "generate.py": "--max-new-tokens 8 --device cpu",
    "evaluate.py": "--max-tokens 300 --device cpu",
    "classify.py": "--device cpu",
}
REDUCED = [  # what a command of a script has, what it lacks, and further flags for it
    ("prepare_data.py", "", "--inspect|--input", "--dataset pydocs --input books"),
    ("prepare_data.py", "--vocab-size", "", "--vocab-size 400"),
    ("prepare_sft_data.py", "builtins-qa", "", "--max-conversations 20"),
    ("prepare_sft_data.py", "alpaca-gpt4", "", "--dataset oasst1 --input tasks.json"),
    ("prepare_sft_data.py", "", "--input|--dataset", "--input chats.jsonl"),
    ("train.py", "--preset shakespeare", "", "--data book.txt --vocab-size 400"),
    ("train.py", r"--data \w+\.txt", "--init-from", "--vocab-size 400"),
    ("train.py", "--minutes", "", "--minutes 0.01"),
    ("evaluate.py", "--hellaswag", "", "--hellaswag hellaswag_val.jsonl"),
]


def blocks(page: str, language: str) -> list[str]:
    """Returns the code blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT[page], re.M | re.S)


def lines_of(block: str) -> list[str]:
    """Returns the commands in a block for a shell; what a here-document holds is none."""
    return re.sub(r"<<'END'\n.*?^END$", "", block, flags=re.M | re.S).strip().splitlines()


def commands(page: str) -> list[str]:
    """Returns the commands on a page in their order. A benchmark or a preset called NAME becomes one that exists."""
    found = []
    for language, block, inline in re.findall(r"^```(\w*)\n(.*?)^```|`([^`]+)`", TEXT[page], re.M | re.S):
        if language == "bash":
            lines = [re.sub(r"\s+# .*$", "", line) for line in lines_of(block)]
            found += [line for line in lines if line.split()[0] in OURS and "llama.cpp" not in line]
        elif re.match(r"(python|make|streamlit|torchrun) [^=]", inline):
            found.append(" ".join(inline.split()))
    return [re.sub(r"\bNAME\b", "training" if "benchmarks" in line else "demo", line) for line in found]


ALL_COMMANDS = list(dict.fromkeys(command for page in PAGES[:-1] for command in commands(page)))
COMMANDS = [command for command in ALL_COMMANDS if NEW_FLAG not in command]


def reduced(script: str, *typed: str) -> list[str]:
    """Returns the arguments of a script with flags for small sizes, and with files in place of downloads."""
    arguments, line, flags = list(typed), " ".join(typed), SMALL.get(script, "")
    for name, has, lacks, more in REDUCED:
        if name == script and re.search(has, line) and not (lacks and re.search(lacks, line)):
            flags += f" {more}"
    for flag, value in zip(*[iter(flags.split())] * 2, strict=True):
        i = arguments.index(flag) if flag in arguments else len(arguments)
        has_value = not "".join(arguments[i + 1 : i + 2]).startswith("--")
        arguments[i : i + 1 + has_value] = [flag, value]
    return arguments


def run(folder: Path, command: str) -> tuple[int, str]:
    """Runs a command of the documentation in a folder; returns its exit status and all that it printed."""
    program, *arguments = shlex.split(command)
    if program == "make":
        return make(folder, arguments)
    if program == "streamlit":
        return serve(folder, arguments)
    if program == "torchrun":
        torchrun.parse_args(arguments)
        command = arguments[[word.endswith(".py") for word in arguments].index(True) :]
        result = run_in_processes(folder, command[0], *reduced(*command), "--dtype", "float32")
        return result.returncode, result.stdout + result.stderr
    if arguments[0] == "-c":
        return ask(folder, {"paste": arguments[1]})
    if arguments[0] == "-m":
        module = importlib.import_module(arguments[1])
        if "benchmarks" in arguments[1]:  # test_benchmarks.py runs them
            return 0, str(hasattr(module, "Config") and cli.parse(module.Config, arguments[2:]))
        return ask(folder, {"script": module.__file__, "arguments": arguments[2:]})
    return ask(folder, {"script": str(REPOSITORY / arguments[0]), "arguments": reduced(*arguments)})


def ask(folder: Path, job: dict) -> tuple[int, str]:
    """Has the command server run a job (see command_server.py)."""
    result = command_server().run(folder, job, stdin="What is len?\n/quit\n")
    return result.returncode, result.stdout + result.stderr


def make(folder: Path, arguments: list[str]) -> tuple[int, str]:
    """Asks `make` what it would run, and runs that for the demo with a reader's files (without: test_commands.py)."""
    dry = subprocess.run(["make", "-n", *arguments], cwd=REPOSITORY, capture_output=True, encoding="utf-8")
    if dry.returncode or arguments[0] != "demo" or len(arguments) == 1:
        return dry.returncode, dry.stdout + dry.stderr
    [line] = [line for line in dry.stdout.splitlines() if line.startswith(".venv/bin/python demo.py")]
    return run(folder, line.removeprefix(".venv/bin/"))


def serve(folder: Path, arguments: list[str]) -> tuple[int, str]:
    """Starts the page, waits until it shows its address, and ends it."""
    script = [str(REPOSITORY / word) if word == "app.py" else word for word in arguments]
    flags = f"--server.headless true --server.address 127.0.0.1 --server.port {8700 + os.getpid() % 200}".split()
    line, pipe = [sys.executable, "-um", "streamlit", *script, *flags], subprocess.PIPE
    with subprocess.Popen(line, cwd=folder, env=ENVIRONMENT, stdout=pipe, encoding="utf-8") as process:
        lines = list(itertools.takewhile(lambda line: "URL" not in line, process.stdout))
        is_served = process.poll() is None
        process.kill()
    return int(not is_served), "".join(lines)


def write_files(folder: Path) -> None:
    """Writes the files that the commands name, and small models in place of OpenAI's."""
    chats = (REPOSITORY / "data/samples/chat.jsonl").read_text(encoding="utf-8").splitlines()
    texts = {"book.txt": chats, "more.txt": chats[60:], "my.txt": chats, "notes.txt": chats[:9]}
    texts |= {"chats.jsonl": chats[:30], **{f"books/{i}.txt": chats[5 * i : 5 * i + 5] for i in range(20)}}
    texts["sms.tsv"] = [f"spam\tWIN a prize of {i}" if i % 3 else f"ham\tSee you at {i}" for i in range(60)]
    tasks = [{"instruction": f"Add {i} and 1.", "input": "", "output": str(i + 1)} for i in range(30)]
    question = {"ctx": "The sun", "endings": [" shines.", " sings.", " barks.", " swims."], "label": 0}
    texts |= {"tasks.json": [json.dumps(tasks)], "hellaswag_val.jsonl": [json.dumps(question)]}
    (folder / "books").mkdir()
    for name, lines in texts.items():
        (folder / name).write_text("\n".join(lines), encoding="utf-8")
    model = GPT(GPTConfig(block_size=64, n_layer=1, n_head=2, n_embd=32))
    packed = checkpoint.pack(model, kind="base", tokenizer=gpt2().spec, template=None)
    for name in ("gpt2", "gpt2-xl"):
        to_huggingface.write_folder(packed, folder / name)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[int, str]]]:
    """A reader's folder, in which every command has run, and what `run` returned for each."""
    folder = tmp_path_factory.mktemp("reader")
    write_files(folder)
    return folder, {command: run(folder, command) for command in COMMANDS}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_documentation_works(reader, command):
    status, output = reader[1][command]
    assert status == 0 and "Traceback" not in output, output[-3000:]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_the_python_of_a_page_can_be_pasted(reader, page):
    pasted = "\n\n".join(block for block in blocks(page, "python") if "datatrove" not in block)
    status, output = ask(reader[0], {"paste": pasted})
    assert status == 0, output[-3000:]


def test_commands_are_found_on_the_pages_that_have_some():
    assert len(commands("README.md")) >= 20 and len(COMMANDS) >= 50
    assert {word for command in COMMANDS for word in command.split() if word.endswith(".py")} >= SCRIPTS - {"demo.py"}


def test_the_worked_example_changes_the_model(reader, tmp_path):
    """Applies the example to a copy of the project, and trains the new variant there."""
    left_out = shutil.ignore_patterns(".*", "checkpoints", "plots", "demo", "__pycache__")
    copy = shutil.copytree(REPOSITORY, tmp_path / "project", ignore=left_out)
    hunks_of = re.compile(r"^\+\+\+ b/(\S+)\n(.*?)(?=^--- |\Z)", re.M | re.S)
    for file, hunks in hunks_of.findall(blocks("docs/how-it-works.md", "diff")[0]):
        text = (copy / file).read_text(encoding="utf-8")
        for hunk in re.split(r"^@@\n", hunks, flags=re.M)[1:]:
            lines = hunk.splitlines(keepends=True)
            before, after = ("".join(line[1:] or line for line in lines if line[0] != sign) for sign in "+-")
            assert text.count(before) == 1, f"{file} has these lines {text.count(before)} times, not once:\n{before}"
            text = text.replace(before, after)
        (copy / file).write_text(text, encoding="utf-8")
    [command] = [shlex.split(command)[1:] for command in ALL_COMMANDS if NEW_FLAG in command]
    for line, expected in (  # not by the server, which has imported the modules of the unchanged project
        ([copy / "train.py", *reduced(*command)], "checkpoints/parallel.pt"),
        (
            [copy / "export.py", "--model", "checkpoints/parallel.pt", "--out", "out"],
            "transformers has parallel_residual",
        ),
        (["-m", "pytest", "-q", copy / "tests/test_fields.py", "-k", "parallel and earlier"], "1 passed"),
    ):
        arguments = [sys.executable, *map(str, line)]
        result = subprocess.run(arguments, cwd=reader[0], env=ENVIRONMENT, capture_output=True, encoding="utf-8")
        output = result.stdout + result.stderr
        assert expected in output and "Traceback" not in output, output[-3000:]


def test_the_folder_for_a_space_holds_all_that_the_app_needs():
    [line] = [line for block in blocks("docs/app.md", "bash") for line in lines_of(block) if "cp -r" in line]
    assert PACKAGES.keys() - {"benchmarks"} | {"*.py", "requirements.txt", ".streamlit"} <= set(line.split())


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_other_programs_say_whether_they_were_run(page):
    for line in (line for block in blocks(page, "bash") for line in lines_of(block)):
        others = line.split()[0] not in (*OURS, "source", "mkdir", "cat", "printf") or "llama.cpp" in line
        assert not others or re.search("not run here|run on 20", line), line


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_or_a_heading(page):
    prose = {page: re.sub(r"^```.*?^```|`[^`\n]+`", "", text, flags=re.M | re.S) for page, text in TEXT.items()}
    for target in re.findall(r"\]\(([^)]+)\)", prose[page]):
        file, _, anchor = target.partition("#")
        path = ((REPOSITORY / page).parent / file if file else REPOSITORY / page).resolve()
        assert target.startswith("https://") or path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", prose[str(path.relative_to(REPOSITORY))], re.M)
            assert anchor in [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings], target


def test_names_in_the_code_exist():
    """A link to a file of the project, followed by names in it, names what is there."""
    for page in PAGES:
        for file, names in re.findall(r"\]\((?:\.\./)?([\w/]+\.py)\)[,:]? ((?:`[\w.]+`(?:, | and )?)+)", TEXT[page]):
            source = (REPOSITORY / file).read_text(encoding="utf-8")
            for name in re.findall(r"`([\w.]+)`", names):
                assert re.search(rf"(def|class) {name.split('.')[-1]}\b", source), f"{page}: {file} has no {name}"


def test_the_readme_is_short_and_leads_to_every_page():
    assert len(TEXT["README.md"].split()) <= 950
    linked = " ".join(re.findall(r"\]\(([^)#]+)", TEXT["README.md"] + TEXT["docs/training.md"]))
    assert not [page for page in PAGES[1:] if Path(page).name not in linked]
