"""A run as one HTML page that needs no network: its curves, its numbers, what it was asked for, and its plan."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from merak_like.partitioner.plan import Plan
from merak_like.partitioner.report.page import page as plan_page
from merak_like.trainer.journal import METRICS

REPORT = "report.html"
"""Where it is left at the end of a run."""
WIDE, HIGH, LEFT, BELOW = 860.0, 240.0, 64.0, 28.0
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; } td, th { padding: .15rem .9rem .15rem 0; text-align: left; }
td:last-child { font-variant-numeric: tabular-nums; } svg { width: 100%; height: auto; }
pre { background: #f5f5f3; padding: .8rem; overflow: auto; font-size: 13px; }
iframe { width: 100%; height: 46rem; border: 1px solid #ddd; }
text { font-size: 12px; fill: #666; } .legend b { font-weight: 500; }
"""
COLOURS = {"loss": "#a9c3e0", "eval_loss": "#1f4e8c"}
CHARTS: Mapping[str, Sequence[str]] = {
    "Loss": ("loss", "eval_loss"),
    "Gradient norm": ("grad_norm",),
    "Learning rate": ("learning_rate",),
    "Items per second": ("items_per_second",),
    "Share of the time spent waiting for data": ("data_wait",),
}
"""What is drawn, each where the run has it."""


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics. Raises ValueError where there are none; a last line cut short is left out."""
    file = folder / METRICS
    if not file.is_file():
        raise ValueError(f"{folder} has no {METRICS}: it is not the folder of a run")
    lines: list[dict[str, Any]] = []
    texts = file.read_text(encoding="utf-8").splitlines()
    for number, text in enumerate(texts, 1):
        try:
            lines.append(json.loads(text))
        except ValueError:
            if number < len(texts):
                raise ValueError(f"{file}, line {number}: not JSON") from None
    return lines


def page(folder: Path) -> str:
    """The page of a run's folder."""
    lines = read_metrics(folder)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(folder.name)}</title><style>{STYLE}</style></head><body>
<h1>{escape(folder.name)}</h1>
{_table(summary(lines))}
{"".join(_charts(lines))}
{"".join(_files(folder))}
</body></html>
"""


def summary(lines: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The numbers that people ask for first."""
    found: dict[str, str] = {}

    def last(name: str) -> Any:
        return next((line[name] for line in reversed(lines) if name in line), None)

    if lines:
        found["steps"] = f"{lines[-1]['step']:,}"
    looked = [(line["eval_loss"], line["step"]) for line in lines if "eval_loss" in line]
    if looked:
        found["best evaluation loss"] = "{:.4f} at step {:,}".format(*min(looked))
    for name, title, text in (
        ("loss", "last training loss", "{:.4f}"), ("eval_perplexity", "last perplexity", "{:.3f}"),
        ("seconds_per_step", "seconds a step", "{:.3f}"), ("items_per_second", "items a second", "{:,.0f}"),
        ("model_flops_utilisation", "MFU", "{:.1%}"), ("tflops_per_rank", "TFLOP/s of a rank", "{:.3g}"),
        ("bubble", "idle pipeline", "{:.1%}"), ("planned_bubble", "planned to idle", "{:.1%}"),
        ("peak_memory_bytes", "memory of the fullest rank, GB", "{:.3g}"), ("skipped", "steps left out", "{:.0f}"),
        ("accuracy", "accuracy", "{:.4f}"), ("wire_bytes", "GB on the wire", "{:.3g}"),
        ("client_flops", "operations of clients", "{:.3g}"), ("c3_score", "C3-score", "{:.4f}"),
    ):  # fmt: skip
        value = last(name)
        if value is not None:
            found[title] = text.format(value / 1e9 if name.endswith("_bytes") else value)
    if each := last("peak_memory_bytes_of_ranks"):
        found["memory of each rank, GB"] = ", ".join(f"{n / 1e9:.3g}" for n in each)
    return found


def _table(rows: Mapping[str, str]) -> str:
    return f"<table>{''.join(f'<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>' for k, v in rows.items())}</table>"


def _charts(lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for title, names in CHARTS.items():
        curves = {name: [(x["step"], x[name]) for x in lines if name in x] for name in names}
        curves = {name: points for name, points in curves.items() if points}
        if curves:
            yield f"<h2>{title}</h2>{chart(curves)}"


def chart(curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Some curves over the steps, as SVG."""
    xs = [x for points in curves.values() for x, _ in points]
    ys = [y for points in curves.values() for _, y in points if abs(y) < float("inf")]  # not NaN either
    low, high = min(ys, default=0.0), max(ys, default=1.0)
    first, last = min(xs), max(max(xs), min(xs) + 1)
    high = high if high > low else low + (abs(low) or 1.0)

    def place(x: float, y: float) -> str:
        across = LEFT + (WIDE - LEFT - 8) * (x - first) / (last - first)
        return f"{across:.1f},{8 + (HIGH - BELOW - 8) * (high - y) / (high - low):.1f}"

    drawn = "".join(
        f'<polyline fill="none" stroke="{COLOURS.get(name, "#1f4e8c")}" stroke-width="1.6" points="'
        f'{" ".join(place(x, y) for x, y in points if abs(y) < float("inf"))}"><title>{escape(name)}</title></polyline>'
        for name, points in curves.items()
    )
    ticks = "".join(
        f'<text x="{LEFT - 8}" y="{place(first, y).split(",")[1]}" text-anchor="end" dy="4">{y:.4g}</text>'
        for y in (low, (low + high) / 2, high)
    )
    foot = (
        f'<text x="{LEFT}" y="{HIGH - 6}">step {first:g}</text>'
        f'<text x="{WIDE - 8}" y="{HIGH - 6}" text-anchor="end">step {last:g}</text>'
    )
    legend = ", ".join(f'<b style="color:{COLOURS.get(name, "#1f4e8c")}">{escape(name)}</b>' for name in curves)
    return f'<p class="legend">{legend}</p><svg viewBox="0 0 {WIDE:g} {HIGH:g}" role="img">{drawn}{ticks}{foot}</svg>'


def _files(folder: Path) -> Iterator[str]:
    for name, title in (("config.resolved.yaml", "What was asked for"), ("env.json", "Where it ran")):
        if (folder / name).is_file():
            yield f"<h2>{title}</h2><pre>{escape((folder / name).read_text(encoding='utf-8'))}</pre>"
    if (folder / "plan.json").is_file():
        inner = escape(plan_page(Plan.load(folder / "plan.json")))
        yield f'<h2>The plan</h2><iframe title="plan" srcdoc="{inner}"></iframe>'
