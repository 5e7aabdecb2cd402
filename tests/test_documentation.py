"""README.md, CONTRIBUTING.md and docs/: every command of this project runs, all Python runs, all links lead somewhere.

Commands run in the order of the pages, README first, in one folder, as a reader would type them. The tests add flags
for small sizes, and local files in place of downloads; `smaller` has all of them.
"""

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ENVIRONMENT, REPOSITORY, command_server, run_in_processes
from test_house import PACKAGES
from torch.distributed import run as torchrun

from model import GPT, GPTConfig
from system import cli
from text.tokenizer import gpt2
from weights import checkpoint, huggingface

PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md")), "CONTRIBUTING.md"]
TEXT = {page: (REPOSITORY / page).read_text(encoding="utf-8") for page in PAGES}
OURS = ("python", "make", "torchrun", "streamlit")
NEW_FIELD = "--parallel-residual"  # of the worked example in docs/how-it-works.md

SHAPE = "--n-layer 2 --n-head 2 --n-embd 32 --block-size 64"
SMALL = {  # flags for small sizes; they replace those on the page
    "demo.py": "--vocab-size 400 --max-steps 3 --sft-steps 3",
    "prepare_data.py": "--workers 1",
    "train.py": f"{SHAPE} --max-steps 3 --batch-size 2 --eval-every 3 --warmup-steps 1 --eval-tokens 1000 --device cpu",
    "prepare_sft_data.py": "--block-size 64",
    "train_sft.py": "--max-steps 2 --batch-size 4 --warmup-steps 1 --device cpu",
    "train_classifier.py": "--max-steps 2 --batch-size 4 --warmup-steps 1 --device cpu",
    "generate.py": "--max-new-tokens 8 --device cpu",
    "evaluate.py": "--max-tokens 300 --device cpu",
    "classify.py": "--device cpu",
    "export.py": "",
}
STDIN = "What is len?\n/quit\n"


def blocks(page: str, language: str) -> list[str]:
    """Returns the code blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT[page], re.M | re.S)


def lines_of(block: str) -> list[str]:
    """Returns the commands in a block for a shell; what a here-document holds is none."""
    return re.sub(r"<<'END'\n.*?^END$", "", block, flags=re.M | re.S).strip().splitlines()


def commands(page: str) -> list[str]:
    """Returns the commands on a page, from blocks for a shell and from code in the text, in their order."""
    found = []
    pattern = r"^```(\w*)\n(.*?)^```|`([^`]+)`"
    for language, block, inline in re.findall(pattern, TEXT[page], re.M | re.S):
        if language == "bash":
            lines = [re.sub(r"\s+# .*$", "", line) for line in lines_of(block)]
            found += [line for line in lines if line.split()[0] in OURS and "llama.cpp" not in line]
        elif re.match(r"(python|make|streamlit|torchrun) [^=]", inline):
            found.append(" ".join(inline.split()))
    return list(dict.fromkeys(found))


COMMANDS = list(dict.fromkeys(command for page in PAGES for command in commands(page)))


def words_of(command: str) -> list[str]:
    """Returns the words of a command; a preset or a benchmark called NAME becomes one that exists."""
    examples = {"NAME": "demo", "benchmarks.NAME": "benchmarks.training"}
    return [examples.get(word, word) for word in shlex.split(command)]


def with_flags(arguments: list[str], flags: str) -> list[str]:
    """Returns arguments with flags and their values in place of their own."""
    arguments = list(arguments)
    for flag, value in zip(*[iter(flags.split())] * 2, strict=True):
        if flag in arguments:
            i = arguments.index(flag)
            del arguments[i : i + 2]
        arguments += [flag, value]
    return arguments


def smaller(script: str, arguments: list[str]) -> list[str]:
    """Returns the arguments of a script with flags for small sizes, and with files in place of downloads."""
    arguments = with_flags(arguments, SMALL[script])
    flags = {flag: value for flag, value in itertools.pairwise([*arguments, ""]) if flag.startswith("--")}
    if script == "prepare_data.py" and "--input" not in flags and "--inspect" not in flags:
        arguments = [*with_flags(arguments, "--dataset pydocs"), "--input", "books"]
    if script == "prepare_data.py" and "--vocab-size" in flags:
        arguments = with_flags(arguments, "--vocab-size 400")
    if script == "prepare_sft_data.py" and flags.get("--dataset") == "builtins-qa":
        arguments += ["--max-conversations", "20"]
    elif script == "prepare_sft_data.py" and "--input" not in flags:
        is_chat = flags.get("--dataset", "oasst1") == "oasst1"
        arguments = with_flags(arguments, "--dataset oasst1")
        arguments += ["--input", "chats.jsonl" if is_chat else "tasks.json"]
    if "--grad-accum-steps" in flags:
        arguments = with_flags(arguments, "--grad-accum-steps 1")
    if script == "train.py" and flags.get("--preset") == "shakespeare":
        arguments += ["--data", "book.txt", "--vocab-size", "400"]
    if script == "train.py" and str(flags.get("--data")).endswith(".txt") and "--init-from" not in flags:
        arguments = with_flags(arguments, "--vocab-size 400")
    if script == "evaluate.py" and str(flags.get("--hellaswag")).startswith("--"):
        arguments.insert(arguments.index("--hellaswag") + 1, "hellaswag_val.jsonl")
    return arguments


class Session:
    """A folder with a reader's files, in which commands run one after another."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_files(folder)

    def run(self, command: str) -> tuple[int, str]:
        """Runs a command of the documentation; returns its exit status and all that it printed."""
        program, *arguments = words_of(command)
        if program == "make":
            return self.make(arguments)
        if program == "streamlit":
            return self.serve(arguments)
        if program == "torchrun":
            return self.launch(arguments)
        if arguments[0] == "-m":
            return check_benchmark(arguments[1], arguments[2:])
        if arguments[0] == "-c":
            return self.ask({"paste": arguments[1]})
        script = arguments[0]
        return self.ask({"script": str(REPOSITORY / script), "arguments": smaller(script, arguments[1:])})

    def ask(self, job: dict) -> tuple[int, str]:
        """Has the server run a job."""
        result = command_server().run(self.folder, job, STDIN)
        return result.returncode, result.stdout + result.stderr

    def make(self, arguments: list[str]) -> tuple[int, str]:
        """Asks `make` what it would run. Runs the demo with a reader's files, nothing that installs, tests or deletes.

        The demo without files asks 1,000 questions at its end; test_commands.py runs it.
        """
        dry = subprocess.run(
            ["make", "-n", *arguments],
            cwd=REPOSITORY, capture_output=True, encoding="utf-8",
        )  # fmt: skip
        if dry.returncode or arguments[0] != "demo" or len(arguments) == 1:
            return dry.returncode, dry.stdout + dry.stderr
        [line] = [line for line in dry.stdout.splitlines() if line.startswith(".venv/bin/python demo.py")]
        return self.run(line.replace(".venv/bin/python", "python"))

    def serve(self, arguments: list[str]) -> tuple[int, str]:
        """Starts the page, waits until it answers, and ends it."""
        script = [str(REPOSITORY / word) if word == "app.py" else word for word in arguments]
        port = 8700 + os.getpid() % 200
        flags = ["--server.headless", "true", "--server.port", str(port)]
        process = subprocess.Popen(
            [sys.executable, "-m", "streamlit", *script, *flags],
            cwd=self.folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
        )  # fmt: skip
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        status = 1
        for _ in range(300):
            try:
                status = opener.open(f"http://127.0.0.1:{port}/_stcore/health").status != 200
                break
            except OSError:
                if process.poll() is not None:
                    break
                time.sleep(0.1)
        process.terminate()
        return int(status), process.communicate()[0]

    def launch(self, arguments: list[str]) -> tuple[int, str]:
        """Parses what torchrun would, and runs the script in two processes on the CPU."""
        i = next(i for i, word in enumerate(arguments) if word.endswith(".py"))
        torchrun.parse_args(arguments)
        flags = smaller(arguments[i], arguments[i + 1 :])
        if arguments[i] == "train.py":
            flags = with_flags(flags, "--dtype float32")
        result = run_in_processes(self.folder, arguments[i], *flags)
        return result.returncode, result.stdout + result.stderr


def check_benchmark(module: str, arguments: list[str]) -> tuple[int, str]:
    """Parses the flags of a benchmark; test_benchmarks.py and test_training.py run all of them."""
    namespace = __import__(module, fromlist=["Config"])
    if hasattr(namespace, "Config"):
        cli.parse(namespace.Config, arguments)
    else:
        assert not arguments and callable(namespace.main)
    return 0, ""


def write_files(folder: Path) -> None:
    """Writes the files that the commands name, and small models in place of OpenAI's."""
    chats = (REPOSITORY / "data/samples/chat.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "books").mkdir()
    for name, part in (("book.txt", chats), ("more.txt", chats[60:]), ("my.txt", chats), ("notes.txt", chats[:9])):
        (folder / name).write_text("\n".join(part), encoding="utf-8")
    for i in range(20):
        (folder / f"books/{i}.txt").write_text("\n".join(chats[5 * i : 5 * i + 5]), encoding="utf-8")
    (folder / "chats.jsonl").write_text("\n".join(chats[:30]) + "\n", encoding="utf-8")
    tasks = [{"instruction": f"Add {i} and 1.", "input": "", "output": str(i + 1)} for i in range(30)]
    (folder / "tasks.json").write_text(json.dumps(tasks))
    messages = [("ham", f"See you at {i}") if i % 3 else ("spam", f"WIN a prize of {i}") for i in range(60)]
    (folder / "sms.tsv").write_text("".join(f"{label}\t{text}\n" for label, text in messages))
    question = {"ctx": "The sun", "endings": [" shines.", " sings.", " barks.", " swims."], "label": 0}
    (folder / "hellaswag_val.jsonl").write_text(json.dumps(question) + "\n")
    config = GPTConfig(block_size=64, n_layer=1, n_head=2, n_embd=32)
    model = checkpoint.pack(GPT(config), kind="base", tokenizer=gpt2().spec, template=None)
    for name in ("gpt2", "gpt2-xl"):
        huggingface.write_folder(model, folder / name)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A session in which every command has run; `results` maps each to its exit status and its output."""
    session = Session(tmp_path_factory.mktemp("reader"))
    results = {command: session.run(command) for command in COMMANDS if NEW_FIELD not in command}
    return SimpleNamespace(session=session, results=results, folder=session.folder)


@pytest.mark.parametrize("command", [command for command in COMMANDS if NEW_FIELD not in command])
def test_a_command_of_the_documentation_works(session, command):
    status, output = session.results[command]
    assert status == 0 and "Traceback" not in output, output[-3000:]


def test_the_demo_teaches_the_readers_chats(session):
    _, output = session.results["make demo INPUT=book.txt CHATS=chats.jsonl"]
    assert " of 30 answered word for word (" in output and output.count(" answered word for word (") == 1
    assert "The loss on conversations\nthat it does not train on would rise" in output
    assert "it has learned your conversations by heart" in output


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_the_python_of_a_page_can_be_pasted(session, page):
    status, output = session.session.ask({"paste": "\n\n".join(blocks(page, "python"))})
    assert status == 0 and output.strip(), output[-3000:]


def test_commands_are_found_on_the_pages_that_have_some():
    counts = {page: len(commands(page)) for page in PAGES}
    assert counts["README.md"] >= 20 and sum(counts.values()) >= 70
    scripts = {word for command in COMMANDS for word in command.split() if word.endswith(".py")}
    assert scripts >= SMALL.keys() - {"demo.py"}


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with the worked example's change."""
    copy = tmp_path_factory.mktemp("changed") / "project"
    left_out = shutil.ignore_patterns(".*", "checkpoints", "plots", "demo", "__pycache__")
    shutil.copytree(REPOSITORY, copy, ignore=left_out)
    [diff] = blocks("docs/how-it-works.md", "diff")
    for file, hunks in re.findall(r"^\+\+\+ b/(\S+)\n(.*?)(?=^--- |\Z)", diff, re.M | re.S):
        text = (copy / file).read_text(encoding="utf-8")
        for hunk in re.split(r"^@@\n", hunks, flags=re.M)[1:]:
            lines = hunk.splitlines(keepends=True)
            before = "".join(line[1:] or line for line in lines if line[0] != "+")
            after = "".join(line[1:] or line for line in lines if line[0] != "-")
            assert text.count(before) == 1, f"{file} has these lines {text.count(before)} times, not once:\n{before}"
            text = text.replace(before, after)
        (copy / file).write_text(text, encoding="utf-8")
    return copy


def test_the_worked_example_changes_the_model(session, changed):
    [diff] = blocks("docs/how-it-works.md", "diff")
    assert len(re.findall(r"^[+-] ", diff, re.M)) <= 15
    [command] = [command for command in COMMANDS if NEW_FIELD in command]
    _, script, *arguments = words_of(command)

    def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(  # not by the server, which has imported the modules of the unchanged project
            [sys.executable, str(changed / script), *arguments],
            cwd=session.folder, env=ENVIRONMENT, capture_output=True, encoding="utf-8",
        )  # fmt: skip

    trained = run(script, *smaller(script, arguments))
    assert trained.returncode == 0, trained.stderr
    assert run("generate.py", "--model", "checkpoints/parallel.pt", "--prompt", "x").returncode == 0
    refused = run("export.py", "--model", "checkpoints/parallel.pt", "--out", "parallel-gpt2")
    assert refused.returncode == 1 and "cannot export" in refused.stderr
    fields = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/test_fields.py", "-k", "every_switch or parallel and cached"],
        cwd=changed, env=ENVIRONMENT, capture_output=True, encoding="utf-8",
    )  # fmt: skip
    assert fields.returncode == 0 and "2 passed" in fields.stdout, fields.stdout[-3000:]


def test_the_folder_for_a_space_holds_all_that_the_app_needs(session):
    [block] = (block for block in blocks("docs/app.md", "bash") if "<<'END'" in block)
    lines = [line for line in block.splitlines() if not line.startswith("hf ")]
    for path in REPOSITORY.iterdir():
        if path.suffix == ".py" or path.name in (*PACKAGES, "requirements.txt", ".streamlit"):
            (session.folder / path.name).symlink_to(path)
    subprocess.run(["sh", "-ec", "\n".join(lines)], cwd=session.folder, check=True)
    space = session.folder / "space"
    code = "import system.interrupts\n"  # in the main thread, since only Streamlit's server handles Ctrl-C itself
    code += "from streamlit.testing.v1 import AppTest\nprint(AppTest.from_file('app.py').run(timeout=60).exception)"
    page = subprocess.run(
        [sys.executable, "-c", code], cwd=space, env=ENVIRONMENT, capture_output=True, encoding="utf-8"
    )
    assert page.stdout == "ElementList()\n", page.stdout + page.stderr[-2000:]
    assert (space / "checkpoints/sft.pt").exists() and "app_port" in (space / "README.md").read_text()


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_other_programs_say_whether_they_were_run(page):
    ours = (*OURS, "source", "mkdir", "cat", "printf")
    for block in blocks(page, "bash"):
        for line in lines_of(block):
            others = line.split()[0] not in ours or "llama.cpp" in line
            assert not others or re.search("not run here|run on 20", line), line


def anchors(page: str) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", (REPOSITORY / page).read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_or_a_heading(page):
    text = re.sub(r"^```.*?^```|`[^`]+`", "", TEXT[page], flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        path = (REPOSITORY / page).parent / file if file else REPOSITORY / page
        assert path.resolve().is_relative_to(REPOSITORY) and path.exists(), target
        assert not anchor or anchor in anchors(str(path.resolve().relative_to(REPOSITORY))), target


def test_names_in_the_code_exist():
    """A link to a file of the project, followed by names in it, names what is there."""
    for page in PAGES:
        for file, names in re.findall(r"\]\((?:\.\./)?([\w/]+\.py)\),? ((?:`[\w.]+`(?:, | and )?)+)", TEXT[page]):
            source = (REPOSITORY / file).read_text(encoding="utf-8")
            for name in re.findall(r"`([\w.]+)`", names):
                assert re.search(rf"(def|class) {name.split('.')[-1]}\b", source), f"{page}: {file} has no {name}"


def test_the_readme_is_short_and_leads_to_every_page():
    assert len(TEXT["README.md"].split()) <= 1000
    linked = " ".join(re.findall(r"\]\(([^)#]+)", TEXT["README.md"] + TEXT["docs/training.md"]))
    assert not [page for page in PAGES[1:] if Path(page).name not in linked]
