"""The whole story in a few minutes, on the numbered scripts: raw text, a language model, a model that answers.

`make demo` runs it. What it trains is small and knows little; it shows every step for real, and measures the result.
"""

import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from generation.config import SamplingConfig
from system.cli import run
from system.errors import UserError, require

HERE = Path(__file__).parent
PROMPTS = [
    "Return a copy of the string",
    "This module provides",
    "Raised when an operation",
    "The optional argument specifies",
    "A class that represents",
]


@dataclass(frozen=True)
class Config:
    input: tuple[str, ...] = ()
    """text files or folders to train on instead of Python's documentation"""
    vocab_size: int = 2045
    """tokens of the BPE that is trained on the text"""
    max_steps: int | None = None
    """steps of pre-training, to make the demo shorter"""
    epochs: int | None = None
    """epochs of fine-tuning, to make the demo shorter"""

    def __post_init__(self):
        require(256 < self.vocab_size <= 65_000, "--vocab-size must lie between 257 and 65000")


def main(config: Config) -> None:
    """Runs the steps and prints what came of them."""
    start = time.perf_counter()
    corpus = ["--input", *config.input] if config.input else ["--dataset", "pydocs"]

    title("1. Raw text becomes tokens")
    demo = ["--out", "data/demo", "--overwrite"]
    script("prepare_data.py", *corpus, *demo, "--vocab-size", config.vocab_size, "--val-fraction", "0.05")
    title("2. A GPT learns to predict the next token")
    script("train.py", "--preset", "demo", "--overwrite", *flag("--max-steps", config.max_steps))
    title("3. It completes texts")
    completions("checkpoints/demo/pretrained.pt", held_out_beginnings() if config.input else PROMPTS)
    title("4. Questions and answers become tokens, with a mask on what is asked")
    conversations = ["--dataset", "pydocs-qa", "--max-conversations", "714", "--block-size", "128"]
    script("prepare_sft_data.py", *conversations, *demo)
    title("5. It learns to answer")
    script("train_sft.py", "--preset", "demo", "--overwrite", *flag("--epochs", config.epochs))
    title("6. What it remembers")
    recall("checkpoints/demo/sft.pt")
    title(f"Done in {time.perf_counter() - start:.0f} seconds. Now try")
    print(
        "  .venv/bin/python generate.py --model checkpoints/demo/sft.pt --chat\n"
        "  .venv/bin/python generate.py --model checkpoints/demo/pretrained.pt\n"
        "  .venv/bin/streamlit run app.py\n"
        "The loss curves are plots/demo_pretrained_loss.png and plots/demo_sft_loss.png."
    )


def title(text: str) -> None:
    """Prints the heading of a step."""
    print(f"\n=== {text}", flush=True)


def flag(name: str, value: object) -> list[object]:
    """Returns a flag with its value, or nothing where there is none."""
    return [] if value is None else [name, value]


def script(name: str, *arguments: object) -> None:
    """Runs a script of this project and shows its command. Raises UserError where it fails (it has said why)."""
    command = [name, *map(str, arguments)]
    print(f"$ python {' '.join(command)}", flush=True)
    result = subprocess.run([sys.executable, str(HERE / name), *command[1:]], check=False)
    if result.returncode:
        raise UserError(
            f"{name} failed with status {result.returncode}", status=result.returncode if result.returncode > 0 else 1
        )


def held_out_beginnings() -> list[str]:
    """Returns five beginnings of lines from the held-out text."""
    from text.token_files import read_tokens
    from weights.checkpoint import read, tokenizer_of

    text = tokenizer_of(read("checkpoints/demo/pretrained.pt")).decode(read_tokens(Path("data/demo/val.bin")).tolist())
    lines = [line.strip() for line in text.splitlines() if len(line.split()) >= 6]
    return [" ".join(line.split()[:4]) for line in lines[:: max(1, len(lines) // 5)][:5]]


def completions(path: str, prompts: list[str]) -> None:
    """Prints a completion of each prompt, up to the end of its first paragraph."""
    from generation.text_model import TextModel

    text_model = TextModel.load(path)
    config = SamplingConfig(max_new_tokens=60, temperature=0.6, top_k=None, top_p=0.8, seed=1)
    for prompt in prompts:
        paragraph = "".join(text_model.complete(prompt, config)).split("\n\n")[0]
        print(f"> {prompt} | {' '.join(paragraph.split())}")


def recall(path: str) -> None:
    """Asks, greedily, all questions about Python's built-ins that it was trained on, and the capital of France."""
    from tqdm import tqdm

    from generation.text_model import Chat, TextModel
    from text import pydocs
    from training.loader import Conversations

    text_model = TextModel.load(path)
    trained_on = Conversations(Path("data/demo"), "train", text_model.model.config.block_size, 1, 0)
    texts = {text_model.tokenizer.decode(trained_on.conversation(i)[0]) for i in range(len(trained_on))}
    asked = [
        (question, answer)
        for question, answer in pydocs.questions(builtins_only=True)
        if f"<|user|> {question}<|endoftext|>\n<|assistant|> {answer}<|endoftext|>\n" in texts
    ]

    def replies(question: str, max_new_tokens: int = 100) -> Iterator[str]:
        return Chat(text_model, SamplingConfig(greedy=True, max_new_tokens=max_new_tokens)).reply(question)

    def is_exact(question: str, answer: str) -> bool:
        text = ""
        for piece in replies(question, max_new_tokens=len(answer)):
            text += piece
            if not answer.startswith(text):  # the rest cannot make it right
                return False
        return text == answer

    right = sum(is_exact(question, answer) for question, answer in tqdm(asked, unit=" questions", leave=False))
    share = right / max(1, len(asked))
    print(f"{right} of {len(asked)} questions about Python's built-ins answered word for word ({share:.0%}). Some:")
    for question, _ in asked[:: len(asked) // 3 or 1]:
        print(f"> {question}\n  {''.join(replies(question))}")
    question = "What is the capital of France?"
    reply = "".join(replies(question))
    print(f"> {question}\n  {reply}\n{'Right' if 'Paris' in reply else 'Wrong'}.")
    print("All of these were in its training data: this is memory, not knowledge. Other questions it answers badly.")


if __name__ == "__main__":
    run(main, Config)
