"""Built-in chat templates, for base models without a template or with one that lacks tools or reasoning."""

from __future__ import annotations

from typing import Any

from dagster_project.core.chat import adds_bos
from dagster_project.core.errors import InputError

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}"
    "{% if message['role'] == 'assistant' and eos_token != '<|im_end|>' %}{{ eos_token }}{% endif %}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""OpenAI's Chat Markup Language. If the model has another end-of-text token, it
follows the assistant's `<|im_end|>`, so that generation stops."""

ALPACA = (
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}"
    "{% else %}Below is an instruction that describes a task."
    " Write a response that appropriately completes the request.{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '\\n\\n### Instruction:\\n' + message['content'] }}{% elif message['role'] == 'tool' %}"
    "{{ '\\n\\n### Input:\\n' + message['content'] }}{% elif message['role'] == 'assistant' %}"
    "{{ '\\n\\n### Response:\\n' + message['content'] + eos_token }}{% elif not loop.first %}"
    "{{ raise_exception('a system turn must come first') }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "{{ '\\n\\n### Response:\\n' }}{% endif %}"
)
"""The prompt of Stanford Alpaca (Taori et al. 2023), its turns repeated for a conversation; the end-of-text token ends
every response."""

HERMES = (
    "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}{% if system or tools %}"
    "{{ '<|im_start|>system\\n' + system }}{% if tools %}{{ '\\n\\n' if system else '' }}"
    "{{ 'You may call functions to answer. Their signatures are in <tools></tools>:\\n<tools>' }}"
    "{% for tool in tools %}{{ '\\n' + tool | tojson }}{% endfor %}"
    "{{ '\\n</tools>\\nFor each call write a JSON object with name and arguments in <tool_call></tool_call>.' }}"
    "{% endif %}{{ '<|im_end|>\\n' }}{% endif %}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{% if not loop.first %}{{ raise_exception('a system turn must come first') }}{% endif %}"
    "{% elif message['role'] == 'assistant' %}{{ '<|im_start|>assistant\\n' }}{% if message['reasoning_content'] %}"
    "{{ '<think>\\n' + message['reasoning_content'] + '\\n</think>\\n\\n' }}{% endif %}{{ message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}{{ '\\n' if message['content'] or not loop.first else '' }}"
    "{{ '<tool_call>\\n{\"name\": ' + call['function']['name'] | tojson"
    " + ', \"arguments\": ' + call['function']['arguments'] | tojson }}{{ '}\\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>' }}{% if eos_token != '<|im_end|>' %}{{ eos_token }}{% endif %}"
    "{{ '\\n' }}{% elif message['role'] == 'tool' %}"
    "{{ '<|im_start|>tool\\n<tool_response>\\n' + message['content'] + '\\n</tool_response><|im_end|>\\n' }}{% else %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML with tools, calls, results and traces in the tags of Nous Research's Hermes, which Qwen adopted. For models
without tools in their own template."""

NAMED = {"alpaca": ALPACA, "chatml": CHATML, "hermes": HERMES}
MARKUP = frozenset({"chatml", "hermes"})
"""Templates that need the special tokens <|im_start|> and <|im_end|>."""


def written_for(tokenizer: Any, name: str, where: str) -> str:
    """The text of a template of NAMED for a tokenizer of transformers.

    Args:
        where: beginning of an error message.
    Raises:
        InputError: the tokenizer lacks a special token of the template.
    """
    for token in ("<|im_start|>", "<|im_end|>") if name in MARKUP else ():
        if not any(str(added) == token and added.special for added in tokenizer.added_tokens_decoder.values()):
            raise InputError(
                f"{where}: the base model's tokenizer has no special token {token}", "use alpaca, or your own template"
            )
    # rendered templates are tokenized without special tokens, so the template must write the beginning-of-text token
    return ("{{ bos_token }}" if adds_bos(tokenizer) else "") + NAMED[name]
