"""The options that every training script shares."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from system.errors import require, require_at_least


@dataclass(frozen=True)
class TrainerConfig:
    """The options that every training script shares; `trainer.py` is their one reader."""

    memory_savers: ClassVar[str] = "larger --grad-accum-steps, a smaller --batch-size or a "

    data: Path = Path("data")
    """folder of prepared data"""
    out: Path = Path("checkpoints/pretrained.pt")
    """checkpoint to write; its log and the file that --resume continues from stand beside it"""
    plot: Path = Path("plots/pretrain_loss.png")
    """loss curves, redrawn as training goes on"""
    resume: bool = False
    """continue an interrupted run"""
    overwrite: bool = False
    """replace an existing checkpoint"""
    max_steps: int = 80_000
    """optimizer steps"""
    batch_size: int = 64
    """sequences per optimizer step, over all processes"""
    grad_accum_steps: int | Literal["auto"] = "auto"
    """micro-batches per step and process; auto takes the fewest that fit the GPU's memory"""
    grad_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, about a third more time"""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon trains the hidden matrices with Muon, the rest with AdamW"""
    learning_rate: float = 6e-4
    """highest learning rate"""
    min_lr: float = 6e-5
    """learning rate at the last step, reached along a cosine"""
    warmup_steps: int = 2_000
    """steps over which the learning rate rises from 0"""
    weight_decay: float = 0.1
    """decoupled weight decay, on matrices only"""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient"""
    beta2: float = 0.95
    """AdamW's decay of the mean squared gradient"""
    grad_clip: float = 1.0
    """largest gradient norm; 0 turns clipping off"""
    eval_every: int = 1_000
    """steps between evaluations"""
    eval_tokens: int = 1_000_000
    """validation tokens an evaluation looks at, at most"""
    save_every: int = 1_000
    """steps between saves of what --resume needs"""
    snapshot_every: int = 0
    """steps between snapshots that are kept; 0 for none"""
    log_every: int = 10
    """steps between lines of the log"""
    keep: Literal["best", "last"] = "best"
    """which weights --out holds: the best by validation loss, or the latest"""
    patience: int = 0
    """stop after this many evaluations without improvement; 0 never"""
    target_loss: float = 0.0
    """stop at this loss"""
    target_loss_on: Literal["train", "val"] = "train"
    """which loss --target-loss means: the mean training loss between two lines of the log, or the validation loss"""
    sample_prompt: str = ""
    """print what the model makes of this text at each evaluation"""
    tensorboard: bool = False
    """write the log for TensorBoard too"""
    wandb: bool = False
    """send the log to Weights & Biases too"""
    seed: int = 1337
    """of the weights, the data order and dropout"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """precision of the forward pass; auto takes bfloat16 where the GPU has it, float32 on the CPU"""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto is on for CUDA"""

    def __post_init__(self):
        require_at_least(1, self, "max_steps", "batch_size", "eval_every", "save_every", "log_every", "eval_tokens")
        require_at_least(0, self, "learning_rate", "min_lr", "warmup_steps", "weight_decay", "grad_clip")
        require_at_least(0, self, "snapshot_every", "patience", "target_loss", "seed")
        require(self.seed < 2**63, "--seed must be below 2^63")
        require(0 <= self.beta1 < 1 and 0 <= self.beta2 < 1, "--beta1 and --beta2 must be at least 0 and below 1")
        require(self.grad_accum_steps == "auto" or self.grad_accum_steps >= 1, "--grad-accum-steps must be at least 1")
        require(not (self.resume and self.overwrite), "--resume and --overwrite exclude each other")
