"use strict";
(() => {
  const NUMBERS = /(-?[\d.]+) (-?[\d.]+)/g;
  const clocks = JSON.parse(document.getElementById("clocks")?.textContent || "[]");
  const short = (v) => v === 0 ? "0" : Math.abs(v) >= 1e6 || Math.abs(v) < 1e-3
    ? v.toExponential(2) : String(+v.toPrecision(4));
  const make = (name, text, parent) => {
    const made = document.createElement(name);
    made.textContent = text;
    parent?.append(made);
    return made;
  };
  // A value between the points of a clock, which has ascending steps and seconds.
  const between = (from, to, x) => {
    let n = from.findIndex((each) => each >= x);
    if (n < 0) n = from.length - 1;
    if (n < 1) return from.length > 1 || !from[0] ? to[0] ?? x : to[0] * x / from[0];
    return to[n - 1] + (to[n] - to[n - 1]) * Math.min(1, (x - from[n - 1]) / (from[n] - from[n - 1]));
  };
  const charts = [];  // Those that can be drawn over time.
  for (const svg of document.querySelectorAll("figure > svg[data-scales]")) {
    const figure = svg.parentElement;
    const [xlow, xhigh, left, right, ylow, yhigh, bottom, top, xlog, ylog] =
      svg.dataset.scales.split(" ").map(Number);
    const value = (pixel, low, high, start, end, log) => {
      const place = low + (pixel - start) / (end - start) * (high - low);
      return log ? 10 ** place : place;
    };
    const xAt = (pixel) => value(pixel, xlow, xhigh, left, right, xlog);
    const yAt = (pixel) => value(pixel, ylow, yhigh, bottom, top, ylog);
    const names = [...figure.querySelectorAll(".legend tbody th")];
    const label = svg.querySelector("text.mid:not(.tick)");
    const groups = [...svg.querySelectorAll("g.series")].map((group, n) => {
      const name = names[n]?.textContent ?? "";
      const swatch = names[n]?.querySelector("svg");
      if (swatch) {  // The name becomes a button that hides its line.
        const button = make("button", "");
        button.type = "button";
        button.setAttribute("aria-pressed", "true");
        button.append(swatch, name);
        names[n].replaceChildren(button);
        button.addEventListener("click", () => {
          const hides = group.style.display !== "none";
          group.style.display = hides ? "none" : "";
          button.setAttribute("aria-pressed", String(!hides));
        });
      }
      const paths = [...group.querySelectorAll("path.line")];
      const points = [...(paths.at(-1)?.getAttribute("d") ?? "").matchAll(NUMBERS)]
        .map((each) => [Number(each[1]), Number(each[2])]);
      const drawn = paths.map((each) => [each, each.getAttribute("d")]);
      const marks = [...group.querySelectorAll("rect.mark")].map((each) => [each, Number(each.getAttribute("x"))]);
      return { group, name, points, drawn, marks, clock: clocks[group.dataset.clock] };
    });
    // `move` maps the drawn place of a point to its pixel, `back` a pixel to the value of the x axis.
    const chart = { svg, groups, label, words: label.textContent, ticks: svg.querySelector("g.x"), move: (x) => x, back: xAt };
    const out = make("output", "", figure);
    out.className = "readout";
    svg.after(out);
    const guide = document.createElementNS(svg.namespaceURI, "path");
    guide.setAttribute("class", "guide");
    svg.append(guide);
    let at = 0;
    const show = (pixel) => {
      const shown = groups.filter((each) => each.points.length > 1 && each.group.style.display !== "none");
      const near = shown.map((each) => {
        const moved = each.points.map(([x]) => Math.abs(chart.move(x, each) - pixel));
        return each.points[moved.indexOf(Math.min(...moved))];
      });
      if (!near.length) return;
      at = chart.move(near[0][0], shown[0]);
      guide.setAttribute("d", `M${at} ${top}V${bottom}`);
      const values = shown.map((each, n) => `${each.name} ${short(yAt(near[n][1]))}`);
      const place = chart.counts && !chart.timed ? Math.round(xAt(near[0][0])) : short(chart.back(at));
      out.textContent = `${label.textContent} ${place}: ${values.join(", ")}`;
    };
    chart.counts = /step|epoch/.test(chart.words);
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      show((event.clientX - box.left) * svg.viewBox.baseVal.width / box.width);
    });
    svg.tabIndex = 0;
    svg.addEventListener("keydown", (event) => {
      const way = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      const first = groups.find((each) => each.points.length > 1 && each.group.style.display !== "none");
      if (!way || !first) return;
      event.preventDefault();
      const xs = first.points.map(([x]) => chart.move(x, first));
      const next = way > 0 ? xs.find((x) => x > at + 0.05) : xs.findLast((x) => x < at - 0.05);
      show(next ?? at);
    });
    if (svg.dataset.timed !== undefined) charts.push({ ...chart, chart, xAt, left, right, bottom });
  }
  if (!clocks.some((each) => each[0].length) || !charts.length) return;
  const button = make("button", "Draw charts over time");
  button.type = "button";
  button.setAttribute("aria-pressed", "false");
  const bar = make("p", "");
  bar.className = "axes";
  bar.append(button);
  document.querySelector("header").append(bar);
  // Draw the charts over training time, or over steps again.
  const redraw = (timed) => {
    for (const { chart, xAt, left, right, bottom } of charts) {
      const hours = (x, { clock }) => clock ? between(clock[0], clock[1], xAt(x)) / 3600 : 0;
      const ends = chart.groups.flatMap((each) => each.points.map(([x]) => hours(x, each)));
      const scale = Math.max(...ends) < 0.05 ? 3600 : Math.max(...ends) < 2 ? 60 : 1;
      const low = Math.min(...ends) * scale;
      const high = Math.max(Math.max(...ends) * scale, low + 1e-9);
      chart.timed = timed;
      chart.move = timed ? (x, each) => left + (hours(x, each) * scale - low) / (high - low) * (right - left) : (x) => x;
      chart.back = timed ? (pixel) => low + (pixel - left) / (right - left) * (high - low) : xAt;
      for (const each of chart.groups) {
        for (const [path, d] of each.drawn) {
          path.setAttribute("d", d.replace(NUMBERS, (_, x, y) => `${chart.move(Number(x), each).toFixed(1)} ${y}`));
        }
        for (const [mark, x] of each.marks) mark.setAttribute("x", chart.move(x + 3.5, each) - 3.5);
      }
      chart.before ??= chart.ticks.innerHTML;
      chart.label.textContent = timed ? { 3600: "seconds", 60: "minutes", 1: "hours" }[scale] + " of training" : chart.words;
      if (!timed) {
        chart.ticks.innerHTML = chart.before;
        continue;
      }
      const raw = (high - low) / 6;
      const power = 10 ** Math.floor(Math.log10(raw));
      const step = [1, 2, 5, 10].find((part) => part * power >= raw) * power;
      chart.ticks.replaceChildren();
      for (let tick = Math.ceil(low / step) * step; tick <= high; tick += step) {
        const text = document.createElementNS(chart.svg.namespaceURI, "text");
        text.setAttribute("class", "tick mid");
        text.setAttribute("x", left + (tick - low) / (high - low) * (right - left));
        text.setAttribute("y", bottom + 18);
        text.textContent = short(tick);
        chart.ticks.append(text);
      }
    }
  };
  button.addEventListener("click", () => {
    const timed = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(timed));
    button.textContent = timed ? "Draw charts over steps" : "Draw charts over time";
    redraw(timed);
  });
})();
