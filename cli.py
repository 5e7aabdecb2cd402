"""Command lines from dataclasses: flags, presets, one-line errors. Imports no torch, so that `--help` is instant."""

import contextlib
import dataclasses
import errno
import io
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from tyro.conf import UseAppendAction

Config = TypeVar("Config")


class UserError(Exception):
    """A mistake that its user can mend: the message is one line that says what is wrong and what to do.

    `status` is the exit status: 1, or 2 where the command line itself is wrong.
    """

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status


def require(condition: bool, message: str) -> None:
    """Raises UserError with exit status 2 (bad usage) unless the condition holds."""
    if not condition:
        raise UserError(message, status=2)


def require_at_least(least: int, config: object, *names: str) -> None:
    """Raises UserError with exit status 2 unless these options of a config, where they are given, are large enough."""
    for name in names:
        value = getattr(config, name)
        require(value is None or value >= least, f"--{name.replace('_', '-')} must be at least {least}")


@dataclass(frozen=True)
class TrainerConfig:
    """The options that every training script shares; `trainer.py` is their one reader."""

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


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are chosen; `sampling.py` is the one reader."""

    max_new_tokens: int = 200
    """longest answer or completion, in tokens"""
    temperature: float = 0.8
    """below 1 likely tokens become likelier, above 1 the text becomes wilder; 0 is greedy"""
    top_k: int | None = 50
    """draw from this many likeliest tokens only"""
    top_p: float | None = None
    """draw from the fewest tokens that together have this probability"""
    min_p: float | None = None
    """draw from the tokens with at least this share of the likeliest one's probability"""
    repetition_penalty: float = 1.0
    """above 1 makes tokens that occurred less likely"""
    greedy: bool = False
    """always the likeliest token, the same as --temperature 0"""
    stop: UseAppendAction[tuple[str, ...]] = ()
    """end a text where this one comes, without it; may be given several times"""
    seed: int | None = None
    """makes the draws repeatable on one device"""

    def __post_init__(self):
        require_at_least(1, self, "max_new_tokens", "top_k")
        require(self.temperature == 0 or self.temperature >= 1e-3, "--temperature must be 0, or at least 0.001")
        require(self.top_p is None or 0 < self.top_p <= 1, "--top-p must be above 0 and at most 1")
        require(self.min_p is None or 0 <= self.min_p <= 1, "--min-p must lie between 0 and 1")
        require(0.01 <= self.repetition_penalty <= 100, "--repetition-penalty must lie between 0.01 and 100")
        require(self.seed is None or 0 <= self.seed < 2**63, "--seed must be at least 0 and below 2^63")


def run(
    main: Callable[[Config], None], config_class: type[Config], presets: Mapping[str, Config] | None = None
) -> None:
    """Runs a script: parses `sys.argv` into its config, prints the config, calls `main(config)` and exits.

    What its user can mend ends in one line on standard error and exit status 1 (2 for bad usage); Ctrl-C in 130.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # what a terminal cannot show, such as bytes that are no text
    config = None
    try:
        config = parse(config_class, sys.argv[1:], presets)
        print(f"{os.path.basename(sys.argv[0])}: {describe(config)}", file=sys.stderr)
        main(config)
        sys.stdout.flush()
    except UserError as error:
        _exit(str(error), error.status)
    except KeyboardInterrupt:
        _exit("interrupted", 130)
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.filename is None and error.errno != errno.ENOSPC:
            raise
        _exit(f"{error.filename or 'writing'}: {error.strerror or error}", 1)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        flags = "larger --grad-accum-steps, a smaller --batch-size or a " * isinstance(config, TrainerConfig)
        _exit(f"out of memory: try a {flags}smaller model", 1)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that the memory of the machine, or of its GPU, is full."""
    signs = ("out of memory", "allocate memory", "not enough memory", "bad_alloc", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)


def parse(config_class: type[Config], arguments: list[str], presets: Mapping[str, Config] | None = None) -> Config:
    """Parses flags into a config dataclass; `--preset NAME` chooses the defaults, flags beside it win.

    Raises UserError (status 2) for bad usage; exits 0 after `--help`.
    """
    import tyro

    default = dataclasses.MISSING
    if presets:
        default = presets[_preset_name(arguments, presets)]
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                config_class,
                args=arguments,
                description=sys.modules[config_class.__module__].__doc__,
                **({} if default is dataclasses.MISSING else {"default": default}),
            )
    except SystemExit as exit_:
        if not exit_.code:
            raise
        raise UserError(f"{_one_line(complaint.getvalue())} (see --help)", status=2) from None


@contextlib.contextmanager
def catch_stop_signals() -> Iterator[list]:
    """Yields a list that gets the number of a SIGINT or SIGTERM; a second one acts at once, as usual."""
    received, before = [], {}

    def handle(number, frame):
        received.append(number)
        signal.signal(number, before[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, handle)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def describe(config: object) -> str:
    """Returns a config dataclass as one line of `name=value`."""
    return " ".join(f"{name}={value}" for name, value in plain(config).items())


def plain(config: object) -> dict:
    """Returns a config dataclass as a dict of numbers, strings and lists, fit for JSON and for a checkpoint."""
    return {
        name: list(value)
        if isinstance(value, tuple)
        else value
        if isinstance(value, int | float | None)
        else str(value)
        for name, value in dataclasses.asdict(config).items()
    }


def command_line(add: str, drop: tuple[str, ...] = ()) -> str:
    """Returns this run's own command with flags added and dropped, to be shown to the user and typed again."""
    arguments = [argument for argument in sys.argv if argument not in drop and argument != add]
    return shlex.join(["python", *arguments, add])


def _preset_name(arguments, presets):
    name = next(iter(presets))
    for i, argument in enumerate(arguments):
        if argument == "--preset" and i + 1 < len(arguments):
            name = arguments[i + 1]
        elif argument.startswith("--preset="):
            name = argument.partition("=")[2]
    require(name in presets, f"no preset {name!r}: choose from {', '.join(presets)}")
    return name


def _one_line(box: str) -> str:
    """Returns the complaint inside the parser's first box of text, without the frame and the suggestions below."""
    lines = [line.strip("│ ") for line in box.splitlines()[1:]]
    end = next((i for i, line in enumerate(lines) if set(line) & set("─╰")), len(lines))
    return " ".join(" ".join(lines[:end]).split())


def _exit(message, status):
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)
