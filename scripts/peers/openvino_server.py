#!/usr/bin/env python3
"""A thin HTTP shim around OpenVINO GenAI's ContinuousBatchingPipeline, enough for `bench serve`.

Answers POST /v1/completions with token ids, streamed, greedy and without end tokens; tokens are
sent as they are read, one event per step, as ids and as placeholder text. Nothing else is served.

    openvino_server.py MODEL_DIR --port 8003 --threads 2 --cache-gb 2
"""

import argparse
import itertools
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import openvino as ov
import openvino_genai as genai


class Engine:
    """The pipeline and the thread that steps it."""

    def __init__(self, args: argparse.Namespace) -> None:
        config = genai.SchedulerConfig()
        config.cache_size = args.cache_gb
        config.enable_prefix_caching = True
        config.max_num_seqs = 256
        config.dynamic_split_fuse = True
        properties = {"INFERENCE_NUM_THREADS": args.threads, "PERFORMANCE_HINT": "THROUGHPUT", "NUM_STREAMS": 1}
        self.pipeline = genai.ContinuousBatchingPipeline(args.model, config, "CPU", properties)
        self.ids = itertools.count()
        self.changed = threading.Condition()
        threading.Thread(target=self.step_forever, daemon=True).start()

    def step_forever(self) -> None:
        """Steps while there is work; readers wake after each step."""
        while True:
            with self.changed:
                while not self.pipeline.has_non_finished_requests():
                    self.changed.wait()
            self.pipeline.step()
            with self.changed:
                self.changed.notify_all()

    def submit(self, prompt: list[int], max_tokens: int) -> "genai.GenerationHandle":
        """A handle for a new request."""
        config = genai.GenerationConfig()
        config.max_new_tokens = max_tokens
        config.min_new_tokens = max_tokens
        config.ignore_eos = True
        config.do_sample = False
        tensor = ov.Tensor(np.array([prompt], dtype=np.int64))
        with self.changed:
            handle = self.pipeline.add_request(next(self.ids), tensor, config)
            self.changed.notify_all()
        return handle

    def tokens(self, handle: "genai.GenerationHandle"):
        """Yields lists of new token ids until the request has ended."""
        running = genai.GenerationStatus.RUNNING
        while True:
            with self.changed:
                while not handle.can_read() and handle.get_status() == running:
                    self.changed.wait()
                if not handle.can_read():
                    return
                outputs = handle.read()
            yield [token for output in outputs.values() for token in output.generated_ids]


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    engine: Engine

    def do_POST(self) -> None:
        """Streams a completion."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        handle = self.engine.submit(body["prompt"], body["max_tokens"])
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        count = 0
        for ids in self.engine.tokens(handle):
            count += len(ids)
            self.event({"choices": [{"index": 0, "text": "x" * len(ids), "token_ids": ids}]})
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": count}
        self.event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def event(self, data: dict) -> None:
        """One event, at once."""
        self.wfile.write(f"data: {json.dumps(data)}\n\n".encode())
        self.wfile.flush()

    def log_message(self, *_: object) -> None:
        """Quiet."""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--cache-gb", type=int, default=2)
    args = parser.parse_args()
    Handler.engine = Engine(args)
    ThreadingHTTPServer(("127.0.0.1", args.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
