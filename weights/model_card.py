"""The page about an exported model, in Markdown: what it is, how it was trained, how it is used."""

from weights.checkpoint import facts

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
    kind, trained = checkpoint["kind"], checkpoint.get("train_config") or {}
    known = facts(checkpoint) | {fact.replace("_", " "): trained[fact] for fact in _FACTS if fact in trained}
    task = "text-classification" if kind == "classifier" else "text-generation"
    usage = {"base": _COMPLETE, "sft": _ANSWER, "classifier": _CLASSIFY}[kind].format(name=name)
    rows = "\n".join(f"| {fact} | {str(value).replace('|', '&#124;')} |" for fact, value in known.items())
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: {task}\ntags: [gpt2]\n---\n\n"
        f"# {name}\n\nThis is {_KINDS[kind]}.\n\n| | |\n| --- | --- |\n{rows}\n\n## Use\n\n{usage}"
    )
