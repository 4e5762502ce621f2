"use strict";
// Reads the data, fills the template's placeholders, and applies the chosen colour scheme.

{
  const data = JSON.parse(document.getElementById("data").textContent);
  const charts = [];
  for (const place of document.querySelectorAll("[data-chart]")) {
    const [group, index] = place.dataset.chart.split(",").map(Number);
    charts.push(new CurveChart(place, data.groups[group].charts[index], data.colours));
  }
  for (const place of document.querySelectorAll("[data-task]")) {
    const task = data.tasks[Number(place.dataset.task)];
    if (task.rows.length) charts.push(new IntervalChart(place, task, data.colours));
  }
  if (data.lenses.length) charts.push(new Lens(data.lenses, data.colours));

  const redraw = () => charts.forEach((chart) => chart.update());
  const paint = (colours) => {
    document.documentElement.dataset.theme = colours;
    redraw();
  };
  for (const choice of document.querySelectorAll("[name=theme]")) {
    choice.addEventListener("change", () => paint(choice.value));
  }
  addEventListener("beforeprint", () => {
    theme.printing = true;
    paint("light");
  });
  addEventListener("afterprint", () => {
    theme.printing = false;
    paint(document.querySelector("[name=theme]:checked").value);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  for (const fold of document.querySelectorAll("details")) {
    fold.addEventListener("toggle", () => {
      for (const plot of fold.querySelectorAll(".plot")) Plotly.Plots.resize(plot);
    });
  }
  document.documentElement.dataset.ready = "";
}
