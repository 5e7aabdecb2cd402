"""Step 3: write with a model. Completes a prompt, or converses with --chat, streaming to the terminal."""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from generation.config import SamplingConfig
from system.cli import run
from system.errors import UserError, require, require_at_least


@dataclass(frozen=True)
class Config(SamplingConfig):
    model: Path = Path("checkpoints/pretrained.pt")
    """checkpoint to load, or gpt2 or another model of the Hugging Face Hub"""
    prompt: str | None = None
    """text to complete; without it, standard input, or on a terminal one line after another"""
    prompt_file: Path | None = None
    """file with the text to complete"""
    chat: bool = False
    """converse with a model that train_sft.py fine-tuned"""
    instruction: str | None = None
    """answer one instruction, with a fine-tuned model"""
    context: str = ""
    """text that the instruction speaks of"""
    num_samples: int = 1
    """completions of the prompt, written as one batch"""
    logprobs: int | None = None
    """print each token with its probability and this many likeliest candidates"""
    json: bool = False
    """print one JSON object a completion: text, tokens, why it ended, and log-probabilities with --logprobs"""
    compile: Literal["on", "off"] = "off"
    """compile the step of one token, on CUDA as a graph; the first tokens wait for the compiler"""
    verify: bool = False
    """compare the checkpoint's checksums first, to find flipped bits"""
    quantize: Literal["none", "int8"] = "none"
    """int8: weights in 8 bits, on the CPU about twice as fast or faster, and a little less exact"""
    device: str = "auto"
    """auto, cpu, cuda, mps"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """precision; auto takes bfloat16 where the GPU has it, float32 on the CPU"""

    def __post_init__(self):
        super().__post_init__()
        require(not self.context or self.instruction is not None, "--context belongs to --instruction")
        require_at_least(1, self, "num_samples", "logprobs")
        texts = (self.prompt is not None, self.prompt_file is not None, self.instruction is not None)
        require(self.chat + sum(texts) <= 1, "--prompt, --prompt-file, --chat and --instruction exclude each other")
        require(
            not self.chat or (not self.json and self.logprobs is None and self.num_samples == 1),
            "--json, --logprobs and --num-samples do not go with --chat",
        )


def main(config: Config) -> None:
    """Loads the model and writes."""
    from generation.text_model import TextModel

    text_model = TextModel.load(
        config.model, config.device, config.dtype, quantize=config.quantize, verify=config.verify
    )
    if config.compile == "on":
        text_model.model.compile_decoding()
    if config.chat and not text_model.template:
        raise UserError(
            f"{config.model} only completes text: leave --chat away, or fine-tune it: "
            f"python train_sft.py --model {config.model}"
        )
    if config.instruction is not None:
        message = {"role": "user", "content": config.instruction, "input": config.context}
        write(text_model, text_model.answer_ids([message], config), "", config)
    elif config.chat:
        from interface.terminal import chat

        chat(text_model, config)
    elif config.prompt is None and config.prompt_file is None and sys.stdin.isatty():
        from interface.terminal import complete

        complete(text_model, lambda line: write(text_model, text_model.prompt_ids(line), line, config))
    else:
        prompt = config.prompt if config.prompt is not None else read_prompt(config.prompt_file)
        write(text_model, text_model.prompt_ids(prompt), prompt, config)


def write(text_model, ids: list[int], prompt: str, config: Config) -> None:
    """Writes what follows token ids behind the prompt: streaming, or several samples, or as JSON.

    Text alone goes to standard output; figures go to standard error.
    """
    from generation.text_model import Sample

    context = text_model.model.config.block_size
    if len(ids) > context:
        print(f"the prompt has {len(ids):,} tokens: the last {context:,}, the model's context, count", file=sys.stderr)
    start, strip = time.perf_counter(), config.instruction is not None
    if config.json or config.logprobs or config.num_samples > 1:
        samples = text_model.samples(ids, config, config.num_samples, config.logprobs, strip)
        for i, sample in enumerate(samples):
            if config.json:
                print(json.dumps(as_json(text_model.tokenizer, prompt, sample, config), ensure_ascii=False))
            else:
                print("---\n" * bool(i) + prompt + sample.text)
                print("".join(f"{line}\n" for line in token_lines(text_model.tokenizer, sample, config)), end="")
    else:
        samples = [Sample()]
        stream(text_model.stream(ids, config, samples[0], strip=strip), prompt)
    seconds, n = time.perf_counter() - start, sum(len(sample.tokens) for sample in samples)
    print(f"{n:,} tokens, {n / seconds:,.1f} tokens/s, prompt of {len(ids):,} tokens", file=sys.stderr)
    if config.stop and not any(sample.finish_reason == "stop" for sample in samples):
        print("the stop text did not come", file=sys.stderr)


def stream(pieces: Iterator[str], prompt: str = "") -> None:
    """Writes pieces of text to standard output as they come, and a newline behind them."""
    sys.stdout.write(prompt)
    try:
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
    finally:
        print(flush=True)


def as_json(tokenizer, prompt: str, sample, config: Config) -> dict:
    """Returns one completion in a form fit for JSON."""
    result = {
        "prompt": prompt,
        "text": sample.text,
        "finish_reason": sample.finish_reason,
        "tokens": [token.id for token in sample.tokens],
    }
    if config.logprobs:
        result["logprobs"] = [
            {
                "token": tokenizer.decode([token.id]),
                "logprob": token.logprob,
                "top": [{"token": tokenizer.decode([i]), "id": i, "logprob": p} for i, p in token.candidates],
            }
            for token in sample.tokens
        ]
    return result


def token_lines(tokenizer, sample, config: Config) -> Iterator[str]:
    """Yields, where they are asked for, a line for each token: its probability and the likeliest candidates."""
    from math import exp

    for token in sample.tokens if config.logprobs else []:
        others = ", ".join(f"{tokenizer.decode([i])!r} {exp(p):.1%}" for i, p in token.candidates)
        yield f"{tokenizer.decode([token.id])!r:20} {exp(token.logprob):6.1%}   {others}"


def read_prompt(path: Path | None) -> str:
    """Reads a file or all of standard input as UTF-8, less a newline at its end. Raises UserError for anything else."""
    try:
        content = path.read_bytes() if path else sys.stdin.buffer.read()
        return content.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError:
        raise UserError(f"{path or 'standard input'} is not UTF-8 text") from None


if __name__ == "__main__":
    run(main, Config)
