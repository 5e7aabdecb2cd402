"""The terminal: completions as text or JSON, a chat with its commands, lines that the user types, the lens as a table.

What a model or a file says reaches a terminal through `printable`, and a pipe as it is.
"""

import dataclasses
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.formatted_text import ANSI
from prompt_toolkit.key_binding import KeyBindings

from generation.config import SamplingConfig
from generation.lens import predictions_by_layer, trace_text
from generation.text_model import Chat, Sample, TextModel
from system.cli import printable
from system.errors import UserError
from system.files import atomic_write, read_json, read_utf8_lines
from text.chat import Message
from text.tokenizer import Tokenizer, legible

COMMANDS = "/help lists the commands; /quit or Ctrl-D ends."
HELP = """\
/NAME VALUE   set temperature, top-k, top-p, min-p, repetition-penalty, max-new-tokens or seed; some can be none
/NAME         show its value
/help         show this; /quit or Ctrl-D ends; Ctrl-C stops a text; Alt-Enter begins a new line"""
HELP_OF_CHAT = f"""\
/reset        clear the conversation
/undo         take back the last exchange
/retry        answer the last message again
/save FILE    write the conversation as one line of JSON
/load FILE    continue a saved conversation
{HELP}"""
FLOATS, INTEGERS = ("temperature", "top-p", "min-p", "repetition-penalty"), ("top-k", "max-new-tokens", "seed")
OPTIONS: dict[str, Callable[[str], float]] = {**dict.fromkeys(FLOATS, float), **dict.fromkeys(INTEGERS, int)}
CAN_BE_NONE = ("top-k", "top-p", "min-p", "seed")
CYAN, BOLD, RESET = "\x1b[36m", "\x1b[1m", "\x1b[0m"
CELL = 12  # characters of a cell of the lens table


def write(
    text_model: TextModel,
    prompt: str,
    config: SamplingConfig,
    *,
    instruction: Message | None = None,
    num_samples: int = 1,
    top_logprobs: int | None = None,
    as_json: bool = False,
) -> None:
    """Prints a prompt and its completion, or the answer to an instruction: streaming, or as several samples, with
    log-probabilities or as JSON. The text goes to standard output, figures go to standard error."""
    ids = text_model.answer_ids([instruction], config) if instruction else text_model.prompt_ids(prompt)
    strip, context = instruction is not None, text_model.model.config.block_size
    if len(ids) > context:
        print_note(f"the prompt has {len(ids):,} tokens: the model sees the last {context:,}, its context")
    start, samples = time.perf_counter(), list[Sample]()
    if as_json or top_logprobs or num_samples > 1:
        for sample in text_model.samples(ids, config, num_samples, top_logprobs, strip):
            if as_json:
                fields = sample_fields(text_model.tokenizer, prompt, sample, with_logprobs=top_logprobs is not None)
                print(json.dumps(fields, ensure_ascii=False))
            else:
                say("---\n" if samples else "", prompt, sample.text, "\n", *token_lines(text_model.tokenizer, sample))
            samples.append(sample)
    else:
        say(prompt)
        stream = (sample for [sample] in text_model.stream(ids, config, strip=strip))
        samples.append(print_stream(stream))
    n_tokens, seconds = sum(len(sample.tokens) for sample in samples), time.perf_counter() - start
    print_note(f"{n_tokens:,} tokens, {n_tokens / seconds:,.1f} tokens/s, prompt of {len(ids):,} tokens")
    if config.stop and all(sample.finish_reason != "stop" for sample in samples):
        print_note("the stop text did not come")


def print_stream(samples: Iterator[Sample]) -> Sample:
    """Prints a sample while it grows, then a newline. Returns the sample."""
    try:
        for sample in samples:
            say(sample.piece)
    finally:
        say("\n")
    return sample


def say(*texts: str) -> None:
    """Prints texts to standard output at once, to a terminal without control characters."""
    for text in texts:
        sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def print_note(text: str) -> None:
    """Prints a remark of the program, which is not the model's text, to standard error."""
    print(printable(text), file=sys.stderr)


def sample_fields(tokenizer: Tokenizer, prompt: str, sample: Sample, with_logprobs: bool) -> dict[str, object]:
    """Returns a sample as a dict for JSON."""
    fields: dict[str, object] = {"prompt": prompt, "text": sample.text, "finish_reason": sample.finish_reason}
    fields["tokens"] = [token.id for token in sample.tokens]
    if not with_logprobs:
        return fields
    logprobs = []
    for token in sample.tokens:
        top = [{"token": tokenizer.decode([i]), "id": i, "logprob": p} for i, p in token.candidates]
        logprobs.append({"token": tokenizer.decode([token.id]), "logprob": token.logprob, "top": top})
    return {**fields, "logprobs": logprobs}


def token_lines(tokenizer: Tokenizer, sample: Sample) -> Iterator[str]:
    """Yields a line for each token that has a log-probability: its probability and the likeliest candidates."""
    for token in sample.tokens:
        if token.logprob is not None:
            candidates = ", ".join(f"{tokenizer.decode([i])!r} {math.exp(p):.1%}" for i, p in token.candidates)
            yield f"{tokenizer.decode([token.id])!r:20} {math.exp(token.logprob):6.1%}   {candidates}\n"


def typed_lines(label: str) -> Iterator[str]:
    """Yields the stripped lines that the user types, with history and editing, until Ctrl-D. If standard input is not a
    terminal, its lines."""
    if not sys.stdin.isatty():
        yield from map(str.strip, read_utf8_lines())
        return
    keys = KeyBindings()
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    session: PromptSession[str] = PromptSession(key_bindings=keys, multiline=False)
    while True:
        try:
            yield session.prompt(ANSI(f"{BOLD}{label}{RESET}")).strip()
        except KeyboardInterrupt:  # discards what is typed
            continue
        except EOFError:
            return


def complete_lines(
    text_model: TextModel, config: SamplingConfig, complete: Callable[[TextModel, str, SamplingConfig], None]
) -> None:
    """Calls `complete` with each line that the user types, until Ctrl-D or /quit. Commands change the config.

    A text may begin with a slash, unless its first word is a command.
    """
    print_note(
        f"{text_model.description}\nType the beginning of a text. /help lists the commands; /quit or Ctrl-D ends."
    )
    for line in typed_lines("text> "):
        command, _, argument = line.partition(" ")
        if command == "/quit":
            return
        try:
            if command == "/help":
                print_note(HELP)
            elif command.startswith("/") and command[1:] in OPTIONS:
                config, note = set_option(config, command[1:], argument.strip())
                print_note(note)
            elif line:
                complete(text_model, line, config)
        except UserError as error:
            print_note(f"error: {error}")
        except KeyboardInterrupt:
            continue


def chat(text_model: TextModel, config: SamplingConfig) -> None:
    """Holds a conversation with the user, until Ctrl-D or /quit."""
    conversation = Chat(text_model, config)
    print_note(f"{text_model.description}\nType a message. {COMMANDS}")
    for line in typed_lines("you> "):
        command, _, argument = line.partition(" ")
        if command == "/quit":
            return
        try:
            if command.startswith("/"):
                if note := obey(conversation, command[1:], argument.strip()):
                    print_note(note)
            elif line:
                answer(conversation, line)
        except UserError as error:
            print_note(f"error: {error}")
        except OSError as error:
            print_note(f"error: {error.filename or argument}: {error.strerror}")


def answer(conversation: Chat, message: str) -> None:
    """Streams the answer to a message, on a terminal behind a label. Ctrl-C stops it; the text so far is kept."""
    try:
        if sys.stdout.isatty():
            sys.stdout.write(f"{BOLD}model> {RESET}{CYAN}")
        sample = print_stream(conversation.reply(message))
        if conversation.text_model.is_guess(sample.tokens):
            print_note("(a guess: the model is not sure)")
    except KeyboardInterrupt:
        pass
    finally:
        if sys.stdout.isatty():
            sys.stdout.write(RESET)


def obey(conversation: Chat, command: str, argument: str) -> str:
    """Carries out a command. Returns what to print. Raises UserError if the command or its argument is wrong."""
    if command in OPTIONS:
        conversation.config, note = set_option(conversation.config, command, argument)
        return note
    if command in ("save", "load") and not argument:
        raise UserError(f"/{command} needs a file name")
    match command:
        case "help":
            return HELP_OF_CHAT
        case "reset":
            conversation.messages.clear()
            return "conversation cleared"
        case "undo" | "retry":
            message = conversation.undo()
            if message is None:
                return "the conversation is empty"
            if command == "undo":
                return f"taken back: {message}"
            answer(conversation, message)
            return ""
        case "save":
            save_conversation(Path(argument), conversation.messages)
            return f"saved {len(conversation.messages)} messages in {argument}"
        case "load":
            conversation.messages[:] = load_conversation(Path(argument))
            return f"loaded {len(conversation.messages)} messages"
    raise UserError(f"unknown command /{command}: /help lists the commands")


def save_conversation(path: Path, messages: list[Message]) -> None:
    """Writes a conversation as one line of JSON. Raises UserError if the file holds anything but its beginning."""
    try:
        old = read_json(path) if path.exists() and path.stat().st_size else {"messages": []}
    except ValueError:
        old = None
    if all(old != {"messages": messages[:n]} for n in range(len(messages) + 1)):
        raise UserError(f"{path} exists and is not the beginning of this conversation: choose another name")
    with atomic_write(path, "w") as file:
        file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def load_conversation(path: Path) -> list[Message]:
    """Returns the first conversation of a file that /save or the page wrote. Raises UserError if there is none."""
    try:
        messages = json.loads(next(read_utf8_lines(path), ""))["messages"]
        pairs = zip(messages, ["user", "assistant"] * len(messages), strict=False)
        if len(messages) % 2 or any(not isinstance(m["content"], str) or m["role"] != role for m, role in pairs):
            raise ValueError
        return messages
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} holds no conversation: load a file that /save or the app wrote") from None


def set_option(config: SamplingConfig, name: str, value: str) -> tuple[SamplingConfig, str]:
    """Returns a config with one option changed, or unchanged if the value is empty, and the option's value in words.
    Raises UserError if the option cannot have the value."""
    field = name.replace("-", "_")
    if value:
        try:
            change: Any = None if value == "none" and name in CAN_BE_NONE else OPTIONS[name](value)
        except ValueError:
            raise UserError(f"/{name} needs a number, not {value!r}") from None
        config = dataclasses.replace(config, **{field: change})
    now = getattr(config, field)
    return config, f"{name} is {'none' if now is None else now}"


def print_lens(text_model: TextModel, text: str, config: SamplingConfig | None = None) -> None:
    """Prints what the model would say after each layer: a row for each token of the text, a column for the embedding
    and each layer. A cell holds the likeliest next token and its probability. The config is not used.

    Layers in the middle are left out if the terminal is too narrow, and a last line says so. Raises UserError if the
    text is empty.
    """
    trace = trace_text(text_model, text)
    predictions = predictions_by_layer(text_model, trace, k=1)
    candidates, probabilities = predictions.candidates[..., 0].tolist(), predictions.logprobs[..., 0].exp().tolist()
    n_layers = len(candidates) - 1
    columns = min(n_layers + 1, max(2, (shutil.get_terminal_size().columns - CELL) // (CELL + 5)))
    layers = [round(i * n_layers / (columns - 1)) for i in range(columns)]

    def cell(token: int) -> str:
        text = legible(text_model.tokenizer.decode_bytes([token]))
        return f"{text[: CELL - 1]}…" if len(text) > CELL else f"{text:{CELL}}"

    heads = ("embedding" if layer == 0 else f"layer {layer}" for layer in layers)
    print(f"{'token':{CELL}}" + "".join(f" {head:{CELL + 4}}" for head in heads))
    for i, token in enumerate(trace.tokens.tolist()):
        print(cell(token) + "".join(f" {cell(candidates[j][i])}{probabilities[j][i]:4.0%}" for j in layers))
    if columns <= n_layers:
        print(f"({n_layers + 1 - columns} of {n_layers} layers left out: a wider terminal shows them)")
