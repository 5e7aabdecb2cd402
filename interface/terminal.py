"""A person at the terminal: line editing, a conversation with its commands, completions one after another."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.formatted_text import ANSI
from prompt_toolkit.key_binding import KeyBindings

from generation.config import SamplingConfig
from generation.text_model import Chat, TextModel
from system.errors import UserError
from system.files import atomic_write

HELP = """/reset        forget the conversation
/undo         take back the last exchange
/retry        answer the last message again
/NAME VALUE   set temperature, top-k, top-p, min-p, repetition-penalty, max-new-tokens or seed (perhaps to none)
/save FILE    write the conversation, one JSON object in a line
/load FILE    go on with a saved one
/help         this; /quit or Ctrl-D ends; Ctrl-C breaks off an answer; Alt-Enter begins a new line"""
SETTINGS = {
    "temperature": float,
    "top-k": int,
    "top-p": float,
    "min-p": float,
    "repetition-penalty": float,
    "max-new-tokens": int,
    "seed": int,
}


class Lines:
    """Lines that a person types, with history and editing; where standard input is no terminal, just its lines."""

    def __init__(self, label: str):
        self.label, self.session = label, None
        if sys.stdin.isatty():
            keys = KeyBindings()
            keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
            self.session = PromptSession(key_bindings=keys, multiline=False)

    def __iter__(self):
        return self

    def __next__(self) -> str:
        """Returns the next line, stripped. Ends at Ctrl-D; Ctrl-C gives a new line."""
        while True:
            try:
                if self.session:
                    return self.session.prompt(ANSI(f"\x1b[1m{self.label}\x1b[0m")).strip()
                return input().strip()
            except KeyboardInterrupt:
                continue
            except EOFError:
                raise StopIteration from None
            except UnicodeDecodeError:
                raise UserError("standard input is not UTF-8 text") from None


def say(text: str) -> None:
    """Says something about the program, not the model's words: to standard error."""
    print(text, file=sys.stderr)


def complete(text_model: TextModel, respond: Callable[[str], None]) -> None:
    """Completes what is typed, line after line."""
    say(f"{text_model.description}\nType the beginning of a text; /quit or Ctrl-D ends; Ctrl-C breaks off a completion.")
    for line in Lines("text> "):
        if line == "/quit":
            return
        if line:
            try:
                respond(line)
            except KeyboardInterrupt:
                continue


def chat(text_model: TextModel, config: SamplingConfig) -> None:
    """Converses until Ctrl-D or /quit."""
    conversation = Chat(text_model, config)
    say(f"{text_model.description}\n{HELP}")
    for line in Lines("you> "):
        command, _, argument = line.partition(" ")
        if command == "/quit":
            return
        try:
            if not command.startswith("/"):
                if line:
                    answer(conversation, line)
            elif command == "/retry":
                if (asked := conversation.undo()) is None:
                    say("nothing was said yet")
                else:
                    answer(conversation, asked)
            else:
                say(obey(conversation, command[1:], argument.strip()))
        except UserError as error:
            say(f"error: {error}")
        except OSError as error:
            say(f"error: {error.filename or argument}: {error.strerror}")


def answer(conversation: Chat, text: str) -> None:
    """Streams the answer to a message to standard output; Ctrl-C breaks it off, and what came of it is kept."""
    colour = ("\x1b[36m", "\x1b[0m") if sys.stdout.isatty() else ("", "")
    pieces = conversation.reply(text)
    sys.stdout.write(colour[0])
    try:
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        pieces.close()
    finally:
        print(colour[1], flush=True)


def obey(conversation: Chat, command: str, argument: str) -> str:
    """Does what a command says; returns what to tell. Raises UserError for one that cannot be done."""
    if command == "help":
        return HELP
    if command == "reset":
        conversation.reset()
        return "forgotten"
    if command == "undo":
        asked = conversation.undo()
        return "nothing was said yet" if asked is None else f"taken back: {asked}"
    if command in ("save", "load") and not argument:
        raise UserError(f"/{command} wants the name of a file")
    if command == "save":
        line, path = json.dumps({"messages": conversation.messages}, ensure_ascii=False), Path(argument)
        if path.exists() and not line.startswith(path.read_text(encoding="utf-8", errors="replace").rstrip("]}\n")):
            raise UserError(f"{path} exists, and is not the beginning of this conversation: choose another name")
        with atomic_write(path, "w") as file:
            file.write(line + "\n")
        return f"saved {len(conversation.messages) // 2} exchanges in {argument}"
    if command == "load":
        conversation.messages[:] = read_conversation(Path(argument))
        return f"loaded {len(conversation.messages) // 2} exchanges"
    if command in SETTINGS:
        conversation.config = set_option(conversation.config, command, argument)
        return f"{command} is {getattr(conversation.config, command.replace('-', '_'))}"
    raise UserError(f"no command /{command}: /help shows those there are")


def read_conversation(path: Path) -> list[dict]:
    """Returns the first conversation in a file that /save or the app wrote. Raises UserError where there is none."""
    from text.conversations import read_file
    from text.readers import Notes

    notes = Notes()
    messages = next(read_file(path, notes), None)
    if messages is None:
        raise UserError(f"{path} holds no conversation{notes.in_brackets()}")
    return messages


def set_option(config: SamplingConfig, name: str, value: str) -> SamplingConfig:
    """Returns a config with one option set. Raises UserError for a value that it cannot have."""
    field = name.replace("-", "_")
    if value in ("", "none") and field in ("top_k", "top_p", "min_p", "seed"):
        return dataclasses.replace(config, **{field: None})
    try:
        return dataclasses.replace(config, **{field: SETTINGS[name](value)})
    except ValueError:
        raise UserError(f"/{name} wants a number, not {value!r}") from None
