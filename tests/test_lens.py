"""A look inside a model: what `generation/lens.py` shows is what the model, and `transformers`, compute."""

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, random_model, succeed
from sklearn.metrics.pairwise import cosine_similarity
from test_fields import CHANGED, VARIANTS
from transformers import GPT2Config, GPT2LMHeadModel

from generation import lens
from generation.lens import predictions_by_layer, trace_text
from generation.text_model import TextModel
from interface.terminal import print_lens
from system.errors import UserError
from text.tokenizer import gpt2, legible, merges

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


@torch.no_grad()
def test_attention_and_residual_stream_are_those_of_transformers(reference, text_model):
    trace = trace_text(text_model, TEXT)
    output = reference(trace.tokens[None], output_attentions=True, output_hidden_states=True)
    assert trace.tokens.tolist() == gpt2().encode(TEXT)
    torch.testing.assert_close(trace.attention, torch.cat(output.attentions), atol=1e-5, rtol=1e-4)
    streams = [*trace.residual[:-1], text_model.model.ln_f(trace.residual[-1])]  # theirs ends behind the last LayerNorm
    torch.testing.assert_close(torch.stack(streams), torch.cat(output.hidden_states), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_recorded_attention_gives_the_output_of_the_model(fields):
    model = random_model(**fields)
    trace = lens.trace(model, torch.randint(300, (24,)))
    torch.testing.assert_close(trace.attention.sum(dim=-1), torch.ones_like(trace.attention[..., 0]))
    assert not trace.attention.triu(1).any()
    hidden = model.hidden(trace.tokens[None])[0]
    torch.testing.assert_close(model.ln_f(trace.residual[-1]), hidden, atol=1e-5, rtol=1e-4)
    assert not model.h[0]._forward_hooks and not model.h[0]._forward_pre_hooks


@torch.no_grad()
def test_each_layer_is_read_by_the_last_layernorm_and_the_head(reference, text_model):
    trace = trace_text(text_model, TEXT)
    layers = predictions_by_layer(text_model, trace, k=3)
    logprobs = reference.lm_head(reference.transformer.ln_f(trace.residual)).log_softmax(-1)
    torch.testing.assert_close(layers.logprobs, logprobs.topk(3).values, atol=1e-4, rtol=1e-4)
    assert layers.candidates.shape == (4, len(trace.tokens), 3)
    for position, token in enumerate(text_model.score(trace.tokens.tolist(), top_logprobs=3)[1:]):  # the last layer
        assert layers.candidates[-1, position].tolist() == [i for i, _ in token.candidates]
        assert layers.next_logprobs[-1, position].item() == pytest.approx(token.logprob, abs=1e-4)
        assert layers.entropies[-1, position].item() == pytest.approx(token.entropy, abs=1e-4)


def test_a_long_text_is_cut_to_its_last_tokens_and_an_empty_one_refused(text_model):
    assert trace_text(text_model, TEXT * 20).tokens.tolist() == gpt2().encode(TEXT * 20)[-64:]
    with pytest.raises(UserError, match="empty"):
        trace_text(text_model, "")


def test_nearest_tokens_and_positions_are_compared_by_cosine_similarity(text_model):
    embeddings = text_model.model.wte.weight[: text_model.model.config.n_tokens].detach().numpy()
    expected = cosine_similarity(embeddings[464:465], embeddings)[0]
    expected[464] = -1
    ids, similarities = zip(*lens.nearest_tokens(text_model.model, 464, 5), strict=True)
    assert list(ids) == np.argsort(-expected)[:5].tolist()
    assert similarities == pytest.approx(sorted(expected)[-5:][::-1], abs=1e-5)
    model = random_model()
    expected = cosine_similarity(model.wpe.weight.detach().numpy())
    np.testing.assert_allclose(lens.position_similarities(model), expected, atol=1e-5)
    assert lens.position_similarities(random_model(**CHANGED)) is None  # rotary positions are not learned


def test_the_map_keeps_the_distances_of_embeddings_that_lie_in_a_plane():
    model = random_model(n_embd=8)
    plane = torch.randn(320, 2) @ torch.linalg.qr(torch.randn(8, 2)).Q.T
    model.wte.weight.data = plane + 3
    points = lens.embedding_map(model, list(range(10)))
    torch.testing.assert_close(torch.cdist(points, points), torch.cdist(plane[:10], plane[:10]), atol=1e-4, rtol=1e-4)


def test_merges_are_those_of_the_bpe():
    ranks = gpt2().mergeable_ranks
    steps = list(merges(b" warm", ranks))
    assert steps[0] == [b" ", b"w", b"a", b"r", b"m"] and steps[-1] == [b" warm"] and len(steps) == 5
    for before, after in itertools.pairwise(steps):
        i = next(i for i in range(len(after)) if before[i] != after[i])
        assert after == [*before[:i], before[i] + before[i + 1], *before[i + 2 :]]
        assert ranks[after[i]] == min(ranks.get(a + b, math.inf) for a, b in itertools.pairwise(before))


def test_the_tokenizer_shows_pieces_and_ids():
    command = [sys.executable, "-m", "text.tokenizer", "The warmth.\n"]
    shown = subprocess.run(command, cwd=REPOSITORY, capture_output=True, encoding="utf-8", check=True).stdout
    lines = ["   464  The", " 23125  ␣warmth", "    13  .", "   198  ↵", "4 tokens, 12 characters, 12 bytes"]
    assert shown.splitlines() == lines


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
    text_model = TextModel(random_model(n_layer=12, vocab_size=50304, n_tokens=50259, n_embd=16), gpt2())
    monkeypatch.setenv("COLUMNS", "100")
    print_lens(text_model, TEXT)
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 100 for line in lines) and lines[0].split()[1] == "embedding"
    assert [int(word) for word in lines[0].split() if word.isdigit()] == [3, 6, 9, 12]
