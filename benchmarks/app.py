"""How fast the page writes, beside `generate.py`: GPT-2 small with random weights, in turn, each in its own process.

    python -m benchmarks.app [ROUNDS]

The page is run by Streamlit's test driver, so that no browser takes part of the processor.
"""

import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent.parent
PROMPT, LENGTH = "Return a copy of the", 200


def main(rounds: int) -> None:
    """Makes the model, measures, and prints a line a round and the median ratio."""
    from model import GPT, GPTConfig
    from weights import checkpoint

    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        model = checkpoint.pack(GPT(GPTConfig()), kind="base", tokenizer="gpt2", template=None)
        checkpoint.save("checkpoints/gpt2.pt", model)
        for _ in range(rounds):
            page = speed("-m", "benchmarks.app", "--page")
            script = speed(
                HERE / "generate.py", "--model", "checkpoints/gpt2.pt", "--prompt", PROMPT, "--max-new-tokens", LENGTH
            )
            ratios.append(page / script)
            print(f"page {page:.1f} tokens/s, generate.py {script:.1f}, ratio {ratios[-1]:.2f}", flush=True)
    print(f"median ratio {statistics.median(ratios):.2f}")


def speed(*command: object) -> float:
    """Runs a Python script; returns the tokens/s that it says."""
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(HERE)},
    )
    return float(re.findall(r"([\d.]+) tokens/s", result.stdout + result.stderr)[-1])


def page() -> None:
    """Completes the prompt on the page, twice, and prints what the page says of the second time."""
    from streamlit.testing.v1 import AppTest

    app = AppTest.from_file(str(HERE / "app.py"), default_timeout=300).run()
    app.text_area(key="prompt").set_value(PROMPT)
    for _ in range(2):
        next(button for button in app.button if button.label == "Complete").click().run()
    print(app.session_state.completion.speed)


if __name__ == "__main__":
    if "--page" in sys.argv:
        page()
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
