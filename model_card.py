"""The page about an exported model, in Markdown: what it is, how it was trained, how it is used."""

_FACTS = ("data", "batch_size", "block_size", "optimizer", "learning_rate", "min_lr", "warmup_steps", "weight_decay")
_KINDS = {
    "base": "a GPT-2 that completes text",
    "sft": "a GPT-2 that answers: a language model, fine-tuned on conversations",
    "classifier": "a GPT-2 that tells kinds of text apart",
}
_COMPLETE = """```python
from transformers import pipeline

write = pipeline("text-generation", "{name}")
print(write("Once upon a time")[0]["generated_text"])
```
"""
_ANSWER = """```python
from transformers import pipeline

answer = pipeline("text-generation", "{name}")
question = [{{"role": "user", "content": "What is the capital of France?"}}]
print(answer(question)[0]["generated_text"][-1]["content"])
```

The chat template writes conversations as they were in training. One thing to know: text passes through it together
with the control tokens, and this library takes a control token that somebody typed, such as `<|assistant|>`, for a real
one. Take them out of what strangers type.
"""
_CLASSIFY = """```python
from transformers import pipeline

classify = pipeline("text-classification", "{name}")
print(classify("WINNER! Call now to claim your prize", truncation=True))
```

The label is read off the `<|endoftext|>` that the tokenizer puts behind a text. Padding is `<|user|>`, which no
text has.
"""


def model_card(checkpoint: dict, name: str) -> str:
    """Returns the model card of a checkpoint that is exported under a name."""
    config, kind, trained = checkpoint["config"], checkpoint["kind"], checkpoint.get("train_config") or {}
    facts = {
        "parameters": f"{sum(tensor.numel() for tensor in checkpoint['model'].values()):,}",
        "layers, heads, width": f"{config.n_layer}, {config.n_head}, {config.n_embd}",
        "context": f"{config.block_size:,} tokens",
        "vocabulary": f"{config.n_tokens:,} tokens, " + ("GPT-2's" if checkpoint["tokenizer"] == "gpt2" else "its own"),
        "labels": ", ".join(checkpoint.get("labels", [])),
        "best validation loss": "{:.4f} nats".format(checkpoint["best_val_loss"]) if trained else "",
        "written": checkpoint.get("created", "")[:10],
        "training steps": f"{checkpoint.get('step', 0):,}" if trained else "",
        "training tokens": f"{checkpoint['tokens']:,}" if checkpoint.get("tokens") else "",
    } | {fact.replace("_", " "): trained.get(fact) for fact in _FACTS}
    task = "text-classification" if kind == "classifier" else "text-generation"
    usage = {"base": _COMPLETE, "sft": _ANSWER, "classifier": _CLASSIFY}[kind].format(name=name)
    rows = "\n".join(f"| {fact} | {value} |" for fact, value in facts.items() if value not in ("", None))
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: {task}\ntags: [gpt2]\n---\n\n"
        f"# {name}\n\nThis is {_KINDS[kind]}.\n\n| | |\n| --- | --- |\n{rows}\n\n## Use\n\n{usage}"
    )
