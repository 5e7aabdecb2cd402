"""The mean loss of a model over held-out rows, and bits per byte."""

import itertools
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from model import GPT, ChunkLoss, chunk_loss
from system.device import autocast
from system.errors import UserError
from training.loader import Batch, micro_batches, require_known_ids
from training.parallel import Processes


@torch.no_grad()
def mean_loss(
    model: GPT,
    rows: Iterable[Batch],
    batch_size: int,
    dtype: torch.dtype = torch.float32,
    processes: Processes | None = None,
    compiled: tuple[Callable[..., Tensor], ChunkLoss] | None = None,
) -> float:
    """Returns the mean loss in nats per counted token over one-row batches, in evaluation mode.

    `processes`, on whose device the model is, share the rows. `compiled`, from `compile_evaluation`, computes the
    batches of full size. Raises UserError if no token counts.
    """
    processes = processes or Processes()
    device, was_training, compiled_training = processes.device, model.training, model.compiled
    model.eval()
    # The sum of the losses, and of their weights. MPS has no float64.
    total = torch.zeros(2, dtype=torch.float64, device="cpu" if device.type == "mps" else device)
    rows, share = iter(rows), math.ceil(batch_size / processes.world_size)
    while group := list(itertools.islice(rows, batch_size)):
        require_known_ids(group, model.config)
        [batch] = micro_batches(group, 1, processes.rank, processes.world_size, model.config.block_size)
        is_full = batch.tokens.shape == (share, model.config.block_size)
        model.compiled = compiled if is_full else None  # another shape would recompile
        weight = batch.total_weight
        batch = batch.to(device)
        with autocast(device, dtype):
            loss = model(batch.tokens, batch.targets, batch.class_weights)
        total += torch.stack([loss.to(total.device).double(), total.new_full((), weight)])
    processes.sum_in_place(total)
    model.train(was_training)
    model.compiled = compiled_training
    loss_sum, weight_sum = total.tolist()
    if not weight_sum:
        raise UserError("the validation data is empty: prepare it with a larger --val-fraction")
    return loss_sum / weight_sum


def compile_evaluation(model: GPT) -> tuple[Callable[..., Tensor], ChunkLoss]:
    """Compiles the network and the loss of a chunk for `mean_loss`.

    They are functions of their own: without gradients, those that `GPT.compile_training` compiled would recompile.
    """
    return torch.compile(lambda *inputs: model.hidden(*inputs)), torch.compile(lambda *inputs: chunk_loss(*inputs))


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """Turns a loss in nats per token into bits per UTF-8 byte of text, which compares models across tokenizers."""
    return loss / math.log(2) / bytes_per_token
