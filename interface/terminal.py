"""The terminal: completions as text or JSON, a chat with its commands, lines that the user types."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.formatted_text import ANSI
from prompt_toolkit.key_binding import KeyBindings

from generation.config import SamplingConfig
from generation.text_model import Chat, Sample, TextModel
from system.cli import printable
from system.errors import UserError
from system.files import atomic_write, read_json, read_utf8, read_utf8_lines
from text.chat import Message
from text.conversations import read_file
from text.sources import Notes
from text.tokenizer import Tokenizer, unix_line_ends

HELP = """/reset        clear the conversation
/undo         take back the last exchange
/retry        answer the last message again
/NAME VALUE   set temperature, top-k, top-p, min-p, repetition-penalty, max-new-tokens or seed; some can be none
/NAME         show its value
/save FILE    write the conversation as one line of JSON
/load FILE    continue a saved conversation
/help         show this; /quit or Ctrl-D ends; Ctrl-C stops an answer; Alt-Enter begins a new line"""
HELP_OF_COMPLETION = """\
/NAME VALUE   set temperature, top-k, top-p, min-p, repetition-penalty, max-new-tokens or seed; some can be none
/NAME         show its value
/help         show this; /quit or Ctrl-D ends; Ctrl-C stops a completion; Alt-Enter begins a new line"""
START_OF_CHAT = "Type a message. /help lists the commands; /quit or Ctrl-D ends."
START_OF_COMPLETION = "Type the beginning of a text. /help lists the commands; /quit or Ctrl-D ends."
OPTIONS: dict[str, Callable[[str], float]] = {
    "temperature": float,
    "top-k": int,
    "top-p": float,
    "min-p": float,
    "repetition-penalty": float,
    "max-new-tokens": int,
    "seed": int,
}
CAN_BE_NONE = ("top-k", "top-p", "min-p", "seed")
CYAN, BOLD, RESET = "\x1b[36m", "\x1b[1m", "\x1b[0m"
LABEL_OF_ANSWER = "model> "


def write(
    text_model: TextModel,
    prompt: str,
    ids: list[int],
    config: SamplingConfig,
    *,
    num_samples: int = 1,
    top_logprobs: int | None = None,
    as_json: bool = False,
    strip: bool = False,
) -> None:
    """Prints a prompt and what follows its token ids: streaming, or as several samples, with log-probabilities or as
    JSON.

    The text goes to standard output, figures go to standard error. With `strip`, a text begins without white space.
    """
    context = text_model.model.config.block_size
    if len(ids) > context:
        print_note(f"the prompt has {len(ids):,} tokens: the model sees the last {context:,}, its context")
    start, n_tokens, is_stopped = time.perf_counter(), 0, False
    if as_json or top_logprobs or num_samples > 1:
        for i, sample in enumerate(text_model.samples_in_batches(ids, config, num_samples, top_logprobs, strip)):
            n_tokens, is_stopped = n_tokens + len(sample.tokens), is_stopped or sample.finish_reason == "stop"
            if as_json:
                fields = sample_fields(text_model.tokenizer, prompt, sample, with_logprobs=top_logprobs is not None)
                print(json.dumps(fields, ensure_ascii=False))
                continue
            if i > 0:
                print("---")
            print(prompt + sample.text)
            for line in token_lines(text_model.tokenizer, sample):
                print(line)
    else:
        sample = Sample()
        print_stream(text_model.stream(ids, config, sample, strip=strip), before=prompt)
        n_tokens, is_stopped = len(sample.tokens), sample.finish_reason == "stop"
    seconds = time.perf_counter() - start
    print_note(f"{n_tokens:,} tokens, {n_tokens / seconds:,.1f} tokens/s, prompt of {len(ids):,} tokens")
    if config.stop and not is_stopped:
        print_note("the stop text did not come")


def print_stream(pieces: Iterable[str], before: str = "") -> None:
    """Prints pieces of text as they come, behind another text, and a newline at the end."""
    sys.stdout.write(before)
    try:
        for piece in pieces:
            sys.stdout.write(printable(piece) if sys.stdout.isatty() else piece)
            sys.stdout.flush()
    finally:
        print(flush=True)


def print_code(code: str) -> None:
    """Changes the colour of what follows, if standard output is a terminal."""
    if sys.stdout.isatty():
        sys.stdout.write(code)


def print_note(text: str) -> None:
    """Prints a remark of the program, which is not the model's text, to standard error."""
    print(printable(text), file=sys.stderr)


def sample_fields(tokenizer: Tokenizer, prompt: str, sample: Sample, with_logprobs: bool) -> dict[str, object]:
    """Returns a sample as a dict for JSON."""
    fields: dict[str, object] = {
        "prompt": prompt,
        "text": sample.text,
        "finish_reason": sample.finish_reason,
        "tokens": [token.id for token in sample.tokens],
    }
    if with_logprobs:
        fields["logprobs"] = [
            {
                "token": tokenizer.decode([token.id]),
                "logprob": token.logprob,
                "top": [{"token": tokenizer.decode([i]), "id": i, "logprob": p} for i, p in token.candidates],
            }
            for token in sample.tokens
        ]
    return fields


def token_lines(tokenizer: Tokenizer, sample: Sample) -> Iterator[str]:
    """Yields a line for each token that has a log-probability: its probability and the likeliest candidates."""
    for token in sample.tokens:
        if token.logprob is not None:
            candidates = ", ".join(f"{tokenizer.decode([i])!r} {math.exp(p):.1%}" for i, p in token.candidates)
            yield f"{tokenizer.decode([token.id])!r:20} {math.exp(token.logprob):6.1%}   {candidates}"


def read_standard_input() -> str:
    """Reads all of standard input, without a newline at its end. Raises UserError if it is not UTF-8, or is huge."""
    return unix_line_ends(read_utf8()).removesuffix("\n")


class LineReader:
    """Lines that the user types, with history and editing. If standard input is not a terminal, its lines."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.session: PromptSession[str] | None = None
        self.lines: Iterator[str] = iter(())
        if not sys.stdin.isatty():
            self.lines = read_utf8_lines()
            return
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8")  # also in the C locale
        keys = KeyBindings()
        keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
        self.session = PromptSession(key_bindings=keys, multiline=False)

    def __iter__(self) -> LineReader:
        return self

    def __next__(self) -> str:
        """Returns the next line, stripped; bytes that are not UTF-8 become U+FFFD if they are typed.

        Ctrl-D ends the iteration; Ctrl-C discards what is typed. Raises UserError if standard input is not a terminal
        and not UTF-8.
        """
        if self.session is None:
            return next(self.lines).strip()
        while True:
            try:
                typed = self.session.prompt(ANSI(f"{BOLD}{self.label}{RESET}"))
                return Notes().clean(typed, "standard input").strip()
            except KeyboardInterrupt:
                continue
            except EOFError:
                raise StopIteration from None

    def confirm(self, question: str) -> bool:
        """Asks a question; whether the user types y or yes. If standard input is not a terminal, nobody does."""
        if self.session is None:
            return False
        try:
            return self.session.prompt(f"{question} [y/N] ").strip().lower() in ("y", "yes")
        except (KeyboardInterrupt, EOFError):
            return False


def complete_lines(
    text_model: TextModel, config: SamplingConfig, complete: Callable[[str, SamplingConfig], None]
) -> None:
    """Calls `complete` with each line that the user types, until Ctrl-D or /quit. Commands change the config.

    A text may begin with a slash, unless its first word is a command.
    """
    print_note(f"{text_model.description}\n{START_OF_COMPLETION}")
    for line in LineReader("text> "):
        command, _, argument = line.partition(" ")
        if command == "/quit":
            return
        try:
            if command == "/help":
                print_note(HELP_OF_COMPLETION)
            elif command.startswith("/") and command[1:] in OPTIONS:
                config = set_or_keep(config, command[1:], argument.strip())
                print_note(show_option(config, command[1:]))
            elif line:
                complete(line, config)
        except UserError as error:
            print_note(f"error: {error}")
        except KeyboardInterrupt:
            continue


def chat(text_model: TextModel, config: SamplingConfig) -> None:
    """Holds a conversation with the user, until Ctrl-D or /quit."""
    conversation = Chat(text_model, config)
    print_note(f"{text_model.description}\n{START_OF_CHAT}")
    reader = LineReader("you> ")
    for line in reader:
        command, _, argument = line.partition(" ")
        if command == "/quit":
            return
        try:
            if command == "/retry":
                message = conversation.undo()
                if message is None:
                    print_note("the conversation is empty")
                else:
                    answer(conversation, message)
            elif command.startswith("/"):
                print_note(obey(conversation, command[1:], argument.strip(), reader.confirm))
            elif line:
                answer(conversation, line)
        except UserError as error:
            print_note(f"error: {error}")
        except OSError as error:
            print_note(f"error: {error.filename or argument}: {error.strerror}")


def answer(conversation: Chat, message: str) -> None:
    """Streams the answer to a message, on a terminal behind a label. Ctrl-C stops it; the text so far is kept."""
    pieces = conversation.reply(message)
    if sys.stdout.isatty():
        print_code(BOLD)
        sys.stdout.write(LABEL_OF_ANSWER)
        print_code(RESET + CYAN)
    try:
        print_stream(pieces)
    except KeyboardInterrupt:
        pieces.close()
    finally:
        print_code(RESET)


def obey(conversation: Chat, command: str, argument: str, confirm: Callable[[str], bool]) -> str:
    """Carries out a command. Returns what to print. `confirm` asks the user a question.

    Raises UserError if the command or its argument is wrong.
    """
    if command == "help":
        return HELP
    if command == "reset":
        conversation.reset()
        return "conversation cleared"
    if command == "undo":
        message = conversation.undo()
        return "the conversation is empty" if message is None else f"taken back: {message}"
    if command in ("save", "load"):
        require_file(command, argument)
    if command == "save":
        save_conversation(Path(argument), conversation.messages, confirm)
        return f"saved {count(conversation.messages)} in {argument}"
    if command == "load":
        conversation.messages[:] = load_conversation(Path(argument))
        return f"loaded {count(conversation.messages)}"
    if command in OPTIONS:
        conversation.config = set_or_keep(conversation.config, command, argument)
        return show_option(conversation.config, command)
    raise UserError(f"unknown command /{command}: /help lists the commands")


def count(messages: list[Message]) -> str:
    """Returns how many exchanges there are, in words."""
    n = len(messages) // 2
    return f"{n} exchange{'s' * (n != 1)}"


def require_file(command: str, argument: str) -> None:
    """Raises UserError unless an argument of /save or /load can name a file: a device may never end."""
    if not argument or "\0" in argument:
        raise UserError(f"/{command} needs a file name")
    path = Path(argument)
    if path.exists() and not path.is_file():
        raise UserError(f"{argument} is not a file: choose another name")


def save_conversation(
    path: Path, messages: list[Message], confirm: Callable[[str], bool] = lambda question: False
) -> None:
    """Writes a conversation as one line of JSON. If the file holds anything but its beginning, `confirm` asks the user.

    Raises UserError if the user does not confirm.
    """
    if path.exists() and not holds_beginning(path, messages):
        problem = f"{path} exists and is not the beginning of this conversation"
        if not confirm(f"{problem}. Replace it?"):
            raise UserError(f"{problem}: choose another name")
    with atomic_write(path, "w") as file:
        file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def holds_beginning(path: Path, messages: list[Message]) -> bool:
    """Whether a file holds the first of these messages and nothing else; an empty file does."""
    if not path.is_file():  # a device or a pipe, which has no end
        return False
    if path.stat().st_size == 0:
        return True
    try:
        saved = read_json(path)
    except ValueError:
        return False
    return any(saved == {"messages": messages[:n]} for n in range(len(messages) + 1))


def load_conversation(path: Path) -> list[Message]:
    """Returns the first conversation of a file that /save or the page wrote. Raises UserError if there is none."""
    notes = Notes()
    messages = next(read_file(path, notes), None)
    if messages is None:
        raise UserError(f"{path} holds no conversation{notes.in_brackets()}")
    return messages


def set_option(config: SamplingConfig, name: str, value: str) -> SamplingConfig:
    """Returns a config with one option changed. Raises UserError if the option cannot have the value."""
    change: dict[str, Any] = {name.replace("-", "_"): None}
    if name not in CAN_BE_NONE or value != "none":
        try:
            change[name.replace("-", "_")] = OPTIONS[name](value)
        except ValueError:
            raise UserError(f"/{name} needs a number, not {value!r}") from None
    return dataclasses.replace(config, **change)


def set_or_keep(config: SamplingConfig, name: str, value: str) -> SamplingConfig:
    """Returns a config with one option changed, or unchanged if no value is given. Raises UserError as `set_option`."""
    return set_option(config, name, value) if value else config


def show_option(config: SamplingConfig, name: str) -> str:
    """Returns the value of an option in words."""
    value = getattr(config, name.replace("-", "_"))
    return f"{name} is {'none' if value is None else value}"
