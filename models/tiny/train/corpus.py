"""The seeded corpus: the task mixture, dialogues that mix tasks, and the held-out golden set.

``python corpus.py --golden ../golden.jsonl`` writes the golden set; ``--show N`` prints samples.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Callable, Iterator

from chat import render
from sample import Dialogue, Message, Unit, text_key, unmark
from tasks_chat import OBVIOUS, smalltalk
from tasks_facts import facts
from tasks_json import extract
from tasks_math import arithmetic, units
from tasks_memory import lookup, remembered
from tasks_story import story
from tasks_text import copy, repeat, strings
from tasks_tools import offered, tools

TASKS: dict[str, Callable[[random.Random], Unit]] = {
    "smalltalk": smalltalk, "arithmetic": arithmetic, "strings": strings, "facts": facts, "units": units,
    "json": extract, "tools": tools, "story": story, "repeat": repeat, "lookup": lookup,
}

MIXTURES: dict[str, dict[str, float]] = {
    "early": {"smalltalk": 5, "arithmetic": 12, "strings": 16, "facts": 16, "units": 5, "json": 12, "tools": 3,
              "story": 0.5, "repeat": 8, "copy": 4, "recall": 5, "dialogue": 2},
    "main": {"smalltalk": 9, "arithmetic": 20, "strings": 20, "facts": 24, "units": 8, "json": 9, "tools": 5,
             "story": 1.5, "repeat": 4, "lookup": 1.2, "recall": 3, "dialogue": 5},
    "late": {"smalltalk": 9, "arithmetic": 20, "strings": 22, "facts": 24, "units": 7, "json": 15, "tools": 6,
             "story": 1.5, "repeat": 7, "lookup": 1, "recall": 4, "dialogue": 5},
}
"""Relative number of samples by task; ``recall`` is a look-up in a short text, ``copy`` a long repeat."""

_SYSTEMS = ["You are a helpful assistant."] * 4 + [
    "You are a helpful assistant", "You are tokenmill's tiny bundled model.", "You are a friendly assistant.",
    "Answer briefly.", "Be concise.", "You are a small language model.", "You are a helpful AI assistant.",
    "You answer questions and tell stories.", "Help the user.", "You are a chat bot.", "Be polite and helpful.",
    "You are a helpful assistant. Answer the question of the user."]
_JSON_SYSTEMS = ["Reply only with JSON.", "You extract data as JSON.", "Answer in JSON."]
_DIALOGUE_TASKS = ("smalltalk", "smalltalk", "arithmetic", "strings", "facts", "units", "json", "tools", "repeat")

Accept = Callable[[str], bool]


def _accepted(rng: random.Random, task: str, accept: Accept) -> Unit:
    makers = TASKS | {"recall": lambda source: lookup(source, short=True), "copy": copy}
    while True:
        unit = makers[task](rng)
        if accept(unit.key):
            return unit


def _with_system(rng: random.Random, messages: list[Message], task: str) -> list[Message]:
    if rng.random() < 0.5:
        return messages
    content = rng.choice(_JSON_SYSTEMS) if task == "json" and rng.random() < 0.4 else rng.choice(_SYSTEMS)
    return [{"role": "system", "content": content}] + messages


def _dialogue(rng: random.Random, accept: Accept) -> Dialogue:
    units = [_accepted(rng, rng.choice(_DIALOGUE_TASKS), accept) for _ in range(rng.randint(2, 5))]
    needed = [tool for unit in units if unit.task == "tools" for tool in unit.tools]
    by_name = {tool["function"]["name"]: tool for tool in needed}
    if needed:
        arithmetic_free = [u for u in units if u.task not in ("arithmetic", "units")]
        seen: set[str] = set()
        units = []
        for unit in arithmetic_free:
            names = {tool["function"]["name"] for tool in unit.tools}
            if unit.task != "tools" or not names & seen:
                units.append(unit)
                seen |= names
        by_name = {t["function"]["name"]: t for u in units for t in u.tools}
    messages = [message for unit in units for message in unit.messages]
    keys, check, task = [unit.key for unit in units], units[-1].check, "dialogue"
    if rng.random() < 0.45 and not needed:
        told, asked = remembered(rng)
        messages = told + messages + asked
        check = {"kind": "text", "any_of": [asked[-1]["content"]]}
        keys = ["dialogue|" + text_key(" ".join(m["content"] for m in messages if m["role"] == "user"))]
        if not accept(keys[0]):
            return _dialogue(rng, accept)
    return Dialogue(task, _with_system(rng, messages, task), keys, check, list(by_name.values()))


def make(rng: random.Random, task: str, accept: Accept) -> Dialogue:
    """One sample of a task; units whose key is not accepted are drawn again."""
    if task == "dialogue":
        return _dialogue(rng, accept)
    unit = _accepted(rng, task, accept)
    extra = offered(rng, []) if not unit.tools and task in ("smalltalk", "facts", "strings") and rng.random() < 0.05 else unit.tools
    return Dialogue(unit.task, _with_system(rng, unit.messages, unit.task), [unit.key], unit.check, extra)


def sample(seed: int, index: int, mixture: str, held_out: set[str]) -> Dialogue:
    """Training sample ``index``: a pure function of its arguments."""
    rng = random.Random(f"{seed}/{index}")
    weights = MIXTURES[mixture]
    task = rng.choices(list(weights), list(weights.values()))[0]
    return make(rng, task, lambda key: key not in held_out)


GOLDEN_COUNTS = {"smalltalk": 30, "arithmetic": 40, "strings": 40, "facts": 40, "units": 30, "json": 40, "tools": 40,
                 "story": 20, "repeat": 30, "lookup": 30, "dialogue": 30}


def golden(seed: int) -> Iterator[dict]:
    """The golden set: for each task distinct prompts, none of them among the obvious ones."""
    obvious = {text_key(text) for text in OBVIOUS}
    for task, count in GOLDEN_COUNTS.items():
        rng, seen, number = random.Random(f"golden/{seed}/{task}"), set(), 0
        while number < count:
            item = make(rng, task, lambda key: key.split("|", 1)[1] not in obvious)
            if item.keys[-1] in seen:
                continue
            seen.add(item.keys[-1])
            number += 1
            yield _golden_row(item, task, number)


def _golden_row(item: Dialogue, task: str, number: int) -> dict:
    prompt = [dict(m, content=unmark(m["content"])) for m in item.messages]
    if item.check["kind"] == "tool_call":
        cut = max(i for i, m in enumerate(prompt) if m.get("tool_calls"))
    else:
        cut = len(prompt) - 1
    row = {"id": f"{task}-{number:03}", "task": task, "messages": prompt[:cut], "check": item.check, "key": item.keys[-1]}
    if item.tools:
        row["tools"] = item.tools
    return row


def held_out_keys(path: Path) -> set[str]:
    """The keys of the golden set, which training must avoid."""
    with path.open(encoding="utf-8") as lines:
        return {json.loads(line)["key"] for line in lines}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--golden", type=Path, help="write the golden set here")
    parser.add_argument("--show", type=int, default=0, help="print this many training samples")
    parser.add_argument("--mixture", default="main", choices=list(MIXTURES))
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    if args.golden:
        with args.golden.open("w", encoding="utf-8") as out:
            for row in golden(args.seed):
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
    for index in range(args.show):
        item = sample(args.seed, index, args.mixture, set())
        print(f"--- {item.task} {item.keys}\n{unmark(render(item.messages, item.tools))}")


if __name__ == "__main__":
    main()
