"""All steps in a few minutes: raw text, a language model, a chat model. `make demo` runs this script.

Its models are small and know little. Every step is real, and its result is measured.
"""

import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from generation.config import SamplingConfig
from system.cli import duration, run
from system.errors import UserError, require
from text.lessons import lessons

HERE, DATA = Path(__file__).parent, Path("data/demo")
PROMPTS = [
    "This module provides",
    "Return a copy of the string",
    "Raised when an operation",
    "The optional argument specifies",
    "A class that represents",
]
PRETRAINING_SHARE = 0.45
"""of the demo's minutes"""
FINE_TUNING_STEPS = 2_000
"""How many steps of pre-training take as long as fine-tuning on all answers, with its evaluations and the questions."""
MEMORIZING = """\
There are few answers, each with many paraphrases of its question, so the model memorizes them. The training loss falls
towards 0. The validation loss, on paraphrases that it does not train on, falls at first and may rise later, when the
model becomes surer of its wrong answers too. The demo keeps the weights of the last step all the same."""


@dataclass(frozen=True)
class Config:
    input: tuple[str, ...] = ()
    """text files or folders to train on instead of Python's documentation"""
    chats: Path | None = None
    """conversations to teach instead of questions about Python, in a file that prepare_sft_data.py --input takes"""
    vocab_size: int = 2045
    """tokens of the vocabulary, a BPE trained on the text"""
    minutes: float = 5.5
    """minutes to take: they choose the size of the model, its steps, and how many answers it is taught"""
    max_steps: int | None = None
    """steps of pre-training, instead of as many as the minutes allow; all answers are taught then"""
    sft_steps: int | None = None
    """steps of fine-tuning, instead of as many as the answers need"""

    def __post_init__(self) -> None:
        require(self.minutes >= 1, "--minutes must be at least 1")


def main(config: Config) -> None:
    """Runs the steps and prints their results."""
    from generation.text_model import TextModel
    from text.token_files import read_sft_meta
    from training.reporting import read_log
    from training.scores import exact_match_report
    from weights.loading import load_checkpoint

    start, out = time.perf_counter(), ["--out", DATA, "--overwrite"]
    corpus = ["--input", *config.input] if config.input else ["--dataset", "pydocs"]

    title("1. Raw text becomes tokens")
    script("prepare_data.py", *corpus, *out, "--vocab-size", config.vocab_size, "--val-fraction", "0.05")
    title("2. A GPT learns to predict the next token")
    print("It begins with random weights. At every evaluation it continues the same words, so you see it learn.")
    sample_prompt = [] if config.input else ["--sample-prompt", PROMPTS[0]]
    length = ["--minutes", f"{PRETRAINING_SHARE * config.minutes:.2f}"]
    if config.max_steps:
        length = ["--max-steps", str(config.max_steps), "--max-epochs", "0"]
    script("train.py", "--preset", "demo", "--overwrite", *sample_prompt, *length)

    title("3. It completes texts")
    prompts = load_checkpoint("checkpoints/demo/pretrained.pt")["prompts"] if config.input else PROMPTS
    text_model = TextModel.load("checkpoints/demo/pretrained.pt")
    sampling = SamplingConfig(max_new_tokens=60, temperature=0.6, top_k=None, top_p=0.8, seed=1)
    for prompt in prompts:
        paragraph = text_model.write(text_model.prompt_ids(prompt), sampling).split("\n\n")[0]
        print(f"> {prompt} | {' '.join(paragraph.split())}")

    title("4. Questions and answers become tokens, with a mask that hides the questions from the loss")
    left = 60 * config.minutes - (time.perf_counter() - start)
    last = read_log(Path("checkpoints/demo/pretrained.jsonl"))[-1]
    n_answers = None if config.max_steps or config.chats else affordable_answers(left, last["seconds"] / last["step"])
    answers = ["--dataset", "builtins-qa", *flag("--max-conversations", n_answers)]
    conversations = ["--input", config.chats] if config.chats else answers
    script("prepare_sft_data.py", *conversations, "--block-size", "128", *out)
    title("5. It learns to answer")
    print("There are few conversations, so the model memorizes them." if config.chats else MEMORIZING)
    script("train_sft.py", "--preset", "demo", "--overwrite", *flag("--max-steps", config.sft_steps))

    title("6. It answers")
    text_model = TextModel.load("checkpoints/demo/sft.pt")
    print("Questions that it was taught:", exact_match_report(text_model, DATA, "train"))
    if read_sft_meta(DATA).get("is_held_out", True):
        print("Questions in words that it has never seen:", exact_match_report(text_model, DATA, "val"))
    print("The answers are memory, not knowledge: it recognizes a question and repeats the answer it was taught.")

    title(f"Done in {duration(time.perf_counter() - start)}. Now try")
    print(
        "  .venv/bin/python generate.py --model checkpoints/demo/sft.pt --chat\n"
        "  .venv/bin/python generate.py --model checkpoints/demo/pretrained.pt\n"
        "  .venv/bin/streamlit run app.py\n"
        "The loss curves are plots/demo/pretrained_loss.png and plots/demo/sft_loss.png."
    )


def title(text: str) -> None:
    """Prints the heading of a step."""
    print(f"\n=== {text}", flush=True)


def affordable_answers(seconds: float, step: float) -> int | None:
    """Returns how many answers fine-tuning can teach in what is left of the minutes, or None for all of them.

    A step of pre-training took `step` seconds. The model sees each answer as often, however many there are.
    """
    whole = FINE_TUNING_STEPS * step
    if whole <= seconds:
        return None
    share = max(0.1, seconds / whole)
    print(f"In the minutes that are left, it is taught {share:.0%} of the answers (make demo MINUTES=12 teaches all).")
    return int(share * len(list(lessons(builtins_only=True))))


def flag(name: str, value: object) -> list[object]:
    """Returns a flag with its value, or nothing if the value is None."""
    return [] if value is None else [name, value]


def script(name: str, *arguments: object, captured: bool = False) -> str:
    """Shows the command of a script and runs it; returns what it prints if that is captured, and "" otherwise.

    Raises UserError if the script fails; it has said why.
    """
    command = [name, *map(str, arguments)]
    print(f"$ python {shlex.join(command)}", flush=True)
    stdout = subprocess.PIPE if captured else None
    result = subprocess.run(
        [sys.executable, str(HERE / name), *command[1:]], stdout=stdout, encoding="utf-8", check=False
    )
    if status := result.returncode:
        raise UserError(f"{name} failed with status {status}", status=max(status, 1))  # below 0: ended by a signal
    return result.stdout or ""


if __name__ == "__main__":
    run(main, Config)
