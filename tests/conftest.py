"""Random models of a few thousand weights, saved once a session, and what tests build from them.

Heavy imports are inside functions, so that tests of the command line stay quick.
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pytest

from alpaca_rlhf.utils.configs import (
    AdapterConfig,
    EngineConfig,
    LoadingConfig,
    PPOConfig,
    RewardConfig,
    RoleConfig,
    RolesConfig,
    SamplingConfig,
    ScheduleConfig,
)

# Programs that a test starts take --dtype auto for fp32 on any processor: bf16 without instructions
# for it is slow. Before torch is imported.
os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE"

# Background jobs of a shell ignore Ctrl-C, and so would every process that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The files that take longest, the longest first. Each goes to one process as a whole: begun last,
# one would leave the other processes idle.
LONGEST = ("test_distributed", "test_entry_points", "test_memory_plan", "test_families",
           "test_golden_curves", "test_quantized", "test_backbone", "test_recipes",
           "test_multi_node", "test_precision", "test_killed_runs", "test_debugging",
           "test_my_deepspeed", "test_slow_ranks", "test_check_gpu", "test_ppo_trainer",
           "test_decoder", "test_checkpoints", "test_tokenizer", "test_chat", "test_serve")

# Of different lengths: batches of them are padded.
PROMPTS = ("What is the capital of France?", "Hi.", "Name a colour.", "How many legs has a cat?",
           "Who wrote Faust?", "Is ice cold?", "What do bees make of it all?", "Go on.")


def small_config(tokenizer: Any, **changes: Any) -> Any:
    """A LLaMA of two layers; a large std of its weights makes its choices clear."""
    from transformers import LlamaConfig

    sizes = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 128, "initializer_range": 0.25, "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return LlamaConfig(**{**sizes, **changes})


def small_tokenizer() -> Any:
    """A sentencepiece tokenizer of some 400 pieces with the chat template set."""
    from alpaca_rlhf.demo import tiny_llama

    return tiny_llama._train_tokenizer(
        tiny_llama.Recipe(vocab_size=420, tokenizer_dialogues=150, max_positions=128)
    )


def save_models(folder: Path, **sizes: Any) -> None:
    """Write `actor` and `critic` (a reward model, with statistics); `sizes` changes them."""
    import torch
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification

    from alpaca_rlhf.utils.model.reward_model import save_statistics

    tokenizer = small_tokenizer()
    torch.manual_seed(0)
    actor = LlamaForCausalLM(small_config(tokenizer, **sizes))
    torch.manual_seed(1)
    critic = LlamaForSequenceClassification(small_config(tokenizer, num_labels=1, **sizes))
    for name, model in (("actor", actor), ("critic", critic)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    save_statistics(folder / "critic", 0.5, 2.0, 40)
    (folder / "unclipped.json").write_text('{"gradient_clipping": 1000000.0}')


@dataclass(frozen=True)
class Small:
    """The saved models, and the engines and trainers that tests build from them."""

    folder: Path
    overrides: str | None = None

    @property
    def actor(self) -> str:
        """Folder of the causal LM."""
        return str(self.folder / "actor")

    @property
    def critic(self) -> str:
        """Folder of the reward model."""
        return str(self.folder / "critic")

    @property
    def unclipped(self) -> str:
        """DeepSpeed's configuration for steps that are compared: clipping would hide a factor."""
        return str(self.folder / "unclipped.json")

    @property
    def comparable(self) -> dict[str, Any]:
        """Options of `trained` and `roles` for steps that are compared.

        A large epsilon makes Adam follow the size of the gradient instead of its sign alone.
        """
        return {"adam_eps": 0.1, "learning_rate": 0.1, "lora_learning_rate": 0.1,
                "overrides": self.overrides or self.unclipped}

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of both."""
        from alpaca_rlhf.utils.data.tokenizer import load_tokenizer

        return load_tokenizer(self.actor)

    @cached_property
    def chat(self) -> Any:
        """Tokenizer and chat template."""
        from alpaca_rlhf.utils.data.tokenizer import ChatFormat

        return ChatFormat(self.tokenizer)

    def causal_lm(self, **options: Any) -> Any:
        """The actor, plain, in evaluation mode."""
        from alpaca_rlhf.utils.model.causal_lm import load_causal_lm

        return self._loaded(load_causal_lm, self.actor, **options)

    def reward_model(self, path: str = "", **options: Any) -> Any:
        """The critic, plain, in evaluation mode; or a reward model from another model."""
        from alpaca_rlhf.utils.model.reward_model import load_reward_model

        return self._loaded(load_reward_model, path or self.critic, **options)

    def _loaded(self, load: Any, path: str, dtype: str = "fp32", **role: Any) -> Any:
        config = {"zero_optimization": {"stage": 0}}
        role = RoleConfig(model_name_or_path=path, **role)
        return load(role, LoadingConfig(dtype=dtype), config, self.tokenizer).eval()

    def _settings(
        self, *names: str, stage: int, lora: int, accumulation: int = 1, lora_dropout: float = 0.0,
        only_lora: bool = True, overrides: str | None = None, adam_eps: float = 1e-8,
        dtype: str = "fp32", lr_scheduler_type: Any = "constant", total_steps: int = 100,
        bits: int | None = None, **role: Any,
    ) -> tuple[list[RoleConfig], dict[str, Any]]:
        """Options of training, with a constant learning rate."""
        role = {"learning_rate": 1e-3, "lora_learning_rate": 1e-3, "zero_stage": stage,
                "lora_dim": lora, **role}
        roles = [RoleConfig(model_name_or_path=str(self.folder / name), **role) for name in names]
        return roles, {
            "loading": LoadingConfig(dtype=dtype),
            "adapters": AdapterConfig(
                lora_dropout=lora_dropout, only_optimize_lora=only_lora, load_in_4bit=bits == 4,
                load_in_8bit=bits == 8),
            "engine": EngineConfig(deepspeed_config=overrides or self.overrides),
            "schedule": ScheduleConfig(
                lr_scheduler_type=lr_scheduler_type, gradient_accumulation_steps=accumulation
            ),
            "micro_batch_size": 2, "total_steps": total_steps, "adam_eps": adam_eps,
        }

    def trained(self, name: str, stage: int = 0, lora: int = 0, **changes: Any) -> Any:
        """A DeepSpeed engine of the actor or of the critic."""
        from alpaca_rlhf.utils.engine import build_trained
        from alpaca_rlhf.utils.model.causal_lm import load_causal_lm
        from alpaca_rlhf.utils.model.reward_model import TokenScorer, load_reward_model

        load, wrap = (load_causal_lm, None) if name == "actor" else (load_reward_model, TokenScorer)
        load = partial(load, tokenizer=self.tokenizer)
        (role,), settings = self._settings(name, stage=stage, lora=lora, **changes)
        return build_trained(load, role, wrap=wrap, **settings)[0]

    def roles(
        self, stage: int = 0, lora: int = 0, eos_every: int = 0, needs_reward_model: bool = True,
        critic_warmup_steps: int = 0, places: dict[str, bool] | None = None, **changes: Any,
    ) -> Any:
        """The four roles of step 3; every `eos_every`th id ends a response: lengths differ."""
        import torch

        from alpaca_rlhf.training_model.step3_rlhf_finetuning.rlhf_engine import RLHFEngine

        (actor, critic), settings = self._settings(
            "actor", "critic", stage=stage, lora=lora, **changes)
        engine = RLHFEngine(
            actor, critic, self.tokenizer, needs_reward_model=needs_reward_model,
            critic_warmup_steps=critic_warmup_steps, roles=RolesConfig(**places or {}), **settings
        )
        if eos_every:
            engine.eos_ids = torch.arange(0, len(self.tokenizer), eos_every)
        return engine

    def maker(
        self, engine: Any, hybrid: bool = False, tokens: int = 6, temperature: float = 1.0,
        seed: int = 7, reward_function: Any = None, rollout_engine: Any = None, **sampling: Any,
    ) -> Any:
        """Generates and scores rollouts."""
        from alpaca_rlhf.training_model.step3_rlhf_finetuning.rollout import RolloutMaker

        return RolloutMaker(
            engine,
            rollout_engine or hybrid_engine(engine.actor, hybrid, slots=3),
            self.chat,
            sampling=SamplingConfig(max_new_tokens=tokens, temperature=temperature, **sampling),
            seed=seed,
            micro_batch_size=2, reward_function=reward_function,
        )

    def prompts(self, count: int = 4) -> Any:
        """A padded batch of prompts."""
        from alpaca_rlhf.utils.data.batches import collate_prompts

        ids = [self.chat.prompt_ids([{"role": "user", "content": text}]) for text in PROMPTS]
        return collate_prompts([{"prompt_ids": row} for row in ids[:count]], self.chat.pad_id)

    def experience(
        self, maker: Any, count: int = 4, *, prompts: Any = None, generations: int = 1,
        trainer: Any = None, number: int = 0, **reward: Any,
    ) -> tuple[Any, Any]:
        """The experience of one PPO iteration, and its metrics; scores are not normalized.

        It is scored in the micro-batches of the trainer's iteration `number`, if one is given.
        """
        from alpaca_rlhf.training_model.step3_rlhf_finetuning.rollout import (
            RewardNormalizer,
            make_experience,
        )

        prompts = prompts or self.prompts(count)
        config = RewardConfig(**{"reward_normalization": "none", **reward})
        rollout = maker.generate(prompts, generations)
        cuts = sum(trainer.plan(rollout, number), []) if trainer else None
        scored, _ = maker.score(rollout, cuts)
        return make_experience(
            scored, RewardNormalizer(config, ""), config, PPOConfig(), config.kl_coef
        )

    def trainer(
        self, engine: Any, most: int = 10, accumulation: int = 1, temperature: float = 1.0,
        micro: int = 2, max_tokens: int | None = None, folder: Path | None = None, **ppo: Any,
    ) -> Any:
        """A trainer with micro-batches of `micro` rows.

        `most` consecutive non-finite steps abort the run; their batches are saved in `folder`.
        """
        from alpaca_rlhf.training_model.step3_rlhf_finetuning.ppo_trainer import PPOTrainer
        from alpaca_rlhf.training_model.step3_rlhf_finetuning.rollout import RewardNormalizer
        from alpaca_rlhf.utils.run.nonfinite import NonFiniteGuard

        return PPOTrainer(
            engine, PPOConfig(per_device_training_batch_size=micro, **ppo),
            normalizer=RewardNormalizer(RewardConfig(reward_normalization="none"), ""),
            schedule=ScheduleConfig(
                gradient_accumulation_steps=accumulation, max_tokens_per_micro_batch=max_tokens),
            temperature=temperature, seed=3,
            guard=NonFiniteGuard(folder, most, "lower the learning rate"),
        )


def hybrid_engine(engine: Any, enabled: bool = True, slots: int = 0, **options: bool) -> Any:
    """Return a hybrid engine around an actor's engine."""
    from alpaca_rlhf.training_model.step3_rlhf_finetuning.hybrid_engine import HybridEngine
    from alpaca_rlhf.utils.configs import HybridEngineConfig

    return HybridEngine(engine, HybridEngineConfig(enable_hybrid_engine=enabled, **options), slots)


def learn(trainer: Any, experience: Any, number: int = 0, *more: Any) -> dict[str, float]:
    """All updates on this experience; the metrics of the updates alone."""
    from alpaca_rlhf.training_model.step3_rlhf_finetuning.ppo_trainer import Iteration

    return trainer.update(Iteration(experience, {}), number, *more)


def fill_adapters(model: Any) -> Any:
    """Fill what an adapter starts with, matrices B of 0 and the old head: it changes the model."""
    import deepspeed
    import torch

    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                if parameter.numel():
                    torch.nn.init.normal_(parameter, std=0.2)
    return model


def save_adapted(small: Small, folder: Path) -> Small:
    """Write what steps 1 and 2 write with LoRA from one base: `actor` and `critic`."""
    from alpaca_rlhf.utils.model.reward_model import save_statistics
    from alpaca_rlhf.utils.run.export import export

    actor = fill_adapters(small.trained("actor", lora=4).module)
    export(actor, small.tokenizer, folder / "actor", "card", {})
    over = replace(small, folder=folder / "bases")
    for name in ("actor", "critic"):  # the reward model starts from the causal LM
        (over.folder / name).parent.mkdir(exist_ok=True)
        (over.folder / name).symlink_to(small.actor)
    critic = fill_adapters(over.trained("critic", lora=4).module.model)
    export(critic, small.tokenizer, folder / "critic", "card", {})
    save_statistics(folder / "critic", 0.5, 2.0, 40)
    return replace(small, folder=folder, overrides=small.unclipped)


def with_adapter(model: Any, names: str | None = None, only_lora: bool = True) -> Any:
    """The model with a LoRA adapter on these modules, by default on all projections."""
    from alpaca_rlhf.utils.model import lora

    role = RoleConfig(lora_dim=4, lora_module_name=names)
    adapters = AdapterConfig(only_optimize_lora=only_lora)
    targets = lora.match_modules(model, role)
    return fill_adapters(lora.add_lora(model, targets, role, adapters)).eval()


def snapshot(model: Any) -> dict[str, Any]:
    """A copy of every weight, whole also under ZeRO-3."""
    from alpaca_rlhf.utils.model.weights.whole import gathered_state_dict

    return gathered_state_dict(model, on_this_rank=True)


def moved(before: dict[str, Any], model: Any) -> set[str]:
    """Names of the weights that are no longer, bit for bit, what they were."""
    after = snapshot(model)
    return {name for name in after if not after[name].equal(before[name])}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first (`--no-loadscope-reorder` keeps them there)."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Gives the machine this number of ranks, bytes and precisions."""
    from alpaca_rlhf.utils import distributed

    def make(device: float, host: float, ranks: int = 1, cpu: bool = False, bf16: bool = False):
        monkeypatch.setattr(distributed, "free_memory", lambda: (device, host))
        monkeypatch.setattr(distributed, "on_cpu", lambda: cpu)
        monkeypatch.setattr(distributed, "has_bf16", lambda: bf16)
        monkeypatch.setattr(distributed, "world_size", lambda: ranks)

    return make


@pytest.fixture(scope="session")
def group() -> None:
    """A process group of this process alone."""
    from alpaca_rlhf.utils import distributed

    before = dict(os.environ)
    distributed.initialize(0)
    distributed.bf16_gain = lambda: 0.5  # whatever this machine is
    gc.freeze()  # DeepSpeed collects garbage whenever it builds an engine: not among the libraries
    # A process that a test starts must not take itself for a rank of this group. DeepSpeed reads
    # LOCAL_RANK whenever it builds an engine.
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if name not in before:
            os.environ.pop(name, None)


@pytest.fixture(scope="session")
def imported() -> Iterator[Any]:
    """A process that has imported the libraries, to run programs in forks of it."""
    from programs import Imported

    process = Imported()
    yield process
    process.close()


@pytest.fixture(scope="session")
def small(group: None, tmp_path_factory: pytest.TempPathFactory) -> Small:
    """The small models, and what is built from them."""
    folder = tmp_path_factory.mktemp("small")
    save_models(folder)
    return Small(folder)
