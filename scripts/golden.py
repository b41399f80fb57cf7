#!/usr/bin/env python3
"""Scores the bundled model's golden prompts through a server, once per weight format.

    scripts/golden.py --binary target/release/tokenmill --formats bf16,int8,int4

Each format gets a server of its own on a free port, started with ``--quantization`` (nothing for
bf16), asked greedily over ``/v1/chat/completions`` and stopped. Prints accuracy by format and
task; ``--json FILE`` keeps it. ``--base-url`` scores a server that runs already instead. Needs
nothing beyond Python's standard library.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

TINY = Path(__file__).resolve().parent.parent / "models" / "tiny"
sys.path.insert(0, str(TINY / "train"))
from scoring import passed  # noqa: E402

Row = dict[str, Any]


def reply(base_url: str, row: Row) -> str:
    """The model's answer as it wrote it: calls that the server parsed are written back."""
    body = {"model": "tiny", "messages": row["messages"], "temperature": 0,
            "max_tokens": 448 if row["task"] == "story" else 128}
    if row.get("tools"):
        body["tools"] = row["tools"]
    request = urllib.request.Request(f"{base_url}/v1/chat/completions", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as response:
        message = json.load(response)["choices"][0]["message"]
    text = message.get("content") or ""
    for call in message.get("tool_calls") or []:
        function = call["function"]
        written = json.dumps({"name": function["name"], "arguments": json.loads(function["arguments"])})
        text += f"<tool_call>\n{written}\n</tool_call>"
    return text


def score(base_url: str, rows: list[Row]) -> dict[str, Any]:
    """Prompts passed, over all and by task."""
    with ThreadPoolExecutor(16) as pool:
        texts = list(pool.map(lambda row: reply(base_url, row), rows))
    tasks: dict[str, list[bool]] = defaultdict(list)
    for row, text in zip(rows, texts):
        tasks[row["task"]].append(passed(text, row["check"]))
    hits = sum(sum(task) for task in tasks.values())
    return {"passed": hits, "prompts": len(rows), "accuracy": round(hits / len(rows), 4),
            "tasks": {name: round(sum(task) / len(task), 4) for name, task in tasks.items()}}


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def served(binary: Path, name: str, rows: list[Row], extra: list[str]) -> dict[str, Any]:
    """The score of a server that is started for it; ``name`` may be ``FORMAT`` or ``FORMAT/ISA``."""
    weights, _, isa = name.partition("/")
    command = [str(binary), "serve", "--port", str(free_port()), *extra]
    command += [] if weights == "bf16" else ["--quantization", weights]
    command += ["--cpu-isa", isa] if isa else []
    base_url = f"http://127.0.0.1:{command[3]}"
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"RUST_LOG": "warn"})
    try:
        for _ in range(600):
            if server.poll() is not None:
                raise SystemExit(f"the server ended with status {server.returncode}: {' '.join(command)}")
            try:
                urllib.request.urlopen(f"{base_url}/ready", timeout=5).close()
                return score(base_url, rows)
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        raise SystemExit(f"the server was not ready within a minute: {' '.join(command)}")
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", type=Path, default=Path("target/release/tokenmill"))
    parser.add_argument("--formats", default="bf16,int8,w8a16,int4,int4-g64,mxfp4,fp8,q8_0",
                        help="weight formats, each perhaps with an instruction set: int8/avx512")
    parser.add_argument("--base-url", help="score this server instead")
    parser.add_argument("--every", type=int, default=1, help="only every n-th prompt")
    parser.add_argument("--json", type=Path, help="write the scores here")
    parser.add_argument("serve_args", nargs="*", help="after --: more flags for the servers")
    args = parser.parse_args()
    rows = [json.loads(line) for line in (TINY / "golden.jsonl").open(encoding="utf-8")][:: args.every]
    names = ["server"] if args.base_url else args.formats.split(",")
    results = {}
    for name in names:
        found = score(args.base_url, rows) if args.base_url else served(args.binary, name, rows, args.serve_args)
        results[name] = found
        tasks = " ".join(f"{task} {share:.0%}" for task, share in found["tasks"].items())
        print(f"{name:>10}: {found['passed']}/{found['prompts']} = {found['accuracy']:.1%}  ({tasks})", flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
