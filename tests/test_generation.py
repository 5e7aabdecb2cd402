"""Writing: how tokens are chosen, how text is made of them, and what a person at the terminal gets."""

import dataclasses
import json
import math
import os
import pty
import random
import select
import signal
import time

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, command, random_model, run_script, succeed
from scipy.stats import chisquare
from test_fields import CHANGED

from generation.config import SamplingConfig
from generation.cpu_linear import PRODUCTS, fastest_product, speed_up_decoding
from generation.decoding import CompiledDecoder, KVCache, decode_one, generate, one_step_ahead, prefill, sample
from generation.text_model import Chat, Sample, TextModel, Token, sampling_probabilities
from system.errors import UserError
from text import tokenizer as tokenizers
from text.tokenizer import Tokenizer

GREEDY = SamplingConfig(greedy=True, max_new_tokens=9)
ALL_FILTERS = {"temperature": 1.4, "top_k": 25, "top_p": 0.8, "min_p": 0.1}
FILTERS = [{}, {"top_k": 7}, {"top_p": 0.6}, {"top_p": 0.999}, {"min_p": 0.2}, {"temperature": 0.6}, ALL_FILTERS]
PENALIZED = [{"temperature": 0, "repetition_penalty": 1.5}, {**ALL_FILTERS, "repetition_penalty": 1.1}]


@pytest.fixture(scope="module")
def text_model(toy) -> TextModel:
    return TextModel.load(toy / "checkpoints/toy.pt", device="cpu")


@pytest.fixture(scope="module")
def chat_model(toy) -> TextModel:
    return TextModel.load(toy / "checkpoints/sft.pt", device="cpu")


def defined(logits: np.ndarray, temperature=1.0, top_k=None, top_p=None, min_p=None) -> np.ndarray:
    """The distribution that sampling should have, straight from the definitions."""
    p = np.exp(logits / temperature)
    p /= p.sum()
    order = np.argsort(-p)
    if top_k:
        p[order[top_k:]] = 0
        p /= p.sum()
    if top_p:
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= top_p]] = 0
    if min_p:
        p[p < min_p * p.max()] = 0
    return p / p.sum()


@pytest.mark.parametrize("n", [40, 2000])
@pytest.mark.parametrize("how", FILTERS, ids=str)
def test_sampling_has_the_distribution_of_its_definition(how, n):
    logits = np.random.default_rng(0).normal(0, 2.0, n)
    expected = defined(logits, **how)
    config = SamplingConfig(**{"temperature": 1.0, "top_k": None, **how})
    np.testing.assert_allclose(sampling_probabilities(torch.tensor(logits), [], config), expected, atol=1e-6)
    drawn = sample(torch.tensor(logits).expand(5_000, n), config, torch.Generator().manual_seed(1))
    counts = drawn.bincount(minlength=n).numpy()
    assert counts[expected == 0].sum() == 0
    often = expected > 0.002  # the rest in one bin
    observed, wanted = (np.array([*p[often], p[~often].sum()]) for p in (counts, expected * 5_000))
    assert chisquare(observed[wanted > 0], wanted[wanted > 0]).pvalue > 1e-3


@pytest.mark.parametrize("shape", [(24, 48), (512, 1024)], ids=["small", "large"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_products_for_few_rows_equal_the_usual_one_and_are_measured_once(bias, shape, dtype):
    layer = torch.nn.Linear(*shape, bias=bias, dtype=dtype)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for rows in (1, 2, 5, 8, 33):
        x = torch.randn(rows, 1, shape[0], dtype=dtype)
        expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
        for product in PRODUCTS:
            torch.testing.assert_close(product(x[:, 0], layer.weight, layer.bias), expected[:, 0], **tolerance)
        speed_up_decoding(layer)
        assert type(layer) is not torch.nn.Linear
        torch.testing.assert_close(layer(x), expected, **tolerance)
        torch.testing.assert_close(layer(x.transpose(0, 1)), expected.transpose(0, 1), **tolerance)
        assert fastest_product(x[:, 0], [layer.weight] * 2) is fastest_product(x[:, 0], [layer.weight] * 2)  # kept


@pytest.mark.parametrize("num_samples", [1, 3])
@pytest.mark.parametrize(
    ("fields", "how"),
    [(CHANGED, {"temperature": 0}), *[({}, how) for how in ({"temperature": 0}, {"temperature": 1.3}, *PENALIZED)]],
    ids=str,
)
def test_a_seed_gives_the_same_tokens_with_any_cache(fields, how, num_samples):
    model = random_model(**fields)
    speed_up_decoding(model)
    static = CompiledDecoder(model)
    static.compile = lambda: decode_one  # the function itself, not compiled

    config = SamplingConfig(**{"max_new_tokens": 90, "top_k": None, **how})

    def written(prompt, **cache):
        generator = torch.Generator().manual_seed(7)
        steps = generate(model, prompt, config, generator=generator, num_samples=num_samples, **cache)
        return torch.stack([ids for ids, *_ in steps], dim=1)  # past the context of 64 tokens

    for prompt in (torch.randint(300, (2, 9)), torch.randint(300, (1, 1)), torch.randint(300, (1, 100))):
        cached = written(prompt)
        assert len(cached) == len(prompt) * num_samples and cached.unique().numel() > 20
        assert torch.equal(cached, written(prompt, compiled=static))
        assert torch.equal(cached, written(prompt, use_cache=False))
        assert num_samples == 1 or torch.equal(cached[0], cached[1]) == (how.get("temperature") == 0)


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="there PyTorch's compiler writes C++ with errors"
)
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_a_compiled_step_has_the_logits_of_the_usual_one(dtype):
    model = random_model(n_layer=1).to(dtype)
    prompt, token = torch.randint(300, (2, 40)), torch.randint(300, (2, 1))
    usual, decoder = KVCache(model.config, 2, model.wte.weight, 64), CompiledDecoder(model)
    prefill(model, prompt, usual)
    static = decoder.take_over(usual)
    for _ in range(3):
        expected, found = prefill(model, token, usual), decoder.step(token, static)
        assert found.dtype == dtype and static.length == usual.length
        tolerance = 1e-4 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(found.float(), expected.float(), rtol=tolerance, atol=tolerance * 10)
    with torch._dynamo.config.patch(recompile_limit=1):  # another number of rows has a function of its own
        usual.repeat(2)
        assert decoder.step(token.repeat(2, 1), decoder.take_over(usual)).shape == (4, 300)


def test_the_next_step_begins_before_the_caller_reads_a_token():
    begun = []

    def steps():
        for step in generate(model, prompt, GREEDY):
            begun.append(step)
            yield step

    model, prompt = random_model(), torch.randint(300, (2, 9))
    usual = list(generate(model, prompt, GREEDY))
    for n, (ids, logits, n_context) in enumerate(one_step_ahead(steps())):
        assert len(begun) == min(n + 2, 9)
        assert torch.equal(ids, usual[n][0]) and torch.equal(logits, usual[n][1]) and n_context == 9 + n
    assert n == 8


def pieces(tokenizer: Tokenizer, ids: list[int], **options) -> tuple[Sample, str]:
    """Returns a sample of these ids, and all that was added to it piece by piece."""
    sample, text = Sample(tokenizer, **options), ""
    for i in ids:
        sample.add(Token(i))
        text += sample.piece
    sample.finish()
    return sample, text + sample.piece


def test_text_comes_in_whole_characters_and_ends_before_a_stop_text():
    tokenizer, rng = tokenizers.gpt2(), random.Random(0)
    alphabet = "ab \n🙂日é<|" + "stop"
    for _ in range(300):
        text = "".join(rng.choice(alphabet) for _ in range(rng.randrange(40)))
        stops = ["".join(rng.choices(alphabet, k=rng.randrange(1, 4))) for _ in range(rng.randrange(3))]
        found, streamed = pieces(tokenizer, tokenizer.encode(text), stops=stops)
        ends = [text.find(stop) for stop in stops if stop in text]
        assert found.text == streamed == text[: min(ends, default=len(text))]
        assert found.finish_reason == ("stop" if ends else "length") and found.is_finished


def test_a_sample_strips_repairs_and_ends():
    tokenizer = tokenizers.gpt2()
    first_half = tokenizer.encode("🙂")[0]
    for ids, options, text, reason in (
        ([first_half], {}, "\ufffd", "length"),  # replaced at the end only
        (tokenizer.encode(" \n\n  \n Hello  you\n "), {"strip": True}, "Hello  you\n ", "length"),
        ([*tokenizer.encode("a"), tokenizer.end_of_text, *tokenizer.encode("b")], {}, "a", "end"),
        (tokenizer.encode("a sto"), {"stops": ["stop"]}, "a sto", "length"),
    ):
        found, streamed = pieces(tokenizer, ids, **options)
        assert (found.text, streamed, found.finish_reason) == (text, text, reason)


def test_log_probabilities_and_contexts_can_be_computed_again(text_model):
    config = SamplingConfig(max_new_tokens=150, temperature=2.0, top_k=20, repetition_penalty=1.2, seed=3)
    prompt = text_model.prompt_ids("What is")
    [written] = text_model.samples(prompt, config, 1, top_logprobs=4)  # past the context of 64 tokens
    assert written.text == text_model.write(prompt, config) and written.n_prompt == len(prompt)
    tokens = [*text_model.score(prompt, 4), *written.tokens]
    ids = [token.id for token in tokens]
    assert len(ids) > 100
    for i, token in enumerate(tokens[1:], 1):
        logits = text_model.next_logits(ids[i - token.n_context : i])
        logprobs = logits.log_softmax(dim=-1)
        assert token.logprob == pytest.approx(logprobs[token.id].item(), abs=1e-4)
        assert [p for _, p in token.candidates] == pytest.approx(logprobs.topk(4).values.tolist(), abs=1e-4)
        assert token.entropy == pytest.approx(-(logprobs.exp() * logprobs).sum().item(), abs=1e-3)
        if i >= written.n_prompt:
            probabilities = sampling_probabilities(logits, ids[:i], config)
            assert probabilities[token.id] > 0 and (probabilities > 0).sum() == 20
            greedy = dataclasses.replace(config, temperature=0)
            assert sampling_probabilities(logits, ids[:i], greedy)[probabilities.argmax()] == 1


def test_samples_differ_and_a_seed_repeats_them(text_model):
    ids, config = text_model.prompt_ids("What is"), SamplingConfig(max_new_tokens=12, seed=3)
    first, again = ([sample.text for sample in text_model.samples(ids, config, 4)] for _ in range(2))
    assert first == again and len(set(first)) == 4
    *_, streamed = text_model.stream(ids, config, n=4)
    assert [sample.text for sample in streamed] == first
    unseeded = dataclasses.replace(config, seed=None, temperature=2.0)
    assert text_model.write(ids, unseeded) != text_model.write(ids, unseeded)


def test_a_chat_keeps_what_was_said_and_takes_it_back(chat_model, text_model):
    chat = Chat(chat_model, SamplingConfig(seed=1, max_new_tokens=9))
    *_, answer = chat.reply("What is abs?")
    early = chat.reply("And len?")
    said = next(early).text
    early.close()
    contents = ["What is abs?", answer.text, "And len?", said]
    assert [message["content"] for message in chat.messages] == contents
    assert chat.undo() == "And len?" and len(chat.messages) == 2
    for _ in range(20):  # the oldest exchanges leave the context of 64 tokens
        list(chat.reply("What is abs?"))
    assert len(chat_model.answer_ids(chat.messages, chat.config)) <= 64 - 9
    chat.messages.clear()
    assert chat.undo() is None
    with pytest.raises(UserError, match="only completes text"):
        list(Chat(text_model, GREEDY).reply("Hello"))


def test_weights_that_are_not_finite_cost_one_line(text_model):
    model = random_model(vocab_size=448, n_tokens=403)
    model.ln_f.weight.data[3] = math.nan
    with pytest.raises(UserError, match="the logits are not finite"):
        TextModel(model, text_model.tokenizer).write([1, 2, 3], GREEDY)


GENERATE = ["generate.py", "--model", "checkpoints/toy.pt", "--device", "cpu", "--max-new-tokens", "24", "--seed", "1"]


def test_text_goes_to_the_pipe_and_figures_to_standard_error(toy):
    result = run_script(toy, *GENERATE, stdin="What is 日本\n")
    assert result.returncode == 0 and result.stdout.startswith("What is 日本")
    assert "tokens/s, prompt of" in result.stderr
    assert succeed(toy, *GENERATE, "--prompt", "What is 日本") == result.stdout
    written = result.stdout[len("What is 日本") : -1]
    stop = next(c for c in written[3:] if c not in written[:3] and c != "\ufffd")
    stopped = run_script(toy, *GENERATE, "--stop", "no such text", "--stop", stop, stdin="What is 日本\n")
    assert stopped.stdout == "What is 日本" + written[: written.index(stop)] + "\n"
    never = run_script(toy, *GENERATE, "--stop", "no such text", stdin="What is 日本\n")
    assert never.stdout == result.stdout and "the stop text did not come" in never.stderr


def test_json_and_log_probabilities(toy):
    arguments = [*GENERATE, "--prompt", "What is", "--num-samples", "2", "--logprobs", "3"]
    lines = [json.loads(line) for line in succeed(toy, *arguments, "--json").splitlines()]
    assert len(lines) == 2 and lines[0]["text"] != lines[1]["text"]
    for line in lines:
        assert line["prompt"] == "What is" and line["finish_reason"] in ("length", "end")
        assert len(line["tokens"]) == len(line["logprobs"]) <= 24
        for entry in line["logprobs"]:
            top = [candidate["logprob"] for candidate in entry["top"]]
            assert len(top) == 3 and top == sorted(top, reverse=True) and entry["logprob"] <= top[0] + 1e-6
    printed = succeed(toy, *arguments)
    assert printed.count("---\n") == 1 and printed.count("%   ") == sum(len(line["tokens"]) for line in lines)
    int8 = succeed(toy, *GENERATE, "--prompt", "What is", "--quantize", "int8")
    assert int8.startswith("What is") and len(int8) > 9


def test_the_chat_obeys_its_commands(toy, chat_model):
    questions = ("Hello", "Hi", "Thanks!", "What is abs?", "What is len?", "How are you?", "Who are you?", "Yes", "No")
    asked = ([{"role": "user", "content": question}] for question in questions)
    answered = ([q] for [q] in asked if chat_model.write(chat_model.answer_ids([q], GREEDY), GREEDY, strip=True))
    question = next(answered)[0]["content"]  # a chat with an empty answer is not loaded
    (toy / "my.bin").write_bytes(b"\xff\xfe")
    commands = {
        "/retry": "the conversation is empty",
        "/undo": "the conversation is empty",
        question: None,
        "/save talk.jsonl": "saved 2 messages",
        "/retry ": None,
        "/undo ": f"taken back: {question}",
        "/undo  ": "the conversation is empty",
        "/load my.bin": "error: my.bin",
        "/nothing": "error: unknown command /nothing",
    }
    arguments = ["generate.py", "--model", "checkpoints/sft.pt", "--chat", "--greedy", "--max-new-tokens", "9"]
    result = run_script(toy, *arguments, stdin="\n".join(commands) + "\n")
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    first, second = result.stdout.splitlines()
    assert first == second and "\x1b" not in result.stdout
    said = filter(None, result.stderr.split("/quit or Ctrl-D ends.\n")[1].splitlines())
    for part, line in zip(filter(None, commands.values()), said, strict=True):
        assert part in line
    saved = json.loads((toy / "talk.jsonl").read_text(encoding="utf-8"))["messages"]
    assert [m["role"] for m in saved] == ["user", "assistant"] and saved[1]["content"].strip() == first.strip()


def test_at_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_the_program(toy):
    arguments = ["--max-new-tokens", "100000", "--device", "cpu", "--temperature", "3", "--top-k", "300"]
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(toy)
        script = command("generate.py", "--model", "checkpoints/sft.pt", "--chat", *arguments)
        os.execve(script[0], script, {**ENVIRONMENT, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"})
    seen = b""

    def read_until(mark: bytes) -> None:
        nonlocal seen
        deadline = time.monotonic() + 60
        while mark not in seen:
            assert time.monotonic() < deadline, seen[-2000:]
            if select.select([terminal], [], [], 0.5)[0]:
                seen += os.read(terminal, 65536)
        seen = seen.partition(mark)[2]

    try:
        read_until(b"you>")
        for _ in range(2):
            os.write(terminal, b"Tell me a long story\r")
            read_until(b"\x1b[36m")  # the answer's colour
            os.kill(process, signal.SIGINT)
            read_until(b"you>")
        until = time.monotonic() + 60
        while not (ended := os.waitpid(process, os.WNOHANG))[0] and time.monotonic() < until:
            os.write(terminal, b"\x04")  # again, if Ctrl-C came after a short answer and took it away with its prompt
            time.sleep(0.2)
        assert ended == (process, 0)
    finally:
        os.close(terminal)
