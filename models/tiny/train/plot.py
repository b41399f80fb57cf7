"""Draws the loss curves of the target, and of the draft if wanted, from their training histories."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402


def smoothed(values: list[float], width: int = 5) -> list[float]:
    """A running mean over the last few values."""
    windows = (values[max(0, i - width + 1) : i + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def draw(histories: dict[str, Path], out: Path) -> None:
    """One curve for each model over the tokens seen."""
    matplotlib.rcParams["svg.hashsalt"] = "tiny"
    figure, axes = plt.subplots(figsize=(7, 3.6))
    for name, path in histories.items():
        rows = json.loads(path.read_text(encoding="utf-8"))
        axes.plot([row["tokens"] / 1e6 for row in rows], smoothed([row["loss"] for row in rows]), label=name, linewidth=1.3)
    axes.set(xlabel="tokens seen (millions)", ylabel="loss per learned token", yscale="log")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=Path, required=True, help="history.json of the target")
    parser.add_argument("--draft", type=Path, help="history.json of the draft")
    parser.add_argument("--out", type=Path, default=Path("../loss.svg"))
    args = parser.parse_args()
    histories = {"target": args.target} | ({"draft": args.draft} if args.draft else {})
    draw(histories, args.out)


if __name__ == "__main__":
    main()
