"use strict";
// Everything a model may have written gets into the page as text nodes; nothing here parses HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const letter = (run) => data.runs[run].letter;

// ---- elements

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}
const make = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const draw = (tag, attributes = {}, ...children) => fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

// Signs that show nothing, or turn the text around them, are spelled out.
const ODD = /([\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff])/;
const code = (sign) => "U+" + sign.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0");
function visible(text) {
  return text.split(ODD).map((part, i) => (i % 2 ? make("span", { class: "odd" }, code(part)) : part)).filter((part) => part !== "");
}

// Arrow keys go from one of `count` to the next; Escape, a mouse that leaves and another element end it, with -1.
function walked(point, at, count, then = () => {}) {
  return {
    onpointerleave: (event) => event.pointerType === "mouse" && point(-1), onblur: () => point(-1),
    onkeydown: (event) => {
      const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (event.key === "Escape") point(-1);
      if (!move) return;
      event.preventDefault();
      point(Math.min(Math.max(at() + move, 0), count - 1));
      then();
    },
  };
}

// ---- numbers

const signed = (value) => (value > 0 ? "+" : "") + number(value);
function number(value) {
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e7)) return value.toExponential(1).replace("e+", "e").replace("-", "−");
  const digits = size >= 100 ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : 3;
  return value.toLocaleString("en", { maximumFractionDigits: digits }).replace("-", "−");
}
const seconds = (value) => (value < 0.1 ? number(value * 1000) + " ms" : number(value) + " s");
const isShare = (chart) => chart.unit.startsWith("%");
const percent = (value) => (value * 100).toLocaleString("en", { maximumFractionDigits: 1 }) + "\u00a0%";
const shown = (chart, value) => (isShare(chart) ? percent(value) : number(value));

// ---- axes

function ticksOf(low, high, most, least = 0) {
  const rough = Math.max((high - low) / most, least, 1e-12);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((each) => each * power).find((each) => each >= rough * 0.999 && (!least || each % 1 === 0));
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) ticks.push(Number((i * step).toPrecision(12)));
  return { ticks, step };
}

// From data to {low, high, ticks, at}: at(value) is 0 at the bottom and 1 at the top.
function verticalAxis(chart, tops) {
  const values = chart.kind === "stack" ? tops : chart.series.flatMap((each) => each.y);
  if (chart.log) {
    const positive = values.filter((value) => value > 0);
    const low = Math.floor(Math.log10(Math.min(...positive, 1)));
    const high = Math.max(Math.ceil(Math.log10(Math.max(...positive, 1e-12))), low + 1);
    const every = Math.ceil((high - low) / 5);
    const ticks = [];
    for (let power = high; power >= low; power -= every) ticks.unshift(10 ** power);
    return { ticks, at: (value) => (value > 0 ? (Math.log10(value) - low) / (high - low) : NaN) };
  }
  let low = Math.min(0, ...values), high = Math.max(0, ...values);
  if (isShare(chart) && high > 0.5) high = 1;
  if (high === low) high = isShare(chart) ? 0.01 : 1;
  const { ticks, step } = ticksOf(low, high, 4);
  if (high > ticks[ticks.length - 1] + step * 1e-9) ticks.push(Number((ticks[ticks.length - 1] + step).toPrecision(12)));
  if (low < ticks[0] - step / 2) ticks.unshift(Number((ticks[0] - step).toPrecision(12)));
  [low, high] = [Math.min(ticks[0], low), ticks[ticks.length - 1]];
  return { ticks, at: (value) => (value - low) / (high - low) };
}

// ---- a chart

const HEIGHT = 190, TOP = 20, BOTTOM = 36, LEFT = 46;

// What stands on what: for each x the layers with where they begin and end, what is negative below zero.
function stacked(chart, xs) {
  return xs.map((x) => {
    let up = 0, down = 0;
    return chart.series.map((series) => {
      const value = series.y[series.x.indexOf(x)] ?? 0;
      const from = value < 0 ? down : up;
      if (value < 0) down += value; else up += value;
      return { from, to: from + value };
    });
  });
}

function drawChart(chart, width, withTitle) {
  const xs = [...new Set(chart.series.flatMap((each) => each.x))].sort((a, b) => a - b);
  const bars = chart.kind === "stack" ? stacked(chart, xs) : null;
  const axis = verticalAxis(chart, bars ? bars.flat().flatMap((each) => [each.from, each.to]) : null);
  const names = chart.series.map((each) => (each.name.length > 18 ? each.name.slice(0, 17) + "…" : each.name));
  const right = Math.min(Math.max(...names.map((name) => name.length)) * 6.8 + 26, width * 0.42);
  const head = withTitle ? 26 : 0;
  const plot = { left: LEFT, right: width - right, top: TOP + head, bottom: HEIGHT + head - BOTTOM };
  const [first, last] = [xs[0], xs[xs.length - 1]];
  const slot = (plot.right - plot.left) / (bars ? xs.length : 1);
  const across = bars
    ? (x) => plot.left + (xs.indexOf(x) + 0.5) * slot
    : (x) => (last === first ? (plot.left + plot.right) / 2 : plot.left + ((x - first) / (last - first)) * (plot.right - plot.left));
  const up = (value) => plot.bottom - axis.at(value) * (plot.bottom - plot.top);
  const root = draw("svg", { viewBox: `0 0 ${width} ${HEIGHT + head}`, height: HEIGHT + head, width });
  if (withTitle) root.append(draw("text", { x: 4, y: 16, class: "title" }, chart.title));
  root.append(draw("text", { x: 4, y: 11 + head }, chart.unit));
  for (const tick of axis.ticks) {
    const y = up(tick);
    root.append(draw("line", { class: "gridline", x1: plot.left, x2: plot.right, y1: y, y2: y }));
    root.append(draw("text", { x: plot.left - 6, y: y + 4, "text-anchor": "end" }, chart.log ? power(tick) : number(isShare(chart) ? Number((tick * 100).toPrecision(12)) : tick)));
  }
  const { ticks } = ticksOf(first, last, Math.max(Math.floor((plot.right - plot.left) / 60), 2), 1);
  for (const tick of bars ? labelled(xs, Math.max(Math.floor((plot.right - plot.left) / 36), 2)) : ticks) {
    root.append(draw("text", { x: across(tick), y: plot.bottom + 15, "text-anchor": "middle" }, number(tick)));
  }
  root.append(draw("text", { x: (plot.left + plot.right) / 2, y: plot.bottom + 30, "text-anchor": "middle" }, chart.x));
  const ends = bars ? drawBars(root, chart, bars, xs, across, up, slot) : drawLines(root, chart, across, up);
  drawLabels(root, chart, names, ends, plot);
  return { root, xs, across, plot };
}

const power = (value) => (value >= 1e-3 && value <= 1000 ? String(value) : "1e" + Math.round(Math.log10(value)));
const labelled = (xs, most) => xs.filter((_, i) => i % Math.ceil(xs.length / most) === 0);

function drawBars(root, chart, bars, xs, across, up, slot) {
  const width = Math.max(slot - Math.min(slot * 0.2, 3), 1);
  chart.series.forEach((series, i) => {
    bars.forEach((layers, j) => {
      const { from, to } = layers[i];
      const [y1, y2] = [up(Math.max(from, to)), up(Math.min(from, to))];
      if (y2 - y1 > 0.05) root.append(draw("rect", { class: "bar " + series.color, x: across(xs[j]) - width / 2, y: y1, width, height: y2 - y1 }));
    });
  });
  const final = bars[bars.length - 1];
  return chart.series.map((_, i) => up((final[i].from + final[i].to) / 2));
}

function drawLines(root, chart, across, up) {
  return chart.series.map((series) => {
    const points = series.x.map((x, i) => [across(x), up(series.y[i])]).filter(([, y]) => Number.isFinite(y));
    const look = series.color + (series.run ? " second" : "");
    if (points.length) root.append(draw("path", { class: "line " + look, d: "M" + points.map((point) => point.map((each) => each.toFixed(1)).join(",")).join("L") }));
    if (points.length <= 30) for (const [x, y] of points) root.append(draw("circle", { class: series.color, cx: x, cy: y, r: 2.5 }));
    return points.length ? points[points.length - 1][1] : null;
  });
}

// The name of each series beside its end, pushed apart so that none covers another.
function drawLabels(root, chart, names, ends, plot) {
  const labels = names.map((name, i) => ({ name, series: chart.series[i], y: ends[i] })).filter((each) => each.y !== null);
  labels.sort((a, b) => a.y - b.y);
  labels.forEach((each, i) => { if (i) each.y = Math.max(each.y, labels[i - 1].y + 13); });
  for (let i = labels.length - 1, limit = plot.bottom + 2; i >= 0; i--, limit -= 13) labels[i].y = Math.min(labels[i].y, limit);
  for (const { name, series, y } of labels) {
    const swatch = { x1: plot.right + 6, x2: plot.right + 16, y1: y, y2: y, class: "line " + series.color + (series.run ? " second" : "") };
    root.append(draw("line", { ...swatch, "stroke-width": 4 }), draw("text", { class: "label", x: plot.right + 20, y: y + 4 }, name));
  }
}

function summary(chart) {
  const spans = chart.series.filter((each) => each.y.length).map((each) => `${each.name} from ${shown(chart, each.y[0])} to ${shown(chart, each.y[each.y.length - 1])}`);
  return `${chart.title}, ${chart.unit} by ${chart.x}: ${spans.join("; ")}. Arrow keys read the values.`;
}

function figure(chart) {
  const holder = make("div", { class: "holder" });
  const tip = make("div", { class: "tip", role: "status", hidden: true });
  const element = make("figure", {}, make("figcaption", {}, make("h3", {}, chart.title), make("p", { class: "note" }, chart.note)), holder, tip,
    make("div", { class: "tools" },
      make("button", { type: "button", "aria-label": `Save ${chart.title} as SVG`, onclick: () => save(chart, "svg", "image/svg+xml", figureFile(chart)) }, "Save SVG"),
      make("button", { type: "button", "aria-label": `Save ${chart.title} as CSV`, onclick: () => save(chart, "csv", "text/csv", tableFile(chart)) }, "Save CSV")));
  let drawn, at = -1;
  const point = (index) => {
    at = index;
    drawn.root.querySelector(".cursor")?.remove();
    tip.hidden = index < 0;
    if (index < 0) return;
    const x = drawn.xs[index];
    const left = drawn.across(x);
    drawn.root.append(draw("line", { class: "cursor", x1: left, x2: left, y1: drawn.plot.top, y2: drawn.plot.bottom }));
    const rows = chart.series.map((each) => [each.name, each.y[each.x.indexOf(x)]]).filter(([, value]) => value !== undefined);
    tip.replaceChildren(make("b", {}, `${chart.x} ${number(x)}`), ...rows.map(([name, value]) => make("span", {}, make("i", {}, name), shown(chart, value))));
    tip.style.top = holder.offsetTop + 24 + "px";
    const room = element.clientWidth - tip.offsetWidth - 4;
    tip.style.left = Math.max(Math.min(holder.offsetLeft + left + (left > element.clientWidth / 2 ? -tip.offsetWidth - 12 : 12), room), 4) + "px";
  };
  const nearest = (event) => {
    const x = event.clientX - drawn.root.getBoundingClientRect().left;
    const distances = drawn.xs.map((each) => Math.abs(drawn.across(each) - x));
    point(distances.indexOf(Math.min(...distances)));
  };
  const redraw = () => {
    drawn = drawChart(chart, Math.max(holder.clientWidth, 240), false);
    fill(drawn.root, { role: "img", tabindex: 0, "aria-label": summary(chart), onpointermove: nearest, onpointerdown: nearest,
      ...walked(point, () => at, drawn.xs.length) }, []);
    holder.replaceChildren(drawn.root);
    point(-1);
  };
  let width = 0;
  new ResizeObserver(() => { if (holder.clientWidth !== width) { width = holder.clientWidth; redraw(); } }).observe(holder);
  return element;
}

// ---- saving

function save(chart, ending, type, text) {
  const link = make("a", { href: URL.createObjectURL(new Blob([text], { type })), download: chart.title.toLowerCase().replace(/[^a-z0-9]+/g, "-") + "." + ending });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

const LOOK = ["fill", "stroke", "stroke-width", "stroke-dasharray", "font-size", "font-family", "font-weight"];

// The chart in the light theme with its look written into it, so that it is the same in any other program.
function figureFile(chart) {
  const { root } = drawChart(chart, 640, true);
  const place = make("figure", {}, root);
  document.body.append(place);
  document.documentElement.dataset.theme = "light";
  for (const element of root.querySelectorAll("*")) {
    const style = getComputedStyle(element);
    for (const name of LOOK) if (element.tagName === "text" || !name.startsWith("font")) element.setAttribute(name, style.getPropertyValue(name));
    element.removeAttribute("class");
  }
  delete document.documentElement.dataset.theme;
  place.remove();
  root.prepend(draw("rect", { width: "100%", height: "100%", fill: "#ffffff" }));
  return new XMLSerializer().serializeToString(root);
}

function tableFile(chart) {
  const quoted = (text) => `"${String(text).replaceAll('"', '""')}"`;
  const lines = chart.series.flatMap((each) => each.x.map((x, i) => [quoted(each.name), x, each.y[i]].join(",")));
  return [["series", chart.x, isShare(chart) ? "fraction " + chart.unit.slice(2) : chart.unit || "value"].map(quoted).join(","), ...lines].join("\n") + "\n";
}
