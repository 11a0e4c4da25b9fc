"""The embedded model: a LLaMA of a few million parameters, made at first use.

It is the base model when no `--model_name_or_path` is given: an ordinary Hugging Face folder with a
`LlamaForCausalLM` and a sentencepiece tokenizer of its own, pretrained as a plain language model on
the dialogues of `assistant_world`, good and bad. It knows the facts of that world and writes
replies of every quality, as a base model does; the three steps take it from there.

The folder is named by a hash of the recipe and of the text. It is made beside its place and renamed
into it, so a build that was killed is never taken for a model, and of two builds at once one wins.

    folder = ensure_tiny_llama(Path.home() / ".cache" / "alpaca_rlhf")
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer, PreTrainedTokenizerBase

from alpaca_rlhf.demo import assistant_world
from alpaca_rlhf.utils import console, distributed
from alpaca_rlhf.utils.data import chat_template
from alpaca_rlhf.utils.data.tokenizer import ChatFormat

BOS, EOS, UNK, PAD = "<s>", "</s>", "<unk>", "<pad>"
BUILD_VERSION = 2
"""Part of the cache key: raise it when the code of this module makes a different model."""


@dataclass(frozen=True)
class Recipe:
    """All that decides what is built: sizes, text and training."""

    vocab_size: int = 1600
    hidden_size: int = 192
    intermediate_size: int = 512
    layers: int = 4
    heads: int = 6
    max_positions: int = 1024
    tokenizer_dialogues: int = 3000
    dialogues: int = 20000
    batch_size: int = 16
    prompt_weight: float = 0.1
    """Of a prompt's tokens in the loss: what is asked is chance, how it is answered is not."""
    learning_rate: float = 3e-3
    warmup_share: float = 0.05
    weight_decay: float = 0.05
    seed: int = 0


def ensure_tiny_llama(
    cache_home: Path, progress: bool = True, recipe: Recipe = Recipe()  # noqa: B008 (frozen)
) -> Path:
    """The folder of the tiny LLaMA under `cache_home`; built if it isn't there yet.

    Args:
        cache_home: where models are kept; made if missing.
        progress: show a bar on stderr while building.
        recipe: sizes, text and training.
    """
    folder = cache_home / f"tiny-llama-{_key(recipe)}"
    if folder.is_dir():
        return folder
    cache_home.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=cache_home))
    try:
        _build(unfinished, progress, recipe)
        unfinished.chmod(0o755)
        _move_into_place(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _key(recipe: Recipe) -> str:
    """A hash of everything the built model follows from."""
    template = chat_template.TEMPLATES["human_assistant"]
    source = repr((BUILD_VERSION, asdict(recipe), assistant_world.fingerprint(), template))
    return hashlib.sha256(source.encode()).hexdigest()[:12]


def _move_into_place(unfinished: Path, folder: Path) -> None:
    """Rename a finished build; if another process was first, its build is the one that counts."""
    try:
        unfinished.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _build(folder: Path, progress: bool, recipe: Recipe) -> None:
    """Train tokenizer and model from scratch and save both into `folder`."""
    tokenizer = _train_tokenizer(recipe)
    with torch.random.fork_rng(devices=[]), _all_cores():
        torch.manual_seed(recipe.seed)
        model = LlamaForCausalLM(_config(tokenizer, recipe))
        _pretrain(model, _batches(ChatFormat(tokenizer), recipe), progress, recipe)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _config(tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=recipe.max_positions,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )


def _dialogues(count: int, seed: int) -> Iterator[tuple[list[dict[str, str]], str]]:
    return islice(assistant_world.pretraining_texts(seed), count)


# ---------------------------------------------------------------------------- the tokenizer


def _train_tokenizer(recipe: Recipe) -> LlamaTokenizer:
    """A LLaMA tokenizer, byte-pair pieces and single bytes, trained on the world's text.

    No space is put before a text, so what is decoded is what was encoded, to the character.
    """
    lines: list[str] = []
    for messages, reply in _dialogues(recipe.tokenizer_dialogues, recipe.seed):
        # Each line of the template apart: sentencepiece reads sentences, and learns no newline.
        lines += [f"{m['role'].replace('user', 'human').title()}: {m['content']}" for m in messages]
        lines.append(f"Assistant: {reply}")
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=trained,
        model_type="bpe",
        vocab_size=recipe.vocab_size,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        split_digits=True,
        character_coverage=1.0,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        unk_piece=UNK,
        bos_piece=BOS,
        eos_piece=EOS,
        pad_piece=PAD,
        num_threads=1,
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    vocab = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    tokenizer = LlamaTokenizer(
        vocab=vocab,
        merges=_merges(vocab),
        unk_token=UNK,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        add_bos_token=True,
        add_prefix_space=False,
        model_max_length=recipe.max_positions,
    )
    tokenizer.chat_template = chat_template.jinja("human_assistant", adds_bos=True)
    return tokenizer


def _merges(vocab: dict[str, int]) -> list[tuple[str, str]]:
    """The merges of a sentencepiece BPE vocabulary, earliest first.

    Sentencepiece merges whatever adjacent pair gives the piece learnt first, that is the lowest id;
    so every way of cutting a piece in two known pieces is a merge, ranked by the piece's id.
    """
    return [
        (piece[:cut], piece[cut:])
        for piece in sorted(vocab, key=vocab.__getitem__)
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]


# ---------------------------------------------------------------------------- the pretraining


def _batches(chat: ChatFormat, recipe: Recipe) -> list[tuple[Tensor, Tensor]]:
    """Batches of ids and weights of the loss [B, T] (pads: 0), of like lengths, in random order.

    A dialogue is a row of its own: packed ones would have to find their subject among strangers',
    and it is copying the subject of the question that takes a small model longest to learn.
    """
    encoded = []
    for messages, reply in _dialogues(recipe.dialogues, recipe.seed):
        prompt, response = chat.prompt_ids(messages), chat.response_ids(reply)
        weights = [recipe.prompt_weight] * len(prompt) + [1.0] * len(response)
        encoded.append((torch.tensor(prompt + response), torch.tensor(weights)))
    encoded.sort(key=lambda row: len(row[0]))
    batches = []
    for start in range(0, len(encoded), recipe.batch_size):
        rows = encoded[start : start + recipe.batch_size]
        ids, shares = [row[0] for row in rows], [row[1] for row in rows]
        batches.append((
            pad_sequence(ids, batch_first=True, padding_value=chat.pad_id),
            pad_sequence(shares, batch_first=True),
        ))
    return [batches[i] for i in torch.randperm(len(batches)).tolist()]


def _pretrain(
    model: nn.Module, batches: list[tuple[Tensor, Tensor]], progress: bool, recipe: Recipe
) -> None:
    """One pass over `batches`; cosine rate with warm-up."""
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=recipe.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    warmup = max(1, round(recipe.warmup_share * len(batches)))
    model.train()
    bar = tqdm(
        batches, desc="pretraining the tiny LLaMA", unit="step", mininterval=1.0,
        disable=not progress,
    )
    for step, (ids, weights) in enumerate(bar):
        done = max(0, step - warmup) / max(1, len(batches) - warmup)
        scale = min(1.0, (step + 1) / warmup) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))
        optimizer.param_groups[0]["lr"] = recipe.learning_rate * scale
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = losses @ weights[:, 1:].flatten() / weights[:, 1:].sum()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
    model.eval()


@contextmanager
def _all_cores() -> Iterator[None]:
    """Compute with the cores of this process: a launcher may have left each rank only its share."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(8, len(os.sched_getaffinity(0))))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def shared(cache_home: Path) -> str:
    """The folder of the tiny LLaMA, announced on the console; one process builds, others wait."""
    console.say("no model is given: using the embedded tiny LLaMA (built at first use)")
    with distributed.main_first():
        return str(ensure_tiny_llama(cache_home, progress=distributed.is_main()))
