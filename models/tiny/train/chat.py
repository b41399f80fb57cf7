"""The chat format: the Jinja template shipped with the model and the same thing in Python."""

from __future__ import annotations

import json
from typing import Any

from sample import Message

IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"

TOOLS_HEAD = "# Tools\n\nTo use a tool, answer with its name and arguments as JSON in <tool_call></tool_call>.\n\n<tools>\n"
TOOLS_TAIL = "</tools>"

CHAT_TEMPLATE = (
    "{%- set first = 0 -%}"
    "{%- if messages and messages[0].role == 'system' -%}{%- set first = 1 -%}{%- endif -%}"
    "{%- if tools or first -%}"
    "{{- '<|im_start|>system\\n' -}}"
    "{%- if first -%}{{- messages[0].content -}}{%- endif -%}"
    "{%- if tools -%}"
    "{%- if first -%}{{- '\\n\\n' -}}{%- endif -%}"
    "{{- '" + TOOLS_HEAD.replace("\n", "\\n") + "' -}}"
    "{%- for tool in tools -%}{{- tool | tojson -}}{{- '\\n' -}}{%- endfor -%}"
    "{{- '" + TOOLS_TAIL + "' -}}"
    "{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if not (loop.first and first) -%}"
    "{{- '<|im_start|>' + message.role + '\\n' -}}"
    "{%- if message.role == 'tool' -%}"
    "{{- '<tool_response>\\n' + message.content + '\\n</tool_response>' -}}"
    "{%- else -%}"
    "{%- if message.content -%}{{- message.content -}}{%- endif -%}"
    "{%- if message.tool_calls -%}"
    "{%- for tool_call in message.tool_calls -%}"
    "{%- set call = tool_call.function if tool_call.function else tool_call -%}"
    "{%- if message.content or not loop.first -%}{{- '\\n' -}}{%- endif -%}"
    "{{- '<tool_call>\\n{\"name\": \"' + call.name + '\", \"arguments\": ' -}}"
    "{%- if call.arguments is string -%}{{- call.arguments -}}"
    "{%- else -%}{{- call.arguments | tojson -}}{%- endif -%}"
    "{{- '}\\n</tool_call>' -}}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def dumps(value: Any) -> str:
    """JSON exactly as the template's ``tojson`` writes it."""
    return json.dumps(value, ensure_ascii=False)


def _calls(message: Message) -> str:
    parts = []
    for call in message.get("tool_calls", []):
        function = call.get("function", call)
        body = f'{{"name": "{function["name"]}", "arguments": {dumps(function["arguments"])}}}'
        parts.append(f"<tool_call>\n{body}\n</tool_call>")
    return "\n".join(parts)


def _body(message: Message) -> str:
    content = message.get("content") or ""
    if message["role"] == "tool":
        return f"<tool_response>\n{content}\n</tool_response>"
    calls = _calls(message)
    return content + ("\n" if content and calls else "") + calls


def segments(messages: list[Message], tools: list[dict[str, Any]]) -> list[tuple[str, bool]]:
    """The rendered chat in order, each piece with whether the model is to learn to write it."""
    out: list[tuple[str, bool]] = []
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    rest = messages[1:] if system is not None else messages
    if tools or system is not None:
        blocks = [system] if system is not None else []
        if tools:
            listing = "".join(dumps(tool) + "\n" for tool in tools)
            blocks.append(TOOLS_HEAD + listing + TOOLS_TAIL)
        out.append((IM_START + "system\n" + "\n\n".join(blocks) + IM_END + "\n", False))
    for message in rest:
        learned = message["role"] == "assistant"
        out.append((f"{IM_START}{message['role']}\n", False))
        out.append((_body(message) + IM_END, learned))
        out.append(("\n", False))
    return out


def render(messages: list[Message], tools: list[dict[str, Any]], generate: bool = False) -> str:
    """The rendered chat as one string."""
    text = "".join(piece for piece, _ in segments(messages, tools))
    return text + (f"{IM_START}assistant\n" if generate else "")
