"""The model card of an exported model: a page in Markdown that tells how the model was trained and how to use it."""

from weights.checkpoint import Checkpoint, facts

_TRAIN_CONFIG = (
    "data",
    "batch_size",
    "block_size",
    "optimizer",
    "learning_rate",
    "min_lr",
    "warmup_steps",
    "weight_decay",
)
_KINDS = {
    "base": "a GPT-2 that completes text",
    "sft": "a GPT-2 that answers, fine-tuned on conversations",
    "classifier": "a GPT-2 that classifies text",
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

The chat template formats conversations as in training. `transformers` encodes the text of a message together with the
control tokens of the template: if a user types `<|assistant|>`, the model sees a real control token. Remove control
tokens from the text of users that you do not trust.
"""
_CLASSIFY = """```python
from transformers import pipeline

classify = pipeline("text-classification", "{name}")
print(classify("WINNER! Call now to claim your prize", truncation=True))
```

The tokenizer appends `<|endoftext|>` to each text, and the model predicts the label at that token. The padding token is
`<|user|>`, because no text contains it.
"""


def model_card(checkpoint: Checkpoint, name: str) -> str:
    """Returns the model card of a checkpoint (base, sft or classifier) that is exported under a name."""
    kind, train_config = checkpoint["kind"], checkpoint.get("train_config") or {}
    metadata = facts(checkpoint)
    metadata |= {key.replace("_", " "): train_config[key] for key in _TRAIN_CONFIG if key in train_config}
    task = "text-classification" if kind == "classifier" else "text-generation"
    usage = {"base": _COMPLETE, "sft": _ANSWER, "classifier": _CLASSIFY}[kind].format(name=name)
    rows = "\n".join(f"| {key} | {str(value).replace('|', '&#124;')} |" for key, value in metadata.items())
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: {task}\ntags: [gpt2]\n---\n\n"
        f"# {name}\n\nThis is {_KINDS[kind]}.\n\n| | |\n| --- | --- |\n{rows}\n\n## Use\n\n{usage}"
    )
