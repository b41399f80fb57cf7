"""Trains the target or the draft model on the generated corpus.

The run can be stopped at any time and resumes from its last checkpoint: weights, optimizers,
random state and data position are written atomically. Its length is a number of steps, or a
number of minutes of training time, over which the learning rate is scheduled. On a CPU the
batches of a step are shared among ``--workers`` processes of ``--threads`` threads each.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from corpus import held_out_keys
from data import Batch, Loader
from init import look_back
from model import CONFIGS, Llama
from optim import Muon

WARMUP, DECAY_FROM = 0.015, 0.5
MUON_LR, EMBED_LR, NORM_LR, SCALE_LR = 0.02, 0.02, 0.004, 0.0003
EARLY_UNTIL, HELD_UNTIL = 0.12, 0.3


def rate(progress: float) -> float:
    """The learning-rate factor: warm up, hold, then fall linearly to nearly nothing."""
    if progress < WARMUP:
        return 0.05 + 0.95 * progress / WARMUP
    if progress < DECAY_FROM:
        return 1.0
    return max(0.01, (1 - progress) / (1 - DECAY_FROM))


class Trainer:
    """All the state of a run."""

    def __init__(self, args: argparse.Namespace, rank: int) -> None:
        self.args, self.rank = args, rank
        torch.manual_seed(args.seed)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = Llama(CONFIGS[args.model], torch.bfloat16)
        self.held = look_back(self.model)
        self.model.to(self.device)
        for layer in self.model.layers if args.compile else ():
            layer.compile(dynamic=True)
        matrices = [p for p in self.model.layers.parameters() if p.ndim == 2]
        norms = [p for p in self.model.layers.parameters() if p.ndim == 1]
        self.muon = Muon(matrices, MUON_LR, rank, args.workers)
        self.adam = torch.optim.AdamW(
            [{"params": self.model.embed_tokens.parameters(), "lr": EMBED_LR}, {"params": norms, "lr": NORM_LR},
             {"params": self.model.norm.parameters(), "lr": SCALE_LR}], betas=(0.9, 0.95), weight_decay=0.0)
        self.bases = [group["lr"] for group in self.muon.param_groups + self.adam.param_groups]
        self.gradients = self._flat_gradients()
        self.teacher = self._load_teacher() if args.teacher else None
        self.step, self.seconds, self.seen = 0, 0.0, 0
        self.history: list[dict[str, float]] = []
        self.loader = Loader(args.tokenizer, held_out_keys(args.golden), args.seed, args.tokens)
        self.path = args.out / "checkpoint.pt"
        if self.path.exists():
            self._resume()

    def _flat_gradients(self) -> Tensor:
        """One buffer that holds every gradient, so that workers add theirs up in one go."""
        params = list(self.model.parameters())
        flat = torch.zeros(sum(p.numel() for p in params), device=self.device)
        for param, part in zip(params, flat.split([p.numel() for p in params])):
            param.grad = part.view_as(param)
        return flat

    def _load_teacher(self) -> Llama:
        state = torch.load(self.args.teacher, map_location=self.device, weights_only=False)
        teacher = Llama(CONFIGS["target"], torch.bfloat16).to(self.device)
        teacher.load_state_dict(state["model"])
        return teacher.requires_grad_(False)

    def _resume(self) -> None:
        state = torch.load(self.path, map_location=self.device, weights_only=False)
        self.model.load_state_dict(state["model"])
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
        torch.set_rng_state(state["rng"].cpu())
        self.step, self.seconds, self.seen, self.history = state["step"], state["seconds"], state["seen"], state["history"]
        self.loader.mixture, self.loader.position = state["mixture"], state["position"]

    def save(self) -> None:
        """Write the checkpoint so that a crash leaves the old or the new one."""
        state = {"model": self.model.state_dict(), "muon": self.muon.state_dict(), "adam": self.adam.state_dict(),
                 "rng": torch.get_rng_state(), "step": self.step, "seconds": self.seconds, "seen": self.seen,
                 "history": self.history, "mixture": self.loader.mixture, "position": self.loader.position,
                 "kind": self.args.model}
        self.args.out.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_suffix(".new")
        torch.save(state, fresh)
        os.replace(fresh, self.path)
        (self.args.out / "history.json").write_text(json.dumps(self.history) + "\n", encoding="utf-8")

    def progress(self) -> float:
        """How much of the run is done, from 0 to 1."""
        done = self.step / self.args.steps if self.args.steps else self.seconds / (60 * self.args.minutes)
        return min(done, 1.0)

    def _loss(self, batch: Batch) -> Tensor:
        ids, where, labels = (x.to(self.device) for x in (batch.ids, batch.where, batch.labels))
        logits = self.model.logits(self.model.hidden(ids).flatten(0, 1)[where]).float()
        if self.teacher is None:
            return F.cross_entropy(logits, labels, reduction="sum")
        with torch.no_grad():
            wanted = self.teacher.logits(self.teacher.hidden(ids).flatten(0, 1)[where]).float().softmax(-1)
        return F.cross_entropy(logits, wanted, reduction="sum")

    def advance(self, progress: float) -> float:
        """One optimizer step; returns this worker's share of the mean loss of a learned token."""
        self.loader.mixture = "early" if progress < EARLY_UNTIL else "main" if progress < DECAY_FROM else "late"
        while progress >= HELD_UNTIL and self.held:
            self.held.pop().remove()
        for group, base in zip(self.muon.param_groups + self.adam.param_groups, self.bases):
            group["lr"] = base * rate(progress)
        wanted = self.args.batches * (2 if progress >= DECAY_FROM else 1)
        batches = [self.loader.next() for _ in range(wanted)]
        count = sum(len(batch.labels) for batch in batches)
        self.gradients.zero_()
        total = 0.0
        for batch in batches[self.rank :: self.args.workers]:
            loss = self._loss(batch) / count
            loss.backward()
            total += loss.item()
        if self.args.workers > 1:
            dist.all_reduce(self.gradients)
        self.muon.step()
        self.adam.step()
        self.step += 1
        self.seen += sum(batch.ids.numel() for batch in batches)
        return total * self.args.workers

    def _agreed(self, stop: bool) -> tuple[float, bool]:
        """The first worker's progress and wish to stop, which all follow."""
        state = torch.tensor([self.progress(), float(stop)], dtype=torch.float64)
        if self.args.workers > 1:
            dist.broadcast(state, 0)
        return float(state[0]), bool(state[1])

    def run(self) -> None:
        """Train to the end of the schedule, saving now and then."""
        stop: list[bool] = []
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, lambda *_: stop.append(True))
        bar = tqdm(total=1000, initial=int(1000 * self.progress()), mininterval=10, disable=self.rank > 0,
                   bar_format="{l_bar}{bar:20}| {elapsed} {postfix}")
        saved, recent = time.monotonic(), []
        progress, halt = self._agreed(False)
        while progress < 1 and not halt:
            begun = time.monotonic()
            recent.append(self.advance(progress))
            self.seconds += time.monotonic() - begun
            if self.step % 10 == 0:
                loss, recent = sum(recent) / len(recent), []
                self.history.append({"step": self.step, "tokens": self.seen, "loss": round(loss, 5), "seconds": round(self.seconds)})
                bar.n = int(1000 * progress)
                bar.set_postfix_str(f"step {self.step} loss {loss:.4f} {self.seen / self.seconds:.0f} tok/s")
            if self.rank == 0 and time.monotonic() - saved > 60 * self.args.save_every:
                self.save()
                saved = time.monotonic()
            progress, halt = self._agreed(bool(stop))
        if self.rank == 0:
            self.save()
        bar.close()


def work(rank: int, args: argparse.Namespace) -> None:
    """One worker process."""
    torch.set_num_threads(args.threads)
    if args.workers > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{args.port}", rank=rank, world_size=args.workers)
    Trainer(args, rank).run()
    if args.workers > 1:
        dist.destroy_process_group()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=list(CONFIGS), default="target")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--tokenizer", type=Path, default=Path("../tokenizer.json"))
    parser.add_argument("--golden", type=Path, default=Path("../golden.jsonl"), help="what training must avoid")
    parser.add_argument("--teacher", type=Path, help="checkpoint of a target model to learn from")
    parser.add_argument("--steps", type=int, help="length of the run in steps")
    parser.add_argument("--minutes", type=float, default=100, help="length of the run in time, without --steps")
    parser.add_argument("--threads", type=int, default=1, help="threads of each worker")
    parser.add_argument("--workers", type=int, default=1, help="processes that share each step")
    parser.add_argument("--port", type=int, default=29517, help="where workers meet")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="compile the layers (needs a C++ compiler)")
    parser.add_argument("--tokens", type=int, default=2048, help="padded tokens in a batch")
    parser.add_argument("--batches", type=int, default=2, help="batches in a step, and twice as many once the rate falls")
    parser.add_argument("--save-every", type=float, default=4, help="minutes between checkpoints")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if args.workers == 1:
        work(0, args)
    else:
        mp.spawn(work, (args,), args.workers)


if __name__ == "__main__":
    main()
