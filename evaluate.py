"""How good a model is: loss, perplexity and bits per byte on any text, accuracy on HellaSwag."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from system.cli import run
from system.errors import require, require_at_least

PUBLISHED = (
    "published for OpenAI's GPT-2 124M: acc 0.2859 and acc_norm 0.2955 in completion style, as here (hellaswag.py of "
    "llm.c); 0.2892 and 0.3114 with Eleuther's harness"
)


@dataclass(frozen=True)
class Config:
    model: Path | None = None
    """checkpoint, or gpt2 or another model of the Hugging Face Hub; by default the newest in checkpoints/"""
    data: Path | None = None
    """a folder of prepared data, whose validation split is read, or one token file (.bin)"""
    text: Path | None = None
    """a text file; without --data, --text and --hellaswag, standard input is read"""
    hellaswag: tuple[Path, ...] | None = None
    """HellaSwag's questions: a file in the published format, hellaswag_val.jsonl; without a file, from the Hub"""
    stride: int | None = None
    """tokens scored at a time, with the rest of the context before them; by default half of the context"""
    max_tokens: int | None = None
    """read at most this many tokens of --data or --text"""
    batch_size: int = 8
    """windows of text per forward pass"""
    json: bool = False
    """print one JSON object"""
    device: str = "auto"
    """auto, cpu, cuda, mps"""
    device_check: bool = True
    """before all else, compute a few tokens on the GPU and on the CPU, and compare"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """precision; auto takes bfloat16 if the GPU has it, float32 on the CPU"""

    def __post_init__(self) -> None:
        require_at_least(1, self, "stride", "max_tokens", "batch_size")
        n_sources = sum(source is not None for source in (self.data, self.text, self.hellaswag))
        require(n_sources <= 1, "--data, --text and --hellaswag exclude each other")
        require(len(self.hellaswag or ()) <= 1, "--hellaswag takes one file")


def main(config: Config) -> None:
    """Evaluates one model."""
    import numpy as np

    from generation.text_model import TextModel
    from system.files import read_utf8
    from text.token_files import read_prepared_tokens
    from text.tokenizer import unix_line_ends
    from training.scores import evaluate_hellaswag, evaluate_text, read_hellaswag
    from weights.describe import newest

    name = config.model or newest("language model")
    text_model = TextModel.load(
        name, config.device, config.dtype, convert_weights=False, device_check=config.device_check
    )
    tokenizer = text_model.tokenizer
    if config.hellaswag is not None:
        figures = evaluate_hellaswag(text_model, read_hellaswag(*config.hellaswag))
        line = f"acc {figures['acc']:.4f}, acc_norm {figures['acc_norm']:.4f} on {figures['questions']:,} questions"
        line += f"\n({PUBLISHED})"
    else:
        if config.data:
            ids = read_prepared_tokens(config.data, tokenizer, text_model.model.config.vocab_size)
        else:
            text = unix_line_ends(read_utf8(config.text))
            ids = np.array([tokenizer.end_of_text, *tokenizer.encode(text)], dtype=np.uint16)
        if config.max_tokens:
            ids = ids[: config.max_tokens + 1]
        figures = evaluate_text(text_model, ids, config.stride, config.batch_size)
        line = (
            f"loss {figures['loss']:.4f} nats per token, perplexity {figures['perplexity']:,.3f}, "
            f"{figures['bits_per_byte']:.4f} bits per byte, on {figures['tokens']:,} tokens"
        )
    print(json.dumps({"model": str(name), **figures}) if config.json else line)


if __name__ == "__main__":
    run(main, Config)
