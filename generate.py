"""Step 3: write with a model. Completes a prompt, or chats with --chat, streaming to the terminal."""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from generation.config import SamplingConfig
from system.cli import GENERATION, run
from system.errors import UserError, require, require_at_least
from system.files import read_utf8


@dataclass(frozen=True)
class Config(SamplingConfig):
    model: Path | None = None
    """checkpoint to load, or gpt2 or another model of the Hugging Face Hub; by default the newest in checkpoints/"""
    prompt: str | None = None
    """text to complete; by default standard input, or the lines that you type on a terminal"""
    chat: bool = False
    """chat with a model that train_sft.py fine-tuned"""
    instruction: str | None = None
    """an instruction for a fine-tuned model to answer"""
    context: str = ""
    """text that the instruction refers to"""
    list: bool = False
    """list the models in checkpoints/, and write nothing"""
    num_samples: int = 1
    """number of completions, generated as one batch, or in batches that fit into the memory"""
    logprobs: int | None = None
    """print each token with its probability and this many of the likeliest candidates"""
    lens: bool = False
    """print what the model would say after each layer, at each token of the prompt, instead of completing it"""
    json: bool = False
    """print one JSON object per completion: text, tokens, finish reason, and log-probabilities with --logprobs"""
    compile: Literal["on", "off"] = "off"
    """compile the decoding of one token, on CUDA as a graph; the first tokens wait for the compiler"""
    quantize: Literal["none", "int8"] = "none"
    """int8 stores the weights in 8 bits: on the CPU about twice as fast, and a little less exact"""
    device: str = "auto"
    """auto, cpu, cuda, mps"""
    device_check: bool = True
    """before the first token, compute a few on the GPU and on the CPU, and compare"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """precision; auto is bfloat16 on a GPU that supports it, float32 on the CPU"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(not self.context or self.instruction is not None, "--context belongs to --instruction")
        require_at_least(1, self, "num_samples", "logprobs")
        modes = (self.chat, self.prompt is not None, self.instruction is not None)
        require(sum(modes) <= 1, "--prompt, --chat and --instruction exclude each other")
        require(
            not self.chat or (not self.json and self.logprobs is None and self.num_samples == 1),
            "--chat excludes --json, --logprobs and --num-samples",
        )
        require(
            not self.lens or (not self.chat and self.instruction is None),
            "--lens looks into a text: name it with --prompt, without --chat and --instruction",
        )


def main(config: Config) -> None:
    """Loads the model and writes."""
    from generation.text_model import TextModel
    from interface import terminal
    from weights import describe

    if config.list:
        print(describe.table())
        return
    is_chat = config.chat or config.instruction is not None
    name = config.model or describe.newest("chat model" if is_chat else "language model")
    options = {"quantize": config.quantize, "compile": config.compile == "on", "device_check": config.device_check}
    text_model = TextModel.load(name, config.device, config.dtype, **options)
    write = partial(terminal.write, num_samples=config.num_samples, top_logprobs=config.logprobs, as_json=config.json)
    complete = terminal.print_lens if config.lens else write
    if is_chat and not text_model.template:
        command = describe.fine_tuning_command(name, text_model.model.n_parameters())
        raise UserError(
            f"{name} only completes text: give it a --prompt, or fine-tune it: {command} --data CHATS.jsonl"
        )
    if config.chat:
        terminal.chat(text_model, config)
    elif config.instruction is not None:
        instruction = {"role": "user", "content": config.instruction, "input": config.context}
        write(text_model, "", config, instruction=instruction)
    elif config.prompt is not None:
        complete(text_model, config.prompt, config)
    elif sys.stdin.isatty():
        terminal.complete_lines(text_model, config, complete)
    else:
        complete(text_model, read_utf8().removesuffix("\n").removesuffix("\r"), config)


if __name__ == "__main__":
    run(main, Config, spin=GENERATION)
