"""The page's script: tips, highlighting, search, zoom. Everything is drawn without it."""

SCRIPT = """
"use strict";
(() => {
  const tips = JSON.parse(document.getElementById("tips").textContent);
  const graph = document.getElementById("graph"), tip = document.getElementById("tip");
  const units = [...graph.querySelectorAll(".unit")], edges = [...graph.querySelectorAll(".edge")];
  const ends = edges.map(edge => [edge.dataset.from, ...edge.dataset.to.split(" ")]);
  const make = (tag, text) => Object.assign(document.createElement(tag), {textContent: text});

  const place = (x, y) => {
    const box = tip.getBoundingClientRect();
    tip.style.left = Math.max(8, Math.min(x + 16, innerWidth - box.width - 8)) + "px";
    tip.style.top = Math.max(8, y + 18 + box.height > innerHeight ? y - box.height - 12 : y + 18) + "px";
  };
  const near = unit => {
    graph.classList.add("pointing");
    const close = new Set([unit]);
    edges.forEach((edge, n) => {
      const [source, ...targets] = ends[n];
      const on = source === unit || targets.includes(unit);
      edge.classList.toggle("near", on);
      if (source === unit) targets.forEach(target => close.add(target));
      if (on) close.add(source);
    });
    units.forEach(other => other.classList.toggle("near", close.has(other.dataset.unit)));
  };
  const show = (target, x, y) => {
    const about = target.dataset.unit === undefined ? tips.cuts[target.dataset.cut] : tips.units[target.dataset.unit];
    const list = make("dl", "");
    for (const [label, text] of about.rows) list.append(make("dt", label), make("dd", text));
    tip.replaceChildren(make("b", about.name), make("em", about.kind), list);
    tip.hidden = false;
    place(x, y);
    if (target.dataset.unit !== undefined) near(target.dataset.unit);
  };
  const hide = () => { tip.hidden = true; graph.classList.remove("pointing"); };

  for (const target of graph.querySelectorAll(".unit, .cut")) {
    target.addEventListener("mouseenter", event => show(target, event.clientX, event.clientY));
    target.addEventListener("mousemove", event => place(event.clientX, event.clientY));
    target.addEventListener("mouseleave", hide);
    target.addEventListener("focus", () => {
      const box = target.getBoundingClientRect();
      show(target, box.right - 12, box.bottom - 14);
    });
    target.addEventListener("blur", hide);
  }
  addEventListener("keydown", event => { if (event.key === "Escape") hide(); });

  const seek = document.getElementById("seek"), found = document.getElementById("found");
  seek.addEventListener("input", () => {
    const words = seek.value.toLowerCase().split(" ").filter(Boolean);
    let number = 0;
    units.forEach((unit, n) => {
      const text = (tips.units[n].name + " " + tips.units[n].kind).toLowerCase();
      const hit = words.length > 0 && words.every(word => text.includes(word));
      unit.classList.toggle("found", hit);
      number += hit;
    });
    graph.classList.toggle("seeking", words.length > 0);
    found.value = words.length ? number + " of " + units.length : "";
  });

  document.getElementById("colour").addEventListener("change", event => {
    const kind = event.target.value;
    graph.classList.toggle("heat", kind in tips.heat);
    graph.classList.toggle("ranks", kind === "tensor parallelism");
    if (kind in tips.heat) units.forEach((unit, n) => unit.style.setProperty("--heat", tips.heat[kind][n]));
  });

  const full = graph.viewBox.baseVal.width, high = graph.viewBox.baseVal.height, stand = graph.parentElement;
  let zoom = 1;
  const size = to => {
    zoom = Math.max(0.2, Math.min(3, to));
    graph.setAttribute("width", full * zoom);
    graph.setAttribute("height", high * zoom);
  };
  const fit = () => size(Math.min(1, (stand.clientWidth - 32) / full));
  document.getElementById("in").addEventListener("click", () => size(zoom * 1.25));
  document.getElementById("out").addEventListener("click", () => size(zoom / 1.25));
  document.getElementById("fit").addEventListener("click", fit);
  size(Math.max(0.72, Math.min(1, (stand.clientWidth - 32) / full)));
})();
"""
