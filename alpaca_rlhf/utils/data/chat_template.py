"""Chat templates: the text of a dialogue, as Jinja that is saved with the tokenizer.

A template renders bos, the turns and the generation prompt, so `tokenizer.apply_chat_template` in
any other tool gives the ids that were trained on. An assistant turn ends with eos and nothing else:
the policy learns to emit one token. Whitespace at the start of a response stays. A user turn in
Stanford Alpaca's format has `instruction` and `input` beside its content, which is both; only
`alpaca` and `alpaca_short` read them.
"""

DEFAULT = "human_assistant"
# The name under which a tokenizer keeps the template it came with.
OWN_TEMPLATE = "tokenizer"
# Tokens that chatml needs; the second becomes eos.
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")

_BOS = "{{- bos_token -}}"
_UNKNOWN_ROLE = "{{- raise_exception('unknown role ' + message['role']) -}}"


def _turns(user: str, assistant: str, system: str, generation_prompt: str = "") -> str:
    """Return a template of turns, each with the Jinja of its role."""
    ending = ""
    if generation_prompt:
        written = "{{- '" + generation_prompt + "' -}}"
        ending = "{%- if add_generation_prompt -%}" + written + "{%- endif -%}"
    return (
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'user' -%}" + user
        + "{%- elif message['role'] == 'assistant' -%}" + assistant
        + "{%- elif message['role'] == 'system' -%}" + system
        + "{%- else -%}" + _UNKNOWN_ROLE + "{%- endif -%}"
        "{%- endfor -%}" + ending
    )


_HUMAN_ASSISTANT = _turns(
    user="{{- 'Human: ' + (message['content'] | trim) + '\\n\\n' -}}",
    assistant="{{- 'Assistant: ' + message['content'].rstrip() + eos_token -}}",
    system="{{- (message['content'] | trim) + '\\n\\n' -}}",
    generation_prompt="Assistant:",
)

# The wording of Stanford Alpaca's two prompts, on which its models were trained.
_ALPACA_PREAMBLE = (
    "{%- if messages and messages[0]['role'] != 'system' -%}"
    "{{- 'Below is an instruction that describes a task' -}}"
    "{%- if messages[0]['input'] -%}"
    "{{- ', paired with an input that provides further context' -}}"
    "{%- endif -%}"
    "{{- '. Write a response that appropriately completes the request.\\n\\n' -}}"
    "{%- endif -%}"
)
_ALPACA_TURNS = _turns(
    user="{%- if not loop.first and messages[loop.index0 - 1]['role'] == 'assistant' -%}"
    "{{- '\\n\\n' -}}"
    "{%- endif -%}"
    "{%- if message['input'] -%}"
    "{{- '### Instruction:\\n' + (message['instruction'] | trim) + '\\n\\n' -}}"
    "{{- '### Input:\\n' + (message['input'] | trim) + '\\n\\n' -}}"
    "{%- else -%}"
    "{{- '### Instruction:\\n' + (message['content'] | trim) + '\\n\\n' -}}"
    "{%- endif -%}",
    assistant="{{- '### Response:\\n' + message['content'].rstrip() + eos_token -}}",
    system="{{- (message['content'] | trim) + '\\n\\n' -}}",
    generation_prompt="### Response:\\n",
)

# Vicuna 1.1's template, its opening sentences included.
_VICUNA = (
    "{%- if messages and messages[0]['role'] != 'system' -%}"
    "{{- 'A chat between a curious user and an artificial intelligence assistant. The assistant "
    "gives helpful, detailed, and polite answers to the user\\'s questions. ' -}}"
    "{%- endif -%}"
) + _turns(
    user="{{- 'USER: ' + (message['content'] | trim) + ' ' -}}",
    assistant="{{- 'ASSISTANT: ' + message['content'].rstrip() + eos_token -}}",
    system="{{- (message['content'] | trim) + ' ' -}}",
    generation_prompt="ASSISTANT:",
)

# Llama 2's template, except that eos follows the response directly: Meta's puts a space before it.
_LLAMA2 = "{%- set state = namespace(system='') -%}" + _turns(
    user="{%- if not loop.first and messages[loop.index0 - 1]['role'] == 'assistant' -%}"
    "BOS"
    "{%- endif -%}"
    "{{- '[INST] ' + state.system + (message['content'] | trim) + ' [/INST]' -}}"
    "{%- set state.system = '' -%}",
    assistant="{{- ' ' + message['content'].rstrip() + eos_token -}}",
    system="{%- set state.system = '<<SYS>>\\n' + (message['content'] | trim) + "
    "'\\n<</SYS>>\\n\\n' -%}",
)

# The line break precedes each further turn instead of ending each: it is no part of a response.
_CHATML = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ('system', 'user', 'assistant') -%}" + _UNKNOWN_ROLE
    + "{%- endif -%}"
    "{%- if not loop.first -%}{{- '\\n' -}}{%- endif -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{{- message['content'].rstrip() if message['role'] == 'assistant' else "
    "message['content'] | trim -}}"
    "{{- '<|im_end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '\\n<|im_start|>assistant\\n' -}}{%- endif -%}"
)

TEMPLATES = {
    "human_assistant": _HUMAN_ASSISTANT,
    "alpaca": _ALPACA_PREAMBLE + _ALPACA_TURNS,
    "alpaca_short": _ALPACA_TURNS,
    "vicuna": _VICUNA,
    "llama2": _LLAMA2,
    "chatml": _CHATML,
}


def jinja(name: str, adds_bos: bool) -> str:
    """Return the Jinja source of a template; with bos where the tokenizer's encoding has one."""
    bos = _BOS if adds_bos else ""
    return bos + TEMPLATES[name].replace("BOS", bos)


def name_of(source: str) -> str | None:
    """Return the name of a template by its Jinja source, or None."""
    return next((n for n in TEMPLATES for bos in (False, True) if jinja(n, bos) == source), None)
