"""Scores a checkpoint on the golden set, greedily, and the draft's agreement with the target.

``python evaluate.py --target CKPT [--draft CKPT] [--out ../eval.json] [--failures N]``
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from chat import IM_END, render
from model import CONFIGS, Llama, generate
from scoring import passed
from tokenizer import Encoder

Row = dict[str, Any]


def load(path: Path, dtype: torch.dtype = torch.float32) -> Llama:
    """A model from a training checkpoint, its weights rounded to the exported bfloat16."""
    state = torch.load(path, map_location="cpu", weights_only=False)
    model = Llama(CONFIGS[state["kind"]], dtype)
    model.load_state_dict({name: value.to(torch.bfloat16).float() for name, value in state["model"].items()})
    return model.eval()


def prompts(rows: list[Row], encoder: Encoder) -> list[list[int]]:
    """The encoded prompts, up to where the assistant is to answer."""
    return [encoder.encode(render(row["messages"], row.get("tools", []), generate=True)) for row in rows]


def replies(model: Llama, encoder: Encoder, ids: list[list[int]], rows: list[Row], batch: int) -> list[list[int]]:
    """Greedy replies to all prompts, stories and the rest apart so that none waits for the other."""
    eos, pad = encoder.tokenizer.token_to_id(IM_END), 0
    out: list[list[int]] = [[] for _ in ids]
    for stories, longest in ((False, 128), (True, 448)):
        order = sorted((i for i in range(len(ids)) if (rows[i]["task"] == "story") == stories), key=lambda i: len(ids[i]))
        for start in tqdm(range(0, len(order), batch), desc="stories" if stories else "replies"):
            group = order[start : start + batch]
            for index, reply in zip(group, generate(model, [ids[i] for i in group], longest, eos, pad)):
                out[index] = reply
    return out


@torch.no_grad()
def agreement(draft: Llama, ids: list[list[int]], answers: list[list[int]], eos: int) -> tuple[int, int]:
    """How many of the target's tokens the draft would have chosen too, and of how many."""
    same = total = 0
    for prompt, answer in zip(ids, answers):
        wanted = torch.tensor(answer + [eos])
        hidden = draft.hidden(torch.tensor([prompt + answer]))[0, len(prompt) - 1 :]
        same += int((draft.logits(hidden).argmax(-1) == wanted).sum())
        total += len(wanted)
    return same, total


def report(rows: list[Row], texts: list[str]) -> dict[str, Any]:
    """Accuracy by task and over all."""
    hits: dict[str, list[bool]] = defaultdict(list)
    for row, text in zip(rows, texts):
        hits[row["task"]].append(passed(text, row["check"]))
    tasks = {task: {"passed": sum(h), "prompts": len(h), "accuracy": round(sum(h) / len(h), 4)} for task, h in hits.items()}
    every = [hit for task in hits.values() for hit in task]
    return {"overall": {"passed": sum(every), "prompts": len(every), "accuracy": round(sum(every) / len(every), 4)}, "tasks": tasks}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=Path, required=True, help="checkpoint of the target")
    parser.add_argument("--draft", type=Path, help="checkpoint of the draft")
    parser.add_argument("--golden", type=Path, default=Path("../golden.jsonl"))
    parser.add_argument("--tokenizer", type=Path, default=Path("../tokenizer.json"))
    parser.add_argument("--out", type=Path, help="write the result here")
    parser.add_argument("--every", type=int, default=1, help="score only every n-th prompt")
    parser.add_argument("--failures", type=int, default=0, help="print up to this many failures a task")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [json.loads(line) for line in args.golden.open(encoding="utf-8")][:: args.every]
    encoder = Encoder(args.tokenizer)
    ids = prompts(rows, encoder)
    answers = replies(load(args.target), encoder, ids, rows, args.batch)
    texts = [encoder.tokenizer.decode(answer, skip_special_tokens=False) for answer in answers]
    result = {"every": args.every} | report(rows, texts)
    if args.draft:
        same, total = agreement(load(args.draft), ids, answers, encoder.tokenizer.token_to_id(IM_END))
        result["draft_agreement"] = {"same": same, "tokens": total, "share": round(same / total, 4)}
    shown: dict[str, int] = defaultdict(int)
    for row, text in zip(rows, texts):
        if not passed(text, row["check"]) and shown[row["task"]] < args.failures:
            shown[row["task"]] += 1
            print(f"{row['id']}: {row['messages'][-1]['content'][-200:]!r}\n   said {text[:300]!r}\n   want {row['check']}")
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
