"""A look inside a model: what `generation/lens.py` shows is what the model, and `transformers`, compute."""

import itertools
import math
import subprocess
import sys
import time
import timeit

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, succeed
from sklearn.metrics.pairwise import cosine_similarity
from test_fields import CHANGED, VARIANTS, random_model
from transformers import GPT2Config, GPT2LMHeadModel

from generation import lens
from generation.text_model import TextModel
from interface.terminal import print_lens
from model import GPT, GPTConfig
from system.errors import UserError
from text.tokenizer import gpt2, legible, load_tokenizer, merges

TEXT = "The cat sat on the mat, because the mat was warm."


@pytest.fixture(scope="module")
def reference() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(n_positions=64, n_embd=32, n_layer=3, n_head=4, initializer_range=0.3)
    return GPT2LMHeadModel._from_config(config, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def text_model(reference, tmp_path_factory) -> TextModel:
    folder = tmp_path_factory.mktemp("lens") / "tiny"
    reference.save_pretrained(folder)
    return TextModel.load(folder, "cpu", "float32")


def test_attention_and_residual_stream_are_those_of_transformers(reference, text_model):
    trace = text_model.trace(TEXT)
    with torch.no_grad():
        output = reference(trace.tokens[None], output_attentions=True, output_hidden_states=True)
    assert trace.tokens.tolist() == gpt2().encode(TEXT)
    torch.testing.assert_close(trace.attention, torch.cat(output.attentions), atol=1e-5, rtol=1e-4)
    # transformers' last hidden state is behind the last LayerNorm
    torch.testing.assert_close(trace.residual[:-1], torch.cat(output.hidden_states[:-1]), atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        last = text_model.model.ln_f(trace.residual[-1])
    torch.testing.assert_close(last, output.hidden_states[-1][0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_recorded_attention_gives_the_output_of_the_model(fields):
    model = random_model(fields)
    tokens = torch.randint(model.config.n_tokens, (24,))
    trace = lens.trace(model, tokens)
    torch.testing.assert_close(trace.attention.sum(dim=-1), torch.ones_like(trace.attention[..., 0]))
    assert not trace.attention.triu(1).any()
    with torch.no_grad():
        torch.testing.assert_close(model.ln_f(trace.residual[-1]), model.hidden(tokens[None])[0], atol=1e-5, rtol=1e-4)
    assert not model.h[0]._forward_hooks and not model.h[0]._forward_pre_hooks


def test_the_last_layer_predicts_what_the_model_does(text_model):
    trace = text_model.trace(TEXT)
    layers = text_model.predictions_by_layer(trace, k=5)
    scored = text_model.score(trace.tokens.tolist(), top_logprobs=5)
    for position, token in enumerate(scored[1:]):
        assert layers.candidates[-1, position].tolist() == [i for i, _ in token.candidates]
        assert layers.logprobs[-1, position].tolist() == pytest.approx([p for _, p in token.candidates], abs=1e-4)
        assert layers.next_logprobs[-1, position].item() == pytest.approx(token.logprob, abs=1e-4)
        assert layers.entropies[-1, position].item() == pytest.approx(token.entropy, abs=1e-4)


def test_each_layer_is_read_by_the_last_layernorm_and_the_head(reference, text_model):
    trace = text_model.trace(TEXT)
    layers = text_model.predictions_by_layer(trace, k=3)
    assert layers.candidates.shape == (4, len(trace.tokens), 3)
    with torch.no_grad():
        logits = reference.lm_head(reference.transformer.ln_f(trace.residual))
    torch.testing.assert_close(layers.logprobs, logits.log_softmax(-1).topk(3).values, atol=1e-4, rtol=1e-4)


def test_a_long_text_is_cut_to_its_last_tokens_and_an_empty_one_refused(text_model):
    trace = text_model.trace(TEXT * 20)
    assert trace.tokens.tolist() == gpt2().encode(TEXT * 20)[-64:]
    with pytest.raises(UserError, match="empty"):
        text_model.trace("")


def test_nearest_tokens_have_the_highest_cosine_similarity(text_model):
    embeddings = text_model.model.wte.weight[: text_model.model.config.n_tokens].detach().numpy()
    expected = cosine_similarity(embeddings[464:465], embeddings)[0]
    expected[464] = -1
    found = lens.nearest_tokens(text_model.model, 464, 5)
    assert [i for i, _ in found] == np.argsort(-expected)[:5].tolist()
    assert [s for _, s in found] == pytest.approx(sorted(expected)[-5:][::-1], abs=1e-5)


def test_the_map_keeps_the_distances_of_embeddings_that_lie_in_a_plane():
    model = GPT(GPTConfig(vocab_size=64, n_tokens=60, n_layer=1, n_head=1, n_embd=8, block_size=8))
    plane = torch.randn(64, 2) @ torch.linalg.qr(torch.randn(8, 2)).Q.T
    model.wte.weight.data = plane + 3
    points = lens.embedding_map(model, list(range(10)))
    torch.testing.assert_close(torch.cdist(points, points), torch.cdist(plane[:10], plane[:10]), atol=1e-4, rtol=1e-4)


def test_positions_are_compared_if_they_are_learned():
    model = random_model({})
    expected = cosine_similarity(model.wpe.weight.detach().numpy())
    np.testing.assert_allclose(lens.position_similarities(model), expected, atol=1e-5)
    assert lens.position_similarities(random_model(CHANGED)) is None


def test_merges_are_those_of_the_bpe():
    ranks = gpt2().mergeable_ranks
    steps = list(merges(b" warm", ranks))
    assert steps[0] == [b" ", b"w", b"a", b"r", b"m"] and steps[-1] == [b" warm"] and len(steps) == 5
    for before, after in itertools.pairwise(steps):
        [i] = [i for i in range(len(after)) if before[i] != after[i]][:1]
        assert after == [*before[:i], before[i] + before[i + 1], *before[i + 2 :]]
        possible = [ranks.get(a + b, math.inf) for a, b in itertools.pairwise(before)]
        assert ranks[after[i]] == min(possible)


def test_the_tokenizer_shows_pieces_and_ids(toy):
    def show(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "text.tokenizer", *arguments]
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, encoding="utf-8")

    result = show("The warmth.\n")
    assert result.stdout.splitlines() == ["   464  The", " 23125  ␣warmth", "    13  .", "   198  ↵"], result.stderr
    assert "4 tokens, 12 characters, 12 bytes" in result.stderr
    tokenizer = load_tokenizer(toy / "data/toy/tokenizer.json")
    own = show("The warmth.", "--tokenizer", str(toy / "data/toy/tokenizer.json"))
    assert [int(line.split()[0]) for line in own.stdout.splitlines()] == tokenizer.encode("The warmth.")
    missing = show("The warmth.", "--tokenizer", "none.json")
    assert missing.returncode == 1 and missing.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.slow
def test_gpt2_small_is_traced_within_a_second():
    """On two cores; if their products take longer by themselves, then in three times their time."""
    text_model, threads = TextModel(GPT(GPTConfig()).eval(), gpt2()), torch.get_num_threads()
    head, hidden = text_model.model.wte.weight, torch.randn(13 * 100, 768)  # after the embedding and 12 layers
    text = " ".join(TEXT.split() * 9)
    torch.set_num_threads(2)
    try:
        text_model.predictions_by_layer(text_model.trace(text))
        start = time.perf_counter()
        trace = text_model.trace(text)
        text_model.predictions_by_layer(trace)
        seconds = time.perf_counter() - start
        of_products = min(timeit.repeat(lambda: hidden @ head.detach().t(), number=1, repeat=3))
    finally:
        torch.set_num_threads(threads)
    assert len(trace.tokens) >= 100 and seconds < max(1.0, 3 * of_products), (seconds, of_products)


def test_the_terminal_shows_what_each_layer_would_say(toy):
    result = succeed(toy, "generate.py", "--model", "checkpoints/toy.pt", "--lens", "--prompt", TEXT)
    head, *rows = result.splitlines()
    assert head.split() == ["token", "embedding", "layer", "1", "layer", "2"] and len(head) <= 80
    text_model = TextModel.load(toy / "checkpoints/toy.pt", "cpu")
    ids = text_model.tokenizer.encode(TEXT)[-64:]
    assert len(rows) == len(ids)
    for row, token, scored in zip(rows[:-1], ids[:-1], text_model.score(ids, top_logprobs=1)[1:], strict=True):
        [(likeliest, logprob)] = scored.candidates
        assert row.startswith(legible(text_model.tokenizer.decode_bytes([token]))[:11])
        assert row.endswith(f"{math.exp(logprob):4.0%}")
        assert legible(text_model.tokenizer.decode_bytes([likeliest]))[:11] in row[-17:]


def test_a_wide_table_leaves_out_layers_in_the_middle(monkeypatch, capsys):
    text_model = TextModel(random_model({}, n_layer=12, vocab_size=50304, n_tokens=50259, n_embd=16), gpt2())
    monkeypatch.setenv("COLUMNS", "100")
    print_lens(text_model, TEXT)
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 100 for line in lines) and lines[0].split()[1] == "embedding"
    assert [int(word) for word in lines[0].split() if word.isdigit()] == [3, 6, 9, 12]
