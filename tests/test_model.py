"""The network against `transformers`, the fused loss against the plain one."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import random_model
from transformers import GPT2Config, GPT2LMHeadModel

from generation.config import SamplingConfig
from generation.decoding import generate
from model import GPT, IGNORE_INDEX, GPTConfig, chunk_loss, linear_cross_entropy

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
VOCABULARY = 211


def fresh(**changes) -> GPT:
    """A small model as training begins with it."""
    torch.manual_seed(0)
    shape = {"block_size": 32, "vocab_size": 128, "n_tokens": 100, "n_layer": 3, "n_head": 4, "n_embd": 32}
    return GPT(GPTConfig(**{**shape, **changes}))


@pytest.fixture(scope="module")
def reference() -> tuple[GPT2LMHeadModel, GPT]:
    """A GPT-2 of `transformers` with random weights, biases and LayerNorms included, and ours with the same weights."""
    torch.manual_seed(1)
    shape = {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 3, "n_head": 4}
    theirs = GPT2LMHeadModel(GPT2Config(**shape, n_positions=256, bos_token_id=0, eos_token_id=0)).eval()
    for name, parameter in theirs.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("ln_" in name and name.endswith("weight")), std=0.2)
    with torch.no_grad():  # so that greedy text does not fall into a loop
        theirs.transformer.wpe.weight.mul_(20)
        theirs.transformer.ln_f.bias.mul_(0.1)
    ours = GPT(GPTConfig(**shape, block_size=256, n_tokens=VOCABULARY)).eval()
    weights = {}
    for name, tensor in theirs.state_dict().items():
        is_transposed = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        weights[name.removeprefix("transformer.")] = tensor.t() if is_transposed else tensor
    ours.load_state_dict(weights)
    return theirs, ours


def test_logits_and_loss_equal_transformers(reference):
    theirs, ours = reference
    tokens = torch.randint(VOCABULARY, (3, 256), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = theirs(tokens, labels=tokens)
        assert expected.logits.std() > 1  # not a comparison of zeros
        torch.testing.assert_close(ours(tokens), expected.logits, atol=1e-4, rtol=1e-4)
        loss = ours(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()
    torch.testing.assert_close(loss, expected.loss, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.8])
def test_greedy_tokens_equal_transformers_with_and_without_repetition_penalty(reference, penalty):
    theirs, ours = reference
    prompt = torch.tensor([[5, 17, 200, 3]])
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "repetition_penalty": penalty}
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=200, **options)[0, 4:]
    steps = generate(ours, prompt, SamplingConfig(max_new_tokens=200, greedy=True, repetition_penalty=penalty))
    assert [int(ids) for ids, *_ in steps] == expected.tolist()
    assert penalty < 1 or len(set(expected.tolist())) >= 50  # so that a wrong token shows


@pytest.mark.parametrize(("tie_weights", "n"), [(True, 124_439_808), (False, 163_037_184)])
def test_gpt2_small_has_the_published_number_of_parameters(tie_weights, n):
    with torch.device("meta"):
        assert GPT(GPTConfig(vocab_size=50257, n_tokens=50257, tie_weights=tie_weights)).n_parameters() == n


def test_looking_up_an_embedding_costs_no_operations():
    shape = {"bias": False, "n_layer": 2, "n_head": 2, "n_embd": 128, "block_size": 64, "vocab_size": 512}
    multiplied = 2 * 12 * 128**2 + 5 * 128 + 512 * 128  # matrices of the layers, LayerNorms, head
    for tie_weights in (True, False):
        model = fresh(**shape, tie_weights=tie_weights)
        assert model.flops_per_token() == 6 * multiplied + 12 * 2 * 128 * 64


def test_a_new_model_guesses_and_its_residual_projections_start_smaller():
    model, tokens = fresh(n_embd=64), torch.randint(128, (8, 33))
    assert model(tokens[:, :-1], tokens[:, 1:]).item() / (8 * 32) == pytest.approx(math.log(128), abs=0.05)
    mlp = fresh(n_layer=8, n_embd=128).h[3].mlp
    assert mlp.c_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.05)


def whole_chunks_only(x, head, y, needs_grad):
    """Stands for the compiled loss, which would recompile for every number of rows."""
    assert len(x) in (7, 64, 1000)
    return chunk_loss(x, head, y, needs_grad)


@pytest.mark.parametrize("ignored", [0, 0.4, 1], ids=["none ignored", "some ignored", "all ignored"])
@pytest.mark.parametrize("chunk_size", [7, 64, 1000])
@pytest.mark.parametrize("loss_function", [chunk_loss, whole_chunks_only])
def test_fused_loss_equals_cross_entropy_in_value_and_gradient(ignored, chunk_size, loss_function):
    torch.manual_seed(0)
    hidden = torch.randn(64, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, 16, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(50, (64,)).masked_fill(torch.rand(64) < ignored, IGNORE_INDEX)
    fused = linear_cross_entropy(hidden, weight, targets, chunk_size, loss_function)
    plain = F.cross_entropy(hidden @ weight.t(), targets, reduction="sum")
    torch.testing.assert_close(fused.double(), plain, atol=1e-5, rtol=1e-6)
    gradients = [torch.autograd.grad(3 * loss, (hidden, weight)) for loss in (fused, plain)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ignored", [0, 0.4, 1], ids=["none ignored", "some ignored", "all ignored"])
@pytest.mark.parametrize("n_classes", [0, 3])
def test_gradients_of_a_model_equal_those_of_the_plain_loss(ignored, n_classes):
    model, tokens = fresh(n_classes=n_classes, tie_weights=not n_classes), torch.randint(100, (4, 32))
    class_weights = torch.tensor([0.5, 1.0, 4.0]) if n_classes else None
    targets = torch.randint(n_classes or 100, (4, 32)).masked_fill(torch.rand(4, 32) < ignored, IGNORE_INDEX)
    fused = model(tokens, targets, class_weights)
    plain = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), class_weights, reduction="sum")
    torch.testing.assert_close(fused, plain, atol=1e-5, rtol=1e-5)
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in (fused, plain)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_nearly_certain_still_has_a_gradient_in_half_precision(dtype):
    torch.manual_seed(0)
    weight, targets = torch.randn(50, 64).to(dtype), torch.randint(50, (256,))
    hidden = 0.12 * weight[targets]  # the targets' probabilities are about 0.99

    def plain(x, weight, targets):
        logits = (x @ weight.t()).to(torch.promote_types(x.dtype, torch.float32))
        return F.cross_entropy(logits, targets, reduction="sum")

    def gradient(loss, dtype):
        x = hidden.to(dtype).requires_grad_()
        return torch.autograd.grad(loss(x, weight.to(dtype), targets), x)[0].double()

    exact = gradient(plain, torch.float64)
    ours, theirs = ((gradient(f, dtype) - exact).norm() / exact.norm() for f in (linear_cross_entropy, plain))
    assert ours < 1.1 * theirs < 0.1


def test_the_gradient_of_a_head_in_half_precision_is_summed_in_float32():
    """In bfloat16, a sum over 512 chunks would lose most of them."""
    torch.manual_seed(0)
    hidden, targets = torch.ones(512, 8).bfloat16(), torch.randint(16, (512,))
    weight = torch.zeros(16, 8).bfloat16().requires_grad_()
    linear_cross_entropy(hidden, weight, targets, chunk_size=1).backward()
    expected = 512 / 16 - targets.bincount(minlength=16)[:, None].expand(16, 8)
    assert weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(weight.grad.float(), expected.float(), atol=0.1, rtol=2**-8)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
@pytest.mark.parametrize(("dtype", "length"), [(torch.bfloat16, 32), (torch.bfloat16, 300), (torch.float16, 32)])
def test_every_gradient_under_autocast_is_near_that_in_float32(device, dtype, length):
    """On CUDA the residual stream is bfloat16. In float16 it could overflow; on the CPU, sums would be inexact."""
    model, seen = fresh(block_size=length).to(device), []
    tokens = torch.randint(100, (1024 // length, length), device=device)
    exact = torch.autograd.grad(model(tokens, tokens), list(model.parameters()))
    model.h[1].register_forward_hook(lambda block, inputs, output: seen.extend([inputs[0].dtype, output.dtype]))
    with torch.autocast(device, dtype):
        model(tokens, tokens).backward()
    assert set(seen) == {torch.bfloat16 if (device, dtype) == ("cuda", torch.bfloat16) else torch.float32}
    for p, gradient in zip(model.parameters(), exact, strict=True):
        assert (p.grad - gradient).norm() < 0.03 * gradient.norm()


@pytest.mark.parametrize(
    "how", [{"temperature": 0}, {"temperature": 2.0}, {"top_k": 3}, {"top_k": None, "top_p": 0.5}], ids=str
)
def test_padding_ids_are_never_sampled(how):
    model = random_model(tie_weights=False)
    with torch.no_grad():  # every padding id is far likelier than any real token
        model.ln_f.weight.zero_()
        model.ln_f.bias.fill_(1.0)
        model.lm_head.weight[300:] = 10.0
    config = SamplingConfig(**{"max_new_tokens": 20, "top_k": None, **how})
    ids = torch.cat([ids for ids, *_ in generate(model, torch.zeros(8, 1, dtype=torch.int64), config)])
    assert ids.max() < 300
