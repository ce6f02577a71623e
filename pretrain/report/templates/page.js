"use strict";

// Plotly's script is in the page as base64 of gzip.
async function loadPlotly() {
  const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (c) => c.charCodeAt(0));
  const unpacked = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(unpacked).text();
  document.head.append(script);
}

const page = JSON.parse(document.getElementById("figures").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");

// A trace names its colour role in `meta`; the theme maps roles to colours. A heat map names a colour scale.
function withColor(trace, { colors, scales }) {
  if (trace.type === "heatmap") return { ...trace, colorscale: scales[trace.meta] };
  const color = colors[trace.meta];
  const [marker, line] = [{ ...trace.marker, color }, { ...trace.line, color }];
  return { ...trace, marker, line, textfont: { color, size: 13 } };
}

function draw() {
  const theme = page.themes[dark.matches ? "dark" : "light"];
  const font = { ...theme.template.layout.font, family: getComputedStyle(document.body).fontFamily };
  for (const [name, figure] of Object.entries(page.charts)) {
    const traces = figure.data.map((trace) => withColor(trace, theme));
    // Plotly writes the slider's place into the layout it gets.
    const layout = { ...structuredClone(figure.layout), template: theme.template, font };
    Plotly.react(`chart-${name}`, traces, layout, { responsive: true, displayModeBar: false });
  }
  document.body.dataset.drawn = dark.matches ? "dark" : "light";
}

loadPlotly().then(() => {
  draw();
  dark.addEventListener("change", draw);
});
