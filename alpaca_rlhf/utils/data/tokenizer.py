"""The one room that decides bos, eos, pad and how a dialogue becomes ids.

Prompt ids and response ids are made apart, once, and concatenated: in all three steps in the same
way, so that the ids the actor samples from, the ids the reward model is trained on and the ids it
scores are the same. eos is appended as an id, never as text, and pad is never eos.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from alpaca_rlhf.utils.data import chat_template
from alpaca_rlhf.utils.errors import UserError

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}

_PAD = "<pad>"
_PROBE = "probe"


class ChatFormat:
    """Turns messages and replies into ids with a tokenizer whose chat template is set.

    Raises:
        UserError: the template's end of an assistant's turn is not the single token eos, or its
            generation prompt is not what stands before a reply.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.eos_id: int = tokenizer.eos_token_id
        self.pad_id: int = tokenizer.pad_token_id
        # The named ones, and those that only the vocabulary marks as special (<|eot_id|>).
        added = tokenizer.added_tokens_decoder.values()
        specials = {*tokenizer.all_special_tokens, *(str(t) for t in added if t.special)}
        self._special = re.compile("|".join(map(re.escape, sorted(specials, key=len)[::-1])))
        question: list[Message] = [{"role": "user", "content": _PROBE}]
        prompt = self.prompt_text(question)
        answer: Message = {"role": "assistant", "content": _PROBE}
        full = tokenizer.apply_chat_template([*question, answer], tokenize=False)
        after = full[len(prompt) :]
        if not full.startswith(prompt) or _PROBE not in after:
            raise UserError(
                "--chat_template tokenizer: the template's generation prompt is not what stands "
                "before a reply; choose human_assistant"
            )
        self._separator, ending = after.split(_PROBE, 1)
        if not ending.startswith(tokenizer.eos_token):
            raise UserError(
                f"--chat_template tokenizer: an assistant's turn ends with {ending!r}, not with "
                f"the single token {tokenizer.eos_token!r}; choose human_assistant"
            )
        # Sentencepiece puts a space before whatever it is given first, so a reply is encoded
        # behind the end of the prompt, and the ids of that end are cut off again.
        self._anchor = prompt.rstrip("\n").rsplit("\n", 1)[-1] + prompt[len(prompt.rstrip("\n")) :]
        self._anchor_ids = self._encode(self._anchor)

    def prompt_text(self, messages: Sequence[Message]) -> str:
        """The text of a dialogue that the assistant is to go on with.

        Raises:
            UserError: the template refuses the dialogue, as some do when roles do not alternate.
        """
        cleaned = [{**m, "content": self._without_specials(m["content"])} for m in messages]
        try:
            return self.tokenizer.apply_chat_template(
                cleaned, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise UserError(
                f"--chat_template tokenizer: the template refuses a dialogue of {len(messages)} "
                f"turns ({' '.join(str(error).split())}); choose human_assistant"
            ) from error

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a dialogue up to the place where the assistant's reply begins (bos included)."""
        return self._encode(self.prompt_text(messages))

    def response_ids(self, text: str) -> list[int]:
        """Ids of a reply, eos last."""
        reply = self._separator + self._without_specials(text).strip()
        ids = self._encode(self._anchor + reply)
        n = len(self._anchor_ids)
        # A tokenizer that merges across the border gives the reply on its own instead.
        ids = ids[n:] if ids[:n] == self._anchor_ids else self._encode(reply)
        return [*ids, self.eos_id]

    def text_ids(self, text: str) -> list[int]:
        """Ids of plain text, that of no dialogue, eos last."""
        return [*self._encode(self._without_specials(text)), self.eos_id]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated ids, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _without_specials(self, text: str) -> str:
        """`text` with the spelled-out special tokens taken out: they would become real ones."""
        before = None
        while before != text:  # taking one out may join the halves of another
            before, text = text, self._special.sub("", text)
        return text


def load_tokenizer(
    path: str, template: str = "human_assistant", trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load a tokenizer, with eos and a pad of its own and the chat template set.

    Args:
        path: hub id or folder.
        template: a key of `chat_template.TEMPLATES`, or "tokenizer" for the one it came with.
        trust_remote_code: allow the code of the repository to run.

    Raises:
        UserError: no tokenizer there, no usable eos, or no template of its own when asked for.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        remedy = "give a folder with tokenizer files" if Path(path).exists() else "check the name"
        raise UserError(f"no tokenizer can be loaded from {path}: {reason}; {remedy}") from error
    if not tokenizer.eos_token or tokenizer.eos_token_id == tokenizer.unk_token_id:
        raise UserError(f"{path}: the tokenizer has no eos token; set eos_token in its config")
    if not tokenizer.pad_token or tokenizer.pad_token_id == tokenizer.eos_token_id:
        _give_pad(tokenizer)
    if template == chat_template.OWN_TEMPLATE:
        if not tokenizer.chat_template:
            raise UserError(
                f"--chat_template tokenizer: the tokenizer of {path} has none; "
                f"choose one of {', '.join(chat_template.TEMPLATES)}"
            )
    else:
        adds_bos = tokenizer.bos_token_id is not None and (
            tokenizer.encode(_PROBE)[:1] == [tokenizer.bos_token_id]
        )
        tokenizer.chat_template = chat_template.jinja(template, adds_bos)
    return tokenizer


def _give_pad(tokenizer: PreTrainedTokenizerBase) -> None:
    """A pad that is not eos: unk when it is a token of its own, else a new token."""
    unk = tokenizer.unk_token
    if unk and tokenizer.unk_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        tokenizer.pad_token = unk
    else:
        tokenizer.add_special_tokens({"pad_token": _PAD})


def describe(tokenizer: PreTrainedTokenizerBase) -> str:
    """One line with the special tokens, for the console."""
    named = ((k, getattr(tokenizer, f"{k}_token"), getattr(tokenizer, f"{k}_token_id"))
             for k in ("bos", "eos", "pad"))
    tokens = ", ".join(f"{k} {token!r} = {i}" for k, token, i in named)
    return f"tokenizer: {len(tokenizer)} tokens, {tokens}"


def require_same(actor: PreTrainedTokenizerBase, critic: PreTrainedTokenizerBase) -> None:
    """Refuse an actor and a critic that do not read the same ids.

    Raises:
        UserError: their vocabularies, special tokens or chat templates differ.
    """
    checks = {
        "vocabularies": lambda t: t.get_vocab(),
        "special tokens": lambda t: (t.bos_token_id, t.eos_token_id, t.pad_token_id),
        "chat templates": lambda t: t.chat_template,
    }
    for what, value in checks.items():
        if value(actor) != value(critic):
            raise UserError(
                f"--actor_model_name_or_path and --critic_model_name_or_path have different {what} "
                f"({actor.name_or_path}, {critic.name_or_path}); train both from the same model"
            )
