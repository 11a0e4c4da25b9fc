"""The embedded base model: a LLaMA of a few million parameters, pretrained at first use.

It is the base model when no `--model_name_or_path` is given: an ordinary Hugging Face folder with a
`LlamaForCausalLM` and a sentencepiece tokenizer of its own, pretrained as a language model on the
dialogues of `assistant_world`. It knows the facts of that data set and writes responses of every
quality, as a base model does; the three steps start from it.

The folder is built under a temporary name and renamed, so a build that was killed is never taken
for a model, and of two builds at the same time one is kept.

    folder = ensure_tiny_llama(Path.home() / ".cache" / "alpaca_rlhf")
"""

import hashlib
import io
import math
import shutil
import tempfile
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer
from transformers.convert_slow_tokenizer import generate_merges

from alpaca_rlhf.demo import assistant_world
from alpaca_rlhf.utils import console, distributed
from alpaca_rlhf.utils.configs import RoleConfig
from alpaca_rlhf.utils.data import chat_template
from alpaca_rlhf.utils.data.tokenizer import ChatFormat

# Raise it whenever one recipe gives another model than before: by changes of this module or of the
# human_assistant template. Changes of the text count in assistant_world.FORMAT.
FORMAT = 3

BOS, EOS, UNK, PAD = "<s>", "</s>", "<unk>", "<pad>"


@dataclass(frozen=True)
class Recipe:
    """Sizes, amount of text and hyperparameters of the embedded model.

    Attributes:
        tokenizer_dialogues: number of dialogues that the tokenizer is trained on.
        dialogues: number of dialogues that the model is pretrained on, once each.
        prompt_weight: weight of prompt tokens in the loss; which question is asked is random, how
            it is answered is not.
        warmup_share: share of the optimizer steps.
    """

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
    learning_rate: float = 3e-3
    warmup_share: float = 0.05
    weight_decay: float = 0.05
    seed: int = 0


def or_embedded(role: RoleConfig, cache_home: Path) -> RoleConfig:
    """Return the role, with the embedded model if it names none.

    On each node one rank builds the model, and the others wait.
    """
    if role.model_name_or_path:
        return role
    console.say("no model is given: using the embedded tiny LLaMA (built at first use)")
    with distributed.main_first():
        return replace(role, model_name_or_path=str(ensure_tiny_llama(cache_home)))


def ensure_tiny_llama(
    cache_home: Path, recipe: Recipe = Recipe()  # noqa: B008 (frozen)
) -> Path:
    """Return the folder of the tiny LLaMA under `cache_home`; build it if it is not there.

    While it is built, a terminal shows a progress bar on stderr.
    """
    key = repr((FORMAT, assistant_world.FORMAT, asdict(recipe)))
    folder = cache_home / f"tiny-llama-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    cache_home.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=cache_home))
    try:
        _build(unfinished, recipe)
        unfinished.chmod(0o755)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, and its build is used
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _build(folder: Path, recipe: Recipe) -> None:
    """Train tokenizer and model from scratch and save both in `folder`."""
    tokenizer = _train_tokenizer(recipe)
    # A launcher may have left each rank only its share of the cores.
    share = torch.get_num_threads()
    torch.set_num_threads(min(8, distributed.usable_cores()))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=recipe.hidden_size,
            intermediate_size=recipe.intermediate_size, num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads, num_key_value_heads=recipe.heads,
            max_position_embeddings=recipe.max_positions, tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id, use_cache=True,
        ))
        _pretrain(model, _batches(ChatFormat(tokenizer), recipe), recipe)
    torch.set_num_threads(share)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---------------------------------------------------------------------------- the tokenizer


def _train_tokenizer(recipe: Recipe) -> LlamaTokenizer:
    """Train a LLaMA tokenizer: byte-pair encoding with single bytes as fallback.

    It puts no space before a text, so decoding gives back exactly the text that was encoded.
    """
    lines: list[str] = []
    texts = assistant_world.pretraining_texts(recipe.seed)
    for messages, response in islice(texts, recipe.tokenizer_dialogues):
        # One sentence for each line of the template: sentencepiece does not learn newlines.
        lines += [f"{m['role'].replace('user', 'human').title()}: {m['content']}" for m in messages]
        lines.append(f"Assistant: {response}")
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=trained, model_type="bpe",
        vocab_size=recipe.vocab_size, byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, add_dummy_prefix=False, split_digits=True,
        character_coverage=1.0, unk_id=0, bos_id=1, eos_id=2, pad_id=3, unk_piece=UNK,
        bos_piece=BOS, eos_piece=EOS, pad_piece=PAD, num_threads=1, minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    vocab = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    tokenizer = LlamaTokenizer(
        vocab=vocab, merges=generate_merges(vocab, None), model_max_length=recipe.max_positions,
        unk_token=UNK, bos_token=BOS, eos_token=EOS, pad_token=PAD, add_bos_token=True,
        add_prefix_space=False,
    )
    tokenizer.chat_template = chat_template.jinja("human_assistant", adds_bos=True)
    return tokenizer


# ---------------------------------------------------------------------------- the pretraining


def _batches(chat: ChatFormat, recipe: Recipe) -> list[tuple[Tensor, Tensor]]:
    """Cut the dialogues into batches of similar length, in random order.

    Each dialogue is a row of its own: copying the subject of the question takes a small model
    longest to learn, and in packed rows it would have to find it among those of other dialogues.

    Returns:
        Token ids [B, T] and weights of the loss [B, T] (0 at pads) of each batch.
    """
    encoded = []
    texts = assistant_world.pretraining_texts(recipe.seed)
    for messages, response in islice(texts, recipe.dialogues):
        prompt_ids, response_ids = chat.prompt_ids(messages), chat.response_ids(response)
        weights = [recipe.prompt_weight] * len(prompt_ids) + [1.0] * len(response_ids)
        encoded.append((torch.tensor(prompt_ids + response_ids), torch.tensor(weights)))
    encoded.sort(key=lambda row: len(row[0]))
    batches = []
    for start in range(0, len(encoded), recipe.batch_size):
        rows = encoded[start : start + recipe.batch_size]
        batches.append((
            pad_sequence([ids for ids, _ in rows], batch_first=True, padding_value=chat.pad_id),
            pad_sequence([weights for _, weights in rows], batch_first=True),
        ))
    return [batches[i] for i in torch.randperm(len(batches)).tolist()]


def _pretrain(model: nn.Module, batches: list[tuple[Tensor, Tensor]], recipe: Recipe) -> None:
    """Train for one epoch; the learning rate warms up and then follows a cosine."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95),
        weight_decay=recipe.weight_decay, fused=True,
    )
    warmup = max(1, round(recipe.warmup_share * len(batches)))
    model.train()
    # disable=None: unless stderr is a terminal.
    bar = tqdm(batches, "pretraining the tiny LLaMA", unit="step", mininterval=1.0, disable=None)
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
