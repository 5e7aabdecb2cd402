"""The code for CUDA and MPS, on a pretended GPU: it computes what the CPU computes, without waiting, and checks itself.

The last test fails if a line for a GPU was not executed by the others.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import streamlit as st
import torch
import torch.nn.functional as F
from app_page import complete, open_page
from conftest import ENVIRONMENT, REPOSITORY, command, contents, fine_tune, log, pretrain, random_model, run_fresh
from gpu_lines import ExecutedLines
from pretended_gpu import PretendedGpu
from test_training import SHAPE, new_trainer
from torch.nn.attention import SDPBackend
from workers import take_step

import train_classifier
from benchmarks import gpu as gpu_benchmark
from benchmarks import training as training_benchmark
from generation.config import SamplingConfig
from generation.decoding import CompiledDecoder, generate, one_step_ahead
from generation.lens import trace_text
from generation.text_model import Chat, TextModel
from model import linear_cross_entropy
from system.device import choose_device, choose_dtype, fast_attention, machine, peak_flops, to_host, total_memory
from system.errors import UserError, is_out_of_memory
from training.trainer import Trainer
from weights import checkpoint

MODERN = dataclasses.replace(SHAPE, tie_weights=False, rotary=True, qk_norm=True, squared_relu=True)
MUON = {"optimizer": "muon", "embedding_lr_scale": 10.0, "grad_accum_steps": 1}
CASES = [
    (SHAPE, {"grad_clip": 0.5, "grad_accum_steps": 1}),
    (dataclasses.replace(SHAPE, dropout=0.1), {"grad_accum_steps": 4}),
    (SHAPE, {"grad_checkpointing": True, "grad_accum_steps": "auto"}),
    (MODERN, MUON),
]
GREEDY = SamplingConfig(greedy=True, max_new_tokens=40)
KINDS = pytest.mark.parametrize("kind", ["cuda", "mps"])


@pytest.fixture(scope="module", autouse=True)
def executed(tmp_path_factory) -> Iterator[ExecutedLines]:
    with ExecutedLines(tmp_path_factory.mktemp("executed")) as lines:
        yield lines


@pytest.fixture
def gpu() -> Iterator[PretendedGpu]:
    with PretendedGpu() as pretended:
        yield pretended


def steps(trainer: Trainer, n: int = 2) -> list[float]:
    """Takes steps; returns their losses and gradient norms."""
    found = []
    for i in range(n):
        torch.manual_seed(i)
        found += take_step(trainer, i)
    return found


@KINDS
@pytest.mark.parametrize(("shape", "options"), CASES)
def test_training_computes_what_the_cpu_computes(toy, shape, options, kind):
    expected = steps(new_trainer(toy, shape, **options))
    with PretendedGpu(kind):
        found = steps(new_trainer(toy, shape, **options, device=kind, dtype="float32"))
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("shape", "options"), [CASES[0], CASES[1], CASES[3]])
def test_a_step_in_half_precision_is_near_and_never_waits(toy, shape, options, dtype):
    expected = steps(new_trainer(toy, shape, **options))
    with PretendedGpu() as gpu:
        trainer = new_trainer(toy, shape, **options, device="cuda", dtype=dtype)
        assert steps(trainer) == pytest.approx(expected, rel=0.03)
        gpu.waits.clear()
        batch = trainer.load_batch(2)
        loss = trainer.forward_backward(batch.micro_batches, batch.total_weight)
        read = to_host(torch.stack([loss, trainer.update_weights(1e-2)]))
        assert gpu.waits == []
        assert all(map(math.isfinite, read()))


def test_muon_skips_a_step_whose_gradient_overflowed(toy, gpu):
    trainer = new_trainer(toy, MODERN, **MUON, device="cuda", dtype="float16")
    steps(trainer, 2)
    batch, matrix = trainer.load_batch(2), trainer.state.model.h[0].mlp.c_fc.weight
    trainer.forward_backward(batch.micro_batches, batch.total_weight)
    matrix.grad[0, 0] = math.inf
    muon = trainer.state.optimizers[0]
    before = [t.clone() for t in (matrix, muon.state[matrix]["momentum"])]
    trainer.update_weights(1e-2)
    assert all(torch.equal(a, b) for a, b in zip(before, (matrix, muon.state[matrix]["momentum"]), strict=True))
    assert all(map(math.isfinite, steps(trainer, 2)))


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), "float16"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")])
def test_the_capability_chooses_precision_attention_and_muons_dtype(toy, capability, dtype):
    with PretendedGpu(capability=capability):
        device = choose_device("auto")
        assert device.type == "cuda" and str(choose_dtype("auto", device)) == f"torch.{dtype}"
        muon = new_trainer(toy, MODERN, **MUON, device="cuda").state.optimizers[0]
        assert muon.dtype == (torch.bfloat16 if dtype == "bfloat16" else torch.float32)
        with fast_attention():
            first = torch._C._get_sdp_priority_order()[0]
        assert (first == int(SDPBackend.CUDNN_ATTENTION)) == (capability == (9, 0))
        assert total_memory(device) == 80e9 and peak_flops(device) == 989e12 and "H100" in machine(device)


def test_the_loss_in_chunks(gpu):
    x, head, y = torch.randn(3000, 32), torch.randn(100, 32), torch.randint(100, (3000,))
    expected = F.cross_entropy(x.bfloat16().float() @ head.bfloat16().float().t(), y, reduction="sum")
    weight = head.to("cuda").requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        loss = linear_cross_entropy(x.to("cuda"), weight, y.to("cuda"))
        large = linear_cross_entropy(*(t.to("cuda") for t in (x.repeat(11, 1), head, y.repeat(11))))
    with torch.autocast("cpu", torch.bfloat16):
        linear_cross_entropy(x, head.requires_grad_(), y)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3) == pytest.approx(large.item() / 11, rel=1e-3)
    assert weight.grad.dtype == torch.float32 and weight.grad.is_cuda


def weights(path: str) -> dict[str, torch.Tensor]:
    return contents(path)["model"]


@KINDS
def test_a_run_is_interrupted_resumed_and_saves_the_cpus_weights(here, kind):
    fast = {"eval_tokens": 64, "eval_every": 6, "grad_accum_steps": 1}
    pretrain(out=Path("cpu.pt"), **fast)
    with PretendedGpu(kind) as gpu:
        calls = itertools.count()

        def embedding(*args, **kwargs):
            if Path("gpu.jsonl").exists() and next(calls) == 5:
                os.kill(os.getpid(), signal.SIGINT)
            return F.embedding(*args, **kwargs)

        gpu.faults["embedding"] = embedding
        options = {"out": Path("gpu.pt"), "device": "auto", "dtype": "float32", **fast}
        pretrain(**options, plan=True)
        pretrain(**options)
        stopped_at = contents("gpu.last.pt")["step"]
        pretrain(**options, resume=True)
    assert gpu.largest_pinned <= 4 * 64 * 8 and 0 < stopped_at < 6 == contents("gpu.last.pt")["step"]
    for name, tensor in weights("cpu.pt").items():
        torch.testing.assert_close(weights("gpu.pt")[name], tensor, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("kind", "options"), [("cuda", {"compile": "on"}), ("mps", {}), ("cuda", {"lora_rank": 4})], ids=str
)
def test_fine_tuning_computes_what_the_cpu_computes(here, options, kind):
    options = {**options, "max_steps": 2, "sample_prompt": "x", "batch_size": 4, "grad_accum_steps": 1}
    fine_tune(out=Path("cpu.pt"), **options | {"compile": "off"})
    with PretendedGpu(kind):
        fine_tune(out=Path("gpu.pt"), device=kind, dtype="float32", **options)
    cpu, found = ([e.get("loss", e.get("val_loss")) for e in log(Path(f"{name}.jsonl"))] for name in ("cpu", "gpu"))
    assert found == pytest.approx(cpu, rel=1e-3)
    if "compile" in options:  # otherwise padded batches compile again when they pass a size
        assert not torch._inductor.config.triton.mix_order_reduction


@KINDS
def test_a_classifier_learns_what_the_cpu_learns(here, kind):
    Path("t.csv").write_text("text,label\n" + "".join(f"{'ab'[i % 2]} of {i},{'xy'[i % 2]}\n" for i in range(40)))
    for device in ("cpu", kind):
        options = {"device": device, "dtype": "float32", "out": Path(f"{device}.pt"), "class_weights": True}
        config = train_classifier.Config(input=Path("t.csv"), max_steps=2, **options)
        with PretendedGpu(kind):
            train_classifier.main(config)
    for name, tensor in weights("cpu.pt").items():
        torch.testing.assert_close(weights(f"{kind}.pt")[name], tensor, atol=1e-4, rtol=1e-3)


def test_a_batch_that_does_not_fit_is_reported(toy, gpu):
    gpu.faults["embedding"] = lambda *_, **__: torch.empty(2**60)
    with pytest.raises(UserError, match="^out of memory with a batch in 4 micro-batches"):
        new_trainer(toy, device="cuda", device_check=False, grad_accum_steps="auto")
    assert is_out_of_memory(RuntimeError("NVML_SUCCESS == r INTERNAL ASSERT FAILED at CUDACachingAllocator.cpp"))


def test_a_device_that_cannot_allocate_is_named_with_its_error(gpu):
    gpu.faults["ones"] = lambda *_, **__: torch.zeros(-1)
    for name in ("auto", "cuda"):
        with pytest.raises(UserError, match="^no device 'cuda' on this machine .*must be non-negative"):
            choose_device(name)


@KINDS
@pytest.mark.parametrize("fields", [{}, {"rotary": True, "qk_norm": True, "squared_relu": True}], ids=str)
def test_decoding_writes_what_the_cpu_writes_and_never_waits(fields, kind):
    model, prompt = random_model(**fields), torch.randint(300, (1, 5))
    expected = [ids.tolist() for ids, *_ in generate(model, prompt, GREEDY, num_samples=2)]
    with PretendedGpu(kind) as gpu:
        model, prompt = model.to(kind), prompt.to(kind)
        decoder = CompiledDecoder(model)
        for compiled in (None, decoder, decoder):
            found = one_step_ahead(generate(model, prompt, GREEDY, num_samples=2, compiled=compiled))
            assert [ids.tolist() for ids, *_ in found] == expected
        how = SamplingConfig(max_new_tokens=20, top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.1)
        found = generate(model, prompt, how, compiled=decoder)
        next(found), next(found)
        gpu.waits.clear()
        next(found)
        assert gpu.waits == []
        for n in range(1, 12):
            next(itertools.islice(generate(model, prompt, GREEDY, num_samples=n, compiled=decoder), 1, None))
        assert list(decoder.static_steps) == list(range(4, 12))  # older ones would keep their memory


def test_a_filtered_token_is_never_drawn_if_the_generator_draws_zeros():
    with PretendedGpu("mps") as gpu:
        gpu.faults["exponential_"] = lambda tensor, **_: tensor.zero_()
        model, prompt = random_model().to("mps"), torch.randint(300, (1, 5)).to("mps")
        for ids, logits, _ in generate(model, prompt, SamplingConfig(max_new_tokens=5, top_k=None, top_p=0.01)):
            assert ids.tolist() == logits.argmax(dim=-1).tolist()


def test_converted_weights_score_and_trace_beyond_256_tokens(toy, tmp_path, gpu):
    state = contents(toy / "checkpoints/toy.pt")
    model = random_model(n_layer=1, block_size=512, vocab_size=448, n_tokens=403, rotary=True, qk_norm=True)
    checkpoint.save(tmp_path / "a.pt", checkpoint.pack(model, kind="base", tokenizer=state["tokenizer"]))
    cpu, found = (TextModel.load(tmp_path / "a.pt", device) for device in ("cpu", "cuda"))
    assert found.dtype == found.model.wte.weight.dtype == torch.bfloat16
    text = "".join(f"{i} naïve " for i in range(300))
    ids = cpu.tokenizer.encode(text)[-400:]
    expected, scored = ([token.logprob for token in m.score(ids, 2)[1:]] for m in (cpu, found))
    assert scored == pytest.approx(expected, abs=0.5)
    difference = (found.next_logits(ids) - cpu.next_logits(ids)).abs()
    assert difference.max() < 0.1 * cpu.next_logits(ids).std()
    assert (trace_text(found, text).attention.cpu() - trace_text(cpu, text).attention).abs().max() < 0.1
    with pytest.raises(UserError, match="^--quantize int8 works on the CPU"):
        TextModel.load(tmp_path / "a.pt", "cuda", quantize="int8")


@KINDS
def test_chat_and_samples_are_those_of_the_cpu(toy, kind):
    def written(device):
        model = TextModel.load(toy / "checkpoints/sft.pt", device, "float32", compile=device != "cpu")
        *_, answer = Chat(model, GREEDY).reply("What does abs do?", top_logprobs=2)
        return answer.text, [s.text for s in model.samples(model.prompt_ids("What"), GREEDY, 2)]

    expected = written("cpu")
    with PretendedGpu(kind):
        assert written(kind) == expected


def test_the_page_completes_a_prompt(page_folder, gpu):
    assert complete(open_page("toy.pt"), "What is", Length=20, Temperature=0.0)
    assert gpu.waits
    st.cache_resource.clear()  # no other test gets this model


FAULTS = {  # of the device: a function, and what it computes instead
    "a missing mask": ("scaled_dot_product_attention", lambda q, k, v, **_: F.scaled_dot_product_attention(q, k, v)),
    "a transposed weight": ("linear", lambda x, w, b=None: F.linear(x, w.t() if w.size(0) == w.size(1) else w, b)),
    "a sum in bfloat16": ("sum", lambda x, *a, **k: functools.reduce(torch.add, x.bfloat16()).sum(*a, **k)),
    "NaN": ("layer_norm", lambda x, *a, **k: F.layer_norm(x, *a, **k) * math.nan),
    "another argmax": ("argmax", lambda x, *a, **k: (-x).argmax(*a, **k)),
}


@KINDS
@pytest.mark.parametrize("fault", FAULTS)
def test_a_device_that_computes_wrongly_is_not_used(toy, capsys, fault, kind):
    path = toy / "checkpoints/toy.pt"
    with PretendedGpu(kind) as gpu:
        gpu.faults = dict([FAULTS[fault]])
        train = functools.partial(new_trainer, toy, MODERN, device=kind)
        load = functools.partial(TextModel.load, path, kind, "float32")  # the toy's attention matters little
        for start in (train, functools.partial(train, dtype="float32"), load):
            with pytest.raises(UserError, match=f"^{kind}.* does not compute what the CPU computes: loss .*-check"):
                start()
        state = new_trainer(toy, device="auto").state
        assert state.processes.device.type == state.model.wte.weight.device.type == "cpu"
        assert TextModel.load(path, dtype="float32").device.type == "cpu"
        assert capsys.readouterr().err.count("; going on on the CPU\n") == 2
        assert TextModel.load(path, kind, device_check=False).device.type == kind


@pytest.mark.parametrize("case", ["correctness", "step", "generation", "loss"])
def test_the_gpu_benchmark(gpu, case):
    shape = training_benchmark.Config(**{**dataclasses.asdict(SHAPE), "device": "cuda", "batch_size": 4, "steps": 1})
    figures = gpu_benchmark.CASES[case][0](shape, choose_device("cuda"))
    assert all(math.isfinite(value) for value in figures.values() if not isinstance(value, str))


@pytest.mark.slow
def test_the_demo_runs_through(tmp_path, executed):
    (tmp_path / "my.txt").write_bytes((REPOSITORY / "data/samples/chat.jsonl").read_bytes())
    chats = (REPOSITORY / "data/samples/chat.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:4]
    (tmp_path / "chats.jsonl").write_text("".join(chats), encoding="utf-8")
    arguments = ["--input", "my.txt", "--chats", "chats.jsonl", "--vocab-size", "400"]
    arguments += ["--max-steps", "3", "--sft-steps", "3"]
    result = run_fresh(tmp_path, "demo.py", *arguments, **executed.variables)
    assert result.returncode == 0, result.stderr[-3000:]
    assert re.findall(r"^=== (\d|Done)", result.stdout, re.MULTILINE) == [*"123456", "Done"]
    assert "H100" in (tmp_path / "checkpoints/demo/sft.md").read_text()


def test_two_processes_train_as_one(here, executed):
    pretrain(max_steps=3)
    shape = "--n-layer 2 --n-head 2 --n-embd 32 --block-size 64 --batch-size 4 --learning-rate 3e-3 --warmup-steps 0"
    line = f"train.py --data data {shape} --max-steps 3 --log-every 1 --eval-tokens 64 --dtype float32 --out b.pt"
    job = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29512", **executed.variables}
    ranks = [
        subprocess.Popen(
            command(*line.split()), stderr=subprocess.PIPE,
            env={**ENVIRONMENT, **job, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    for rank in ranks:
        _, stderr = rank.communicate(timeout=120)
        assert rank.returncode == 0, stderr.decode()[-3000:]
    one, two = ([e["loss"] for e in log(Path(path)) if "loss" in e] for path in ("checkpoints/a.jsonl", "b.jsonl"))
    assert len(one) == 3 and two == pytest.approx(one, rel=1e-4)


def test_every_line_for_a_gpu_was_executed(executed, request):
    if request.session.testsfailed or len(request.session.items) < 50:
        pytest.skip("the other tests did not run or pass")
    assert executed.missing() == []
