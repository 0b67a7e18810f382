"""Draw docs/images/plan.svg: the plan of GPT-2 on four stages, as the page of ``merak html`` shows it.

Run it as ``python docs/images/draw_plan.py``.
"""

from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from merak_like import Mesh, make_plan, trace
from merak_like.hf import example_for
from merak_like.partitioner.report.drawing import svg
from merak_like.partitioner.report.page_style import STYLE

HUES = {0: 255, 1: 345, 2: 75, 3: 165}
"""Of the stages, as on the page."""


def main() -> None:
    """Plan, draw, and carry the page's colours along, so that the file stands alone."""
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config()).to(torch.bfloat16).train()
    graph = trace(model, example_for(model, 4, 1024)).graph
    plan = make_plan(graph, Mesh(pp=4), hardware="a100-80gb", batch=64)
    stages = "".join(
        f".s{s}{{--hue:{hue};--fill:oklch(var(--fill-l) var(--fill-c) {hue});"
        f"--line:oklch(var(--line-l) var(--line-c) {hue})}}"
        for s, hue in HUES.items()
    )
    head, body = svg(plan).split(">", 1)
    ground = '<rect x="-1" y="-1" width="100%" height="100%" style="fill:var(--card)"/>'
    style = f"<style>{STYLE}{stages}</style>".replace("&", "&amp;")
    drawn = f'{head} xmlns="http://www.w3.org/2000/svg">{style}{ground}{body}\n'
    Path(__file__).with_name("plan.svg").write_text(drawn, encoding="utf-8")


if __name__ == "__main__":
    main()
