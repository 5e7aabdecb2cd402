"""The cases of `benchmarks.gpu`. Each function measures one and returns its figures.

python -m benchmarks.gpu_cases CASE DEVICE FOLDER
"""

from __future__ import annotations

import itertools
import json
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

import train as train_script
from generation.decoding import CompiledDecoder, generate, one_step_ahead
from model import GPT, GPTConfig, linear_cross_entropy
from system.device import autocast, choose_device, peak_memory
from system.files import write_json
from text.tokenizer import Tokenizer, from_spec, to_json
from training.config import TrainerConfig
from training.distributed import Processes
from training.loader import Conversations, Windows
from training.run_log import read_log
from training.state import TrainingState
from training.trainer import Trainer

REPOSITORY = Path(__file__).resolve().parent.parent
Figures = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """How large the cases are; the defaults are GPT-2 small as `train.py` trains it."""

    device: torch.device
    folder: Path
    shape: GPTConfig = GPTConfig()
    batch_size: int = 64
    steps: int = 20
    new_tokens: int = 200
    train_steps: int = 150

    @classmethod
    def of(cls, device: torch.device, folder: Path) -> Scale:
        """The full size on CUDA, a tiny one elsewhere."""
        if device.type == "cuda":
            return cls(device, folder)
        shape = GPTConfig(block_size=32, vocab_size=512, n_tokens=500, n_layer=2, n_head=2, n_embd=32)
        return cls(device, folder, shape, batch_size=4, steps=2, new_tokens=4, train_steps=40)

    def synchronize(self) -> None:
        """Waits until the device has finished."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], times: int, warmup: int = 3) -> float:
        """Returns the seconds that one call takes: the median of three rounds with one synchronization each."""
        for _ in range(warmup):
            work()
        rounds = []
        for _ in range(3):
            self.synchronize()
            start = time.perf_counter()
            for _ in range(times):
                work()
            self.synchronize()
            rounds.append((time.perf_counter() - start) / times)
        return statistics.median(rounds)


def machine(scale: Scale) -> Figures:
    """Versions, and the ceilings: a large matrix product in bfloat16, a large copy."""
    figures: Figures = {"device": scale.device.type, "torch": torch.__version__, "cuda": torch.version.cuda}
    n = 256
    if scale.device.type == "cuda":
        n = 8192
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        figures["device"] = torch.cuda.get_device_name()
        figures["driver"] = subprocess.run(query, capture_output=True, encoding="utf-8").stdout.strip()
    a, b = torch.randn(2, n, n, device=scale.device).bfloat16()
    copy = torch.empty_like(a.repeat(8, 1)), a.repeat(8, 1)
    figures["matmul_tflops"] = 2e-12 * n**3 / scale.seconds(lambda: a @ b, 10)
    figures["copy_tb_per_s"] = 2e-12 * copy[0].nbytes / scale.seconds(lambda: copy[0].copy_(copy[1]), 10)
    return figures


def correctness(scale: Scale) -> Figures:
    """The compiled bfloat16 step against an eager float32 one, and each special kernel against its definition."""
    torch.manual_seed(0)
    model = GPT(scale.shape).to(scale.device).train()
    tokens, targets = torch.randint(scale.shape.n_tokens, (2, 4, scale.shape.block_size), device=scale.device)
    losses, gradients = [], []
    for dtype in (torch.float32, torch.bfloat16):
        if dtype == torch.bfloat16 and scale.device.type == "cuda":
            model.compile_training()
        with autocast(scale.device, dtype):
            loss = model(tokens, targets) / tokens.numel()
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad.clone().flatten() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    cosines = [F.cosine_similarity(a, b, dim=0).item() for a, b in zip(*gradients, strict=True)]
    return {
        "loss_error": abs(losses[1] / losses[0] - 1),
        "gradient_cosine": min(cosines),
        **attention_error(scale),
        **fused_loss_error(scale),
        "float16_loss_ratio": float16_loss_ratio(scale),
    }


def attention_error(scale: Scale) -> Figures:
    """Flash attention against cuDNN's: the largest difference of outputs and gradients, in bfloat16."""
    if scale.device.type != "cuda":
        return {}
    results = []
    qkv = torch.randn(3, 4, 12, 1024, 64, device=scale.device, dtype=torch.bfloat16)
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        q, k, v = (x.clone().requires_grad_() for x in qkv)
        with sdpa_kernel(backend):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y.sum().backward()
        results.append([y, q.grad, k.grad, v.grad])
    return {"attention_error": max(float((a - b).abs().max()) for a, b in zip(*results, strict=True))}


def fused_loss_error(scale: Scale) -> Figures:
    """The fused loss in bfloat16 against PyTorch's cross-entropy in float64: relative errors of loss and gradients."""
    n, width, vocab_size = 5000, 64, 1000  # the last chunk is not whole
    x = torch.randn(n, width, device=scale.device).bfloat16()
    head, y = torch.randn(vocab_size, width, device=scale.device) / 8, torch.randint(vocab_size, (n,)).to(scale.device)
    head = head.bfloat16().float()
    results = []
    for dtype in (torch.float64, torch.bfloat16):
        a, b = x.to(dtype).requires_grad_(), head.to(torch.float32 if dtype == torch.bfloat16 else dtype)
        b.requires_grad_()
        if dtype == torch.bfloat16:
            loss = linear_cross_entropy(a, b, y)
        else:
            loss = F.cross_entropy(a @ b.t(), y, reduction="sum")
        results.append([loss, *torch.autograd.grad(loss, (a, b))])
    (loss, *gradients), (ours, *our_gradients) = results
    errors = [(b.double() - a).norm() / a.norm() for a, b in zip(gradients, our_gradients, strict=True)]
    return {
        "fused_loss_error": abs(float(ours) / float(loss) - 1),
        "fused_gradient_error": max(error.item() for error in errors),
    }


def float16_loss_ratio(scale: Scale) -> float:
    """Trains a few steps on one batch in float16 with gradient scaling; returns the last loss over the first."""
    trainer = build_trainer(scale, dtype="float16" if scale.device.type == "cuda" else "bfloat16", compile="off")
    batch = trainer.load_batch(0)
    losses = []
    for _ in range(8):
        losses.append(trainer.forward_backward(batch.micro_batches, batch.total_weight).item())
        trainer.update_weights(1e-3)
    return losses[-1] / losses[0]


def build_trainer(scale: Scale, **options: Any) -> Trainer:
    """Returns a trainer of the project on random tokens, with the options of `train.py`."""
    config = TrainerConfig(out=scale.folder / "a.pt", batch_size=scale.batch_size, device=scale.device.type, **options)
    data = Windows(
        [write_tokens(scale.folder / "train.bin", scale.shape.n_tokens)], scale.shape.block_size, scale.batch_size, 0
    )
    torch.manual_seed(0)
    return Trainer(TrainingState.create(GPT(scale.shape), config, Processes(scale.device)), data, data)


def write_tokens(path: Path, n_tokens: int, n: int = 2_000_000) -> Path:
    """Writes `n` random ids below `n_tokens`, frequent and rare ones as in text (Zipf's law)."""
    np.minimum(np.random.default_rng(0).zipf(1.3, n) - 1, n_tokens - 1).astype("<u2").tofile(path)
    return path


def measure_steps(scale: Scale, trainer: Trainer) -> Figures:
    """Times the trainer's steps, and reports the largest memory."""
    batches = [trainer.load_batch(i) for i in range(4)]
    counter = iter(range(10**9))

    def take_step() -> None:
        batch = batches[next(counter) % len(batches)]
        trainer.forward_backward(batch.micro_batches, batch.total_weight)
        trainer.update_weights(6e-4)

    seconds = scale.seconds(take_step, scale.steps)
    figures = {
        "ms": 1e3 * seconds,
        "tokens_per_s": statistics.mean(batch.n_tokens for batch in batches) / seconds,
        "micro_batches": trainer.state.n_micro_batches,
        "peak_gb": peak_memory(scale.device) / 1e9,
    }
    return {**figures, **time_by_class(scale, take_step)}


KERNELS = {  # the first class with a part of the kernel's name has it
    "attention": ("flash", "fmha", "sdpa", "attention"),
    "matmul": ("gemm", "nvjet", "cutlass", "cublas", "xmma", "aten::mm", "aten::addmm", "aten::bmm"),
    "optimizer": ("multi_tensor", "adam", "foreach"),
    "copies": ("memcpy", "memset", "copy_", "fill_"),
    "fused": ("triton",),
}


def time_by_class(scale: Scale, work: Callable[[], object]) -> Figures:
    """Returns the milliseconds that one call spends in each class of kernels."""
    on_cuda = scale.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as profiler:
        for _ in range(3):
            work()
        scale.synchronize()
    milliseconds: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        microseconds = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        name = event.key.lower()
        kind = next((kind for kind, parts in KERNELS.items() if any(part in name for part in parts)), "other")
        milliseconds[f"ms_{kind}"] += microseconds / 3e3
    return dict(sorted(milliseconds.items(), key=lambda item: -item[1]))


def step(scale: Scale) -> Figures:
    """The training step of `train.py`."""
    return measure_steps(scale, build_trainer(scale))


def step_flash(scale: Scale) -> Figures:
    """The same with Flash attention instead of cuDNN's."""
    flash = lambda on: sdpa_kernel(SDPBackend.FLASH_ATTENTION)  # noqa: E731
    with patch("training.trainer.fast_attention", flash):
        return measure_steps(scale, build_trainer(scale))


def step_float32_stream(scale: Scale) -> Figures:
    """The same with a float32 residual stream, as autocast alone has it."""
    trainer = build_trainer(scale)
    trainer.state.model.h[0].register_forward_pre_hook(lambda block, inputs: (inputs[0].float(), *inputs[1:]))
    return measure_steps(scale, trainer)


def generation(scale: Scale) -> Figures:
    """Tokens per second in bfloat16 after a short prompt, for one sequence and for several."""
    torch.manual_seed(0)
    model = GPT(scale.shape).to(scale.device).bfloat16().eval()
    prompt = torch.randint(scale.shape.n_tokens, (1, 8), device=scale.device)

    def tokens_per_s(n: int, decoder: CompiledDecoder | None = None) -> float:
        def write() -> None:
            steps = generate(
                model, prompt, scale.new_tokens, num_samples=n, temperature=0.8, top_k=50, compiled=decoder
            )
            for ids, _ in one_step_ahead(steps):
                ids.tolist()

        return n * scale.new_tokens / scale.seconds(write, 1, warmup=1)

    figures = {"eager_tokens_per_s": tokens_per_s(1), "batch_8_tokens_per_s": tokens_per_s(8)}
    figures["batch_32_tokens_per_s"] = tokens_per_s(32)
    if scale.device.type == "cuda":  # compiling takes too long for a test on the CPU
        figures["compiled_tokens_per_s"] = tokens_per_s(1, CompiledDecoder(model))
    return figures


def loss(scale: Scale) -> Figures:
    """Milliseconds of head and loss, forward and backward, uncompiled, by the size of the chunks."""
    n, c = scale.batch_size * scale.shape.block_size, scale.shape
    hidden = torch.randn(n, c.n_embd, device=scale.device).bfloat16().requires_grad_()
    head = torch.randn(c.vocab_size, c.n_embd, device=scale.device).mul_(0.02).requires_grad_()
    targets = torch.randint(c.n_tokens, (n,), device=scale.device)

    def milliseconds(chunk_size: int) -> float:
        work = lambda: linear_cross_entropy(hidden, head, targets, chunk_size).backward()  # noqa: E731
        return 1e3 * scale.seconds(work, 2, warmup=1)

    return {f"ms_chunks_of_{n // parts}": milliseconds(n // parts) for parts in (32, 16, 8, 4)}


def train(scale: Scale) -> Figures:
    """`train.py` itself: half of the steps, a SIGINT, and the rest after `--resume`."""
    write_data(scale.folder)
    log_path = scale.folder / "a.jsonl"

    def start(worker: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "benchmarks.gpu_cases", worker, scale.device.type, str(scale.folder)]
        return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL)

    first = start("train_worker")
    while first.poll() is None and len(read_log(log_path)) < scale.train_steps // 2:
        time.sleep(0.02)
    first.send_signal(signal.SIGINT)
    status = first.wait()
    interrupted_at = max((entry["step"] for entry in read_log(log_path)), default=0)
    resumed_status = start("resume_worker").wait()
    steps = [entry for entry in read_log(log_path) if "loss" in entry]
    milliseconds = [1e3 * (b["seconds"] - a["seconds"]) for a, b in itertools.pairwise(steps)]
    settled = milliseconds[30:interrupted_at] or milliseconds  # after compiling, with a save and an evaluation
    return {
        "status": status,
        "resumed_status": resumed_status,
        "interrupted_at": interrupted_at,
        "steps_lost": scale.train_steps - len({entry["step"] for entry in steps}),
        "last_loss": steps[-1]["loss"],
        "ms": statistics.median(settled),
        "speed_with_saves": statistics.median(settled) / statistics.mean(settled),
    }


def run_train(scale: Scale, resume: bool) -> None:
    """Calls `main` of `train.py`, which parses no flags then."""
    names = ("block_size", "n_layer", "n_head", "n_embd")
    config = train_script.Config(
        **{name: getattr(scale.shape, name) for name in names},
        data=str(scale.folder),
        out=scale.folder / "a.pt",
        resume=resume,
        device=scale.device.type,
        max_steps=scale.train_steps,
        batch_size=scale.batch_size,
        warmup_steps=20,
        log_every=1,
        eval_every=60,
        save_every=60,
        eval_tokens=16 * scale.shape.block_size,
    )
    train_script.main(config)


def write_data(folder: Path) -> None:
    """Writes token files with a tokenizer of GPT-2's size, so that its vocabulary need not be installed."""
    for split in ("train", "val"):
        write_tokens(folder / f"{split}.bin", 50_257)
    pairs = [bytes(pair) for pair in itertools.product(range(256), repeat=2)]
    tokens = [*(bytes([byte]) for byte in range(256)), *pairs[:50_000]]
    spec = to_json(Tokenizer({token: i for i, token in enumerate(tokens)}, "pairs of bytes"), 50_259)
    (folder / "tokenizer.json").write_text(spec, encoding="utf-8")
    meta = {"files": ["train.bin", "val.bin", "tokenizer.json"], "tokenizer": from_spec(spec).name, "splits": {}}
    write_json(folder / "meta.json", meta)


def sft(scale: Scale) -> Figures:
    """Fine-tuning steps: conversations of many lengths, padded, with the loss on the second half of each."""
    c, random = scale.shape, np.random.default_rng(0)
    lengths = random.integers(c.block_size // 8, c.block_size, 400)
    for split in ("train", "val"):
        write_tokens(scale.folder / f"sft_{split}.bin", c.n_tokens, int(lengths.sum()))
        mask = np.concatenate([np.arange(length) > length // 2 for length in lengths])
        mask.astype(np.uint8).tofile(scale.folder / f"sft_{split}_mask.bin")
        np.append(0, lengths.cumsum()).astype("<u8").tofile(scale.folder / f"sft_{split}_index.bin")
    data = Conversations(scale.folder, "train", c.block_size, scale.batch_size // 2, 0)
    config = TrainerConfig(out=scale.folder / "a.pt", batch_size=scale.batch_size // 2, device=scale.device.type)
    trainer = Trainer(TrainingState.create(GPT(c), config, Processes(scale.device)), data, data)
    batches = [trainer.load_batch(i) for i in range(20)]

    def take_steps() -> None:
        for batch in batches:
            trainer.forward_backward(batch.micro_batches, batch.total_weight)
            trainer.update_weights(1e-5)

    for batch in batches[:3]:
        trainer.forward_backward(batch.micro_batches, batch.total_weight)
    torch._dynamo.config.error_on_recompile = True
    seconds = scale.seconds(take_steps, 1, warmup=1)
    return {
        "tokens_per_s": sum(batch.n_tokens for batch in batches) / seconds,
        "peak_gb": peak_memory(scale.device) / 1e9,
    }


CASES: dict[str, Callable[[Scale], Figures]] = {
    case.__name__: case
    for case in (machine, correctness, step, generation, loss, train, step_flash, step_float32_stream, sft)
}


def main() -> None:
    """Runs a case and prints its figures as the last line."""
    name, device, folder = sys.argv[1:]
    scale = Scale.of(choose_device(device), Path(folder))
    if name in ("train_worker", "resume_worker"):
        run_train(scale, resume=name == "resume_worker")
    else:
        print(json.dumps(CASES[name](scale)))


if __name__ == "__main__":
    main()
