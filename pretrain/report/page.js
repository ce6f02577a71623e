"use strict";

// Plotly's script lies in this page as gzip in base64.
async function loadPlotly() {
  const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (c) => c.charCodeAt(0));
  const unpacked = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(unpacked).text();
  document.head.append(script);
}

const page = JSON.parse(document.getElementById("figures").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");

// A trace names the role of its colour in `meta`; the theme knows the colour.
function coloured(trace, colors) {
  const color = colors[trace.meta];
  return { ...trace, marker: { ...trace.marker, color }, line: { ...trace.line, color }, textfont: { color, size: 13 } };
}

function draw() {
  const theme = page.themes[dark.matches ? "dark" : "light"];
  const font = { ...theme.template.layout.font, family: getComputedStyle(document.body).fontFamily };
  for (const [name, figure] of Object.entries(page.charts)) {
    const traces = figure.data.map((trace) => coloured(trace, theme.colors));
    Plotly.react(`chart-${name}`, traces, { ...figure.layout, template: theme.template, font }, { responsive: true, displayModeBar: false });
  }
  document.body.dataset.drawn = dark.matches ? "dark" : "light";
}

loadPlotly().then(() => {
  draw();
  dark.addEventListener("change", draw);
});
