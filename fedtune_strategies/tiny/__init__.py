"""The embedded default, for use without downloads: our own small language model and instruction data written by rule.

See docs/tiny-model.md. The trained folder is `MODEL_FOLDER`; `tasks.write_federation` writes the data.
"""

from pathlib import Path

MODEL_FOLDER = Path(__file__).parent / "model"
