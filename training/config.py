"""The options that the training scripts share."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from system.errors import require, require_at_least


@dataclass(frozen=True)
class TrainerConfig:
    """The options that every training script shares."""

    # hardware
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps"""
    device_check: bool = True
    """before the first step, compute a few tokens on the GPU and on the CPU, and compare"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """precision of the forward pass; auto takes bfloat16 if the GPU has it, or if the CPU is faster in it"""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto compiles on CUDA"""
    grad_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, about a third more time"""
    grad_accum_steps: int | Literal["auto"] = "auto"
    """micro-batches per step and process; auto takes the fewest that fit into the GPU's memory"""

    # logging
    eval_every: int = 1_000
    """steps between evaluations"""
    eval_tokens: int = 1_000_000
    """validation tokens per evaluation, at most"""
    log_every: int = 10
    """steps between lines of the log"""
    save_every: int = 1_000
    """steps between saves of the file for --resume"""
    snapshot_every: int = 0
    """steps between snapshots of the weights, all of which are kept; 0 for none"""
    keep: Literal["best", "last"] = "best"
    """the weights in --out: best has the lowest validation loss, last is the latest evaluation's"""
    tensorboard: bool = False
    """write the log for TensorBoard too"""
    wandb: bool = False
    """send the log to Weights & Biases too"""

    # optimization
    max_steps: int = 80_000
    """optimizer steps"""
    batch_size: int = 64
    """sequences per optimizer step, over all processes"""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon trains the matrices inside the blocks with Muon, everything else with AdamW"""
    learning_rate: float = 6e-4
    """peak learning rate"""
    min_lr: float | None = None
    """learning rate at the last step; by default a tenth of --learning-rate"""
    warmup_steps: int = 2_000
    """steps over which the learning rate rises from 0, at most a fifth of all"""
    cooldown: float = 0.0
    """share of the steps, at the end, over which the learning rate falls linearly; 0 for a cosine over all steps"""
    embedding_lr_scale: float = 1.0
    """the embeddings' learning rate, as a multiple of the others'"""
    weight_decay: float = 0.1
    """decoupled weight decay, on matrices only"""
    beta2: float = 0.95
    """AdamW's decay rate of the mean squared gradient"""
    grad_clip: float = 1.0
    """largest gradient norm; 0 turns clipping off"""
    patience: int = 0
    """stop after this many evaluations without improvement, with at least one evaluation per epoch; 0 never stops"""
    target_loss: float | None = None
    """stop when the training loss, averaged between two lines of the log, reaches this value"""
    seed: int = 1337
    """seed of the weights, the data order and dropout"""

    # output
    out: Path = Path("checkpoints/pretrained.pt")
    """checkpoint to write; the log, the plot, the report and the file for --resume are named after it"""
    resume: bool = False
    """continue an interrupted run; start it if it has not saved yet"""
    overwrite: bool = False
    """replace an existing checkpoint"""
    plan: bool = False
    """measure a few steps, print the time, memory and disk space that the run takes, and write nothing"""

    plots: ClassVar[tuple[str, ...]] = ("loss",)
    memory_savers: ClassVar[str] = "larger --grad-accum-steps, a smaller --batch-size or a "

    def __post_init__(self) -> None:
        require(self.out.suffix == ".pt", f"--out {self.out} must end in .pt")
        require(not self.out.name.endswith(".last.pt"), f"--out {self.out}: files for --resume end in .last.pt")
        require_at_least(1, self, "max_steps", "batch_size", "eval_every", "save_every", "log_every", "eval_tokens")
        require_at_least(0, self, "learning_rate", "min_lr", "warmup_steps", "weight_decay", "grad_clip")
        require_at_least(0, self, "embedding_lr_scale", "snapshot_every", "patience", "seed")
        require(0 <= self.cooldown <= 1, "--cooldown must be a share of the steps, from 0 to 1")
        require(0 <= self.beta2 < 1, "--beta2 must be at least 0 and below 1")
        require(self.grad_accum_steps == "auto" or self.grad_accum_steps >= 1, "--grad-accum-steps must be at least 1")
        require(not (self.resume and self.overwrite), "--resume and --overwrite exclude each other")
        require(not (self.resume and self.plan), "--plan is for new runs: it excludes --resume")

    @property
    def last_path(self) -> Path:
        """The file that `--resume` continues from: `checkpoints/pretrained.last.pt`."""
        return self.out.with_suffix(".last.pt")

    @property
    def log_path(self) -> Path:
        """The log, one JSON object per line: `checkpoints/pretrained.jsonl`."""
        return self.out.with_suffix(".jsonl")

    @property
    def report_path(self) -> Path:
        """The report for people, in Markdown: `checkpoints/pretrained.md`."""
        return self.out.with_suffix(".md")

    def plot_path(self, what: str = "loss") -> Path:
        """A plot: `plots/demo/sft_loss.png` for `checkpoints/demo/sft.pt`, otherwise beside the checkpoint.

        The folders below `plots` are those below `checkpoints`, so that no two checkpoints share a plot.
        """
        beside = self.out.with_name(f"{self.out.stem}_{what}.png")
        first, *others = beside.parts
        return Path("plots", *others) if first == "checkpoints" and others else beside
