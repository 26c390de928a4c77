"""Chat templates of the common families, in the manner of the published ones, and tokenizers that go with them.

Each is written with `{% generation %}` around what the assistant says; `unmarked` takes that away.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tests.lab import tokenizers as lab

CHATML = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- '# Tools\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
        {{- message.content or '' }}
        {%- for call in message.tool_calls or [] %}
            {{- '<tool_call>\\n' + (call.function or call) | tojson + '\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- elif not (message.role == 'system' and loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

LLAMA3 = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}
        {{- message['content'] | trim + '<|eot_id|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = """{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] + '\\n\\n' %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set system = '' %}
    {%- set turns = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in turns %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate between user and assistant.') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}
    {%- else %}
        {%- generation %}
        {{- ' ' + message['content'] | trim + eos_token }}
        {%- endgeneration %}
    {%- endif %}
{%- endfor %}
"""

GEMMA = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start_of_turn>' + role + '\\n' }}
    {%- if role == 'model' %}
        {%- generation %}
        {{- message['content'] | trim + '<end_of_turn>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- message['content'] | trim + '<end_of_turn>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
"""

# Reasoning of earlier turns is taken away, as Qwen 3 and DeepSeek R1 do it.
THINKING = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' and message.reasoning_content and loop.last %}
        {{- '<think>' + message.reasoning_content + '</think>' }}
    {%- endif %}
    {{- message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

# template; special tokens; end of turn; beginning of a text; whether text is pieces of SentencePiece
FAMILIES: dict[str, tuple[str, list[str], str, str | None, bool]] = {
    "chatml": (CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|im_end|>", None, False),
    "llama3": (
        LLAMA3,
        ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|eot_id|>",
        "<|begin_of_text|>",
        False,
    ),
    "mistral": (MISTRAL, ["[INST]", "[/INST]"], "</s>", "<s>", True),
    "gemma": (GEMMA, ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], "<eos>", "<bos>", False),
}

CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "the cat?"}, {"role": "assistant", "content": "sat on the mat."}],
    [
        {"role": "user", "content": "naïve café 🙂"},
        {"role": "assistant", "content": "日本語 — yes, 1234."},
        {"role": "user", "content": "  spaces  \nand lines\n"},
        {"role": "assistant", "content": "def encode(text):\n    return text"},
    ],
    [{"role": "user", "content": "the quick brown fox " * 20}, {"role": "assistant", "content": "ok"}],
]
WITH_SYSTEM = [{"role": "system", "content": "Be the cat."}, *CONVERSATIONS[1]]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather <b>of</b> a town.",
            "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
        },
    }
]
WITH_TOOLS: list[dict[str, Any]] = [
    {"role": "user", "content": "weather in Zürich?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"town": "Zürich"}}}],
    },
    {"role": "tool", "name": "weather", "content": "rain"},
    {"role": "assistant", "content": "It rains."},
]


def unmarked(template: str) -> str:
    """The same template, without what says where the assistant speaks."""
    return re.sub(r"\{%-? *(end)?generation *-?%\}\n?", "", template)


def make(folder: Path, family: str, template: str | None = None) -> Path:
    """A directory of a tokenizer with its chat template; None: the family's own."""
    own, specials, eos, bos, pieces = FAMILIES[family]
    backend = lab.sentencepiece_like() if pieces else lab.byte_level(specials, 300)
    if pieces:
        backend.add_special_tokens(specials)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos,
        **({"bos_token": bos} if bos else {}),
        "model_max_length": 4096,
    }
    return lab.save(
        folder,
        backend,
        tokenizer_config_json=json.dumps(config),
        chat_template_jinja=own if template is None else template,
    )
