"""The templates of chats and instructions: how a conversation becomes tokens and a loss mask."""

from text.tokenizer import ASSISTANT, END_OF_TEXT, USER, Tokenizer, unix_line_ends

Message = dict[str, str]
"""One turn: `role` ("system", "user" or "assistant"), `content`, and with Alpaca's instructions perhaps `input`."""


def encode_turn(message: Message, tokenizer: Tokenizer, template: str) -> tuple[list[int], list[int]]:
    """Encodes one turn of a conversation; returns its ids and its loss mask (1 where loss counts), equally long.

    In the template "chat" a turn is its role token, a space and the text encoded together, `<|endoftext|>` and a
    newline. In the template "alpaca" (Taori et al. 2023, without its preamble) the user's turn is `### Instruction:`
    with its text, perhaps `### Input:` with its text, and the header `### Response:`; the assistant's turn is the text
    and `<|endoftext|>`. Loss counts on the assistant's text and its `<|endoftext|>` only.
    """
    encode = tokenizer.encode
    text, given = (unix_line_ends(message.get(name, "")).strip() for name in ("content", "input"))
    is_assistant = message["role"] == "assistant"
    if template == "alpaca":
        if is_assistant:
            ids = encode(text) + [tokenizer.end_of_text]
            return ids, [1] * len(ids)
        if given:
            text += f"\n\n### Input:\n{given}"
        ids = encode(f"### Instruction:\n{text}\n\n### Response:\n")
        return ids, [0] * len(ids)
    if given:
        text += "\n\n" + given
    header = response_header(tokenizer, template) if is_assistant else [tokenizer.user]
    body, newline = encode(" " + text), encode("\n")
    ids = header + body + [tokenizer.end_of_text] + newline
    return ids, [0] * len(header) + [int(is_assistant)] * (len(body) + 1) + [0] * len(newline)


def response_header(tokenizer: Tokenizer, template: str) -> list[int]:
    """Returns the ids before the assistant's text: the role token in the chat template, none in the Alpaca template."""
    return [tokenizer.assistant] if template == "chat" else []


def encode_conversation(
    messages: list[Message], tokenizer: Tokenizer, template: str = "chat", block_size: int | None = None
) -> tuple[list[int], list[int]]:
    """Encodes a conversation for training; returns its ids and its loss mask (1 where loss counts), equally long.

    A conversation longer than `block_size` tokens loses whole exchanges (a user's turn and the answer), the oldest
    first. If even the last exchange is too long, both lists are empty.
    """
    turns = [encode_turn(message, tokenizer, template) for message in messages]
    while block_size and sum(len(ids) for ids, _ in turns) > block_size:
        turns = turns[2:]
    return sum((ids for ids, _ in turns), []), sum((mask for _, mask in turns), [])


def encode_prompt(
    messages: list[Message], tokenizer: Tokenizer, template: str = "chat", max_tokens: int | None = None
) -> list[int]:
    """Returns the ids of a conversation that ends with the user's turn, up to where the assistant's text begins.

    A conversation longer than `max_tokens` loses whole exchanges, the oldest first. If the last turn alone is too long,
    it keeps its first token and its end.
    """
    turns = [encode_turn(message, tokenizer, template)[0] for message in messages]
    header = response_header(tokenizer, template)
    if max_tokens:
        while len(turns) > 2 and sum(map(len, turns)) + len(header) > max_tokens:
            turns = turns[2:]
        excess = sum(map(len, turns)) + len(header) - max_tokens
        if excess > 0:
            turns = [turns[0][:1] + turns[0][1 + excess :]]
    return sum(turns, []) + header


def jinja_template(template: str) -> str:
    """Returns the Jinja template with which `apply_chat_template` of `transformers` renders a conversation.

    A leading system message is put before the first user's text. The ids are those of `encode_prompt`, unless a text
    contains the name of a control token: `transformers` encodes that as the control token.
    """
    user, assistant, header = {
        "chat": (
            f"'{USER} ' ~ text ~ ('\\n\\n' ~ given if given else '') ~ '{END_OF_TEXT}\\n'",
            f"'{ASSISTANT} ' ~ text ~ '{END_OF_TEXT}\\n'",
            ASSISTANT,
        ),
        "alpaca": (
            "'### Instruction:\\n' ~ text ~ ('\\n\\n### Input:\\n' ~ given if given else '')"
            " ~ '\\n\\n### Response:\\n'",
            f"text ~ '{END_OF_TEXT}'",
            "",
        ),
    }[template]
    return _JINJA.replace("AS_USER", user).replace("AS_ASSISTANT", assistant).replace("HEADER", header)


_JINJA = """{%- set ns = namespace(system='') -%}
{%- for message in messages -%}
{%- set text = message['content'] | replace('\\r\\n', '\\n') | replace('\\r', '\\n') | trim -%}
{%- set given = message['input'] | default('', true) | replace('\\r\\n', '\\n') | replace('\\r', '\\n') | trim -%}
{%- if message['role'] == 'system' and loop.first -%}
{%- set ns.system = text ~ '\\n\\n' -%}
{%- elif message['role'] == 'user' -%}
{%- set text = (ns.system ~ text) | trim -%}
{%- set ns.system = '' -%}
{{- AS_USER -}}
{%- elif message['role'] == 'assistant' -%}
{{- AS_ASSISTANT -}}
{%- else -%}
{{- raise_exception('the roles are user and assistant, perhaps after one system message') -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- 'HEADER' -}}
{%- endif -%}
"""
