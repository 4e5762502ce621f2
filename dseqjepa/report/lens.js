"use strict";
// The region lens: one image, one checkpoint, one step of the prediction sequence.

/** The borders between patches for which `of` differs, and the grid's edge where `edge` is set. */
function borders(h, w, of, edge) {
  const inside = (row, column) => (row >= 0 && row < h && column >= 0 && column < w ? of(row * w + column) : edge);
  let path = "";
  for (let row = 0; row <= h; row++) {
    for (let column = 0; column <= w; column++) {
      const here = inside(row, column);
      if (column < w && here !== inside(row - 1, column) && (edge !== undefined || (row > 0 && row < h))) path += `M${column} ${row}h1`;
      if (row < h && here !== inside(row, column - 1) && (edge !== undefined || (column > 0 && column < w))) path += `M${column} ${row}v1`;
    }
  }
  return path;
}

/** A colour between those of a scale; `share` is in [0, 1]. */
function mix(scale, share) {
  const place = Math.min(Math.max(share, 0), 1) * (scale.length - 1);
  const low = Math.min(Math.floor(place), scale.length - 2);
  const channel = (colour, index) => parseInt(colour.slice(1 + 2 * index, 3 + 2 * index), 16);
  const mixed = [0, 1, 2].map((index) => {
    const [from, to] = [channel(scale[low], index), channel(scale[low + 1], index)];
    return Math.round(from + (place - low) * (to - from));
  });
  return `rgb(${mixed.join(",")})`;
}

function count(text) {
  return text.split("1").length - 1;
}

class Lens {
  constructor(lenses, colours) {
    this.lenses = lenses;
    this.colours = colours;
    this.run = this.step = 0;
    this.checkpoint = lenses[0].checkpoints.length - 1;
    const lengths = lenses[0].checkpoints[this.checkpoint].images.map((look) => look.steps.length);
    this.image = lengths.indexOf(Math.max(...lengths)); // the one with the longest sequence
    this.get = (id) => document.getElementById(`lens-${id}`);
    this.get("runs").hidden = lenses.length < 2;
    lenses.forEach((lens, index) => {
      const input = make("input", { type: "radio", name: "lens-run", value: index });
      input.checked = index === 0;
      input.addEventListener("change", () => this.choose({ run: index }));
      this.get("runs").append(make("label", {}, input, make("span", {}, lens.run)));
    });
    this.get("checkpoint").addEventListener("input", (event) => this.choose({ checkpoint: Number(event.target.value) }));
    this.get("back").addEventListener("click", () => this.choose({ step: this.step - 1 }));
    this.get("next").addEventListener("click", () => this.choose({ step: this.step + 1 }));
    for (const id of ["saliency", "loss"]) this.get(id).addEventListener("change", () => this.draw());
    this.thumbs();
    this.chart = null;
    this.choose({});
  }

  get lens() {
    return this.lenses[this.run];
  }

  get look() {
    return this.lens.checkpoints[this.checkpoint].images[this.image];
  }

  /** Change some of run, image, checkpoint and step; the others are kept if possible. */
  choose({ run = this.run, image = this.image, checkpoint, step = this.step }) {
    const other = this.lenses[run];
    if (run !== this.run) {
      const share = this.checkpoint / Math.max(this.lens.checkpoints.length - 1, 1);
      checkpoint = Math.round(share * (other.checkpoints.length - 1));
      image = Math.min(image, other.pictures.length - 1);
    }
    [this.image, this.checkpoint] = [image, checkpoint ?? this.checkpoint];
    if (run !== this.run) {
      this.run = run;
      this.thumbs();
    }
    this.step = Math.min(Math.max(step, 0), Math.max(this.look.steps.length - 1, 0));
    this.steps();
    this.draw();
    this.curve();
  }

  update() {
    this.draw();
    if (this.chart) this.chart.update();
  }

  thumbs() {
    const place = this.get("images");
    place.querySelectorAll("label").forEach((label) => label.remove());
    this.lens.pictures.forEach((picture, index) => {
      const input = make("input", { type: "radio", name: "lens-image", value: index });
      input.checked = index === this.image;
      input.addEventListener("change", () => this.choose({ image: index, step: 0 }));
      const alt = [picture.label, picture.name].filter(Boolean).join(": ");
      place.append(make("label", { title: alt }, input, make("img", { src: picture.src, alt })));
    });
  }

  /** The table of steps, the slider and the buttons. */
  steps() {
    const { checkpoints } = this.lens;
    const slider = this.get("checkpoint");
    slider.max = checkpoints.length - 1;
    slider.value = this.checkpoint;
    const at = `step ${checkpoints[this.checkpoint].step.toLocaleString("en")}`;
    slider.setAttribute("aria-valuetext", at);
    this.get("at").textContent = `${at}, ${this.checkpoint + 1} of ${checkpoints.length}`;
    this.get("back").disabled = this.step === 0;
    this.get("next").disabled = this.step >= this.look.steps.length - 1;

    const body = this.get("steps").tBodies[0];
    const hadFocus = body.contains(document.activeElement);
    body.replaceChildren(
      ...this.look.steps.map((step, index) => {
        const input = make("input", { type: "radio", name: "lens-step", value: index });
        input.checked = index === this.step;
        input.addEventListener("change", () => this.choose({ step: index }));
        const dot = make("i", { class: "dot" });
        dot.style.background = this.colour(step);
        const row = make(
          "tr", {},
          make("td", {}, make("label", {}, input, dot, String(index + 1))),
          make("td", {}, `${count(step.context)} patches`),
          make("td", {}, this.predicts(step)),
          make("td", {}, digits(step.loss)),
        );
        row.classList.toggle("now", index === this.step);
        row.addEventListener("click", () => this.choose({ step: index }));
        return row;
      }),
    );
    if (hadFocus) body.querySelector(":checked").focus();
  }

  colour(step) {
    const { regions } = this.colours;
    return regions[step.number % regions.length];
  }

  predicts(step) {
    const what = this.look.ranked ? `region ${step.number + 1}` : `block ${step.number}`;
    return `${what}, ${count(step.target)} patches`;
  }

  draw() {
    this.drawRegions();
    this.drawStep();
    this.drawKey();
  }

  /** The image itself, in units of patches; `children` are laid over it. */
  canvas(id, label, children) {
    const [h, w] = this.lens.grid;
    const svg = this.get(id);
    svg.setAttribute("viewBox", `0 0 ${w} ${h}`);
    svg.setAttribute("aria-label", label);
    const { src } = this.lens.pictures[this.image];
    const image = makeSvg("image", { href: src, width: w, height: h, preserveAspectRatio: "none" });
    svg.replaceChildren(image, ...children);
  }

  cell(index, fill, opacity, words) {
    const w = this.lens.grid[1];
    const place = { x: index % w, y: Math.floor(index / w), width: 1, height: 1 };
    const rect = makeSvg("rect", { ...place, fill, "fill-opacity": opacity, "shape-rendering": "crispEdges" });
    if (words) rect.append(makeSvg("title", {}, words));
    return rect;
  }

  outline(path, colour, width) {
    const common = { d: path, fill: "none", "vector-effect": "non-scaling-stroke", "stroke-linecap": "square" };
    return makeSvg("path", { ...common, stroke: colour, "stroke-width": width });
  }

  drawRegions() {
    const { rank, saliency, labels } = this.look;
    const [h, w] = this.lens.grid;
    const { regions, heat } = this.colours;
    const hot = this.get("saliency").checked;
    const cells = rank.map((region, index) => {
      const share = saliency[index] / 255;
      const fill = hot ? mix(heat, share) : regions[region % regions.length];
      const inside = region < this.look.count;
      const words = `${inside ? `region ${region + 1}` : "in no region"}, saliency ${share.toFixed(2)}`;
      return this.cell(index, fill, hot ? 0.72 : inside ? 0.5 : 0, words);
    });
    const size = Math.max(h, w) / 11;
    const numbers = labels.flatMap((place, index) => place === null ? [] :
      makeSvg("text", {
        x: place[1] + 0.5, y: place[0] + 0.5, "font-size": size, "font-weight": 700, "text-anchor": "middle",
        "dominant-baseline": "central", fill: "#fff", stroke: "#222", "stroke-width": size / 6,
        "paint-order": "stroke", "pointer-events": "none",
      }, String(index + 1)),
    );
    const lines = this.outline(borders(h, w, (index) => rank[index], undefined), "#fff", 2);
    const { name, label } = this.lens.pictures[this.image];
    const many = `${this.look.count} region${this.look.count === 1 ? "" : "s"}`;
    const what = hot ? `saliency (${this.lens.saliency})` : "regions in order";
    this.canvas("regions", `${label || "Image"} ${name}: ${what}; ${many}.`, [...cells, lines, ...numbers]);
    this.get("regions-caption").textContent = hot ? `Saliency, low to high` : `${many}, in order`;
  }

  drawStep() {
    const step = this.look.steps[this.step];
    const words = this.get("words");
    if (!step) {
      this.canvas("step", "No prediction step.", []);
      words.textContent = "There is no prediction step for this image at this checkpoint.";
      this.get("step-caption").textContent = "No step";
      return;
    }
    const [h, w] = this.lens.grid;
    const byPatch = this.get("loss").checked;
    const veil = theme.colour("veil");
    const colour = this.colour(step);
    const most = this.mostLoss();
    let target = 0;
    const cells = [...step.target].map((bit, index) => {
      if (bit === "1") {
        const loss = step.losses[target++];
        const fill = byPatch ? mix(this.colours.heat, (loss ?? most) / most) : colour;
        return this.cell(index, fill, byPatch ? 0.9 : 0.55, `predicted, loss ${digits(loss)}`);
      }
      const seen = step.context[index] === "1";
      return this.cell(index, veil, seen ? 0 : 0.88, seen ? "seen" : "hidden");
    });
    const context = borders(h, w, (index) => step.context[index], "0");
    const edge = borders(h, w, (index) => step.target[index], "0");
    const lines = [
      this.outline(context, theme.colour("ink"), 1),
      this.outline(edge, "#fff", 5),
      this.outline(edge, colour, 3),
    ];
    const from = this.from(step);
    const to = this.look.ranked ? `region ${step.number + 1}` : `block ${step.number}`;
    const sentence =
      `At training step ${this.lens.checkpoints[this.checkpoint].step.toLocaleString("en")}: from ${from} ` +
      `it predicts ${to} (${count(step.target)} patches). Loss ${digits(step.loss)}.`;
    this.canvas("step", `Step ${this.step + 1} of ${this.look.steps.length}. ${sentence}`, [...cells, ...lines]);
    this.get("step-caption").textContent = `Step ${this.step + 1} of ${this.look.steps.length}`;
    words.textContent = this.look.ranked ? sentence : `${sentence} The blocks are random: ${this.why()}`;
  }

  from(step) {
    const seen = new Set([...step.context].flatMap((bit, index) => (bit === "1" ? [this.look.rank[index] + 1] : [])));
    const patches = `${count(step.context)} of ${step.context.length} patches`;
    if (!this.look.ranked) return `the context (${patches})`;
    const named = [...seen].sort((a, b) => a - b);
    return `region${named.length > 1 ? "s" : ""} ${named.join(", ")} (${patches})`;
  }

  why() {
    return this.lens.ranks ? "no region stands out here." : "this method does not use the regions.";
  }

  mostLoss() {
    const losses = this.look.steps.flatMap((step) => step.losses).filter((loss) => loss !== null);
    return Math.max(...losses, 1e-9);
  }

  drawKey() {
    const swatch = (background, words) => {
      const box = make("i", { class: "dot" });
      box.style.background = background;
      return make("li", {}, box, words);
    };
    const scale = (words) => {
      const bar = make("i", { class: "bar" });
      bar.style.background = `linear-gradient(to right, ${this.colours.heat.join(",")})`;
      return make("li", {}, bar, words);
    };
    const step = this.look.steps[this.step];
    const items = [];
    if (this.get("saliency").checked) items.push(scale("saliency of a patch, lowest to highest in this image (no unit)"));
    if (step && this.get("loss").checked) items.push(scale(`loss of a patch, 0 to ${digits(this.mostLoss())}`));
    else if (step) items.push(swatch(this.colour(step), "to be predicted"));
    items.push(swatch(theme.colour("veil"), "hidden from the encoder"), make("li", {}, "Uncovered patches are seen."));
    const { label, name } = this.lens.pictures[this.image];
    items.push(make("li", {}, `Image: ${[label, name].filter(Boolean).join(", ")} (${this.lens.origin}).`));
    this.get("key").replaceChildren(...items);
  }

  /** The loss of this image at every checkpoint, mean over all predicted patches. */
  curve() {
    const series = this.lenses.flatMap((lens, colour) => {
      if (this.lens.pictures[this.image].src !== lens.pictures[this.image]?.src) return [];
      const mean = (look) => {
        const losses = look.steps.flatMap((step) => step.losses).filter((loss) => loss !== null);
        return losses.length ? losses.reduce((sum, loss) => sum + loss, 0) / losses.length : null;
      };
      const y = lens.checkpoints.map((checkpoint) => mean(checkpoint.images[this.image]));
      return [{ name: lens.run, colour, x: lens.checkpoints.map((checkpoint) => checkpoint.step), y }];
    });
    const chart = {
      title: "This image over training",
      meaning: "Prediction loss at each checkpoint, mean over all predicted patches of the image.",
      unit: "loss",
      series,
      mark: this.lens.checkpoints[this.checkpoint].step,
    };
    if (this.chart) this.chart.update(chart);
    else this.chart = new CurveChart(this.get("chart"), chart, this.colours, { short: true });
  }
}
