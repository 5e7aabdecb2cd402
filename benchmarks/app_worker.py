"""Completes a prompt twice in the app and prints the speed of the second completion, as the app shows it.

python -m benchmarks.app_worker PROMPT
"""

from __future__ import annotations

import sys
from pathlib import Path

from streamlit.testing.v1 import AppTest

REPOSITORY = Path(__file__).resolve().parent.parent


def main(prompt: str) -> None:
    """Runs the app on the checkpoints of the current folder."""
    app = AppTest.from_file(str(REPOSITORY / "app.py"), default_timeout=300).run()
    app.text_area(key="prompt").set_value(prompt)
    for _ in range(2):
        next(button for button in app.button if button.label == "Complete").click().run()
    print(app.session_state.session.completion.branch.speed)


if __name__ == "__main__":
    main(sys.argv[1])
