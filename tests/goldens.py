"""Record what every program does, so that it can be compared after the code has moved.

    python tests/goldens.py record before.json [--root CHECKOUT] [--only PREFIX ...]
    python tests/goldens.py compare before.json after.json [--expected-help-changes]

Three kinds of items, each with a name that `--only` takes the beginning of:

    run/CASE/...      the three steps on a tiny model: SHA-256 of every exported tensor, metrics and
                      results but for time, speed and memory, samples, scores, the console's lines
    help/PROGRAM      what --help prints
    bad/PROGRAM/CASE  the exit code and the lines that a wrong command line ends in

Nothing of the product is imported: the checkout's programs run in processes of their own, so any
checkout can be recorded by this one script. Numbers are exact, hence a comparison holds only
between records of one machine and one environment. The wrong command lines and --help run in forks
of this process, which has loaded the heavy libraries once.
"""

import argparse
import difflib
import hashlib
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Items = dict[str, Any]

# --- what is run: edit here when programs move ---------------------------------------------------

TRAINING = "alpaca_rlhf.training_model"
STEP1, STEP2, STEP3 = (f"{TRAINING}.step{name}_finetuning" for name in (
    "1_supervised", "2_reward_model", "3_rlhf"))
# Name of a program: the modules that it may be, the first that is there is taken.
PROGRAMS = {
    "my_deepspeed": [f"{TRAINING}.my_deepspeed"],
    "step1": [f"{STEP1}.main"],
    "step2": [f"{STEP2}.main"],
    "step3": [f"{STEP3}.main"],
    "prompt_eval": [f"{STEP1}.prompt_eval", "alpaca_rlhf.evaluation.prompt_eval"],
    "rw_eval": [f"{STEP2}.rw_eval", "alpaca_rlhf.evaluation.rw_eval"],
    "win_rate": [f"{STEP3}.win_rate", "alpaca_rlhf.evaluation.win_rate"],
    "inspect_data": ["alpaca_rlhf.inspect_data", "alpaca_rlhf.data.inspect_data"],
    "doctor": ["alpaca_rlhf.doctor"],
    "chat": ["alpaca_rlhf.inference.chat"],
    "web_chat": ["alpaca_rlhf.inference.web_chat"],
    "serve": ["alpaca_rlhf.inference.serve"],
    "report": ["alpaca_rlhf.report", "alpaca_rlhf.evaluation.report"],
}

SMALL = "--per_device_train_batch_size 4 --per_device_eval_batch_size 8 --eval_iters 2"
STEPS = {  # what all cases share
    "step1": f"--model_name_or_path {{w}}/actor --max_steps 3 --max_seq_len 192 {SMALL} "
             "--learning_rate 1e-3",
    "step2": f"--model_name_or_path {{w}}/actor --max_steps 3 --max_seq_len 192 {SMALL} "
             "--learning_rate 1e-3",
    "step3": "--actor_model_name_or_path {w}/{case}/step1 --max_steps 4 --max_answer_seq_len 8 "
             "--critic_model_name_or_path {w}/{case}/step2 --eval_prompts 6 --log_samples_steps 1 "
             "--per_device_generation_batch_size 8 --actor_learning_rate 1e-3 "
             "--critic_learning_rate 1e-3",
}
MIXED = "--unsupervised_dataset_name {w}/plain.txt --entropy_coef 0.01 --critic_warmup_steps 1"
# Case: ranks, and more flags of all steps, of steps 1 and 2, of step 3.
CASES = {
    "zero0": (1, "--save_steps 1 --save_total_limit 9", "", "--per_device_training_batch_size 4"),
    "zero0_lora": (
        1, "", "--lora_dim 4", "--actor_lora_dim 4 --critic_lora_dim 4 --enable_hybrid_engine "
        "--num_generations 2 --kl_controller adaptive --ppo_epochs 2 "
        "--per_device_training_batch_size 8"),
    "zero3": (
        2, "", "--zero_stage 3", "--actor_zero_stage 3 --critic_zero_stage 3 "
        "--enable_hybrid_engine --per_device_training_batch_size 4"),
    "zero3_lora": (
        2, "--gradient_accumulation_steps 2 --data_path {w}/pairs.jsonl",
        "--zero_stage 3 --lora_dim 4",
        "--actor_zero_stage 3 --critic_zero_stage 3 --actor_lora_dim 4 --critic_lora_dim 4 "
        f"--enable_hybrid_engine --enable_ema --per_device_training_batch_size 2 {MIXED}"),
}

ONE = ("--model_name_or_path {w}/actor --data_path {w}/pairs.jsonl --data_output_path {w}/cache "
       "--output_dir {w}/out --max_steps 1 --max_seq_len 128")
THREE = ("--actor_model_name_or_path {w}/actor --critic_model_name_or_path {w}/critic "
         "--data_path {w}/pairs.jsonl --data_output_path {w}/cache --output_dir {w}/out "
         "--max_steps 1 --max_prompt_seq_len 128 --max_answer_seq_len 8")
BASE = {"step1": ONE, "step2": ONE, "step3": THREE}
# Program: wrong flags, for a step behind those of BASE (the last of two is the one that holds).
BAD = {
    "step1": """
        --zero_stagee 2
        --unknown_flag 2
        --max_steps many
        --max_steps 0
        --zero_stage 4
        --seed
        --offload
        --lora_alpha 8
        --lora_learning_rate 1e-3
        --data_split 1,2
        --data_split 0,1,1
        --data_split a,b,c
        --output_dir
        --output_dir ''
        --output_dir {w}/other
        --output_dir {w}/pairs.jsonl
        --output_dir {w}/pairs.jsonl/out
        --data_output_path {w}/pairs.jsonl/cache
        --resume_from_checkpoint {w}/nowhere
        --resume_from_checkpoint {w}/empty
        --replay {w}/nowhere.pt
        --tracker nonesuch
        --dtype fp16
        --max_tokens_per_micro_batch 10
        --deepspeed_config {w}/nowhere.json
        --deepspeed_config {w}/broken.json
        --deepspeed_config {w}/batch.json
        --config {w}/nowhere.yaml
        --config {w}/broken.yaml
        --config {w}/another.yaml
        --config {w}/nested.yaml
        --config {w}/typo.yaml
        --data_path {w}/nowhere.jsonl
        --data_path {w}/broken.jsonl
        --data_path {w}/empty.jsonl
        --data_path {w}/bytes.jsonl
        --data_path {w}/pairs.csv
        --data_path {w}/pairs.parquet
        --data_path {w}/empty
        --data_path nonesuch={w}/pairs.jsonl
        --data_path {w}/pairs.jsonl:1.5
        --sft_only_data_path {w}/nowhere.json
        --max_seq_len 8
        --lora_dim 4 --lora_module_name nonesuch
        --model_name_or_path {w}/empty
        --model_name_or_path {w}/nowhere
        --model_name_or_path nobody/nothing
        --model_name_or_path {w}/no_config
        --model_name_or_path {w}/torn
        --tokenizer_name_or_path {w}/bad_tokenizer
        --chat_template tokenizer""",
    "step2": """
        --train_on last
        --zero_stage 4
        --data_path {w}/columns.jsonl
        --data_path {w}/broken.jsonl
        --data_split 1,0,1
        --output_dir {w}/other
        --overlong drop --max_seq_len 8""",
    "step3": """
        --actor_model_name_or_path ''
        --per_device_training_batch_size 5
        --num_generations 3
        --temperature 0
        --top_p 1.5
        --ema_decay 1
        --inference_tp_size 2
        --unsupervised_dataset_name {w}/nowhere.txt
        --reward_function nowhere:length
        --reward_function math:pi
        --reward_function {w}
        --actor_lora_dim 4 --actor_lora_module_name nonesuch
        --critic_model_name_or_path {w}/actor --reward_normalization reference
        --critic_model_name_or_path {w}/no_statistics
        --critic_model_name_or_path {w}/other_words
        --data_path {w}/columns.jsonl
        --max_prompt_seq_len 4
        --output_dir {w}/other""",
    "my_deepspeed": """
        {w}/nowhere.py
        --nonesuch {w}/nowhere.py
        --hostfile {w}/nowhere.hosts {step1}
        --no_ssh {step1}
        --debug_ranks one {step1}
        --num_gpus 1 {step1} --zero_stage 4
        --num_gpus 2 {step1} --data_path {w}/nowhere.jsonl --model_name_or_path {w}/actor""",
    "prompt_eval": """
        --path {w}/actor
        --prompt Hi.
        --path {w}/actor --prompts {w}/nowhere.jsonl
        --path {w}/actor --prompts {w}/columns.jsonl --output {w}/answers.csv
        --path {w}/nowhere --prompt Hi.
        --path {w}/actor --prompt Hi. --replies 0
        --path {w}/actor --prompt Hi. --max_new_tokens 100000
        --path {w}/actor --prompt Hi. --max_new_tokens 4 --reward_model {w}/actor""",
    "rw_eval": """
        --limit 4
        --path {w}/actor --data_path {w}/pairs.jsonl
        --path {w}/critic --data_path {w}/columns.jsonl
        --path {w}/critic --data_path {w}/pairs.jsonl --max_seq_len 1
        --path {w}/critic --data_path {w}/pairs.jsonl --data_split 1""",
    "win_rate": """
        --path {w}/actor
        --run {w}/nowhere
        --path {w}/actor --baseline {w}/actor --data_path {w}/pairs.jsonl
        --path {w}/actor --baseline {w}/actor --output {w}/rates.txt
        --path {w}/actor --baseline {w}/actor --reward_function math:pi""",
    "inspect_data": """
        --rows 2
        --step 4
        --step 1 --rows -1
        --step 1 --max_seqlen 8
        --step 2 --model_name_or_path {w}/actor --data_path {w}/broken.jsonl""",
    "doctor": "--nonesuch",
    "chat": """
        --temperature 1
        --path {w}/actor --temperatur 1
        --path {w}/nowhere
        --path {w}/critic""",
    "web_chat": """
        --path {w}/actor --arena
        --path {w}/actor {w}/actor {w}/actor
        --path {w}/actor --port 70000""",
    "serve": """
        --path {w}/actor --at_once 0
        --path {w}/actor --port http
        --path {w}/empty""",
    "report": """
        --nonesuch
        {w}/nowhere
        {w}/empty""",
}

# --- the folder that all of it runs in -----------------------------------------------------------

PAIRS = [{"prompt": f"What is {i} and {i * 7 % 11}?", "chosen": f"It is {i + i * 7 % 11}.",
          "rejected": "No" + "." * (i % 5)} for i in range(160)]


def make_inputs(work: Path) -> None:
    """Write models, data and broken files; the same bytes each time."""
    def lines(rows: list[dict[str, str]]) -> str:
        return "".join(json.dumps(row) + "\n" for row in rows)

    texts = {
        "pairs.jsonl": lines(PAIRS), "empty.jsonl": "", "pairs.csv": "a,b\n1,2\n",
        "pairs.parquet": "torn",
        "broken.jsonl": lines(PAIRS[:16]) + '{"prompt": "What?",\n' + lines(PAIRS[17:]),
        "columns.jsonl": lines([{"subject": "a", "chosen": "b"}]),
        "plain.txt": "".join(f"The sum of {i} and two is {i + 2}.\n" for i in range(400)),
        "broken.json": '{"a": ', "batch.json": '{"train_micro_batch_size_per_gpu": 3}',
        "broken.yaml": "seed: [1,\n", "another.yaml": "config: broken.yaml\n",
        "nested.yaml": "seed: {a: 1}\n", "typo.yaml": "max_step: 3\n",
        "other/results.json": "{}",
    }
    (work / "other").mkdir()
    (work / "empty").mkdir()
    for name, text in texts.items():
        (work / name).write_text(text)
    (work / "bytes.jsonl").write_bytes(b"\xff\xfe\x00{\n")
    make_models(work)
    copies = {"no_config": "actor", "torn": "actor", "bad_tokenizer": "actor",
              "no_statistics": "critic", "other_words": "critic"}
    for name, origin in copies.items():
        shutil.copytree(work / origin, work / name)
    (work / "no_config" / "config.json").unlink()
    (work / "torn" / "model.safetensors").write_bytes(b"torn")
    (work / "bad_tokenizer" / "tokenizer.json").write_text("{}")
    (work / "no_statistics" / "score_statistics.json").unlink()
    tokenizer = work / "other_words" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"A":', '"AAAA":'))


def make_models(work: Path) -> None:
    """Save `actor` and `critic`: LLaMAs with random weights, and a tokenizer of single bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        LlamaForSequenceClassification,
        PreTrainedTokenizerFast,
    )

    pieces = ["<pad>", "<s>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    model = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>")
    sizes = {
        "vocab_size": len(pieces), "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 512, "initializer_range": 0.25, "tie_word_embeddings": False,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }
    torch.manual_seed(0)
    actor = LlamaForCausalLM(LlamaConfig(**sizes))
    actor.lm_head.weight.data[tokenizer.eos_token_id] *= 4  # so that some replies come to an end
    actor.save_pretrained(work / "actor")
    LlamaForSequenceClassification(
        LlamaConfig(**sizes, num_labels=1)).save_pretrained(work / "critic")
    for name in ("actor", "critic"):
        tokenizer.save_pretrained(work / name)
    (work / "critic" / "score_statistics.json").write_text(
        json.dumps({"mean": 0.5, "std": 2.0, "count": 40}))


# --- running -------------------------------------------------------------------------------------


class Checkout:
    """The programs of a checkout, run in a folder of inputs.

    Args:
        root: of the checkout.
        work: the folder.
    """

    def __init__(self, root: Path, work: Path) -> None:
        self.root, self.work = root, work
        self.modules = {name: self._find(name, places) for name, places in PROGRAMS.items()}
        ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        for name in ours:
            os.environ.pop(name, None)
        os.environ.update(
            PYTHONPATH=str(root), OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", COLUMNS="100",
            HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="",
            DS_ACCELERATOR="cpu", NO_COLOR="1", PYTHONWARNINGS="ignore",
            PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        )

    def _find(self, name: str, places: list[str]) -> str:
        for place in places:
            path = self.root / place.replace(".", "/")
            if path.with_suffix(".py").is_file() or (path / "__main__.py").is_file():
                return place
        raise SystemExit(f"{self.root} has no {name}: tried {', '.join(places)}")

    def script(self, name: str) -> str:
        """Return the path of a program that is one file."""
        return str(self.root / (self.modules[name].replace(".", "/") + ".py"))

    def plain(self, text: str) -> str:
        """Return `text` without what differs between two records: folders and home."""
        for path, name in ((self.work, "WORK"), (self.root, "ROOT"), (Path.home(), "HOME")):
            text = text.replace(str(path), name)
        return text

    def words(self, text: str, **names: str) -> list[str]:
        """Split a command line, its names in braces filled in; {w} is the folder of inputs."""
        return shlex.split(text.format(w=self.work, step1=self.script("step1"), **names))

    def call(self, name: str, words: list[str]) -> tuple[int, str, str]:
        """Run a program in a fork of this process; return exit code, stdout and stderr."""
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            sys.stdout.flush()
            child = os.fork()
            if not child:
                self._become(self.modules[name], words, out.fileno(), err.fileno())
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(self.plain(file.read().decode(errors="replace")))
        return code, texts[0], texts[1]

    def _become(self, module: str, words: list[str], out: int, err: int) -> None:
        """Run a module in this process as `python -m` does, and end it."""
        code: Any = 1
        try:
            with open(os.devnull) as nothing:
                os.dup2(nothing.fileno(), 0)
            os.dup2(out, 1)
            os.dup2(err, 2)
            os.chdir(self.work)
            sys.path[0] = str(self.root)
            sys.argv = [module, *words]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as ended:
            code = ended.code or 0
            if isinstance(code, str):
                sys.stderr.write(f"{code}\n")
                code = 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def train(self, step: str, ranks: int, words: list[str], output: Path) -> Items:
        """Run a step through the launcher and return what it has printed and written."""
        command = [sys.executable, self.script("my_deepspeed"), "--num_gpus", str(ranks),
                   self.script(step), *words, "--output_dir", str(output),
                   "--data_output_path", str(self.work / "cache")]
        done = subprocess.run(command, cwd=self.work, capture_output=True, text=True, timeout=600)
        items: Items = {"exit": done.returncode, "stderr": self.plain(done.stderr).splitlines()}
        said = re.sub(r"  \([^()]* left\)", "", self.plain(done.stdout))
        items["console"] = [re.sub(r"\d[\d,.:e+-]*", "#", line) for line in said.splitlines()]
        if done.returncode:
            return items
        return items | self.exported(output)

    def exported(self, folder: Path) -> Items:
        """Return the names of a run's files, hashes of its tensors, and its records."""
        import torch
        from safetensors import safe_open

        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*")
                       if path.is_file() and "checkpoints" not in path.parts)
        items: Items = {"files": names}
        for name in names:
            path = folder / name
            if path.suffix == ".safetensors":
                with safe_open(path, "pt") as tensors:
                    for key in sorted(tensors.keys()):
                        tensor = tensors.get_tensor(key)
                        content = tensor.flatten().view(torch.uint8).numpy().tobytes()
                        items[f"tensor {name} {key}"] = (
                            f"{list(tensor.shape)} {hashlib.sha256(content).hexdigest()}")
            elif path.suffix == ".jsonl":
                rows = self.plain(path.read_text()).splitlines()
                items[name] = [steady(json.loads(row)) for row in rows]
            elif path.suffix == ".json" and path.name not in ("run.json", "tokenizer.json"):
                items[name] = steady(json.loads(self.plain(path.read_text())))
            elif path.name == "README.md":
                items[name] = self.plain(path.read_text()).splitlines()
        return items


def steady(value: Any) -> Any:
    """Return a JSON value without the numbers that are other ones each time."""
    if isinstance(value, dict):
        kept = {key: steady(part) for key, part in value.items()
                if not re.search(r"time|second|memory|_gb|started", key)}
        if "target_modules" in kept:  # peft's set, in the order of this process's hashes
            kept["target_modules"].sort()
        return kept
    return [steady(part) for part in value] if isinstance(value, list) else value


def runs(checkout: Checkout, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Items]]:
    """Train in all cases, then go on from a checkpoint of the first; yield what came of it."""
    work = checkout.work
    for case, (ranks, shared, models, ppo) in CASES.items():
        if not wanted(f"run/{case}") and not (case == "zero0" and wanted("run/resumed")):
            continue
        for step, flags in STEPS.items():
            text = f"{flags} {shared} {ppo if step == 'step3' else models}"
            words = checkout.words(text, case=case)
            yield f"run/{case}/{step}", checkout.train(step, ranks, words, work / case / step)
    if not wanted("run/resumed"):
        return
    (work / "resumed").mkdir()
    for step, resume in (("step1", "latest"), ("step3", "{w}/zero0/step3/checkpoints/{first}")):
        output, first = work / "resumed" / step, "step-00000001"
        if resume == "latest":  # as a run leaves it that was killed behind its first step
            left = shutil.copytree(work / "zero0" / step, f"{output}.partial")
            for path in Path(left, "checkpoints").iterdir():
                if path.name != first:
                    shutil.rmtree(path)
        ranks, shared, models, ppo = CASES["zero0"]
        text = f"{STEPS[step]} {shared} {ppo if step == 'step3' else models} "
        text += f"--resume_from_checkpoint {resume}"
        words = checkout.words(text, case="zero0", first=first)
        yield f"run/resumed/{step}", checkout.train(step, ranks, words, output)


def helps(checkout: Checkout, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Items]]:
    """Ask every program for its flags; yield what they print."""
    for name in PROGRAMS:
        if wanted(f"help/{name}"):
            code, out, err = checkout.call(name, ["--help"])
            yield f"help/{name}", {"exit": code, "stdout": out.splitlines(),
                                   "stderr": err.splitlines()}


def bad_inputs(checkout: Checkout, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Items]]:
    """Start every program with wrong flags; yield exit codes and error lines."""
    for name, lines in BAD.items():
        for line in lines.strip().splitlines():
            item = f"bad/{name}/{line.strip()}"
            if not wanted(item):
                continue
            code, out, err = checkout.call(name, checkout.words(f"{BASE.get(name, '')} {line}"))
            said = [text.rstrip() for text in err.splitlines() if is_complaint(text)]
            said += [text.rstrip() for text in out.splitlines() if "error" in text.lower()]
            yield item, {"exit": code, "lines": said}
            for path in ("out", "out.partial"):
                shutil.rmtree(checkout.work / path, ignore_errors=True)


def is_complaint(line: str) -> bool:
    """Return whether a line of stderr is an error's own: no traceback, usage, log line or bar."""
    return bool(line.strip()) and not re.match(r"\s|\[20|Traceback|usage:|.*(Warning|\d%\|)", line)


# --- the two commands ----------------------------------------------------------------------------


def record(args: argparse.Namespace) -> int:
    """Run everything in a checkout and write down what it did."""
    def wanted(name: str) -> bool:
        return any(name.startswith(part) or part.startswith(f"{name}/") for part in args.only)

    items: Items = {}
    root = Path(args.root or Path(__file__).parents[1]).resolve()
    target = Path(args.file).resolve()
    with tempfile.TemporaryDirectory(prefix="goldens-") as folder:
        checkout = Checkout(root, Path(folder).resolve())
        # Only now: what they read of the environment is set.
        import accelerate
        import datasets
        import deepspeed
        import peft
        import transformers.models.llama.modeling_llama

        loaded = (accelerate, datasets, deepspeed, peft, transformers)
        print("with", ", ".join(f"{module.__name__} {module.__version__}" for module in loaded))
        make_inputs(checkout.work)
        for part in (helps, bad_inputs, runs):
            before = time.monotonic()
            for name, found in part(checkout, wanted):
                now = time.monotonic()
                print(f"{now - before:6.1f} s  exit {found['exit']}  {name}", flush=True)
                before = now
                items |= {f"{name}/{key}": value for key, value in found.items()}
    target.write_text(json.dumps(items, indent=1, ensure_ascii=False) + "\n")
    print(f"{len(items)} items in {args.file}")
    return 0


def compare(args: argparse.Namespace) -> int:
    """Print the items that differ; 1 if there are any but expected ones."""
    before, after = (json.loads(Path(name).read_text()) for name in (args.before, args.after))
    names = [name for name in {**before, **after} if name.startswith(tuple(args.only))]
    differing = [name for name in names if before.get(name) != after.get(name)]
    for name in differing:
        print(f"--- {name}")
        if "/tensor " in name and name in before and name in after:
            continue  # two hashes tell no more than that they differ
        old, new = (pretty(record.get(name, "(not there)")) for record in (before, after))
        for line in list(difflib.unified_diff(old, new, lineterm="", n=0))[2:][: args.lines]:
            print(f"    {line[:400]}")
    expected = [name for name in differing
                if args.expected_help_changes and name.startswith("help/")]
    print(f"{len(names)} items compared, {len(differing)} differ"
          + (f", {len(expected)} of them expected" if expected else ""))
    return int(not names or len(differing) > len(expected))


def pretty(value: Any) -> list[str]:
    """Return a recorded value as lines."""
    if isinstance(value, list):
        return [row if isinstance(row, str) else json.dumps(row) for row in value]
    return json.dumps(value, indent=1).splitlines()


def main() -> int:
    """Read the command line and do one of the two."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    recorder = commands.add_parser("record", help="run everything, write what it did")
    recorder.add_argument("file", help="JSON file to write")
    recorder.add_argument("--root", help="the checkout (default: the one this script is in)")
    comparer = commands.add_parser("compare", help="print what differs; exit code 1 if anything")
    comparer.add_argument("before")
    comparer.add_argument("after")
    comparer.add_argument("--expected-help-changes", action="store_true",
                          help="differences of --help are printed, and are no failure")
    comparer.add_argument("--lines", type=int, default=12, help="most lines shown of an item")
    for command, action in ((recorder, record), (comparer, compare)):
        command.add_argument("--only", nargs="+", default=[""], metavar="PREFIX",
                             help="items whose names begin so, such as run/zero3 or bad/step1")
        command.set_defaults(action=action)
    args = parser.parse_args()
    return args.action(args)


if __name__ == "__main__":
    sys.exit(main())
