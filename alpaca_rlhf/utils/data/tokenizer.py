"""Tokenizers: bos, eos, pad, and how a dialogue becomes token ids.

Prompt ids and response ids are made separately, once, and concatenated: in all three steps in the
same way, so that the ids the actor samples from, the ids the reward model is trained on and the ids
it scores are the same. eos is appended as an id, never as text, and pad is never eos.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from pathlib import Path

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from alpaca_rlhf.utils import console
from alpaca_rlhf.utils.configs import LoadingConfig
from alpaca_rlhf.utils.data import chat_template
from alpaca_rlhf.utils.errors import UserError
from alpaca_rlhf.utils.files import pointer_problem

# {"role": "system" | "user" | "assistant", "content": text}; see `samples.Sample` for two more.
Message = dict[str, str]

_PAD = "<pad>"
_PROBE = "probe"
# Stands for a response while a dialogue is rendered; the text between two of them is context.
_RESPONSE = "\u27e6alpaca-rlhf response\u27e7"
# A pad that a vocabulary may have though its tokenizer does not name it.
_SPARE_PADS = (_PAD, "<|padding|>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>")
# Written by Meta's converter for LLaMA 1: names without text, of tokens that are there.
_EMPTY_NAMES = {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}
# Key in tokenizer_config.json: the --chat_template that the model was trained with.
_TEMPLATE_NAME = "chat_template_name"


class TemplateRefusal(UserError):
    """A dialogue that the chat template refuses, or renders with its responses changed."""


class ChatFormat:
    """A tokenizer with its chat template: messages and responses to token ids, and back.

    A dialogue is a list of segments: the context before a response, the response with its eos, the
    context before the next one, and so on. Each is encoded by itself, in surroundings like its own.

    Raises:
        UserError: the template does not end an assistant turn with the single token eos, or its
            generation prompt is not the text that precedes a response.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.eos_id: int = tokenizer.eos_token_id
        self.pad_id: int = tokenizer.pad_token_id
        controls = _control_tokens(tokenizer)
        self._control_ids = frozenset(controls.values())
        self._special = re.compile("|".join(map(re.escape, sorted(controls, key=len)[::-1])))
        # Our own templates render a response in one way wherever it stands.
        self._is_ours = chat_template.name_of(tokenizer.chat_template) is not None
        question: list[Message] = [{"role": "user", "content": _PROBE}]
        prompt = self.prompt_text(question)
        answer: Message = {"role": "assistant", "content": _PROBE}
        full = tokenizer.apply_chat_template([*question, answer], tokenize=False)
        after = full[len(prompt) :]
        if not full.startswith(prompt) or _PROBE not in after:
            raise UserError(
                "--chat_template tokenizer: the template's generation prompt is not the text that "
                "precedes a response; choose human_assistant"
            )
        self._separator, ending = after.rsplit(_PROBE, 1)
        # Qwen3's templates put a thinking block before the last response only, and some open it in
        # the generation prompt.
        self._earlier_separator = self._separator
        with contextlib.suppress(TemplateRefusal):
            earlier = self.prompt_text([*question, answer, *question])
            shared = len(os.path.commonprefix([earlier, prompt]))
            self._earlier_separator = earlier[shared:].split(_PROBE, 1)[0]
        if not ending.startswith(tokenizer.eos_token):
            raise UserError(
                f"--chat_template tokenizer: an assistant turn ends with {ending!r}, not with "
                f"the single token {tokenizer.eos_token!r}; choose human_assistant"
            )
        # Sentencepiece puts a space before the text it is given, so a response is encoded after
        # the end of the prompt, and the ids of that end are cut off again.
        self._anchor = prompt.rstrip("\n").rsplit("\n", 1)[-1] + prompt[len(prompt.rstrip("\n")) :]
        self._anchor_ids = self._encode([self._anchor])[0]

    def prompt_text(self, messages: Sequence[Message]) -> str:
        """Render a dialogue up to where the next response begins.

        Raises:
            TemplateRefusal: the template refuses it, as some do when roles do not alternate.
        """
        cleaned = [
            {name: self._without_specials(text) for name, text in m.items()} for m in messages
        ]
        try:
            return self.tokenizer.apply_chat_template(
                cleaned, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise TemplateRefusal(
                f"--chat_template tokenizer: the template refuses a dialogue of {len(messages)} "
                f"turns ({' '.join(str(error).split())}); choose human_assistant"
            ) from error

    def segments(self, dialogues: Sequence[Sequence[Message]]) -> list[list[list[int]]]:
        """Encode dialogues up to where the next response begins: context, response, context, …

        The even segments are contexts (bos included, the last one ends with the generation prompt),
        the odd ones the assistant's earlier responses with their eos. A dialogue that the template
        refuses has no segments.
        """
        parts = [self._parts(messages) for messages in dialogues]
        contexts = [texts for texts, _ in parts]
        # All contexts but the first follow an eos: they are encoded after one, which is cut off.
        first = self._encode([texts[0] for texts in contexts if texts])
        later = self._encode(
            [self.tokenizer.eos_token + text for texts in contexts for text in texts[1:]]
        )
        responses = self._encode_responses([text for _, rendered in parts for text in rendered])
        beginnings, rest = iter(first), iter(zip(responses, later, strict=True))
        made = []
        for texts in contexts:
            found = [next(beginnings)] if texts else []
            for response, (_, *context) in islice(rest, max(0, len(texts) - 1)):
                found += [response, context]
            made.append(found)
        return made

    def _parts(self, messages: Sequence[Message]) -> tuple[list[str], list[str]]:
        """Return texts before responses, and responses as rendered; none if refused or changed."""
        hidden = [
            {**m, "content": _RESPONSE} if m["role"] == "assistant" else m for m in messages
        ]
        try:
            parts = self.prompt_text(hidden).split(_RESPONSE)
            whole = parts[0] if len(parts) == 1 else self.prompt_text(messages)
        except TemplateRefusal:
            return [], []
        eos, separator = self.tokenizer.eos_token, self._earlier_separator
        responses = sum(m["role"] == "assistant" for m in messages)
        if len(parts) != responses + 1 or not whole.startswith(parts[0]) or not (
            all(part.endswith(separator) for part in parts[:-1])
            and all(part.startswith(eos) for part in parts[1:])
        ):
            return [], []
        rendered, at = [], len(parts[0])
        for part in parts[1:]:  # no response has an eos, with which each part begins
            end = whole.find(part, at)
            if end < 0:
                return [], []
            rendered.append(separator + whole[at:end])
            at = end + len(part)
        parts = [parts[0], *(part[len(eos) :] for part in parts[1:])]
        contexts = [*(part[: len(part) - len(separator)] for part in parts[:-1]), parts[-1]]
        return (contexts, rendered) if at == len(whole) else ([], [])

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Encode a dialogue up to where the next response begins, bos included.

        Raises:
            TemplateRefusal: the template does not render it.
        """
        (segments,) = self.segments([messages])
        if not segments:
            self.prompt_text(messages)  # raises with the reason
            raise TemplateRefusal(
                f"--chat_template tokenizer: the template changes the responses of a dialogue of "
                f"{len(messages)} turns; choose human_assistant"
            )
        return list(chain.from_iterable(segments))

    def responses(self, texts: Iterable[str]) -> list[list[int]]:
        """Encode responses, eos last."""
        return self._encode_responses([self._rendered(text) for text in texts])

    def _rendered(self, text: str) -> str:
        """Return what the template makes of a last response, from the end of the prompt to eos."""
        text = self._without_specials(text).rstrip()
        if self._is_ours or not text:
            return self._separator + text
        question: list[Message] = [{"role": "user", "content": _PROBE}]
        whole = self.tokenizer.apply_chat_template(
            [*question, {"role": "assistant", "content": text}], tokenize=False)
        rendered = whole[len(self.prompt_text(question)) :]
        return rendered[: rendered.rindex(self.tokenizer.eos_token)]

    def _encode_responses(self, rendered: list[str]) -> list[list[int]]:
        n = len(self._anchor_ids)
        made = self._encode([self._anchor + text for text in rendered])
        for i, ids in enumerate(made):
            # With a tokenizer that merges across the border, the response is encoded alone.
            whole = ids[:n] == self._anchor_ids
            made[i] = [*(ids[n:] if whole else self._encode([rendered[i]])[0]), self.eos_id]
        return made

    def response_ids(self, text: str) -> list[int]:
        """Encode a response, eos last."""
        return self.responses([text])[0]

    def text_ids(self, text: str) -> list[int]:
        """Encode plain text, which belongs to no dialogue, eos last."""
        return [*self._encode([self._without_specials(text)])[0], self.eos_id]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of generated ids, without control tokens and the template's space."""
        # Sentencepiece drops a space at the start of what it decodes, unless something precedes it.
        before = [] if ids[:1] == [self.tokenizer.bos_token_id] else self._anchor_ids
        text = self.text([*before, *ids]).removeprefix(self.text(before))
        return text.removeprefix(self._separator if self._separator.isspace() else "").rstrip()

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of ids without control tokens, with the spaces around it."""
        return self.tokenizer.decode([i for i in ids if i not in self._control_ids])

    def hide(self, ids: Iterable[int]) -> None:
        """Leave more special ids out of texts: those that end a response beside eos."""
        self._control_ids |= self.tokenizer.added_tokens_decoder.keys() & set(ids)

    def is_empty(self, text: str) -> bool:
        """Return whether a response has no text but spelled-out special tokens."""
        return not self._without_specials(text).strip()

    def head_length(self, messages: Sequence[Message], ids: Sequence[int]) -> int:
        """Return how many of a dialogue's first ids are bos and the system's text."""
        bos = int(ids[:1] == [self.tokenizer.bos_token_id])
        if not messages or messages[0]["role"] != "system":
            return bos
        system = self._without_specials(messages[0]["content"]).strip()
        text = self.prompt_text(messages)
        end = text.find(system) + len(system)
        shared = os.path.commonprefix([self._encode([text[:end]])[0], list(ids)])
        return max(bos, len(shared))

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]

    def _without_specials(self, text: str) -> str:
        """Remove spelled-out special tokens from text: they would become real ones."""
        before = None
        while before != text:  # removing one may join the halves of another
            before, text = text, self._special.sub("", text)
        return text


def load_tokenizer(
    path: str, template: str | None = None, trust_remote_code: bool = False, fixed: bool = False
) -> PreTrainedTokenizerBase:
    """Load a tokenizer, with eos and a pad of its own and the chat template set.

    Args:
        path: hub id or folder.
        template: value of `--chat_template`.
        trust_remote_code: allow the code of the repository to run.
        fixed: the model must keep the template it was trained with.

    Raises:
        UserError: no tokenizer there, no usable eos, no template of its own when asked for, tokens
            of the template that the tokenizer lacks, or another template when `fixed`.
    """
    tokenizer = _load(path, trust_remote_code)
    _name_empty(tokenizer)
    if not _is_real(tokenizer, "eos"):
        raise UserError(f"{path}: the tokenizer has no eos token; set eos_token in its config")
    _set_template(tokenizer, path, template, fixed)
    if not _is_real(tokenizer, "pad") or tokenizer.pad_token_id == tokenizer.eos_token_id:
        _give_pad(tokenizer)
    return tokenizer


def _is_real(tokenizer: PreTrainedTokenizerBase, kind: str) -> bool:
    """Return whether a special token is in the vocabulary, by its text and by its id.

    An id alone says little: a token that is missing has the id of unk, and eos may be unk.
    """
    text, number = getattr(tokenizer, f"{kind}_token"), getattr(tokenizer, f"{kind}_token_id")
    return bool(text) and number is not None and tokenizer.convert_ids_to_tokens(number) == text


def _name_empty(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give special tokens that have a name without a text their usual ones, or no name."""
    for kind, usual in _EMPTY_NAMES.items():
        if getattr(tokenizer, f"{kind}_token") == "":
            found = usual if usual in tokenizer.get_vocab() else None
            setattr(tokenizer, f"{kind}_token", found)
            console.say(f"tokenizer: {kind}_token is empty in its config; {kind} is {found!r}")


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the special tokens that structure a dialogue: they are no part of any text.

    These are the named ones, those of the chat template, and all of the form <|…|>. Others that
    the vocabulary marks as special are markup that a user has added, and stay in the text.
    """
    kinds = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")
    named = {str(t) for kind in kinds if (t := getattr(tokenizer, f"{kind}_token", None))}
    specials = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
    template = tokenizer.chat_template or ""
    controls = named | {t for t in specials if t in template or re.fullmatch(r"<[|｜].*[|｜]>", t)}
    return {text: tokenizer.convert_tokens_to_ids(text) for text in controls}


def load_chat(
    model: str, loading: LoadingConfig, template: str | None = None, fixed: bool = False
) -> ChatFormat:
    """Load the tokenizer given by the options, else the model's; say its special tokens.

    Template, `fixed` and errors are those of `load_tokenizer`.
    """
    path = loading.tokenizer_name_or_path or model
    tokenizer = load_tokenizer(path, template, loading.trust_remote_code, fixed)
    named = ((k, getattr(tokenizer, f"{k}_token"), getattr(tokenizer, f"{k}_token_id"))
             for k in ("bos", "eos", "pad"))
    tokens = ", ".join(f"{k} {token!r} = {i}" for k, token, i in named)
    console.say(f"tokenizer: {len(tokenizer)} tokens, {tokens}")
    return ChatFormat(tokenizer)


def _load(path: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        # Without its files, some classes give a tokenizer of nothing but special tokens.
        specials = {str(token) for token in tokenizer.added_tokens_decoder.values()}
        if all(token in specials for token in tokenizer.get_vocab()):
            raise ValueError("no vocabulary")
    except Exception as error:  # the libraries raise a dozen kinds for files missing or broken
        raise UserError(
            f"no tokenizer can be loaded from {path}: {_problem(path, error)}"
        ) from error
    return tokenizer


_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
                 "tekken.json")


def _problem(path: str, error: Exception) -> str:
    """Return why a tokenizer cannot be loaded, and the remedy."""
    folder, message = Path(path), str(error).strip()
    if "trust_remote_code" in message:
        return "it comes with code of its own; give --trust_remote_code to run it"
    if folder.is_file():
        return "it is a file; give the folder with the tokenizer files"
    if not folder.is_dir():
        hub_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path)
        return f"{message.splitlines()[0] if hub_id else 'no such folder'}; check the name"
    for name in ("tokenizer_config.json", *_VOCABULARIES):
        if (folder / name).is_file() and (pointer := pointer_problem(folder / name)):
            return f"its {name} is {pointer}"
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        if (folder / name).is_file() and not _holds_object(folder / name):
            return f"its {name} is broken; save or download it again"
    if any((folder / name).is_file() for name in _VOCABULARIES):
        return f"its files cannot be read ({type(error).__name__}); save or download them again"
    return "it has no tokenizer.json or other vocabulary; give a folder with tokenizer files"


def _holds_object(file: Path) -> bool:
    try:
        return isinstance(json.loads(file.read_bytes()), dict)
    except ValueError:
        return False


def _set_template(
    tokenizer: PreTrainedTokenizerBase, path: str, wanted: str | None, fixed: bool
) -> None:
    saved = tokenizer.init_kwargs.get(_TEMPLATE_NAME) or (
        chat_template.name_of(tokenizer.chat_template or "")
    )
    name = wanted or saved or chat_template.DEFAULT
    if name == chat_template.OWN_TEMPLATE and not tokenizer.chat_template:
        raise UserError(
            f"--chat_template tokenizer: the tokenizer of {path} has none; "
            f"choose one of {', '.join(chat_template.TEMPLATES)}"
        )
    if saved and name not in (saved, chat_template.OWN_TEMPLATE):
        if fixed:
            raise UserError(
                f"--chat_template {name}: {path} was trained with {saved}; remove the flag"
            )
        console.say(
            f"--chat_template {name}: {path} was trained with {saved}; from here on it is {name}"
        )
    if name in (saved, chat_template.OWN_TEMPLATE):
        if name == chat_template.OWN_TEMPLATE:
            _end_turns_as(tokenizer)
        tokenizer.init_kwargs[_TEMPLATE_NAME] = saved or name
        return
    if name == "chatml":
        _take_chatml_tokens(tokenizer, path)
    adds_bos = _is_real(tokenizer, "bos") and (
        tokenizer.encode(_PROBE)[:1] == [tokenizer.bos_token_id]
    )
    tokenizer.chat_template = chat_template.jinja(name, adds_bos)
    tokenizer.init_kwargs[_TEMPLATE_NAME] = name


def _take_chatml_tokens(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Make <|im_end|> eos; tokens are not added, since an adapter would never train them."""
    missing = [t for t in chat_template.CHATML_TOKENS if t not in tokenizer.get_vocab()]
    if missing:
        raise UserError(
            f"--chat_template chatml: the tokenizer of {path} has no {' and no '.join(missing)}; "
            "choose another template, or a model that has them"
        )
    end = chat_template.CHATML_TOKENS[1]
    if tokenizer.eos_token != end:
        tokenizer.eos_token = end
        console.say(f"--chat_template chatml: {end} is eos from here on")


def _end_turns_as(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make eos of the special token with which the tokenizer's own template ends a response."""
    dialogue = [{"role": role, "content": _PROBE} for role in ("user", "assistant")]
    try:
        ending = tokenizer.apply_chat_template(dialogue, tokenize=False).rpartition(_PROBE)[2]
    except TemplateError:
        return
    specials = sorted(_control_tokens(tokenizer), key=len)
    end = next((text for text in specials[::-1] if ending.startswith(text)), None)
    if end not in (None, tokenizer.eos_token):
        tokenizer.eos_token = end
        console.say(f"--chat_template tokenizer: it ends a response with {end}, which is eos from "
                    "here on")


def _give_pad(tokenizer: PreTrainedTokenizerBase) -> None:
    """Set a pad that is not eos: unk or a spare token of the vocabulary, else a new token."""
    taken = (tokenizer.eos_token_id, tokenizer.bos_token_id)
    vocabulary = tokenizer.get_vocab()
    if _is_real(tokenizer, "unk") and tokenizer.unk_token_id not in taken:
        tokenizer.pad_token = tokenizer.unk_token
    else:
        spare = (text for text in _SPARE_PADS if vocabulary.get(text, taken[0]) not in taken)
        tokenizer.add_special_tokens({"pad_token": next(spare, _PAD)})
    pad = tokenizer.pad_token
    is_new = "" if pad in vocabulary else ", a new token"
    console.say(f"tokenizer: there is no pad beside eos; pad is {pad!r} from here on{is_new}")


def eos_ids(
    tokenizer: PreTrainedTokenizerBase, configured: int | Sequence[int] | None
) -> list[int]:
    """Return every id that ends a response: the tokenizer's eos, those of a generation config."""
    more = [] if configured is None else [configured] if isinstance(configured, int) else configured
    return list(dict.fromkeys([tokenizer.eos_token_id, *more]))


def require_same(actor: PreTrainedTokenizerBase, critic: PreTrainedTokenizerBase) -> None:
    """Raise UserError if vocabularies, special tokens or chat templates of two models differ."""
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
