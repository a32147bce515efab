"use strict";
// Charts in SVG. A chart is a figure: caption, legend with the values under the cursor, drawing, and the same as a table.
// The cursor is a range input over the drawing, so mouse, touch, keyboard and screen readers all move the same thing.

const SVG = "http://www.w3.org/2000/svg";

function make(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== null && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}
const html = (tag, attributes = {}, ...children) => make(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) => make(document.createElementNS(SVG, tag), attributes, children);

// What people read

function bytes(count) {
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (count < 1000 || unit === "GB") return `${unit === "B" ? count : count.toFixed(1)} ${unit}`;
    count /= 1000;
  }
}
function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 10) return `${seconds.toFixed(seconds < 1 ? 2 : 1)} s`;
  if (seconds < 100) return `${seconds.toFixed(0)} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 100) return `${minutes} min`;
  return minutes < 2880 ? `${Math.floor(minutes / 60)} h ${minutes % 60} min` : `${Math.round(minutes / 1440)} days`;
}
const decimal = (digits) => (value) => (value === null || value === undefined ? "–" : value.toFixed(digits));
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
const short = (name, most) => (name.length > most ? `${name.slice(0, most - 1)}…` : name);

// A cell is text, or a ready td; a column of numbers stands to the right.
function table(element, headings, rows) {
  const numeric = headings.map((_, i) => i > 0 && rows.some((row) => /^\d/.test(row[i])) && "number");
  const cell = (value, i) => {
    if (value instanceof Node) return value;
    return html(i === 0 ? "th" : "td", { scope: i === 0 && "row", class: numeric[i] }, value);
  };
  const head = headings.map((text, i) => html("th", { scope: "col", class: numeric[i] }, text));
  element.replaceChildren(
    html("thead", {}, html("tr", {}, ...head)),
    html("tbody", {}, ...rows.map((row) => html("tr", {}, ...row.map(cell)))),
  );
}

// The frame of every chart

const charts = new Map();

function frame(figure) {
  if (charts.has(figure)) return charts.get(figure);
  const chart = {
    caption: html("figcaption", { id: `${figure.id}-title` }),
    legend: html("p", { class: "legend" }),
    drawing: svg("svg", { "aria-hidden": "true" }),
    cursor: html("input", { type: "range", min: 0, "aria-labelledby": `${figure.id}-title` }),
    table: html("table"),
    at: null,
  };
  const region = { class: "scroll", tabindex: 0, role: "region", "aria-labelledby": chart.caption.id };
  figure.append(
    chart.caption, chart.legend, html("div", { class: "plot" }, chart.drawing, chart.cursor),
    html("details", {}, html("summary", {}, "As a table"), html("div", region, chart.table)),
  );
  const move = (at) => { chart.at = at; redraw(chart); };
  chart.cursor.addEventListener("input", () => move(Number(chart.cursor.value)));
  chart.cursor.addEventListener("focus", () => chart.cursor.matches(":focus-visible") && move(Number(chart.cursor.value)));
  chart.cursor.addEventListener("blur", () => move(null));
  chart.cursor.addEventListener("pointerleave", () => move(null));
  chart.cursor.addEventListener("pointermove", (event) => move(chart.nearest(event.offsetX, event.offsetY)));
  new ResizeObserver(() => redraw(chart)).observe(chart.drawing.parentElement);
  charts.set(figure, chart);
  return chart;
}

// `spec`: stops (positions of the cursor), describe(at) -> [[mark, name, value]], headings and rows of the table, and
// draw(width) -> {nodes, height, nearest(x, y) -> stop, cursor(stop) -> what marks it}.
function show(figure, title, spec) {
  figure.hidden = spec === null;
  if (spec === null) return;
  const chart = frame(figure);
  chart.caption.textContent = title;
  chart.spec = spec;
  table(chart.table, spec.headings, spec.rows);
  redraw(chart);
}

function redraw(chart) {
  const width = chart.drawing.parentElement.clientWidth;
  if (!chart.spec || width === 0) return;
  const { stops, describe, draw } = chart.spec;
  const at = Math.min(chart.at ?? chart.spec.first ?? stops - 1, stops - 1);
  const { nodes, height, nearest, cursor } = draw(width);
  chart.nearest = nearest;
  chart.drawing.setAttribute("viewBox", `0 0 ${width} ${height}`);
  chart.drawing.replaceChildren(...(chart.at === null ? [] : [cursor(at)]), ...nodes);
  const values = describe(at);
  chart.legend.replaceChildren(
    ...values.map(([mark, name, value]) => html("span", {}, mark && swatch(mark), `${name} `, html("b", {}, value))),
  );
  chart.cursor.max = Math.max(0, stops - 1);
  chart.cursor.value = at;
  chart.cursor.setAttribute("aria-valuetext", values.map(([, name, value]) => `${name} ${value}`).join(", "));
}

function swatch(mark) {
  const line = mark.startsWith("fill") ? svg("rect", { class: mark, width: 24, height: 11, rx: 3 })
    : svg("line", { class: `curve ${mark}`, x1: 0, x2: 24, y1: 6, y2: 6 });
  return svg("svg", { viewBox: "0 0 24 11", "aria-hidden": "true" }, line);
}

// Scales

function ticks(low, high, count) {
  const rough = (high - low || Math.abs(high) || 1) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
  const first = Math.floor(low / step);
  return Array.from({ length: Math.ceil(high / step - 1e-9) - first + 1 }, (_, i) => (first + i) * step);
}

function axes(width, height, left, xs, xOf, yTicks, yOf, label, xLabel) {
  const nodes = yTicks.flatMap((y) => [
    svg("line", { class: "axis", x1: left, x2: width, y1: yOf(y), y2: yOf(y) }),
    svg("text", { x: left - 8, y: yOf(y) + 4, "text-anchor": "end" }, label(y)),
  ]);
  const stride = Math.ceil(xs.length / Math.max(2, Math.floor((width - left) / 56)));
  xs.forEach((x, i) => {
    if ((xs.length - 1 - i) % stride === 0) nodes.push(svg("text", { x: xOf(i), y: height - 4, "text-anchor": "middle" }, xLabel(x)));
  });
  return nodes;
}

// A cursor that stands upright at one of the places on the x axis.
function upright(place, stops, height) {
  return {
    nearest(x) {
      let best = 0;
      for (let i = 1; i < stops; i += 1) if (Math.abs(place(i) - x) < Math.abs(place(best) - x)) best = i;
      return best;
    },
    cursor: (at) => svg("line", { class: "cursor", x1: place(at), x2: place(at), y1: 0, y2: height - 20 }),
  };
}

// Lines over rounds. `series`: [{name, mark, values: Map round -> number}].
function lineChart(figure, title, series, { digits = 3, zero = false } = {}) {
  const drawn = series.filter(({ values }) => values.size > 0);
  if (drawn.length === 0) return show(figure, title, null);
  const rounds = [...new Set(drawn.flatMap(({ values }) => [...values.keys()]))].sort((a, b) => a - b);
  const all = drawn.flatMap(({ values }) => [...values.values()]);
  const scale = ticks(zero ? 0 : Math.min(...all), Math.max(...all), 4);
  const value = (one, at) => decimal(digits)(one.values.get(rounds[at]));
  show(figure, title, {
    stops: rounds.length,
    describe: (at) => [["", "round", String(rounds[at])], ...drawn.map((one) => [one.mark, one.name, value(one, at)])],
    headings: ["Round", ...drawn.map(({ name }) => name[0].toUpperCase() + name.slice(1))],
    rows: rounds.map((round, at) => [String(round), ...drawn.map((one) => value(one, at))]),
    draw(width) {
      const height = 230, left = 44, right = width - 12, span = rounds.at(-1) - rounds[0] || 1;
      const place = (i) => (rounds.length === 1 ? (left + right) / 2 : left + 8 + ((rounds[i] - rounds[0]) / span) * (right - left - 8));
      const yOf = (y) => 10 + (1 - (y - scale[0]) / (scale.at(-1) - scale[0] || 1)) * (height - 40);
      const precision = Math.max(0, -Math.floor(Math.log10(scale[1] - scale[0] || 1) + 1e-9));
      const nodes = axes(width, height, left, rounds, place, scale, yOf, (y) => y.toFixed(precision), String);
      for (const { mark, values } of drawn) {
        const points = rounds.map((round, i) => [i, values.get(round)]).filter(([, y]) => y !== undefined);
        const at = points.map(([i, y]) => `${place(i).toFixed(1)},${yOf(y).toFixed(1)}`);
        nodes.push(svg("polyline", { class: `curve ${mark}`, points: at.join(" ") }));
        const fill = `fill-${mark.split(" ")[0]}`;
        if (points.length <= 40) nodes.push(...points.map(([i, y]) => svg("circle", { class: fill, cx: place(i), cy: yOf(y), r: 3 })));
      }
      return { nodes, height, ...upright(place, rounds.length, height) };
    },
  });
}

// Stacked columns. `columns`: [{label, name, values: [number]}], `parts`: [{name, mark}].
function columnChart(figure, title, columns, parts, format, spec = {}) {
  if (columns.length === 0) return show(figure, title, null);
  const sum = (column) => column.values.reduce((total, one) => total + one, 0);
  const scale = ticks(0, Math.max(...columns.map(sum), 1e-9), 4);
  show(figure, title, {
    stops: columns.length,
    describe: (at) => [
      ["", spec.of ?? "round", columns[at].label],
      ...parts.map(({ name, mark }, i) => [mark, name, format(columns[at].values[i])]),
    ],
    headings: [spec.heading ?? "Round", ...parts.map(({ name }) => name[0].toUpperCase() + name.slice(1))],
    rows: columns.map(({ label, values }) => [label, ...values.map(format)]),
    draw(width) {
      const height = 190, left = 52, step = (width - left) / columns.length, wide = Math.max(1, Math.min(42, step * 0.72));
      const place = (i) => left + step * (i + 0.5);
      const yOf = (y) => 10 + (1 - y / scale.at(-1)) * (height - 40);
      const nodes = axes(width, height, left, columns.map(({ label }) => label), place, scale, yOf, spec.tick ?? format, String);
      columns.forEach(({ values }, i) => {
        let below = 0;
        values.forEach((value, part) => {
          const y = yOf(below + value);
          nodes.push(svg("rect", { class: parts[part].mark, x: place(i) - wide / 2, y, width: wide, height: yOf(below) - y }));
          below += value;
        });
      });
      return { nodes, height, ...upright(place, columns.length, height) };
    },
  });
}

// Two bars for each name. `rows`: [{name, values: [a, b]}].
function barChart(figure, title, rows, parts, format) {
  if (rows.length === 0) return show(figure, title, null);
  const most = Math.max(...rows.flatMap(({ values }) => values), 1);
  show(figure, title, {
    stops: rows.length,
    first: 0,
    describe: (at) => [["", "node", rows[at].name], ...parts.map(({ name, mark }, i) => [mark, name, format(rows[at].values[i])])],
    headings: ["Node", ...parts.map(({ name }) => name[0].toUpperCase() + name.slice(1))],
    rows: rows.map(({ name, values }) => [name, ...values.map(format)]),
    draw(width) {
      const shown = rows.slice(0, 10), step = 34, more = rows.length - shown.length;
      const height = shown.length * step + (more > 0 ? 22 : 0);
      const left = Math.min(width * 0.34, 14 + 7 * Math.max(...shown.map(({ name }) => Math.min(16, name.length))));
      const nodes = shown.flatMap(({ name, values }, i) => [
        svg("text", { x: left - 8, y: i * step + 20, "text-anchor": "end" }, short(name, 16)),
        ...values.map((value, part) => svg("rect", {
          class: parts[part].mark, x: left, y: i * step + 5 + part * 11, height: 9, rx: 2,
          width: Math.max(1.5, (value / most) * (width - left - 8)),
        })),
      ]);
      if (more > 0) nodes.push(svg("text", { x: left, y: height - 4 }, `and ${more} more in the table`));
      return {
        nodes, height,
        nearest: (x, y) => Math.max(0, Math.min(shown.length - 1, Math.floor(y / step))),
        cursor: (at) => svg("rect", { class: "row", x: 0, y: Math.min(at, shown.length) * step, width, height: step, rx: 6 }),
      };
    },
  });
}
