"""The training loop and its optimizers: equal to their references, however a batch is split; when a run stops."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import fine_tune, log, pretrain

from model import GPT, GPTConfig
from system.device import choose_device
from system.errors import UserError
from text.labelled import Example
from text.tokenizer import load_tokenizer
from training.classifier import LabelledTexts
from training.config import TrainerConfig
from training.loader import Windows
from training.optim import Muon, build_optimizers, learning_rate_at, set_learning_rate
from training.parallel import Processes
from training.state import StopReason, TrainingState
from training.trainer import Trainer

SHAPE = GPTConfig(block_size=32, vocab_size=448, n_tokens=448, n_layer=2, n_head=2, n_embd=32)


def new_trainer(folder: Path, shape: GPTConfig = SHAPE, **options: object) -> Trainer:
    """Returns a trainer of a random model on the toy's text."""
    torch.manual_seed(0)
    config = TrainerConfig(**{"device": "cpu", "batch_size": 4, "warmup_steps": 0, "eval_tokens": 200, **options})
    data = Windows([folder / "data/toy/train.bin"], shape.block_size, config.batch_size, config.seed)
    return Trainer(TrainingState.create(GPT(shape), config, Processes(choose_device(config.device))), data, data)


def losses(out: str) -> list[float]:
    return [entry["loss"] for entry in log(Path(out).with_suffix(".jsonl")) if "loss" in entry]


@pytest.mark.parametrize("train", [pretrain, fine_tune])
def test_splitting_a_batch_and_recomputing_activations_change_no_loss(here, train):
    found = []
    for options in ({}, {"grad_accum_steps": 3}, {"grad_accum_steps": 99}, {"grad_checkpointing": True}):
        train(out=Path("a.pt"), batch_size=6, eval_every=100, overwrite=True, sample_prompt="x", **options)
        found.append(losses("a.pt"))
    assert len(found[0]) == 6 and found[0][-1] < found[0][0]
    assert all(other == pytest.approx(found[0], rel=1e-5) for other in found[1:])


def after_equal_gradients(*optimizers: Callable[[list], torch.optim.Optimizer]) -> list[list[torch.nn.Parameter]]:
    """The parameters after five steps of each optimizer from the same start, with the same random gradients."""
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in [(64, 32), (64, 32), (32, 64), (48, 48)]]
    gradients = [[torch.randn_like(tensor) for tensor in start] for _ in range(5)]
    results = []
    for build in optimizers:
        parameters = [torch.nn.Parameter(tensor.clone()) for tensor in start]
        optimizer = build(parameters)
        for step in gradients:
            for p, gradient in zip(parameters, step, strict=True):
                p.grad = gradient.clone()
            optimizer.step()
        results.append(parameters)
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_muon_equals_torchs(dtype):
    torchs = lambda ps: torch.optim.Muon(ps, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")  # noqa: E731
    ours, theirs = after_equal_gradients(lambda ps: Muon(ps, lr=0.02, dtype=dtype), torchs)
    for p, q in zip(ours, theirs, strict=True):  # torch computes in bfloat16
        assert (p - q).norm() < 1e-3 * q.norm()


def test_a_step_of_adamw_follows_the_paper(toy):
    """Loshchilov & Hutter 2019: decay apart from the gradient, and of matrices only."""
    trainer = new_trainer(toy, learning_rate=1e-2, weight_decay=0.1, grad_clip=0)
    model, batch = trainer.state.model, trainer.load_batch(0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.forward_backward(batch.micro_batches, batch.total_weight)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    trainer.update_weights(1e-2)
    for name, p in model.named_parameters():
        decayed = before[name] * (1 - 1e-2 * (0.1 if p.dim() == 2 else 0.0))
        expected = decayed - 1e-2 * gradients[name] / (gradients[name].abs() + 1e-8)  # both means are corrected
        torch.testing.assert_close(p.detach(), expected, rtol=1e-4, atol=1e-6)


def test_a_gradient_is_clipped_to_the_largest_norm(toy):
    trainer = new_trainer(toy, grad_clip=0.25)
    trainer.state.optimizers = [torch.optim.SGD(trainer.state.model.parameters(), lr=1.0)]
    before = [p.detach().clone() for p in trainer.state.model.parameters()]
    batch = trainer.load_batch(0)
    trainer.forward_backward(batch.micro_batches, batch.total_weight)
    assert trainer.update_weights(1.0) > 1  # the norm before clipping
    steps = torch.cat([(p - q).flatten() for p, q in zip(trainer.state.model.parameters(), before, strict=True)])
    assert steps.norm().item() == pytest.approx(0.25, rel=1e-3)


def test_muon_takes_the_matrices_inside_and_embeddings_learn_at_their_own_rate():
    model = GPT(dataclasses.replace(SHAPE, tie_weights=False))
    optimizers = build_optimizers(model, TrainerConfig(optimizer="muon", embedding_lr_scale=10.0))
    set_learning_rate(optimizers, 2e-3)
    rates = {p: group["lr"] for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(list(model.parameters()))  # each in one group
    for name, p in model.named_parameters():
        assert rates[p] == pytest.approx(2e-2 if name in ("wte.weight", "wpe.weight") else 2e-3)
    in_muon = {p for group in optimizers[0].param_groups for p in group["params"]}
    assert in_muon == {p for p in model.h.parameters() if p.dim() == 2}


def test_learning_rate_warms_up_then_falls_along_a_cosine_or_a_line():
    config = TrainerConfig(max_steps=110, warmup_steps=10, learning_rate=1.0, min_lr=0.1)
    rates = [learning_rate_at(step, config) for step in range(111)]
    assert [rates[i] for i in (0, 10, 60, 110)] == pytest.approx([1 / 11, 1.0, 0.55, 0.1])
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)
    cooled = [learning_rate_at(step, dataclasses.replace(config, cooldown=0.5)) for step in range(111)]
    assert cooled[:11] == rates[:11] and set(cooled[10:56]) == {1.0} and cooled[110] == pytest.approx(0.1)
    falls = [a - b for a, b in zip(cooled[55:], cooled[56:], strict=False)]
    assert falls == pytest.approx([0.9 / 55] * 55)


@pytest.mark.parametrize("n_steps", [1, 4, 20])
def test_a_short_run_neither_ends_in_its_warm_up_nor_above_its_learning_rate(n_steps):
    config = TrainerConfig(max_steps=n_steps, learning_rate=3e-5)  # 2,000 warm-up steps
    rates = [learning_rate_at(step, config) for step in range(n_steps + 1)]
    assert max(rates) == rates[n_steps // 5] == pytest.approx(3e-5) and rates[-1] == pytest.approx(3e-6)


@pytest.mark.parametrize("grad_clip", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("name", ["wte.weight", "h.0.mlp.c_fc.weight"])  # AdamW's and Muon's
def test_no_optimizer_steps_if_a_gradient_overflowed(toy, name, value, grad_clip):
    trainer = new_trainer(toy, optimizer="muon", dtype="float16", grad_clip=grad_clip)
    model, batch = trainer.state.model, trainer.load_batch(0)
    for is_broken in (False, True):
        before = [p.detach().clone() for p in model.parameters()]
        trainer.forward_backward(batch.micro_batches, batch.total_weight)
        if is_broken:
            model.get_parameter(name).grad[0, 0] = value
        trainer.update_weights(1e-2)
        assert all(torch.equal(p, q) == is_broken for p, q in zip(model.parameters(), before, strict=True))


STOPS = [  # options, the step at which the run stops, why
    ({"max_steps": 7}, 7, StopReason.DONE),
    ({"max_steps": 100, "log_every": 2, "target_loss": 1e6}, 3, StopReason.TARGET_LOSS),
    ({"max_steps": 100, "log_every": 4, "target_loss": 1e6}, 5, StopReason.TARGET_LOSS),
    ({"max_steps": 3, "log_every": 1, "target_loss": 0.0}, 3, StopReason.DONE),
    ({"max_steps": 100, "eval_every": 3, "patience": 2, "learning_rate": 0.0, "min_lr": 0.0}, 9, StopReason.PATIENCE),
    ({"max_steps": 12, "eval_every": 3, "patience": 2, "learning_rate": 1e-2}, 12, StopReason.DONE),
]


@pytest.mark.parametrize(("options", "step", "reason"), STOPS)
def test_when_a_run_stops(toy, options, step, reason):
    trainer = new_trainer(toy, **options)
    assert trainer.run() is reason and trainer.state.step == step
    assert trainer.state.tokens == step * 4 * 32 and trainer.state.history[-1]["step"] == step


@pytest.mark.parametrize(("target", "step"), [(None, 6), (0.0, 2)])
def test_a_loss_of_zero_stops_only_a_run_that_asked_for_it(toy, target, step):
    """With one label, the cross-entropy is exactly 0."""
    tokenizer = load_tokenizer(toy / "data/toy/tokenizer.json")
    data = LabelledTexts([Example(f"text {i}", "a") for i in range(8)], ["a"], tokenizer, 32, batch_size=4)
    shape = dataclasses.replace(SHAPE, n_classes=1, tie_weights=False)
    config = TrainerConfig(device="cpu", batch_size=4, max_steps=6, log_every=1, target_loss=target)
    trainer = Trainer(TrainingState.create(GPT(shape), config, Processes()), data, data)
    trainer.run()
    assert trainer.state.step == step and trainer.state.history[-1]["val_loss"] == 0


def test_patience_counts_one_evaluation_an_epoch_at_least(here):
    """The toy's text has fewer than 1,000 batches."""
    stop = {"patience": 1, "eval_every": 1_000, "max_steps": 4_000, "learning_rate": 0.0, "min_lr": 0.0}
    pretrain(**stop, batch_size=64, block_size=32, log_every=1_000)
    steps = [entry["step"] for entry in log(Path("checkpoints/a.jsonl")) if "val_loss" in entry]
    assert len(steps) == 3 and steps[2] == 2 * steps[1] < 1_000


def test_a_short_text_gets_fewer_steps_but_at_least_a_hundred(here, capsys):
    stop_soon = {"target_loss": 1e6, "eval_tokens": 64}
    for max_epochs, max_steps, expected in ((0.01, 1_500, 100), (0.0, 1_500, 1_500), (0.01, 3, 3)):
        pretrain(max_epochs=max_epochs, max_steps=max_steps, overwrite=True, **stop_soon)
        out = capsys.readouterr().out
        assert f"; {expected:,} steps are" in out
        assert ("100 steps instead of 1,500, for so short a text (--max-epochs)" in out) == (expected == 100)


@pytest.mark.parametrize(("learning_rate", "weight_decay"), [(1e38, 0.1), (1.0, 1e9), (math.inf, 0.1)])
@pytest.mark.parametrize("eval_every", [1, 1000])
def test_a_run_that_diverges_stops_and_saves_no_broken_weights(here, learning_rate, weight_decay, eval_every):
    pretrain(max_steps=2, eval_every=eval_every, save_every=1, keep="last")
    before = {path: path.read_bytes() for path in Path("checkpoints").glob("a*.pt")}
    assert len(before) == 2
    broken = {"learning_rate": learning_rate, "min_lr": 0.0, "grad_clip": 0.0, "weight_decay": weight_decay}
    with pytest.raises(UserError, match="loss .* try a lower --learning-rate, or --dtype float32") as error:
        pretrain(**broken, max_steps=40, eval_every=eval_every, save_every=1, resume=True, keep="last")
    assert "checkpoints/a.last.pt" in str(error.value)
    assert {path: path.read_bytes() for path in Path("checkpoints").glob("a*.pt")} == before
