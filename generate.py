"""Step 3: write with a model. Completes a prompt, or converses with --chat, streaming to the terminal."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cli import SamplingConfig, UserError, require, run

HELP = "/reset forgets the conversation, /help shows this, /quit (or Ctrl-D) ends; Ctrl-C breaks off an answer."


@dataclass(frozen=True)
class Config(SamplingConfig):
    model: Path = Path("checkpoints/pretrained.pt")
    """checkpoint to load"""
    prompt: str | None = None
    """text to complete; without it, standard input, or on a terminal one line after another"""
    chat: bool = False
    """converse with a model that train_sft.py fine-tuned"""
    instruction: str | None = None
    """answer one instruction, with a fine-tuned model"""
    context: str = ""
    """text that the instruction speaks of"""
    num_samples: int = 1
    """completions of the prompt"""
    device: str = "auto"
    """auto, cpu, cuda, mps"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """precision; auto takes bfloat16 where the GPU has it, float32 on the CPU"""

    def __post_init__(self):
        super().__post_init__()
        require(self.num_samples >= 1, "--num-samples must be at least 1")
        require(
            sum((self.chat, self.prompt is not None, self.instruction is not None)) <= 1,
            "--prompt, --chat and --instruction exclude each other",
        )


def main(config: Config) -> None:
    """Loads the model and writes."""
    from sampling import Chat, TextModel

    text_model = TextModel.load(config.model, config.device, config.dtype)
    if config.instruction is not None:
        message = {"role": "user", "content": config.instruction, "input": config.context}
        write(text_model.answer([message], config))
    elif config.chat:
        if not text_model.template:
            raise UserError(f"{config.model} only completes text: leave --chat away, or fine-tune it with train_sft.py")
        chat = Chat(text_model, config)
        print(text_model.facts, HELP, sep="\n", file=sys.stderr)
        commands = {"/reset": chat.reset, "/help": lambda: print(HELP, file=sys.stderr)}
        converse("you> ", lambda line: write(chat.reply(line)), commands)
    elif config.prompt is not None or not sys.stdin.isatty():
        prompt = read_standard_input() if config.prompt is None else config.prompt
        for i in range(config.num_samples):
            print("---\n" * bool(i), end="")
            write(text_model.complete(prompt, with_seed(config, i)), prompt)
    else:
        print(text_model.facts, "Type the beginning of a text; /quit (or Ctrl-D) ends.", sep="\n", file=sys.stderr)
        converse("text> ", lambda line: write(text_model.complete(line, config), line), {})


def with_seed(config: Config, i: int) -> Config:
    """Returns the config of sample `i`, whose draws differ from those of the others."""
    import dataclasses

    return config if config.seed is None else dataclasses.replace(config, seed=config.seed + i)


def write(pieces: Iterator[str], prompt: str = "") -> None:
    """Streams text to standard output, and a newline behind it."""
    sys.stdout.write(prompt)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    print(flush=True)


def converse(label: str, respond: Callable[[str], None], commands: dict[str, Callable[[], None]]) -> None:
    """Answers line after line from standard input; a line that is a command is run instead."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives input() a history and line editing
    while True:
        try:
            line = input(label if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        except UnicodeDecodeError:
            raise UserError("standard input is not UTF-8 text") from None
        if line == "/quit":
            return
        if line in commands:
            commands[line]()
        elif line.startswith("/") and " " not in line:
            print(f"no command {line}; there are {', '.join([*commands, '/quit'])}", file=sys.stderr)
        elif line:
            try:
                respond(line)
            except KeyboardInterrupt:
                print(flush=True)


def read_standard_input() -> str:
    """Reads all of standard input as UTF-8, less a newline at its end. Raises UserError where it is something else."""
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError:
        raise UserError("standard input is not UTF-8 text") from None


if __name__ == "__main__":
    run(main, Config)
