"""The network against `transformers`, the fused loss against the plain one, the cache against none."""

import math

import pytest
import torch
import torch.nn.functional as F

from generation.decoding import KVCache, generate, sample
from model import GPT, GPTConfig, causal_attention, chunk_loss, linear_cross_entropy, rotary_angles, rotate

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def small(**changes) -> GPT:
    torch.manual_seed(0)
    return GPT(
        GPTConfig(
            **{"block_size": 32, "vocab_size": 128, "n_tokens": 100, "n_layer": 3, "n_head": 4, "n_embd": 32, **changes}
        )
    )


@pytest.fixture(scope="module")
def reference():
    """A GPT-2 of `transformers` with random weights, biases and LayerNorms included, and ours with the same weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    theirs = GPT2LMHeadModel(
        GPT2Config(vocab_size=211, n_positions=256, n_embd=48, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0)
    ).eval()
    for name, parameter in theirs.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("ln_" in name and name.endswith("weight")), std=0.2)
    with torch.no_grad():  # so that greedy text does not fall into a loop
        theirs.transformer.wpe.weight.mul_(20)
        theirs.transformer.ln_f.bias.mul_(0.1)
    ours = GPT(GPTConfig(block_size=256, vocab_size=211, n_tokens=211, n_layer=3, n_head=4, n_embd=48)).eval()
    weights = {
        name.removeprefix("transformer."): w.t()
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        else w
        for name, w in theirs.state_dict().items()
    }
    ours.load_state_dict(weights)
    return theirs, ours


def test_logits_equal_transformers(reference):
    theirs, ours = reference
    tokens = torch.randint(211, (3, 256), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert expected.std() > 1  # not a comparison of zeros
        torch.testing.assert_close(ours(tokens), expected, atol=1e-4, rtol=1e-4)


def test_loss_equals_transformers(reference):
    theirs, ours = reference
    tokens = torch.randint(211, (3, 101), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = theirs(tokens, labels=tokens).loss
        loss = ours(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)


def test_greedy_tokens_equal_transformers(reference):
    theirs, ours = reference
    prompt = torch.tensor([[5, 17, 200, 3]])
    expected = theirs.generate(prompt, max_new_tokens=200, do_sample=False, pad_token_id=0, eos_token_id=None)[0, 4:]
    assert len(set(expected.tolist())) >= 50  # so that a wrong token shows
    assert [int(token) for token, _ in generate(ours, prompt, 200, temperature=0)] == expected.tolist()


def test_gpt2_small_has_124_million_parameters():
    with torch.device("meta"):
        assert GPT(GPTConfig(vocab_size=50257, n_tokens=50257)).n_parameters() == 124_439_808
        assert GPT(GPTConfig(vocab_size=50257, n_tokens=50257, tie_weights=False)).n_parameters() == 163_037_184


def test_looking_up_an_embedding_costs_no_operations():
    shape = {"bias": False, "n_layer": 2, "n_embd": 128, "block_size": 64, "vocab_size": 512, "n_tokens": 512}
    tied = GPT(GPTConfig(**shape, n_head=2))
    multiplied = 2 * 12 * 128**2 + 5 * 128 + 512 * 128  # matrices of the layers, LayerNorms, head
    assert tied.flops_per_token() == 6 * multiplied + 12 * 2 * 128 * 64
    more = GPT(GPTConfig(**shape, n_head=2, tie_weights=False, value_embeddings=True, rotary=True))
    assert more.flops_per_token() == tied.flops_per_token() and more.n_parameters() > 1.2 * tied.n_parameters()


def test_rotary_attention_depends_on_distances_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 8, 16)
    near, far = (rotary_angles(torch.arange(start, start + 8), 16) for start in (0, 500))
    scores = [rotate(q, rotation) @ rotate(k, rotation).mT for rotation in (near, far)]
    torch.testing.assert_close(*scores, atol=1e-4, rtol=1e-4)
    assert (scores[0] - q @ k.mT).abs().max() > 0.1


@pytest.mark.parametrize("n", [64, 300])
def test_attention_in_bfloat16_is_nearly_that_in_float32(n):
    torch.manual_seed(0)
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 2, 2, n, 16).bfloat16())
    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = causal_attention(q, k, v, dropout=0.0)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, atol=2e-2, rtol=2e-2)
    ours, theirs = (torch.autograd.grad(y.float().square().sum(), (q, k, v)) for y in (found, exact))
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() < 0.03 * b.norm()


def test_first_loss_is_that_of_guessing():
    model = small(n_embd=64)
    tokens = torch.randint(128, (8, 33))
    loss = model(tokens[:, :-1], tokens[:, 1:]).item() / (8 * 32)
    assert abs(loss - math.log(128)) < 0.05


def test_residual_projections_start_smaller():
    model = GPT(GPTConfig(block_size=8, vocab_size=64, n_tokens=64, n_layer=8, n_head=2, n_embd=128))
    assert model.h[3].mlp.c_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert model.h[3].mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.05)


def whole_chunks_only(x, head, y, needs_grad):
    """Stands where the compiled loss stands, which compiles anew for every number of rows."""
    assert len(x) in (7, 64, 1000)
    return chunk_loss(x, head, y, needs_grad)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("chunk", [7, 64, 1000])
@pytest.mark.parametrize("loss_function", [chunk_loss, whole_chunks_only])
def test_fused_loss_equals_plain_in_value_and_gradient(masked, chunk, loss_function):
    torch.manual_seed(0)
    hidden = torch.randn(64, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, 16, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(50, (64,))
    kept = torch.randperm(64)[:40].sort().values if masked else torch.arange(64)

    fused = linear_cross_entropy(hidden[kept], weight, targets[kept], chunk, loss_function) / len(kept)
    plain = F.cross_entropy((hidden @ weight.t())[kept], targets[kept])
    torch.testing.assert_close(fused.double(), plain, atol=1e-6, rtol=1e-6)
    for ours, theirs in zip(
        torch.autograd.grad(3 * fused, (hidden, weight)), torch.autograd.grad(3 * plain, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_nearly_certain_still_has_a_gradient_in_half_precision(dtype):
    torch.manual_seed(0)
    weight = torch.randn(50, 64).to(dtype)
    targets = torch.randint(50, (256,))
    hidden = (0.12 * weight[targets]).detach()  # the targets' probabilities are about 0.99

    def gradient(loss, dtype):
        x = hidden.to(dtype).requires_grad_()
        return torch.autograd.grad(loss(x, weight.to(dtype)), x)[0].double()

    def plain(x, weight):
        return F.cross_entropy(
            (x @ weight.t()).to(torch.promote_types(x.dtype, torch.float32)), targets, reduction="sum"
        )

    exact = gradient(plain, torch.float64)
    ours, theirs = (
        (gradient(loss, dtype) - exact).norm() / exact.norm()
        for loss in (lambda x, weight: linear_cross_entropy(x, weight, targets), plain)
    )
    assert ours < 1.1 * theirs < 0.1


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_gradient_under_autocast_is_near_that_in_float32(device, dtype):
    """On CUDA the residual stream is bfloat16. In float16 it could overflow; on the CPU, sums would be inexact."""
    model, seen = small().to(device), []
    tokens = torch.randint(100, (32, 32), device=device)
    model(tokens, tokens).backward()
    exact = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.h[1].register_forward_hook(lambda block, inputs, output: seen.extend([inputs[0].dtype, output.dtype]))
    with torch.autocast(device, dtype):
        model(tokens, tokens).backward()
    assert set(seen) == {torch.bfloat16 if (device, dtype) == ("cuda", torch.bfloat16) else torch.float32}
    for p, gradient in zip(model.parameters(), exact, strict=True):
        assert (p.grad - gradient).norm() < 0.03 * gradient.norm()


@pytest.mark.parametrize("masked", [False, True])
def test_model_gradients_equal_those_of_the_plain_loss(masked):
    model = small()
    tokens, targets = torch.randint(100, (4, 32)), torch.randint(100, (4, 32))
    counted = torch.arange(3, 100, 2) if masked else None
    n = 49 if masked else 128
    (model(tokens, targets, counted) / n).backward()
    fused = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    ignored = targets.flatten().clone()
    if masked:
        ignored[[i for i in range(128) if i not in set(counted.tolist())]] = -100
    F.cross_entropy(model(tokens).flatten(0, 1), ignored).backward()
    for ours, plain in zip(fused, (p.grad for p in model.parameters()), strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-6, rtol=1e-4)


def test_the_gradient_of_a_head_in_half_precision_is_summed_in_float32():
    """In bfloat16, a sum over 512 chunks would lose most of them."""
    torch.manual_seed(0)
    hidden, targets = torch.ones(512, 8).bfloat16(), torch.randint(16, (512,))
    weight = torch.zeros(16, 8).bfloat16().requires_grad_()
    linear_cross_entropy(hidden, weight, targets, chunk_size=1).backward()
    expected = 512 / 16 - targets.bincount(minlength=16)[:, None].expand(16, 8)
    assert weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(weight.grad.float(), expected.float(), atol=0.1, rtol=2**-8)


def test_gradient_checkpointing_changes_no_gradient():
    model, tokens = small(), torch.randint(100, (2, 32))
    model(tokens, tokens).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing = True
    model(tokens, tokens).backward()
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)


def test_overfits_one_batch():
    model = small()
    tokens = torch.randint(100, (4, 33))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = model(tokens[:, :-1], tokens[:, 1:]) / (4 * 32)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 0},
        {"temperature": 1.3},
        {"top_k": 5},
        {"top_p": 0.7},
        {"top_k": 20, "top_p": 0.9, "temperature": 0.8},
        {"min_p": 0.1, "repetition_penalty": 1.2},
        {"temperature": 0, "repetition_penalty": 1.5},
    ],
    ids=str,
)
def test_cached_generation_equals_uncached_past_the_context(how):
    model = small().eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    torch.nn.init.normal_(model.wpe.weight)
    prompt = torch.randint(100, (2, 9))

    def run(use_cache):
        generator = torch.Generator().manual_seed(7)
        steps = generate(model, prompt, 70, generator=generator, use_cache=use_cache, num_samples=2, **how)
        return torch.stack([ids for ids, _ in steps], dim=1)

    cached = run(True)
    assert cached.unique().numel() > 10
    assert torch.equal(cached, run(False))


def test_a_block_of_new_positions_sees_the_cached_past():
    model = small().eval()
    tokens = torch.randint(100, (2, 20))
    cache = KVCache(model.config, 2, model.wte.weight)
    with torch.no_grad():
        parts = [model.hidden(tokens[:, a:b], torch.arange(a, b), cache.layers) for a, b in ((0, 6), (6, 7), (7, 20))]
        torch.testing.assert_close(torch.cat(parts, dim=1), model.hidden(tokens), atol=1e-5, rtol=1e-5)


def test_padding_ids_are_never_sampled():
    model = small(tie_weights=False).eval()
    with torch.no_grad():  # every padding id is far likelier than any real token
        model.ln_f.weight.zero_()
        model.ln_f.bias.fill_(1.0)
        model.lm_head.weight[100:] = 10.0
    for how in ({"temperature": 0}, {"temperature": 2.0}, {"top_k": 3}, {"top_p": 0.5}):
        tokens = torch.cat([ids for ids, _ in generate(model, torch.zeros(8, 1, dtype=torch.int64), 20, **how)])
        assert tokens.max() < 100


def test_sampling_follows_its_definition():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(40_000, 4)
    generator = torch.Generator().manual_seed(0)

    def frequencies(**how):
        return (sample(logits, generator=generator, **how).bincount(minlength=4) / len(logits)).tolist()

    assert frequencies() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.01)
    assert frequencies(top_k=2) == pytest.approx([0.625, 0.375, 0, 0], abs=0.01)
    assert frequencies(top_p=0.6) == pytest.approx([0.625, 0.375, 0, 0], abs=0.01)
    assert frequencies(top_p=0.4) == [1, 0, 0, 0]
    assert frequencies(temperature=0) == [1, 0, 0, 0]
    squared = [p * p / 0.365 for p in (0.5, 0.3, 0.15, 0.05)]
    assert frequencies(temperature=0.5) == pytest.approx(squared, abs=0.01)
