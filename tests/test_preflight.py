"""Refusals and warnings before data and models are loaded: memory, compiler, precision."""

from __future__ import annotations

import errno
import os
import shutil
import types
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects

from alpaca_rlhf.utils import distributed, optimizer, preflight
from alpaca_rlhf.utils.configs import AdapterConfig, EngineConfig, LoadingConfig, RoleConfig
from alpaca_rlhf.utils.errors import UserError
from alpaca_rlhf.utils.preflight import Planned

GB = 10**9
BF16_GAIN = distributed.bf16_gain.__wrapped__  # before `group` fixes it


def planned(path, *, stage=0, lora=0, dtype="fp32", offload=False, prefix="", **needs):
    return Planned(
        RoleConfig(model_name_or_path=path, zero_stage=stage, lora_dim=lora, prefix=prefix),
        LoadingConfig(dtype=dtype), AdapterConfig(only_optimize_lora=lora > 0),
        EngineConfig(offload=offload), **needs,
    )


# --- memory that is there ------------------------------------------------------------------------


@pytest.mark.parametrize(("folder", "limit", "used"), [
    ("", "memory.max", "memory.current"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
])
def test_a_containers_limit_counts_and_ranks_share_the_host(
    tmp_path: Path, monkeypatch, folder, limit, used
):
    monkeypatch.setattr(distributed, "_place", distributed._Place(local_size=4))
    groups = tmp_path / "groups"
    (groups / folder).mkdir(parents=True)
    (groups / folder / limit).write_text("900000\n")
    (groups / folder / used).write_text("100000\n")
    assert distributed.free_memory(groups)[1] == 200_000
    if limit == "memory.max":
        (groups / limit).write_text("max\n")
        assert distributed.free_memory(groups)[1] > 200_000


# --- the hub -------------------------------------------------------------------------------------

SMALL = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer.model"}
HUB = {
    "org/safe": {*SMALL, "README.md", "modeling.py", "model-00001-of-00001.safetensors",
                 "model.safetensors.index.json", "pytorch_model.bin", "consolidated.safetensors",
                 "original/model.safetensors"},
    "org/pickled": {*SMALL, "pytorch_model-00001-of-00001.bin", "training_args.bin"},
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """A hub that can be reached; the files that are fetched from it."""
    fetched: dict[str, set[str]] = {}

    def download(path, *, allow_patterns, ignore_patterns):
        if path not in HUB:
            raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)
        folder = tmp_path / path
        folder.mkdir(parents=True, exist_ok=True)
        for name in filter_repo_objects(
            HUB[path], allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            (folder / name).touch()
            fetched.setdefault(path, set()).add(name)
        return str(folder)

    online = types.SimpleNamespace(HF_HUB_OFFLINE=False)
    monkeypatch.setattr(preflight, "constants", online)
    monkeypatch.setattr(preflight, "snapshot_download", download)
    return fetched


def of_hub(path, **loading):
    return Planned(RoleConfig(model_name_or_path=path), LoadingConfig(**loading),
                   AdapterConfig(), EngineConfig())


def test_one_process_of_a_node_fetches_what_loading_will_read(hub, monkeypatch):
    models = [of_hub("org/safe"), of_hub("org/pickled")]
    monkeypatch.setattr(distributed, "_place", distributed._Place(first_on_node=False))
    preflight.fetch(models)
    assert hub == {}
    monkeypatch.setattr(distributed, "_place", distributed._Place())
    preflight.fetch(models)
    assert hub == {
        "org/safe": {*SMALL, "model-00001-of-00001.safetensors", "model.safetensors.index.json"},
        "org/pickled": {*SMALL, "pytorch_model-00001-of-00001.bin"},
    }


def test_of_a_tokenizers_repository_no_weights_are_fetched(small, hub):
    preflight.check([of_hub(small.actor, tokenizer_name_or_path="org/pickled")])
    assert hub == {"org/pickled": SMALL}


def test_code_is_fetched_if_it_is_trusted(hub):
    preflight.fetch([of_hub("org/safe", trust_remote_code=True)])
    assert "modeling.py" in hub["org/safe"]


def test_a_repository_that_is_missing_is_one_line(hub):
    with pytest.raises(UserError, match="no model can be loaded from nobody/nothing: no such f"):
        preflight.check([of_hub("nobody/nothing")])


def test_a_full_disk_is_not_left_to_the_loader(hub, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(preflight, "snapshot_download", full)
    with pytest.raises(OSError, match="No space left"):
        preflight.fetch([of_hub("org/safe")])


# --- a compiler ----------------------------------------------------------------------------------


def test_offloading_without_compiler_and_ninja_says_what_to_install(small, monkeypatch, machine):
    machine(GB, GB)
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    with pytest.raises(UserError) as refused:
        preflight.check([planned(small.actor, stage=2, offload=True)])
    assert str(refused.value) == (
        "--offload: DeepSpeed compiles its CPU optimizer at first use, and there is no C++ "
        "compiler (c++; Debian and Ubuntu: apt-get install g++) and no ninja (pip install ninja); "
        "install it, or leave --offload out")
    preflight.check([planned(small.actor, stage=2)])


def test_the_ninja_of_an_environment_that_is_not_active_is_found(monkeypatch, tmp_path):
    for folder, name in (("usr", "c++"), ("venv", "ninja")):
        program = tmp_path / folder / name
        program.parent.mkdir()
        program.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "usr"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(optimizer.sys, "executable", str(tmp_path / "venv" / "python"))
    optimizer.require_offloading()
    assert shutil.which("ninja") == str(tmp_path / "venv" / "ninja")
    assert os.environ["PATH"].startswith(str(tmp_path / "usr"))


def test_a_tracker_without_its_package_is_refused():
    with pytest.raises(UserError, match="^--tracker aim: its package is not installed; pip install"
                       " aim$"):
        preflight.check([], ["tensorboard", "aim"])


# --- a machine without bf16 ----------------------------------------------------------------------


def test_a_gpu_that_only_emulates_bf16_trains_in_fp32_by_default_and_refuses_bf16(
    monkeypatch, capsys
):
    # Before Ampere torch counts the emulation as support.
    gpu = types.SimpleNamespace(device_name=lambda: "cuda", is_bf16_supported=lambda: True)
    monkeypatch.setattr(distributed, "get_accelerator", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: including_emulation)
    distributed._auto_dtype.cache_clear()
    assert [distributed.resolve_dtype("auto") for _ in range(2)] == [torch.float32] * 2
    assert capsys.readouterr().out == (
        "--dtype auto: this accelerator has no bf16, so it is fp32; --dtype fp16 is faster and "
        "takes less memory\n")  # once
    with pytest.raises(UserError, match="^--dtype bf16: this accelerator has no bf16; take fp16"):
        distributed.resolve_dtype("bf16")


@pytest.mark.parametrize(("gain", "dtype", "reason"), [
    (4.3, torch.bfloat16, "because this CPU multiplies matrices 4.3 times as fast as in fp32"),
    (1.5, torch.bfloat16, "because this CPU multiplies matrices 1.5 times as fast as in fp32"),
    (1.4, torch.float32, None),
])
def test_a_cpu_trains_in_bf16_by_default_where_it_is_clearly_faster(
    group, monkeypatch, capsys, gain, dtype, reason
):
    monkeypatch.setattr(distributed, "bf16_gain", lambda: gain)
    distributed._auto_dtype.cache_clear()
    assert [distributed.resolve_dtype("auto") for _ in range(2)] == [dtype] * 2
    assert distributed.has_bf16() == (dtype == torch.bfloat16)
    assert capsys.readouterr().out == (f"--dtype auto: bf16, {reason}\n" if reason else "")  # once
    distributed._auto_dtype.cache_clear()


def test_a_dtype_that_is_given_is_taken_whatever_the_cpu_is_faster_in(group, monkeypatch):
    monkeypatch.setattr(distributed, "bf16_gain", None)  # is not asked
    assert distributed.resolve_dtype("fp32") == torch.float32
    assert distributed.resolve_dtype("bf16") == torch.bfloat16


@pytest.mark.parametrize("slow", [torch.float32, torch.bfloat16])
def test_the_cpu_is_asked_by_products_of_which_a_disturbed_one_does_not_count(monkeypatch, slow):
    threads, clock, calls = torch.get_num_threads(), [0.0], []

    def linear(x, weight):
        calls.append(torch.get_num_threads())
        clock[0] += 0.002 if x.dtype == slow else 0.001
        if len(calls) in (1, 6):
            clock[0] += 0.03

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    monkeypatch.setattr(distributed.time, "perf_counter", lambda: clock[0])
    gain = BF16_GAIN()
    assert gain == pytest.approx(2 if slow == torch.float32 else 0.5)
    assert set(calls) == {1} and torch.get_num_threads() == threads
    assert clock[0] < 0.1


def test_the_lock_of_a_killed_compilation_is_refused_with_its_folder(tmp_path, monkeypatch):
    from torch.utils import cpp_extension

    monkeypatch.setattr(cpp_extension, "_get_build_directory", lambda *_: str(tmp_path))
    optimizer._check_build_lock()
    lock = tmp_path / "lock"
    lock.touch()
    optimizer._check_build_lock()  # another process may be compiling
    os.utime(lock, (0, 0))
    with pytest.raises(UserError) as refused:
        optimizer._check_build_lock()
    assert str(refused.value) == (
        f"--offload: {lock} was left by a compilation of DeepSpeed's CPU optimizer that was "
        f"killed, and would be waited for; delete {tmp_path}")
