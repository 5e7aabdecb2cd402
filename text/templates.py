"""The templates of chats and instructions."""

from text.tokenizer import ASSISTANT, END_OF_TEXT, USER, Tokenizer

Message = dict[str, str]
"""One turn: `role` ("system", "user" or "assistant"), `content`, and with Alpaca's instructions perhaps `input`."""


def encode_turn(message: Message, tokenizer: Tokenizer, template: str) -> tuple[list[int], list[int]]:
    """Encodes one turn of a conversation; returns its ids and its loss mask (1 where loss counts), equally long.

    Template "chat": role token, a space and the text encoded together, `<|endoftext|>`, a newline. Template "alpaca"
    (Taori et al. 2023, without its preamble): `### Instruction:` and perhaps `### Input:` with their texts and the
    header `### Response:` as the user's turn, then text and `<|endoftext|>` as the assistant's. Loss counts on the
    assistant's text and its `<|endoftext|>`, never on a header or on the user's words.
    """
    encode, text = tokenizer.encode, message["content"].strip()
    is_assistant = message["role"] == "assistant"
    if template == "alpaca":
        if is_assistant:
            ids = encode(text) + [tokenizer.end_of_text]
            return ids, [1] * len(ids)
        given = f"\n\n### Input:\n{message['input'].strip()}" if message.get("input", "").strip() else ""
        ids = encode(f"### Instruction:\n{text}{given}\n\n### Response:\n")
        return ids, [0] * len(ids)
    if message.get("input", "").strip():
        text += "\n\n" + message["input"].strip()
    header, body, newline = response_header(tokenizer, template), encode(" " + text), encode("\n")
    if not is_assistant:
        header = [tokenizer.user]
    ids = header + body + [tokenizer.end_of_text] + newline
    return ids, [0] * len(header) + [int(is_assistant)] * (len(body) + 1) + [0] * len(newline)


def response_header(tokenizer: Tokenizer, template: str) -> list[int]:
    """Ids between the user's turn and the assistant's text: the role token in chats, nothing in the Alpaca template."""
    return [tokenizer.assistant] if template == "chat" else []


def encode_conversation(
    messages: list[Message], tokenizer: Tokenizer, template: str = "chat", block_size: int | None = None
) -> tuple[list[int], list[int]]:
    """Encodes a conversation for training; returns ids and loss mask, equally long.

    Longer than `block_size` tokens, it loses whole exchanges (a user's turn and the answer), the oldest first; both
    lists are empty where even the last one alone is too long.
    """
    turns = [encode_turn(message, tokenizer, template) for message in messages]
    while block_size and sum(len(ids) for ids, _ in turns) > block_size:
        turns = turns[2:]
    return sum((ids for ids, _ in turns), []), sum((mask for _, mask in turns), [])


def encode_prompt(
    messages: list[Message], tokenizer: Tokenizer, template: str = "chat", max_tokens: int | None = None
) -> list[int]:
    """Encodes a conversation that ends with the user's turn, up to where the assistant's text begins.

    Longer than `max_tokens`, it loses whole exchanges, the oldest first; a last turn that is still too long keeps its
    end, behind its own role token.
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
    """Returns the template that renders a conversation for `apply_chat_template` of `transformers`.

    The ids are those of `encode_prompt`, a leading system message put before the first user's text, unless somebody
    typed a control token: that library takes it for one.
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
{%- set text = message['content'] | trim -%}
{%- set given = message['input'] | default('', true) | trim -%}
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
