"use strict";
// Draws charts from plain JSON with Plotly, with a legend that shows values, in the page's colours.

const theme = {
  /** In print, charts do not adapt to the width of their container. */
  printing: false,
  /** The current colour of a CSS variable. */
  colour(name) {
    const probe = document.body.appendChild(document.createElement("i"));
    probe.style.color = `var(--${name})`;
    const found = getComputedStyle(probe).color;
    probe.remove();
    return found;
  },
  isDark() {
    const chosen = document.documentElement.dataset.theme;
    return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  },
  /** The colour and dash of line `index`, distinguishable when lines coincide or are printed. */
  line(colours, index) {
    const lines = colours.lines[theme.isDark() ? "dark" : "light"];
    const dashes = ["solid", "7px,3px", "2px,2px", "7px,2px,2px,2px"];
    return { color: lines[index % lines.length], dash: dashes[index % dashes.length], width: 2 };
  },
};

/** An element with attributes and children; text is never read as HTML. */
function make(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

const SVG = "http://www.w3.org/2000/svg";

function makeSvg(name, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

/** A number with four significant digits, readable. */
function digits(value) {
  if (value === null || value === undefined) return "–";
  if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e6)) return value.toExponential(3);
  return String(Number(value.toPrecision(4)));
}

/** Plotly interprets some tags in texts: escape them. */
function literal(text) {
  return text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}

function nearest(sorted, x) {
  let best = 0;
  sorted.forEach((value, index) => {
    if (Math.abs(value - x) < Math.abs(sorted[best] - x)) best = index;
  });
  return best;
}

const CONFIG = { displayModeBar: false, responsive: true, showTips: false, doubleClick: "reset" };

function layout(unit, more = {}) {
  const axis = {
    gridcolor: theme.colour("rule"),
    linecolor: theme.colour("rule"),
    zeroline: false,
    automargin: true,
    fixedrange: matchMedia("(pointer: coarse)").matches,
  };
  return {
    ...(theme.printing ? { width: 640 } : { autosize: true }),
    margin: { l: 8, r: 12, t: 8, b: 8 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: theme.colour("muted") },
    hoverlabel: {
      bgcolor: theme.colour("paper"),
      bordercolor: theme.colour("rule"),
      font: { color: theme.colour("ink"), size: 12 },
    },
    hovermode: "x unified",
    showlegend: false,
    dragmode: "zoom",
    xaxis: { ...axis, showgrid: false, title: { text: "step", standoff: 6 }, ...more.xaxis },
    yaxis: { ...axis, title: { text: unit, standoff: 8 }, ...more.yaxis },
    shapes: more.shapes || [],
  };
}

/** A chart of curves in a `.chart` element. `update(chart)` redraws it, or draws another. */
class CurveChart {
  constructor(place, chart, colours, { short = false } = {}) {
    this.colours = colours;
    this.title = make("h4");
    this.meaning = make("p", { class: "meaning" });
    this.legend = make("ul", { class: "legend" });
    this.plot = make("div", { class: short ? "plot short" : "plot", tabindex: "0", role: "group" });
    this.plot.setAttribute("aria-roledescription", "chart");
    place.replaceChildren(this.title, this.meaning, this.plot, this.legend);
    this.update(chart);
    this.plot.on("plotly_hover", (event) => this.read(event.points[0].x));
    this.plot.on("plotly_unhover", () => this.read(null));
    this.plot.addEventListener("keydown", (event) => this.key(event));
    this.plot.addEventListener("blur", () => this.leave());
  }

  update(chart = this.chart) {
    this.chart = chart;
    this.title.textContent = chart.title;
    this.meaning.textContent = chart.meaning;
    this.plot.setAttribute("aria-label", `${chart.title}: ${this.summary()} Arrow keys read values.`);
    const traces = chart.series.map((one) => ({
      type: "scatter",
      mode: one.x.length < 25 ? "lines+markers" : "lines",
      x: one.x,
      y: one.y,
      name: literal(one.name),
      line: theme.line(this.colours, one.colour),
      marker: { size: 5 },
      hovertemplate: "%{y:.4~g}",
    }));
    const band = (one, values, fill) => ({
      type: "scatter", mode: "lines", x: one.x, y: values, line: { width: 0 }, hoverinfo: "skip",
      ...(fill && { fill: "tonexty", fillcolor: `${theme.line(this.colours, one.colour).color}33` }),
    });
    const bands = chart.series
      .filter((one) => one.low)
      .flatMap((one) => [band(one, one.low, false), band(one, one.high, true)]);
    const mark = (x) => ({
      type: "line", x0: x, x1: x, yref: "paper", y0: 0, y1: 1,
      line: { color: theme.colour("muted"), width: 1, dash: "dot" },
    });
    const shapes = chart.mark === undefined ? [] : [mark(chart.mark)];
    Plotly.react(this.plot, [...traces, ...bands], layout(chart.unit, { shapes }), CONFIG);
    this.steps = [...new Set(chart.series.flatMap((one) => one.x))].sort((a, b) => a - b);
    this.at = null;
    this.read(null);
  }

  summary() {
    return this.chart.series
      .map((one) => {
        const last = one.x.length - 1;
        return `${one.name} from ${digits(one.y[0])} at step ${one.x[0]} to ${digits(one.y[last])} at step ${one.x[last]}.`;
      })
      .join(" ");
  }

  /** The legend's values: those nearest to a step, or the last ones. */
  read(x) {
    this.legend.replaceChildren(
      ...this.chart.series.map((one) => {
        const index = x === null ? one.x.length - 1 : nearest(one.x, x);
        const line = theme.line(this.colours, one.colour);
        const stroke = makeSvg("line", { x1: 0, x2: 20, y1: 4, y2: 4, stroke: line.color, "stroke-width": 3 });
        if (line.dash !== "solid") stroke.setAttribute("stroke-dasharray", line.dash.replace(/px/g, ""));
        const item = make("li", { "data-step": one.x[index] });
        item.append(
          makeSvg("svg", { width: 20, height: 8, "aria-hidden": "true" }, stroke),
          make("span", {}, one.name),
          make("b", {}, digits(one.y[index])),
        );
        return item;
      }),
      make("li", { class: "at" }, x === null ? "at the end" : `at step ${this.nearStep(x).toLocaleString("en")}`),
    );
  }

  nearStep(x) {
    return this.steps[nearest(this.steps, x)];
  }

  key(event) {
    const last = this.steps.length - 1;
    const moves = {
      ArrowLeft: () => (this.at === null ? last : Math.max(this.at - 1, 0)),
      ArrowRight: () => (this.at === null ? 0 : Math.min(this.at + 1, last)),
      Home: () => 0,
      End: () => last,
    };
    if (event.key === "Escape") this.leave();
    if (!(event.key in moves)) return;
    event.preventDefault();
    this.at = moves[event.key]();
    const x = this.steps[this.at];
    Plotly.Fx.hover(this.plot, { xval: x });
    this.legend.setAttribute("aria-live", "polite");
    this.read(x);
  }

  leave() {
    this.at = null;
    this.legend.removeAttribute("aria-live");
    Plotly.Fx.unhover(this.plot);
    this.read(null);
  }
}

/** Values with intervals, one line each. */
class IntervalChart {
  constructor(place, chart, colours) {
    this.chart = chart;
    this.colours = colours;
    this.plot = make("div", { class: "plot", role: "img" });
    this.plot.style.height = `${4 + 1.6 * chart.rows.length}rem`;
    this.plot.setAttribute("aria-label", `The table's values with their intervals: ${chart.title}.`);
    place.replaceChildren(this.plot);
    this.update();
  }

  update() {
    const { rows, unit } = this.chart;
    const labels = rows.map((_, index) => rows.length - index);
    const traces = rows.map((row, index) => {
      const line = theme.line(this.colours, row.colour);
      return {
        type: "scatter", mode: "markers", x: [row.value], y: [labels[index]],
        marker: { size: 10, color: line.color },
        error_x: {
          type: "data", symmetric: false, array: [row.high - row.value],
          arrayminus: [row.value - row.low], color: line.color, thickness: 2, width: 5,
        },
        name: literal(row.name),
        hovertemplate: `${literal(row.name)}: ${digits(row.value)} (${digits(row.low)} to ${digits(row.high)})<extra></extra>`,
      };
    });
    const more = {
      xaxis: { title: { text: unit, standoff: 6 }, showgrid: true, rangemode: "tozero" },
      yaxis: {
        title: { text: "" }, showgrid: false, tickvals: labels,
        ticktext: rows.map((row) => literal(row.name)), range: [0.4, rows.length + 0.6], fixedrange: true,
      },
    };
    Plotly.react(this.plot, traces, { ...layout("", more), hovermode: "closest" }, CONFIG);
  }
}
