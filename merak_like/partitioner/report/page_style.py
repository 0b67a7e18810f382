"""The page's style sheet. A string in a module, so that every kind of installation carries it."""

STYLE = """
:root {
  color-scheme: light dark;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "DejaVu Sans", sans-serif;
  --page: #f6f7f9; --card: #fff; --ink: #1b1f27; --dim: #667085; --rule: #dfe3ea; --accent: #3157d5;
  --fill-l: 95.5%; --fill-c: .028; --line-l: 56%; --line-c: .14; --panel-l: 98%; --warn: #c2410c;
  --shadow: 0 1px 2px #1018280f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0f1217; --card: #171b22; --ink: #e6e9ef; --dim: #93a0b4; --rule: #2b323e; --accent: #8ea8ff;
    --fill-l: 29%; --fill-c: .045; --line-l: 72%; --line-c: .12; --panel-l: 21%; --warn: #fb923c; --shadow: none;
  }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 14px/1.45 var(--sans);
  font-variant-numeric: tabular-nums }
main { max-width: 1720px; margin: 0 auto; padding: 28px 28px 48px }
h1 { font-size: 24px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -.01em }
h2 { font-size: 15px; margin: 32px 0 10px }
.lead { color: var(--dim); margin: 0 }
.facts { display: flex; flex-wrap: wrap; gap: 12px 36px; margin: 20px 0 0; padding: 0 }
.facts div { min-width: 84px }
.facts dt { color: var(--dim); font-size: 12px }
.facts dd { margin: 0; font-size: 17px; font-weight: 600 }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(270px, 1fr)); gap: 14px }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 14px 16px;
  box-shadow: var(--shadow);
  border-top: 3px solid var(--line) }
.card h3 { margin: 0; font-size: 14px; display: flex; justify-content: space-between }
.card h3 span { font-weight: 400; color: var(--dim) }
.card p { margin: 2px 0 10px; color: var(--dim); overflow-wrap: anywhere; font-size: 13px }
.meter { margin-top: 9px; font-size: 12px }
.meter > div:first-child { display: flex; justify-content: space-between; margin-bottom: 3px }
.meter span + span { color: var(--dim) }
.track { display: flex; height: 9px; border-radius: 5px; overflow: hidden; background: var(--rule) }
.track i { display: block; height: 100% }
.over { color: var(--warn) !important; font-weight: 600 }
.forward { background: var(--line) } .backward { background: var(--line); opacity: .55 }
.weights { background: #4f6bd8 } .gradients { background: #8b7ae6 } .optimizer { background: #c07ad6 }
.activations { background: #e08a3c } .boundary { background: #d8b32f }
.logits { background: #b5502f } .workspace { background: #8d97a8 }
.legend { display: flex; flex-wrap: wrap; gap: 6px 18px; color: var(--dim); font-size: 12px; margin: 10px 0 0;
  padding: 0; list-style: none }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 6px;
  vertical-align: -1px }
.bar { display: flex; flex-wrap: wrap; gap: 8px 10px; align-items: center; margin: 32px 0 10px }
.bar h2 { margin: 0 auto 0 0 }
.bar input, .bar button, .bar select { font: inherit; font-size: 13px; color: inherit; background: var(--card);
  border: 1px solid var(--rule);
  border-radius: 7px; padding: 5px 10px }
.bar input { width: 200px } .bar button { min-width: 34px; cursor: pointer }
.bar output { color: var(--dim); font-size: 12px; min-width: 64px }
.stand { overflow: auto; border: 1px solid var(--rule); border-radius: 10px; background: var(--card); padding: 16px;
  max-height: 92vh }
svg { display: block; font: 11.5px/1 var(--sans) }
svg text { fill: var(--ink) }
.panel rect { fill: oklch(var(--panel-l) calc(var(--fill-c) * .45) var(--hue)); stroke: var(--rule) }
.stage { font-weight: 650; font-size: 14px } .time { font-weight: 600; font-size: 12px; text-anchor: end }
svg .about { fill: var(--dim); font-size: 10.5px }
.block { fill: none; stroke: var(--rule) }
.unit { cursor: default; outline: none }
.box { fill: var(--fill); stroke: var(--line); stroke-width: 1 }
.again .box { stroke-dasharray: 4 2 }
.cost { fill: var(--line) }
.amount { text-anchor: end; fill: var(--dim) !important; font-size: 10px }
.unit:hover .box, .unit:focus .box { stroke-width: 2.2 }
.way { fill: none; stroke: var(--dim); stroke-width: 1.1 } .tip { fill: var(--dim) }
.skip .way { stroke: var(--line); stroke-width: 1.2 } .skip .tip { fill: var(--line) }
.cut-line { stroke: var(--dim); stroke-width: 1.2; stroke-dasharray: 3 4 }
.cut { outline: none } .cut text { text-anchor: middle }
.cut rect { fill: var(--card); stroke: var(--rule) } .cut:hover rect, .cut:focus rect { stroke: var(--accent) }
.sum { font-weight: 650 } .value { font-size: 11px }
svg.pointing .edge { opacity: .16 } svg.pointing .unit { opacity: .5 } svg.pointing .near { opacity: 1 }
svg.pointing .edge.near .way { stroke-width: 2 }
svg.seeking .unit { opacity: .22 } svg.seeking .unit.found { opacity: 1 } svg.seeking .found .box { stroke-width: 2.2 }
svg.heat .box { fill: color-mix(in oklch, var(--card), #e5484d calc(var(--heat) * 85%)); stroke: var(--rule) }
svg.heat .cost { fill: none }
.divided { --lies: #2f9e6e } .partly { --lies: #d8b32f } .whole { --lies: #e5484d }
.legend i:is(.divided, .partly, .whole) { background: var(--lies) }
svg.ranks .box { fill: var(--card); stroke: var(--rule) }
svg.ranks :is(.divided, .partly, .whole) .box { fill: color-mix(in oklch, var(--card), var(--lies) 45%) }
#tip { position: fixed; z-index: 5; pointer-events: none; max-width: 420px; padding: 10px 13px; border-radius: 9px;
  font-size: 12.5px;
  background: var(--card); color: var(--ink); border: 1px solid var(--rule); box-shadow: 0 8px 28px #00000038 }
#tip[hidden] { display: none }
#tip b { display: block; overflow-wrap: anywhere } #tip em { color: var(--dim); font-style: normal }
#tip dl { display: grid; grid-template-columns: auto 1fr; gap: 2px 14px; margin: 7px 0 0 }
#tip dt { color: var(--dim) } #tip dd { margin: 0; overflow-wrap: anywhere }
.wide { overflow-x: auto; background: var(--card); border: 1px solid var(--rule); border-radius: 10px }
table { border-collapse: collapse; width: 100%; font-size: 13px }
th, td { text-align: left; padding: 7px 14px; border-top: 1px solid var(--rule); white-space: nowrap }
th { border-top: 0; color: var(--dim); font-weight: 500 } td.number, th.number { text-align: right }
code { font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 12px;
  overflow-wrap: anywhere }
.why { margin: 0; padding-left: 20px } .why li { margin: 3px 0 }
footer { margin-top: 36px; color: var(--dim); font-size: 12px }
@media print { .bar input, .bar button, .bar select { display: none } .stand { max-height: none } }
"""
