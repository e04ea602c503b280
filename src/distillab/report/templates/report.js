"use strict";
(() => {
  const root = document.documentElement;
  // A page opened from a file may be refused storage: it then forgets, and works all the same.
  const remember = (key, value) => { try { localStorage.setItem(`distillab-${key}`, value); } catch { /* refused */ } };
  const recall = (key) => { try { return localStorage.getItem(`distillab-${key}`); } catch { return null; } };
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const select = document.getElementById("axis");
  const drawn = [];

  if (recall("theme")) root.dataset.theme = recall("theme");
  if (select && recall("axis")) select.value = recall("axis");

  const { axes, charts } = JSON.parse(document.getElementById("figures").textContent);
  const names = { tokens: "training tokens", step: "optimizer steps", seconds: "seconds of training" };

  function themed(element, key) {
    const style = getComputedStyle(element);
    const axis = { gridcolor: style.borderTopColor, linecolor: style.borderTopColor, zerolinecolor: style.borderTopColor };
    const { layout, training } = charts[key];
    const x = training ? { title: { text: names[select.value], font: { size: 11 } }, tickformat: "~s", hoverformat: "," } : {};
    return {
      ...layout,
      xaxis: { ...axis, automargin: true, spikecolor: style.color, spikethickness: 1, spikedash: "solid", ...layout.xaxis, ...x },
      yaxis: { ...axis, ...layout.yaxis },
      font: { family: style.fontFamily, size: 12, color: style.color },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: style.backgroundColor,
      margin: { l: 48, r: 12, t: 8, b: 40 },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", bgcolor: "rgba(0,0,0,0)" },
      hovermode: "x unified",
      hoverdistance: -1, // the nearest point, however far apart they are
      hoverlabel: { bgcolor: style.backgroundColor, bordercolor: style.borderTopColor, font: { color: getComputedStyle(document.body).color } },
      dragmode: false, // a finger on a chart scrolls the page
    };
  }

  function traces(key) {
    const ink = getComputedStyle(document.body).color;
    return charts[key].data.map((trace) => ({
      ...trace,
      ...(trace.meta?.axis && { x: axes[trace.meta.axis][select.value] }),
      ...(trace.error_y && { error_y: { ...trace.error_y, color: ink } }),
    }));
  }

  function draw(element) {
    const key = element.dataset.chart;
    return Plotly.react(element, traces(key), themed(element, key), { displayModeBar: false, responsive: true });
  }

  const redraw = () => drawn.forEach(draw);
  document.getElementById("theme").addEventListener("click", () => {
    const now = root.dataset.theme || (dark.matches ? "dark" : "light");
    root.dataset.theme = now === "dark" ? "light" : "dark";
    remember("theme", root.dataset.theme);
    redraw();
  });
  dark.addEventListener("change", redraw);
  select?.addEventListener("change", () => { remember("axis", select.value); redraw(); });

  async function unpack() {
    const packed = document.getElementById("library").textContent;
    const bytes = Uint8Array.from(atob(packed), (character) => character.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
  }

  async function start() {
    const elements = document.querySelectorAll(".chart");
    if (elements.length) await unpack();
    for (const element of elements) {
      await draw(element);
      drawn.push(element);
    }
    root.dataset.ready = "true";
  }
  start().catch((error) => {
    for (const element of document.querySelectorAll(".chart:not(.js-plotly-plot)")) {
      element.textContent = `Not drawn: ${error.message}`; // a browser from before 2023
    }
  }).finally(() => {
    const wait = document.body.dataset.reload;
    if (wait) setTimeout(() => location.reload(), Number(wait));
  });
})();
