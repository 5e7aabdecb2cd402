"""Writing: how tokens are chosen, how text is made of them, and what a person at the terminal gets."""

import dataclasses
import fcntl
import json
import math
import os
import pty
import random
import select
import signal
import struct
import subprocess
import sys
import termios
import time

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, REPOSITORY, command, run_script, succeed
from scipy.stats import chisquare

from generation.config import SamplingConfig
from generation.cpu_linear import PRODUCTS, fastest_product, quantize_weights, speed_up_decoding
from generation.decoding import CompiledDecoder, KVCache, decode_one, generate, one_step_ahead, prefill, sample
from generation.text_model import TextModel, TextWriter, sampling_probabilities
from model import GPT, GPTConfig
from system.errors import UserError
from text import tokenizer as tokenizers
from text.token_files import read_tokens
from weights import checkpoint
from weights.loading import load_checkpoint


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


@pytest.mark.parametrize("n", [40, 1000])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 7},
        {"top_p": 0.6},
        {"top_p": 0.999},
        {"min_p": 0.2},
        {"temperature": 1.4, "top_k": 25, "top_p": 0.8, "min_p": 0.1},
    ],
    ids=str,
)
def test_sampling_has_the_distribution_of_its_definition(how, n):
    logits = np.random.default_rng(0).normal(0, 2.0, n)
    expected = defined(logits, **how)
    draws = 30_000
    generator = torch.Generator().manual_seed(1)
    batches = [sample(torch.tensor(logits).expand(1000, n), generator=generator, **how) for _ in range(draws // 1000)]
    counts = torch.cat(batches).bincount(minlength=n).numpy()
    assert counts[expected == 0].sum() == 0
    often = expected * draws >= 8  # the rest in one bin
    observed = [*counts[often], counts[~often].sum()]
    wanted = [*expected[often] * draws, expected[~often].sum() * draws]
    keep = np.array(wanted) > 0
    assert chisquare(np.array(observed)[keep], np.array(wanted)[keep]).pvalue > 1e-3
    config = SamplingConfig(**{"temperature": 1.0, "top_k": None, **how})
    np.testing.assert_allclose(sampling_probabilities(torch.tensor(logits), [], config), expected, atol=1e-6)


def varied(**shape) -> GPT:
    """A random model whose output has many different tokens."""
    torch.manual_seed(0)
    shape = {"block_size": 64, "vocab_size": 320, "n_tokens": 300, "n_layer": 2, "n_head": 2, "n_embd": 48, **shape}
    model = GPT(GPTConfig(**shape)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    torch.nn.init.normal_(model.wpe.weight)
    return model


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_the_repetition_penalty_equals_transformers(penalty):
    from transformers import GPT2Config, GPT2LMHeadModel

    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=320, n_positions=256, n_embd=48, n_layer=2, n_head=2)).eval()
    ours = varied(block_size=256, n_tokens=320)
    weights = {}
    for name, tensor in ours.state_dict().items():
        is_matrix = tensor.dim() == 2 and name.startswith("h.")
        weights[f"transformer.{name}" if name != "lm_head.weight" else name] = tensor.t() if is_matrix else tensor
    theirs.load_state_dict(weights)
    prompt = torch.randint(300, (1, 5))
    expected = theirs.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=120,
        do_sample=False,
        repetition_penalty=penalty,
        pad_token_id=0,
        eos_token_id=None,
    )[0, 5:].tolist()
    found = [int(i) for i, _ in generate(ours, prompt, 120, temperature=0, repetition_penalty=penalty)]
    assert found == expected and (penalty < 1 or len(set(found)) > 50)


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 8, 31, 33])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(24, 48), (512, 1024)], ids=["small", "large"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_for_few_rows_equal_the_usual_ones(rows, bias, shape, dtype):
    layer = torch.nn.Linear(*shape, bias=bias, dtype=dtype)
    x = torch.randn(rows, 1, shape[0], dtype=dtype)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    with torch.inference_mode():
        expected = layer(x)
        for product in PRODUCTS:
            torch.testing.assert_close(product(x[:, 0], layer.weight, layer.bias), expected[:, 0], **tolerance)
        speed_up_decoding(layer)
        assert type(layer) is not torch.nn.Linear
        torch.testing.assert_close(layer(x), expected, **tolerance)
        torch.testing.assert_close(layer(x.transpose(0, 1)), expected.transpose(0, 1), **tolerance)


def test_the_fastest_product_is_measured_once():
    x, weights = torch.randn(3, 512), [torch.randn(1024, 512), torch.randn(1024, 512)]
    with torch.inference_mode():
        chosen = fastest_product(x, weights)
        assert chosen in PRODUCTS and all(fastest_product(x, weights) is chosen for _ in range(20))


def test_samples_of_one_prompt_are_a_batch():
    model = varied()
    speed_up_decoding(model)
    prompt = torch.randint(300, (1, 9))

    def tokens(**how):
        return torch.stack([ids for ids, _ in generate(model, prompt, 90, **how)], dim=1)  # past the context too

    greedy = tokens(temperature=0, num_samples=3)
    assert torch.equal(greedy, tokens(temperature=0).expand(3, -1)) and greedy.unique().numel() > 30
    drawn = tokens(num_samples=3, generator=torch.Generator().manual_seed(5))
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn, tokens(num_samples=3, generator=torch.Generator().manual_seed(5)))


@pytest.mark.parametrize(
    "how", [{"temperature": 0}, {"top_k": 50, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.1}], ids=str
)
def test_decoding_over_a_static_cache_equals_decoding_over_a_growing_one(how):
    model = varied()
    static = CompiledDecoder(model)
    static.decode_one = decode_one  # the function itself, not compiled

    def written(prompt, num_samples, compiled=None):
        generator = torch.Generator().manual_seed(2)
        steps = generate(model, prompt, 90, num_samples=num_samples, compiled=compiled, generator=generator, **how)
        return torch.stack([ids for ids, _ in steps], dim=1)

    for num_samples in (1, 3, 1):
        for prompt in (torch.randint(300, (1, 9)), torch.randint(300, (1, 1))):
            growing = written(prompt, num_samples)
            assert torch.equal(growing, written(prompt, num_samples, static)) and growing.unique().numel() > 20


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="there PyTorch's compiler writes C++ with errors"
)
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_compiled_step_has_the_logits_of_the_usual_one(dtype):
    model = varied(n_layer=1).to(dtype)
    prompt, token = torch.randint(300, (2, 40)), torch.randint(300, (2, 1))
    with torch.inference_mode():
        usual = KVCache(model.config, 2, model.wte.weight)
        prefill(model, prompt, usual)
        decoder = CompiledDecoder(model)
        static = decoder.take_over(usual)
        for _ in range(3):
            expected, found = prefill(model, token, usual), decoder.step(token, static)
            assert found.dtype == dtype and static.length == usual.length
            tolerance = 1e-4 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(found.float(), expected.float(), rtol=tolerance, atol=tolerance * 10)


def test_a_gpu_would_compute_the_next_step_while_the_caller_reads_a_token():
    begun = []

    def steps():
        for step, (ids, logits) in enumerate(generate(model, prompt, 12, temperature=0)):
            begun.append(step)
            yield ids, logits

    model, prompt = varied(), torch.randint(300, (2, 9))
    usual = list(generate(model, prompt, 12, temperature=0))
    for n, (ids, logits) in enumerate(one_step_ahead(steps())):
        assert begun[-1] == min(n + 1, 11)
        assert torch.equal(ids, usual[n][0]) and torch.equal(logits, usual[n][1])
    assert n == 11


def test_logits_come_with_the_tokens():
    model = varied()
    prompt = torch.randint(300, (1, 9))
    steps = list(generate(model, prompt, 20, temperature=0))
    written = torch.cat([prompt, *(ids[:, None] for ids, _ in steps)], dim=1)
    with torch.no_grad():
        expected = model(written)[:, 8:-1, :300]
    torch.testing.assert_close(torch.stack([logits for _, logits in steps], dim=1), expected, rtol=1e-4, atol=1e-4)


def test_int8_weights_change_the_perplexity_by_less_than_a_hundredth(toy):
    state = load_checkpoint(toy / "checkpoints/toy.pt")
    ids = torch.from_numpy(read_tokens(toy / "data/toy/val.bin").astype("int64"))
    ids = ids[: len(ids) // 65 * 65].view(-1, 65)

    def perplexity(model):
        with torch.inference_mode():
            logits = model(ids[:, :-1])
        return math.exp(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item())

    plain, int8 = checkpoint.build(state), checkpoint.build(state)
    quantize_weights(int8)
    assert perplexity(int8) != perplexity(plain)
    assert perplexity(int8) == pytest.approx(perplexity(plain), rel=0.01)


# ---- text


def test_text_comes_in_whole_characters_and_ends_before_a_stop_text():
    tokenizer, rng = tokenizers.gpt2(), random.Random(0)
    alphabet = "ab \n🙂日é<|" + "stop"
    for _ in range(300):
        text = "".join(rng.choice(alphabet) for _ in range(rng.randrange(40)))
        stops = ["".join(rng.choices(alphabet, k=rng.randrange(1, 4))) for _ in range(rng.randrange(3))]
        writer, pieces = TextWriter(tokenizer, stops), []
        for token in tokenizer.encode(text):
            pieces.append(writer.feed(token))
            if writer.stopped:
                break
        pieces.append(writer.finish())
        ends = [text.find(stop) for stop in stops if stop in text]
        assert "".join(pieces) == text[: min(ends, default=len(text))]
        assert writer.stopped == bool(ends)


def test_bytes_that_are_no_character_are_replaced_at_the_end_only():
    tokenizer = tokenizers.gpt2()
    first_half = tokenizer.encode("🙂")[0]
    writer = TextWriter(tokenizer)
    assert writer.feed(first_half) == "" and writer.finish() == "\ufffd"


def test_an_answer_begins_without_white_space():
    tokenizer = tokenizers.gpt2()
    writer = TextWriter(tokenizer, strip=True)
    pieces = [writer.feed(token) for token in tokenizer.encode(" \n\n  \n Hello  you\n ")]
    assert "".join([*pieces, writer.finish()]) == "Hello  you\n "


def test_the_logits_behind_a_token_can_be_computed_again(toy):
    model = TextModel.load(toy / "checkpoints/toy.pt", device="cpu")
    ids = model.prompt_ids("What is")
    config = SamplingConfig(max_new_tokens=150, temperature=2.0, top_k=20, repetition_penalty=1.2, seed=3)
    [written] = model.samples(ids, config, 1, top_logprobs=0)  # past the context of 64 tokens
    tokens = [*model.score(ids, 0), *written.tokens]
    ids = [token.id for token in tokens]
    assert len(ids) > 100
    for i, token in enumerate(tokens[1:], 1):
        logits = model.next_logits(ids[i - token.n_context : i])
        assert logits.log_softmax(dim=-1)[token.id].item() == pytest.approx(token.logprob, abs=1e-4)
        if i >= written.n_prompt:
            probabilities = sampling_probabilities(logits, ids[:i], config)
            assert probabilities[token.id] > 0 and (probabilities > 0).sum() == 20
            greedy = dataclasses.replace(config, temperature=0)
            assert sampling_probabilities(logits, ids[:i], greedy)[probabilities.argmax()] == 1


def test_five_lines_of_python(toy):
    model = TextModel.load(toy / "checkpoints/toy.pt", device="cpu")
    config = SamplingConfig(max_new_tokens=12, seed=3)
    text = "".join(model.complete("What is", config))
    [found] = model.samples(model.prompt_ids("What is"), config, 1, top_logprobs=4)
    assert found.text == text and len(found.tokens) <= 12
    with torch.no_grad():
        ids = torch.tensor([model.prompt_ids("What is") + [token.id for token in found.tokens]])
        logprobs = model.model(ids)[0, :, : model.tokenizer.n_tokens].log_softmax(dim=-1)
    start = len(model.prompt_ids("What is")) - 1
    for i, token in enumerate(found.tokens):
        assert token.logprob == pytest.approx(logprobs[start + i, token.id].item(), abs=1e-3)
        assert [p for _, p in token.candidates] == pytest.approx(logprobs[start + i].topk(4).values.tolist(), abs=1e-3)
    with pytest.raises(UserError, match="--top-k 100000 is more than"):
        list(model.complete("x", SamplingConfig(top_k=100_000)))


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
    for_people = succeed(toy, *arguments)
    assert for_people.count("---\n") == 1 and for_people.count("%   ") == sum(len(line["tokens"]) for line in lines)
    int8 = succeed(toy, *GENERATE, "--prompt", "What is", "--quantize", "int8")
    assert int8.startswith("What is") and len(int8) > 9


def ask(text_model: TextModel, question: str, config: SamplingConfig) -> str:
    """Returns the answer to the first question of a chat."""
    ids = text_model.answer_ids([{"role": "user", "content": question}], config)
    return "".join(text_model.stream(ids, config))


def test_the_chat_obeys_its_commands(toy):
    text_model, greedy = (
        TextModel.load(toy / "checkpoints/sft.pt", "cpu"),
        SamplingConfig(greedy=True, max_new_tokens=9),
    )
    questions = ("Hello", "Hi", "Thanks!", "What is abs?", "What is len?", "How are you?", "Who are you?", "Yes", "No")
    answered = (q for q in questions if ask(text_model, q, greedy).strip())
    question = next(answered)  # a chat with an empty answer is not loaded
    lines = [
        "/retry", "/undo", question, "/save talk.jsonl", "/retry", "/undo", "/undo", "/load talk.jsonl", "/undo",
        "/temperature 0.7", "/top-k none", "/top-p 2", "/seed x", "/save", "/load none.jsonl", "/load my.bin",
        "/nothing",
    ]  # fmt: skip
    (toy / "my.bin").write_bytes(b"\xff\xfe")
    result = run_script(
        toy, "generate.py", "--model", "checkpoints/sft.pt", "--chat", "--greedy", "--max-new-tokens", "9",
        stdin="\n".join(lines) + "\n",
    )  # fmt: skip
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    first, second = result.stdout.splitlines()
    assert first == second and "\x1b" not in result.stdout
    said = result.stderr.split("/quit or Ctrl-D ends.\n")[1].splitlines()
    for i, part in enumerate(
        [
            "the conversation is empty",
            "the conversation is empty",
            "saved 1 exchange in talk.jsonl",
            f"taken back: {question}",
            "the conversation is empty",
            "loaded 1 exchange",
            f"taken back: {question}",
            "temperature is 0.7",
            "top-k is none",
            "error: --top-p must be above 0",
            "error: /seed needs a number",
            "error: /save needs a file name",
            "error: cannot read none.jsonl",
            "error: my.bin",
            "error: unknown command /nothing",
        ]  # fmt: skip
    ):
        assert part in said[i], (part, said)
    saved = json.loads((toy / "talk.jsonl").read_text(encoding="utf-8"))["messages"]
    assert [m["role"] for m in saved] == ["user", "assistant"] and saved[1]["content"].strip() == first.strip()


def test_at_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_the_program(toy):
    terminal, their_end = pty.openpty()
    fcntl.ioctl(their_end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(
        command("generate.py", "--model", "checkpoints/sft.pt", "--chat", "--max-new-tokens", "100000",
                "--device", "cpu", "--temperature", "3", "--top-k", "300"),
        cwd=toy, env={**ENVIRONMENT, "TERM": "xterm"}, stdin=their_end, stdout=their_end, stderr=their_end,
        start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(their_end)
    seen = b""

    def read_until(mark, seconds=60):
        nonlocal seen
        deadline = time.monotonic() + seconds
        while mark not in seen:
            assert time.monotonic() < deadline, seen[-2000:]
            if select.select([terminal], [], [], 0.5)[0]:
                seen += os.read(terminal, 65536)
                if b"\x1b[6n" in seen:  # it asks where the cursor is
                    os.write(terminal, b"\x1b[24;1R")
                    seen = seen.replace(b"\x1b[6n", b"")
        before, _, seen = seen.partition(mark)
        return before

    try:
        read_until(b"you>")
        for _ in range(2):
            os.write(terminal, b"Tell me a long story\r")
            read_until(b"\x1b[36m")  # the answer's colour
            time.sleep(0.3)
            os.kill(process.pid, signal.SIGINT)
            read_until(b"you>")
            assert process.poll() is None
        os.write(terminal, b"\x04")
        assert process.wait(30) == 0
    finally:
        process.kill()
        os.close(terminal)


# ---- damaged files


def test_a_damaged_checkpoint_costs_one_line_and_runs_nothing(toy, tmp_path):
    good, rng, path = (toy / "checkpoints/toy.pt").read_bytes(), random.Random(0), tmp_path / "x.pt"
    payload = good.index(b"data/0") + 200  # inside the first tensor
    for i in range(200):
        damaged = bytearray(good)
        kind = i % 5
        if kind == 0:  # cut anywhere
            del damaged[rng.randrange(len(damaged)) :]
        elif kind == 1:  # header
            damaged[rng.randrange(64)] ^= 1 << rng.randrange(8)
        elif kind == 2:  # the pickle that describes the tensors
            at = good.index(b"data.pkl") + rng.randrange(20, 3000)
            damaged[at] = rng.randrange(256)
        elif kind == 3:  # one bit of a weight
            damaged[payload + rng.randrange(5000)] ^= 1 << rng.randrange(8)
        else:  # foreign bytes
            damaged = bytearray(rng.randbytes(rng.randrange(3000)))
        path.write_bytes(damaged)
        try:
            checkpoint.build(load_checkpoint(path, verify=True))
        except UserError as error:
            assert "\n" not in str(error)
        else:
            assert kind == 1 or bytes(damaged) == good, f"damage {i} went unseen"
        try:
            checkpoint.build(load_checkpoint(path))
        except UserError as error:
            assert "\n" not in str(error)


def test_writing_does_not_import_the_compiler(toy):
    """`torch._dynamo` takes about a second to import, and only `--compile on` needs it."""
    program = (
        "import sys; from generation.config import SamplingConfig; from generation.text_model import TextModel; "
        "text_model = TextModel.load('checkpoints/toy.pt', 'cpu'); "
        "print(''.join(text_model.complete('x', SamplingConfig(max_new_tokens=2)))); "
        "print('torch._dynamo' in sys.modules)"
    )
    environment = {**ENVIRONMENT, "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=toy, env=environment, capture_output=True, encoding="utf-8", timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "False"


def test_a_new_model_is_initialized():
    """Only `checkpoint.build` leaves the initialization out."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=256, n_tokens=256, n_layer=2, n_head=2, n_embd=64))
    assert math.isclose(model.wte.weight.std().item(), 0.02, rel_tol=0.1)
    assert math.isclose(model.h[0].mlp.c_proj.weight.std().item(), 0.01, rel_tol=0.1)
