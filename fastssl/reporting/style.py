"""The looks of a report, and the script that shows values under the pointer. Nothing is loaded."""

# Colours of lines: Okabe and Ito (2008), those too pale for lines on white made darker.
STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1d2126; --soft: #59616b; --page: #ffffff; --card: #f6f7f9; --edge: #d9dde2;
  --mark: #fff2cc; --link: #0b61a4; --good: #176f3a; --busy: #8a5a00; --bad: #a3301b;
  --c0: #0072b2; --c1: #d55e00; --c2: #00875f; --c3: #b3508c; --c4: #9a7200; --c5: #3b97d3;
  --c6: #4a4f57; --c7: #8f5a3c;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e4e7eb; --soft: #a0a8b2; --page: #14171b; --card: #1c2026; --edge: #353b44;
    --mark: #4a3d12; --link: #7fbdf0; --good: #6fd398; --busy: #f0bd5a; --bad: #ff8f78;
    --c0: #4aa8e8; --c1: #ff8b3d; --c2: #2bc597; --c3: #e693c6; --c4: #e3b51f; --c5: #9fd8ff;
    --c6: #c8ccd2; --c7: #cf9d7f;
  }
}
@media print {
  :root {
    color-scheme: light;
    --ink: #000; --soft: #444; --page: #fff; --card: #fff; --edge: #bbb; --mark: #eee;
    --c0: #0072b2; --c1: #d55e00; --c2: #00875f; --c3: #b3508c; --c4: #9a7200; --c5: #3b97d3;
    --c6: #4a4f57; --c7: #8f5a3c;
  }
  nav { display: none; }
  .key { position: static !important; }
  figure, tr { break-inside: avoid; }
  .scroll { overflow: visible !important; }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.2rem clamp(0.9rem, 3vw, 2.5rem) 4rem; max-width: 1500px;
  background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  overflow-wrap: anywhere;
}
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 0.2rem; }
h2 {
  font-size: 1.25rem; margin: 2.6rem 0 0.6rem; padding-top: 0.5rem;
  border-top: 1px solid var(--edge);
}
h3 { font-size: 1rem; margin: 1.4rem 0 0.4rem; }
p { margin: 0.3rem 0 0.7rem; max-width: 75ch; }
small, .soft { color: var(--soft); font-size: 0.86rem; }
code, pre { font: 0.86rem/1.45 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
pre {
  max-height: 32rem; overflow: auto; padding: 0.7rem; margin: 0.4rem 0;
  background: var(--card); border: 1px solid var(--edge); border-radius: 6px;
}
a { color: var(--link); }
nav a { margin-right: 1rem; white-space: nowrap; }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
.scroll { overflow-x: auto; margin: 0.5rem 0 1rem; }
table { border-collapse: collapse; font-size: 0.9rem; overflow-wrap: normal; }
caption { text-align: left; color: var(--soft); padding: 0.2rem 0; font-size: 0.86rem; }
th, td {
  padding: 0.3rem 0.9rem 0.3rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--edge); font-variant-numeric: tabular-nums;
}
thead th { color: var(--soft); font-weight: 600; white-space: nowrap; }
tbody th { font-weight: 600; white-space: nowrap; }
td { min-width: 4.5rem; max-width: 26rem; overflow-wrap: break-word; }
td.whole { white-space: nowrap; }
td code { overflow-wrap: anywhere; }
@media (max-width: 900px) { table { width: max-content; } }
.numbers td, .numbers thead th + th {
  text-align: right; padding: 0.3rem 0 0.3rem 1.1rem; white-space: nowrap;
}
td small { display: block; }
.differs { background: var(--mark); }
.done { color: var(--good); }
.running { color: var(--busy); }
.stopped, .nothing { color: var(--bad); }
.warn { border-left: 4px solid var(--busy); padding: 0.2rem 0 0.2rem 0.7rem; margin: 0.4rem 0; }
details { margin: 0.4rem 0; }
summary { cursor: pointer; padding: 0.2rem 0; }
details > :not(summary) { margin-left: 1rem; }
td.text { white-space: normal; min-width: 9rem; }
.key {
  position: sticky; top: 0; z-index: 2; background: var(--page); padding: 0.35rem 0;
  border-bottom: 1px solid var(--edge); margin-bottom: 0.6rem;
}
.legend {
  display: flex; flex-wrap: wrap; gap: 0.1rem 1.2rem; list-style: none; margin: 0; padding: 0;
  font-size: 0.88rem;
}
.legend li { display: flex; align-items: center; gap: 0.4rem; }
.swatch { width: 26px; height: 10px; flex: none; vertical-align: middle; margin-right: 0.4rem; }
.charts {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 390px), 1fr));
  gap: 1rem;
}
figure { margin: 0; }
.chart {
  position: relative; background: var(--card); border: 1px solid var(--edge);
  border-radius: 8px; padding: 0.6rem 0.7rem 0.3rem;
}
.chart > svg { display: block; width: 100%; height: auto; touch-action: pan-y; }
.chart figcaption small { display: block; line-height: 1.35; }
svg text {
  fill: var(--soft);
  font: 11.5px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
.grid { stroke: var(--edge); stroke-width: 1; }
.line, .key { fill: none; stroke: currentColor; }
path.line, path.key { stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.chance {
  fill: none; stroke: currentColor; stroke-width: 1.3; stroke-dasharray: 2 4; opacity: 0.9;
}
.dashed { stroke-dasharray: 9 4; } .dotted { stroke-dasharray: 1.5 4.5; }
.chance.dashed, .chance.dotted { stroke-dasharray: 2 4; }
.band { fill: currentColor; opacity: 0.22; stroke: none; }
.dot { fill: currentColor; }
.cursor { stroke: var(--soft); stroke-width: 1; visibility: hidden; }
.c0 { color: var(--c0); }
.c1 { color: var(--c1); }
.c2 { color: var(--c2); }
.c3 { color: var(--c3); }
.c4 { color: var(--c4); }
.c5 { color: var(--c5); }
.c6 { color: var(--c6); }
.c7 { color: var(--c7); }
.tip {
  position: absolute; z-index: 3; pointer-events: none; max-width: 92%; padding: 0.35rem 0.55rem;
  background: var(--page); border: 1px solid var(--edge); border-radius: 6px; font-size: 0.82rem;
  box-shadow: 0 2px 8px rgb(0 0 0 / 0.18); font-variant-numeric: tabular-nums;
}
.tip div::before {
  content: ""; display: inline-block; width: 0.6rem; height: 0.6rem; margin-right: 0.4rem;
  border-radius: 50%; background: currentColor;
}
.tip div:first-child::before { display: none; }
.tip span { color: var(--ink); }
.pictures {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr));
  gap: 1rem; align-items: start;
}
.picture img, .wide img {
  display: block; max-width: 100%; height: auto; background: #fff;
  border: 1px solid var(--edge); border-radius: 6px;
}
.wide { overflow-x: auto; }
.wide img { min-width: min(100%, 640px); }
figcaption { margin-bottom: 0.3rem; }
"""

# Bins are [first x, last x, least, mean, greatest], single values [x, value].
SCRIPT = """
"use strict";
for (const figure of document.querySelectorAll("figure.chart")) {
  const svg = figure.querySelector("svg[tabindex]"), source = figure.querySelector("script");
  if (!svg || !source) continue;
  const chart = JSON.parse(source.textContent), [low, high, left, right] = chart.x;
  const middle = (p) => (p.length > 2 ? (p[0] + p[1]) / 2 : p[0]);
  const all = chart.series.flatMap((s) => s.points.map(middle));
  const places = [...new Set(all)].sort((a, b) => a - b);
  const cursor = svg.querySelector(".cursor"), tip = document.createElement("div");
  const number = (v) => chart.unit === "%" ? (100 * v).toFixed(1) + " %"
    : Math.abs(v) >= 1000 ? Math.round(v).toLocaleString("en") : String(Number(v.toPrecision(4)));
  const said = (p) => p.length > 2
    ? number(p[3]) + " (" + number(p[2]) + " to " + number(p[4]) + ")" : number(p[1]);
  const at = (p) => chart.labels.length ? chart.labels[p[0]]
    : p.length > 2 ? "steps " + p[0].toLocaleString("en") + " to " + p[1].toLocaleString("en")
    : "step " + p[0].toLocaleString("en");
  let chosen = -1;
  tip.className = "tip"; tip.hidden = true; figure.append(tip);
  const row = (text, kind) => {
    const line = document.createElement("div"), words = document.createElement("span");
    line.className = kind; words.textContent = text; line.append(words); tip.append(line);
  };
  const hide = () => { tip.hidden = true; cursor.style.visibility = "hidden"; };
  const show = (index) => {
    chosen = Math.max(0, Math.min(places.length - 1, index));
    const x = places[chosen], shown = [];
    for (const series of chart.series) {
      let best = null;
      for (const p of series.points)
        if (!best || Math.abs(middle(p) - x) < Math.abs(middle(best) - x)) best = p;
      const reach = chart.labels.length ? 0.1 : (high - low) * 0.03;
      if (best && Math.abs(middle(best) - x) <= reach) shown.push([series, best]);
    }
    tip.replaceChildren();
    const heads = new Set(shown.map(([, p]) => at(p)));
    row(heads.size === 1 ? [...heads][0] : "near step " + Math.round(x).toLocaleString("en"), "");
    for (const [series, p] of shown)
      row(series.name + ": " + said(p) + (heads.size === 1 ? "" : " at " + at(p)), series.class);
    const unit = left + (x - low) / (high - low) * (right - left);
    cursor.setAttribute("x1", unit); cursor.setAttribute("x2", unit);
    cursor.style.visibility = "visible"; tip.hidden = false;
    const box = svg.getBoundingClientRect(), home = figure.getBoundingClientRect();
    const pixel = box.left - home.left + unit / svg.viewBox.baseVal.width * box.width;
    const room = home.width - tip.offsetWidth - 6;
    const beside = pixel + 12 > room ? pixel - tip.offsetWidth - 12 : pixel + 12;
    tip.style.left = Math.max(4, Math.min(room, beside)) + "px";
    tip.style.top = box.top - home.top + 10 + "px";
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const unit = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const x = low + (unit - left) / (right - left) * (high - low);
    let best = 0;
    places.forEach((p, i) => { if (Math.abs(p - x) < Math.abs(places[best] - x)) best = i; });
    if (places.length) show(best);
  });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape") hide();
    if (!move || !places.length) return;
    event.preventDefault();
    show(chosen < 0 ? (move > 0 ? 0 : places.length - 1) : chosen + move);
  });
}
"""
