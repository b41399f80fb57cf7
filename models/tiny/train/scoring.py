"""Checks a model's reply against what the golden set expects."""

from __future__ import annotations

import json
import re
from typing import Any

from sample import Check


def plain(text: str) -> str:
    """Case, spacing and final punctuation aside."""
    return " ".join(text.casefold().split()).rstrip(".!? ")


def tool_calls(reply: str) -> list[dict[str, Any]]:
    """The well-formed tool calls in a reply."""
    calls = []
    for body in re.findall(r"<tool_call>\s*(.*?)\s*</tool_call>", reply, re.DOTALL):
        try:
            calls.append(json.loads(body))
        except ValueError:
            continue
    return calls


def _json_equal(reply: str, value: Any) -> bool:
    try:
        return json.loads(reply) == value
    except ValueError:
        return False


def _ends(reply: str, value: str) -> bool:
    tail, wanted = plain(reply), plain(value)
    before = tail[: -len(wanted)][-1:] if tail.endswith(wanted) else "x"
    return tail.endswith(wanted) and not (before.isalnum() or before in ".-" and wanted[0].isdigit())


def _story(reply: str, check: Check) -> bool:
    folded = reply.casefold()
    told = all(word.casefold() in folded for word in check["mentions"])
    return told and len(reply.split()) >= check["min_words"] and reply.strip().endswith(check["last"])


def passed(reply: str, check: Check) -> bool:
    """Whether the reply meets the check."""
    kind = check["kind"]
    if kind == "exact":
        return reply.strip() in check["any_of"]
    if kind == "text":
        return plain(reply) in [plain(text) for text in check["any_of"]]
    if kind == "ends":
        return _ends(reply, check["value"])
    if kind == "json":
        return _json_equal(reply, check["value"])
    if kind == "tool_call":
        return tool_calls(reply) == [check["value"]]
    if kind == "story":
        return _story(reply, check)
    raise ValueError(f"unknown check {kind}")
