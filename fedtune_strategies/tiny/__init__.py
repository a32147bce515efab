"""The embedded default: a small language model of our own and instruction data written by rule, for use without downloads.

See docs/tiny-model.md. The trained folder is `MODEL_FOLDER`; `tasks.write_federation` writes the data.
"""

from pathlib import Path

MODEL_FOLDER = Path(__file__).parent / "model"
