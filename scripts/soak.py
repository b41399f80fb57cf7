#!/usr/bin/env python3
"""Sends many streamed chats to a running server and hangs up on some of them at random.

Prints one JSON line per round and exits 1 unless, after the last one, no request runs or waits
and resident memory has stopped growing. Needs nothing beside Python 3.11:

    cargo run --release -- --port 8123 &
    scripts/soak.py --port 8123 --requests 2000 --disconnect 0.5
"""

import argparse
import asyncio
import json
import random
import sys
import time

PROMPTS = [
    "What is the capital of France?",
    "Tell me a story about a fox.",
    "What is 312 + 87?",
    "Reverse the word lantern.",
    "Convert 12 kilometers to meters.",
    "Hello!",
]


async def http(args: argparse.Namespace, method: str, path: str, body: dict | None = None):
    """Opens a connection and sends one request."""
    reader, writer = await asyncio.open_connection("127.0.0.1", args.port)
    payload = json.dumps(body).encode() if body is not None else b""
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
    writer.write(head.encode() + payload)
    await writer.drain()
    return reader, writer


async def metrics(args: argparse.Namespace) -> dict[str, float]:
    """The server's metrics, labels dropped, equal names added up."""
    reader, writer = await http(args, "GET", "/metrics")
    text = (await reader.read()).decode()
    writer.close()
    values: dict[str, float] = {}
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        if name and not name.startswith("#"):
            try:
                number = float(line.rsplit(" ", 1)[1])
            except (ValueError, IndexError):
                continue
            key = name.split("{")[0]
            values[key] = values.get(key, 0.0) + number
    return values


async def one_request(args: argparse.Namespace, rng: random.Random, outcome: dict[str, int]) -> None:
    """One streamed chat, read to its end or left after a random number of bytes."""
    body = {
        "model": args.model,
        "messages": [{"role": "user", "content": f"{rng.choice(PROMPTS)} ({rng.randrange(10**6)})"}],
        "max_tokens": rng.randrange(1, 96),
        "temperature": 1.0,
        "ignore_eos": True,
        "stream": True,
        "n": 2 if rng.random() < 0.1 else 1,
    }
    leaves_after = rng.randrange(1, 6000) if rng.random() < args.disconnect else None
    reader, writer = await http(args, "POST", "/v1/chat/completions", body)
    received = b""
    try:
        while chunk := await reader.read(4096):
            received += chunk
            if leaves_after is not None and len(received) >= leaves_after:
                outcome["left"] += 1
                return
        outcome["finished" if b"data: [DONE]" in received else "broken"] += 1
    finally:
        writer.close()


async def run_round(args: argparse.Namespace, rng: random.Random) -> dict[str, int]:
    """`args.requests` requests, at most `args.concurrency` at a time."""
    outcome = {"finished": 0, "left": 0, "broken": 0}
    gate = asyncio.Semaphore(args.concurrency)

    async def guarded() -> None:
        async with gate:
            await one_request(args, rng, outcome)

    await asyncio.gather(*(guarded() for _ in range(args.requests)))
    return outcome


async def settle(args: argparse.Namespace) -> dict[str, float]:
    """Waits until nothing runs or waits; gives up after a minute."""
    for _ in range(600):
        values = await metrics(args)
        if values["vllm:num_requests_running"] == 0 and values["vllm:num_requests_waiting"] == 0:
            return values
        await asyncio.sleep(0.1)
    return values


async def soak(args: argparse.Namespace) -> int:
    """All rounds; the exit status."""
    rng = random.Random(args.seed)
    resident: list[float] = []
    for number in range(args.rounds):
        started = time.monotonic()
        outcome = await run_round(args, rng)
        values = await settle(args)
        resident.append(values["process_resident_memory_bytes"] / 2**20)
        print(json.dumps({
            "round": number,
            **outcome,
            "seconds": round(time.monotonic() - started, 1),
            "running": values["vllm:num_requests_running"],
            "waiting": values["vllm:num_requests_waiting"],
            "kv_cache_usage": values["vllm:kv_cache_usage_perc"],
            "resident_mib": round(resident[-1], 1),
        }), flush=True)
        if outcome["broken"] or values["vllm:num_requests_running"]:
            print("a stream broke off or a request never ended", file=sys.stderr)
            return 1
    if len(resident) > 2 and resident[-1] > resident[-2] * args.growth:
        print(f"resident memory still grows: {resident}", file=sys.stderr)
        return 1
    return 0


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--requests", type=int, default=2000, help="per round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--disconnect", type=float, default=0.5, help="share of clients that leave early")
    parser.add_argument("--growth", type=float, default=1.02, help="most growth of resident memory in the last round")
    parser.add_argument("--seed", type=int, default=1)
    sys.exit(asyncio.run(soak(parser.parse_args())))


if __name__ == "__main__":
    main()
