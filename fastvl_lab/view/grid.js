"use strict";
// Draws the figure and the table of a grid's page from its data, as far as the filters leave it.
(() => {
  const data = JSON.parse(document.getElementById("grid-data").textContent);
  const at = Object.fromEntries(data.columns.map((name, number) => [name, number]));
  const get = (row, name) => row[at[name]];
  const unique = (rows, name) => [...new Set(rows.map((row) => get(row, name)))];
  const selects = [...document.querySelectorAll("#grid-filters select")];
  const engines = unique(data.rows, "engine"), checkpoints = unique(data.rows, "checkpoint");
  const loaded = "load" in at, loads = loaded ? unique(data.rows, "load") : [""];
  const loadOf = (row) => (loaded ? get(row, "load") : "");
  const MOST_ROWS = 500; // that a table draws; the export has all

  for (const select of selects) {
    const values = unique(data.rows, select.dataset.column).map((value) => new Option(value, JSON.stringify(value)));
    select.append(new Option("all", ""), ...values);
    // A line a recipe can be read, one of each checkpoint and load cannot.
    if (["checkpoint", "load"].includes(select.dataset.column)) select.selectedIndex = 1;
    select.addEventListener("change", draw);
  }

  function left() {
    const wanted = selects.filter((select) => select.value).map((select) => [at[select.dataset.column], JSON.parse(select.value)]);
    return data.rows.filter((row) => wanted.every(([column, value]) => row[column] === value));
  }

  // One panel a card, under one another; a line a recipe, checkpoint and load: the recipe has its colour, the checkpoint its marker.
  function figure(rows) {
    const cards = unique(rows, "card"), traces = [], named = new Set(), lines = new Map();
    for (const row of rows.filter((row) => get(row, "ttft_ms") !== null)) {
      const key = JSON.stringify([get(row, "card"), get(row, "checkpoint"), loadOf(row), get(row, "engine")]);
      lines.set(key, [...(lines.get(key) ?? []), row]);
    }
    const layout = { margin: { t: 30, r: 10 }, height: 60 + 360 * Math.max(cards.length, 1), annotations: [], legend: { font: { size: 11 } } };
    cards.forEach((card, panel) => {
      const end = panel ? String(panel + 1) : "", share = 1 / cards.length;
      const domain = [1 - (panel + 1) * share + 0.16 * share, 1 - panel * share - 0.06 * share];
      layout["xaxis" + end] = { title: { text: "visual tokens" }, rangemode: "tozero", anchor: "y" + end };
      layout["yaxis" + end] = { title: { text: "warm TTFT, ms" }, rangemode: "tozero", domain, anchor: "x" + end };
      layout.annotations.push({ text: card, xref: "paper", yref: "paper", x: 0, y: domain[1], xanchor: "left", yanchor: "bottom", showarrow: false });
      for (const checkpoint of checkpoints) for (const load of loads) for (const engine of engines) {
        const mine = lines.get(JSON.stringify([card, checkpoint, load, engine]));
        if (!mine) continue;
        mine.sort((a, b) => get(a, "visual_tokens") - get(b, "visual_tokens"));
        const reach = (end) => mine.map((row) => (get(row, end) === null ? 0 : Math.abs(get(row, end) - get(row, "ttft_ms"))));
        const name = [checkpoint, ...(loads.length > 1 ? [load] : []), engine].join(" · "), number = engines.indexOf(engine);
        const colour = data.colours[number % data.colours.length];
        traces.push({
          name, legendgroup: name, showlegend: !named.has(name), mode: "lines+markers", xaxis: "x" + end, yaxis: "y" + end,
          x: mine.map((row) => get(row, "visual_tokens")), y: mine.map((row) => get(row, "ttft_ms")),
          customdata: mine.map((row) => `${get(row, "image")}, ${get(row, "host")}`),
          hovertemplate: "%{x} visual tokens (%{customdata}): %{y:.1f} ms",
          error_y: { type: "data", symmetric: false, array: reach("ttft_high_ms"), arrayminus: reach("ttft_low_ms"), thickness: 1 },
          line: { color: colour, width: 2, dash: Math.floor(number / data.colours.length) % 2 ? "dash" : "solid" },
          marker: { color: colour, size: 7, symbol: data.markers[checkpoints.indexOf(checkpoint) % data.markers.length] },
        });
        named.add(name);
      }
    });
    Plotly.react("grid-figure", traces, layout, data.config);
  }

  function said(value) {
    if (value === null) return "";
    return typeof value === "number" && !Number.isInteger(value) ? value.toFixed(2) : String(value);
  }

  function table(rows) {
    const columns = data.headings.map((heading, number) => [heading, number]).filter(([heading]) => heading);
    const line = (tag, texts) => {
      const made = document.createElement("tr");
      for (const text of texts) {
        const cell = document.createElement(tag);
        cell.textContent = text;
        if (tag === "th") cell.scope = "col";
        made.append(cell);
      }
      return made;
    };
    document.querySelector("#grid-table thead").replaceChildren(line("th", columns.map(([heading]) => heading)));
    const lines = rows.slice(0, MOST_ROWS).map((row) => line("td", columns.map(([, number]) => said(row[number]))));
    document.querySelector("#grid-table tbody").replaceChildren(...lines);
  }

  function draw() {
    const rows = left();
    const cut = rows.length > MOST_ROWS ? `; the table has the first ${MOST_ROWS}, the export has all` : "";
    document.getElementById("grid-count").textContent = `${rows.length} of ${data.rows.length} rows${cut}`;
    figure(rows);
    table(rows);
  }

  document.getElementById("grid-export").addEventListener("click", () => {
    const field = (value) => (value === null ? "" : /[",\n]/.test(String(value)) ? `"${String(value).replaceAll('"', '""')}"` : String(value));
    const lines = [data.columns, ...left()].map((row) => row.map(field).join(","));
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([lines.join("\n") + "\n"], { type: "text/csv" }));
    link.download = "grid.csv";
    link.click();
    URL.revokeObjectURL(link.href);
  });

  draw();
})();
