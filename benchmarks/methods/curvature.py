"""The row about K-FAC: by owners, with shared factors, and SGD, each at its best rate."""

from __future__ import annotations

import statistics

from small import Lines

RATES = {"sgd": (0.4, 0.5, 0.6), "clipped": (0.1, 0.3), "free": (0.1, 0.2, 0.3)}
"""What each is tuned over; clipped is with the default ``kl_clip``, free without one."""
WAYS = [("sgd", "sgd"), *((kind, how) for kind in ("mpd", "kfac") for how in ("clipped", "free"))]


def kfac() -> Lines:
    """Four replicas by gloo on digits, each with its own batch of 32."""
    from tests.ranks import Call, torchrun

    def call(kind: str, how: str, rate: float) -> Call:
        options = {"dp": 4, "pp": 1, "kind": kind, "rate": rate, "steps": 45 if kind == "sgd" else 20, "data": "digits"}
        options |= {"kl_clip": None} if how == "free" else {}
        return Call(f"{kind} {how} {rate}", "tests.kfac_runs:on_ranks", options)

    calls = {way: [call(*way, rate) for rate in RATES[way[1]]] for way in WAYS}
    job = torchrun([c for some in calls.values() for c in some], 4, timeout=290)
    best = {way: min((job.results(c.name) for c in some), key=lambda r: r[0]["steps"]) for way, some in calls.items()}
    lines: Lines = []
    where, kinds = "digits, 64-256-256-10, 4 replicas", ("sgd", "mpd", "kfac")
    for how, title in (("clipped", "kl_clip 0.01"), ("free", "no kl_clip")):
        found = {kind: best[kind, "sgd" if kind == "sgd" else how] for kind in kinds}
        steps = {kind: ranks[0]["steps"] for kind, ranks in found.items()}
        told = " ".join(str(steps[kind]) for kind in kinds)
        lines += [
            [where, f"{title}: steps to a loss of 0.3: SGD, shared factors, owners, each at its best rate", "", told],
            [where, f"{title}: steps to those with shared factors", "1.10", f"{steps['kfac'] / steps['mpd']:.2f}"],
            [where, f"{title}: steps to those of tuned SGD", "0.50", f"{steps['kfac'] / steps['sgd']:.2f}"],
        ]
    sent = {kind: ranks[0]["sent"] for kind, ranks in found.items()}
    extra = {kind: sum(sent[kind].values()) - sum(sent["sgd"].values()) for kind in ("mpd", "kfac")}
    held = [rank["held"] for rank in found["kfac"]]
    ms = {kind: statistics.mean(rank["cpu_ms"] for rank in ranks) for kind, ranks in found.items()}
    spent = " ".join(f"{ms[kind]:.1f}" for kind in kinds)
    more = f"{extra['mpd'] / 1024:.0f} {extra['kfac'] / 1024:.0f}"
    full = f"{max(held) / 1024:.0f} {min(held) / 1024:.0f}"
    return [
        [where, "factor bytes on the wire", "0", f"{extra['kfac'] - sent['kfac']['broadcast']}"],
        *lines,
        [where, "bytes of a step beyond SGD's, KiB: shared factors, owners", "", more],
        [where, "factors on the fullest and the emptiest rank, KiB", "", full],
        [where, "CPU milliseconds of a step: SGD, shared factors, owners", "", spent],
    ]
