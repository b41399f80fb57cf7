"""Muon for the hidden matrices, with the work shared among worker processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


@torch.no_grad()
def orthogonalize(matrix: Tensor, steps: int = 4) -> Tensor:
    """The nearest orthogonal matrix, approximately, by a quintic Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.to(torch.bfloat16)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalized; for two-dimensional weights.

    With several workers each orthogonalizes its part of the matrices and all share the results.
    """

    def __init__(self, params: list[Tensor], lr: float, rank: int, workers: int, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})
        self.rank, self.workers = rank, workers
        self._flat = torch.zeros(sum(p.numel() for p in params) if workers > 1 else 0, device=params[0].device)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Apply one update."""
        group = self.param_groups[0]
        params = group["params"]
        shared = self._flat.zero_().split([param.numel() for param in params]) if self.workers > 1 else None
        for index, param in enumerate(params):
            buffer = self._momentum(param)
            buffer.lerp_(param.grad, 1 - group["momentum"])
            if index % self.workers == self.rank:
                update = orthogonalize(param.grad.lerp(buffer, group["momentum"]))
                if shared is None:
                    self._apply(param, update, group["lr"])
                else:
                    shared[index].copy_(update.reshape(-1))
        if shared is not None:
            dist.all_reduce(self._flat)
            for param, update in zip(params, shared):
                self._apply(param, update.view_as(param), group["lr"])

    @staticmethod
    def _apply(param: Tensor, update: Tensor, lr: float) -> None:
        scale = max(1.0, param.shape[0] / param.shape[1]) ** 0.5
        param.mul_(1 - 0.01 * lr).add_(update, alpha=-lr * scale)

    def _momentum(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(param)
        return state["momentum"]
