"""How well would truth itself do at vTrain's choices, were the rows measured once more?

    python -m benchmarks.planner.noise      prints a table; seconds

Measurements with noise on them are drawn, and told by what was measured: its Spearman's rank correlation, and how much
slower than the best of a draw its choice is. Two measurements of a configuration differ by 2 % to 6 %.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

DRAWS, RANK, REGRET = 10_000, 0.9, 0.02


def main() -> None:
    """Print a row for each noise."""
    rows = json.loads(Path(__file__).with_name("results.json").read_text(encoding="utf-8"))["vtrain"]
    models = {
        model: np.array([row["measured"] for row in rows if row["name"].split()[0] == model])
        for model in ("3.6B", "18.4B")
    }
    random = np.random.default_rng(0)
    print("| noise | Spearman of 18.4B | draws of at least 0.9 | regret, mean of both | draws of at most 2 % |")
    print("|---:|---:|---:|---:|---:|")
    for noise in (0.02, 0.03, 0.04, 0.05, 0.06):
        regrets, ranks = list[np.ndarray](), np.empty(0)
        for truth in models.values():
            drawn = truth * (1 + noise * random.standard_normal((DRAWS, len(truth))))
            regrets.append(drawn[:, truth.argmin()] / drawn.min(axis=1) - 1)
            apart = drawn.argsort(axis=1).argsort(axis=1) - truth.argsort().argsort()
            n = len(truth)
            ranks = 1 - 6 * (apart**2).sum(axis=1) / (n * (n * n - 1))  # the last is that of 18.4B
        regret = np.mean(regrets, axis=0)
        print(
            f"| {noise:.0%} | {ranks.mean():.2f} | {(ranks >= RANK).mean():.0%} | {regret.mean():.1%} | "
            f"{(regret <= REGRET).mean():.0%} |"
        )


if __name__ == "__main__":
    main()
