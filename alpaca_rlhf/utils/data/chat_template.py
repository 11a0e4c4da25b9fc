"""What a dialogue looks like to the model, as Jinja: the form that is saved with the tokenizer.

A template renders bos, the turns and the generation prompt, so `tokenizer.apply_chat_template` in
any other tool gives the text that was trained on. A turn of the assistant ends with eos, and with
nothing else: what the policy learns to emit is one token.
"""

# The name under which a tokenizer keeps the template it came with.
OWN_TEMPLATE = "tokenizer"

_HUMAN_ASSISTANT = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{- 'Human: ' + (message['content'] | trim) + '\\n\\n' -}}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{- 'Assistant: ' + (message['content'] | trim) + eos_token -}}"
    "{%- elif message['role'] == 'system' -%}"
    "{{- (message['content'] | trim) + '\\n\\n' -}}"
    "{%- else -%}"
    "{{- raise_exception('unknown role ' + message['role']) -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}"
)

TEMPLATES = {"human_assistant": _HUMAN_ASSISTANT}


def jinja(name: str, adds_bos: bool) -> str:
    """The Jinja source of template `name`.

    Args:
        name: a key of `TEMPLATES`.
        adds_bos: whether the tokenizer's own encoding begins with bos; then the template does.

    Raises:
        KeyError: no template of that name.
    """
    return ("{{- bos_token -}}" if adds_bos else "") + TEMPLATES[name]
