"""A tokenizer of a few words, one id each, so that tests can name ids.

    tokenizer = word_tokenizer("Human: Assistant: hi yes")     # 4, 5, 6, 7
"""

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from alpaca_rlhf.utils.data import chat_template


def word_tokenizer(words: str = "", **special: str | None) -> PreTrainedTokenizerFast:
    """One id a word: pad 0, bos 1, eos 2, unk 3, then `words` from 4 on; the usual template.

    Args:
        words: separated by spaces.
        **special: special tokens in place of those, such as pad_token="</s>"; None is none.
    """
    pieces = ["<pad>", "<s>", "</s>", "<unk>", *words.split()]
    model = Tokenizer(WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    model.pre_tokenizer = WhitespaceSplit()
    usual = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokens = {name: token for name, token in {**usual, **special}.items() if token is not None}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, **tokens)
    tokenizer.chat_template = chat_template.jinja("human_assistant", adds_bos=True)
    return tokenizer
