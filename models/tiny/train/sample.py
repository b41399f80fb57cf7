"""The pieces every task builds: units (a checked exchange) and dialogues (what is trained on)."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
Check = dict[str, Any]

SPELL_OPEN = "\ue000"
SPELL_CLOSE = "\ue001"


def spelled(text: str) -> str:
    """Marks text that training encodes one character per token (markers never reach a user)."""
    return f"{SPELL_OPEN}{text}{SPELL_CLOSE}"


def unmark(text: str) -> str:
    """The text without spelling markers."""
    return text.replace(SPELL_OPEN, "").replace(SPELL_CLOSE, "")


def text_key(text: str) -> str:
    """Identity of a prompt regardless of case and punctuation."""
    return " ".join(re.findall(r"[^\W_]+|[-+*/%=]", text.lower()))


@dataclass
class Unit:
    """One request with its reply.

    ``key`` identifies the request: whatever shares a key with the golden set is kept out of
    training. ``check`` says how a model's reply to the last message's prompt is scored.
    """

    task: str
    messages: list[Message]
    check: Check
    key: str = ""
    tools: list[dict[str, Any]] = field(default_factory=list)
    system: str | None = None

    def __post_init__(self) -> None:
        if not self.key:
            users = [m["content"] for m in self.messages if m["role"] == "user"]
            self.key = f"{self.task}|{text_key(users[-1])}"


@dataclass
class Dialogue:
    """A whole conversation to train on, and the keys of the units inside it."""

    task: str
    messages: list[Message]
    keys: list[str]
    check: Check
    tools: list[dict[str, Any]] = field(default_factory=list)


def ask(task: str, prompt: str, reply: str, check: Check | None = None, key: str = "") -> Unit:
    """A single-turn unit; without a check the reply itself is expected."""
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
    return Unit(task, messages, check or same(unmark(reply)), key)


def same(*texts: str) -> Check:
    """The reply must equal one of the texts (case, spacing and final punctuation aside)."""
    return {"kind": "text", "any_of": list(texts)}


def ends(text: str) -> Check:
    """The reply must end with the text (case, spacing and final punctuation aside)."""
    return {"kind": "ends", "value": text}


def vary(rng: random.Random, prompt: str) -> str:
    """Type the prompt as people do: sometimes lower-case, without punctuation, with 'please'."""
    roll = rng.random()
    if roll < 0.08:
        prompt = prompt[0].lower() + prompt[1:]
    elif roll < 0.14:
        prompt = prompt.lower()
    if rng.random() < 0.12 and prompt[-1] in ".?!":
        prompt = prompt[:-1]
    elif rng.random() < 0.03:
        prompt += rng.choice("?!.")
    return prompt


def polite(rng: random.Random, request: str) -> str:
    """An imperative request, sometimes wrapped in courtesy."""
    roll = rng.random()
    lowered = request[0].lower() + request[1:]
    if roll < 0.12:
        return f"Please {lowered}"
    if roll < 0.2:
        return f"Can you {lowered.rstrip('.')}?"
    if roll < 0.26:
        return f"Could you {lowered.rstrip('.')}, please?"
    return request
