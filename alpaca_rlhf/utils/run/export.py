"""Where a run writes, and the exports other tools can read. A folder is complete or not there.

A run works in `OUTPUT_DIR.partial` and takes its final name when all is written, so nothing that
stood there before is lost to a run that fails. What it needs to go on after that is in
`OUTPUT_DIR.partial/checkpoints` (see `resume`). Exports are Hugging Face checkpoints: safetensors,
config, tokenizer with chat template, generation config and a model card.
"""

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from peft import PeftModel
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from alpaca_rlhf.utils import console, distributed
from alpaca_rlhf.utils.errors import TrainingStopped, UserError
from alpaca_rlhf.utils.model.lora import gathered_state_dict, merged_state_dict, unwrapped

ARGUMENTS_FILE = "training_arguments.json"
RESULTS_FILE = "results.json"
ADAPTER_FOLDER = "adapter"
CHECKPOINTS_FOLDER = "checkpoints"


class RunFolder:
    """The output folder of a run; without one, nothing is saved.

    Args:
        output_dir: `--output_dir`, or None.
        overwrite: whether a run that stands there may be replaced, once this one is complete.
        resume: whether to go on with a run that did not finish.

    Raises:
        UserError: the folder holds something already, cannot be written, or another process is
            at work in it.
        TrainingStopped: what is to be resumed has finished.
    """

    def __init__(self, output_dir: str | None, overwrite: bool, resume: bool = False) -> None:
        self.final = Path(output_dir).absolute() if output_dir else None
        self.path = self.final.with_name(f"{self.final.name}.partial") if self.final else None
        if self.final is None or self.path is None:
            return
        if self.final.exists() and not self.final.is_dir():
            raise UserError(f"--output_dir {output_dir}: is a file; give a folder")
        if resume and not overwrite and (self.final / RESULTS_FILE).exists():
            raise TrainingStopped(
                f"--output_dir {output_dir}: this run has finished, there is nothing to resume",
                code=0,
            )
        if self.final.exists() and any(self.final.iterdir()) and not overwrite:
            raise UserError(
                f"--output_dir {output_dir}: is not empty, another run may be in it; give another "
                "folder, or --overwrite_output_dir to replace it"
            )
        kept = self.path / CHECKPOINTS_FOLDER
        if not (resume or overwrite) and any(kept.glob("step-*")):
            raise UserError(
                f"--output_dir {output_dir}: {kept} has checkpoints of a run that did not finish; "
                "--resume_from_checkpoint latest goes on with it, --overwrite_output_dir starts "
                "over"
            )
        # Every rank has looked before rank 0 changes anything.
        distributed.barrier()
        if distributed.is_main():
            self._make(self.path, output_dir, keep=resume)
        distributed.barrier()

    def _make(self, path: Path, output_dir: str | None, keep: bool) -> None:
        """The folder to work in, for this process alone."""
        try:
            path.mkdir(parents=True, exist_ok=True)
            # The system lets go of it when the process ends, however that comes about.
            self._lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=0)
            self._lock.acquire()
            if not keep:
                shutil.rmtree(path, ignore_errors=True)
            path.mkdir(exist_ok=True)
            (path / ".writable").touch()
            (path / ".writable").unlink()
        except Timeout:
            raise UserError(
                f"--output_dir {output_dir}: another process is writing there; wait for it, or "
                "give another folder"
            ) from None
        except OSError as error:
            raise UserError(
                f"--output_dir {output_dir}: cannot be written ({error.strerror}); "
                "give a folder that can"
            ) from error

    def finish(self, arguments: dict[str, Any], results: dict[str, Any]) -> None:
        """Write the resolved arguments and the results, and give the folder its final name."""
        if self.path is not None and self.final is not None and distributed.is_main():
            write_json(self.path / ARGUMENTS_FILE, arguments)
            write_json(self.path / RESULTS_FILE, results)
            old = self.final.with_name(f"{self.final.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            if self.final.exists():
                os.rename(self.final, old)
            os.rename(self.path, self.final)
            shutil.rmtree(old, ignore_errors=True)
            self._lock.release()
            Path(self._lock.lock_file).unlink(missing_ok=True)
            console.say(f"saved to {self.final}")
        elif self.final is None:
            console.say("nothing is saved: no --output_dir was given")
        distributed.barrier()


def write_json(path: Path, record: dict[str, Any]) -> None:
    """A record as indented JSON."""
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def export(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path | None,
    card: str,
) -> None:
    """Save a model as a Hugging Face checkpoint, adapters merged, and the adapter beside it.

    All ranks must call it (under ZeRO-3 each holds a part). The model is left as it is.

    Args:
        model: a causal LM or sequence classifier, with or without an adapter.
        tokenizer: saved with it, chat template included.
        folder: made if it is not there; None saves nothing.
        card: text of the README.md.
    """
    if folder is None:
        return
    state = gathered_state_dict(model, distributed.is_main())
    if distributed.is_main():
        if isinstance(model, PeftModel):
            _save_adapter(model, state, folder / ADAPTER_FOLDER)
        save_state(unwrapped(model), merged_state_dict(model, state), tokenizer, folder, card)
    distributed.barrier()


def save_state(
    model: nn.Module,
    state: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    card: str,
) -> None:
    """Write whole weights `state` as a checkpoint of `model`'s class."""
    empty = [name for name, tensor in state.items() if tensor.numel() == 0]
    assert not empty, f"weights that were not gathered: {empty}"
    assert isinstance(model, PreTrainedModel)
    config = copy.deepcopy(model.config)
    config.pad_token_id = tokenizer.pad_token_id
    config.use_cache = True
    with torch.device("meta"):
        plain = type(model)(config).to(model.dtype)
    if plain.can_generate():
        plain.generation_config = _generation_config(model, tokenizer)
    plain.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card)


def _generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> GenerationConfig:
    config = copy.deepcopy(model.generation_config) or GenerationConfig()
    config.pad_token_id = tokenizer.pad_token_id
    config.eos_token_id = eos_ids(model, tokenizer)
    config.bos_token_id = tokenizer.bos_token_id
    return config


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a reply: the tokenizer's eos first, then the generation config's."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    more = configured if isinstance(configured, list) else [configured]
    ids = [tokenizer.eos_token_id, *(i for i in more if i is not None)]
    return list(dict.fromkeys(ids))


def _save_adapter(model: PeftModel, state: dict[str, Tensor], folder: Path) -> None:
    model.save_pretrained(str(folder), state_dict=state, safe_serialization=True)


def model_card(title: str, facts: dict[str, Any]) -> str:
    """A short README.md for an export."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return (
        f"# {title}\n\nTrained with alpaca-rlhf. `{ARGUMENTS_FILE}` of the run gives every "
        f"argument; `--config` takes it.\n\n| | |\n| --- | --- |\n{rows}\n"
    )


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON record, or a message that says what is missing.

    Raises:
        UserError: no such file, or it is broken.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{what}: {path} is missing or broken") from error
