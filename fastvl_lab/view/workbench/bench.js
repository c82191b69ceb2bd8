// The page of a workbench. Every trait of the model is a record of messages.py; a change of one redraws what it is about and
// nothing else. What is clicked or typed goes back as a wish, {kind, …}, with files beside it as buffers.

const KEYS = [
  ["r", "run the recipe once more"],
  ["s", "stop at the end of the stage or step"],
  ["u", "undo: back to the recipe before"],
  ["b", "the preset baseline"],
  ["f", "the preset fastest"],
  ["1 – 9", "the views"],
  ["← →", "another option of the toggle"],
  ["↑ ↓", "the toggle, or the stage, above or below"],
  ["?", "this help"],
];
const WORDS = [
  ["TTFT", "time to first token: from the request's bytes to the first text in the reader's hands"],
  ["TPOT", "time per output token after the first"],
  ["cold, warm", "the first run of its shape, which compiles and fills caches, and every run after it; never pooled"],
  ["cache hit", "a run that used something of an earlier request"],
  ["unaccounted", "time that no stage covers"],
  ["floor", "what a stage must cost at least here, by its operations and bytes and what this device was seen to do"],
  ["parity", "whether a recipe computes what Transformers computes on the same weights"],
  ["audit", "whether the numbers can be what they say"],
  ["at once, a rate", "how a load's requests arrive: the next when one ends, or at random, so many a second on average"],
  ["p50, p90, p99", "what half of the requests stayed below, nine of ten, 99 of 100"],
  ["≈", "an approximate option: other tokens than Transformers' are possible"],
  ["→", "an option that another choice has brought along"],
];
const HUES = {
  light: { grey: "#767676", orange: "#b17300", blue: "#0072b2", sky: "#2a86b8", green: "#00875f", pink: "#b25587", red: "#c24f00",
    ink: "#222222", soft: "#5c6166", grid: "#dddddd", paper: "#ffffff", rival: "#7f858b" },
  dark: { grey: "#a0a6ad", orange: "#e69f00", blue: "#4aa8e0", sky: "#7cc8f2", green: "#1fbf91", pink: "#dd93ba", red: "#ef7a2d",
    ink: "#e8e8e8", soft: "#b3b9c0", grid: "#3a3f45", paper: "#111418", rival: "#8d949c" },
};
const HUE_OF = { decode_image: "orange", preprocess: "orange", vit: "blue", wait: "blue", first_token: "blue", merge: "sky",
  prefill: "green", sample: "pink", emit: "pink", decode: "red" };
const WAITS = ["queued", "waiting", "await_image"];
// Light colours of waits, pale on dark paper: they must not be the brightest there.
const PALE = { "#CFCFCF": "#4d545c", "#E8E2D0": "#3d3b32", "#F7E2B5": "#574a2c" };
const OPENS = { vit: "ViT blocks", prefill: "decoder layers" };
const FONT = "12px/1.4 'DejaVu Sans', Arial, sans-serif";
const [LABEL, NUMBERS, ROW, AXIS] = [112, 130, 24, 22]; // pixels of the waterfall
const SLOW = 250; // ms of a run from which it is watched while it runs

const h = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const s = (tag, attributes = {}, ...children) => fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}
const ms = (value) => {
  if (Math.abs(value) >= 1000) return `${(value / 1000).toFixed(2)} s`;
  const size = Math.abs(value);
  return `${value.toFixed(size >= 100 ? 0 : size >= 10 ? 1 : size >= 0.1 || size === 0 ? 2 : 3)} ms`;
};
const ruler = document.createElement("canvas").getContext("2d"); // measures texts
const percent = (share) => share > 0 && share < 0.0005 ? "<0.1 %" : `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;

export default () => {
  const libraries = { plotly: null, waiting: [] };
  return {
    initialize({ model }) {
      model.on("msg:custom", ({ kind }, buffers) => {
        if (kind !== "plotly") return;
        const library = { exports: {} };
        new Function("module", "exports", new TextDecoder().decode(buffers[0]))(library, library.exports);
        libraries.plotly = library.exports;
        libraries.waiting.splice(0).forEach((draw) => draw());
      });
    },
    render({ model, el }) {
      return mount(model, el, libraries);
    },
  };
};

function mount(model, el, libraries) {
  const send = (kind, fields = {}, buffers = undefined) => model.send({ kind, ...fields }, undefined, buffers);
  const press = (button) => send("Press", { button });
  const remembered = { get: (key) => { try { return localStorage.getItem(key); } catch { return null; } },
    set: (key, value) => { try { localStorage.setItem(key, value); } catch { /* a page that may not store */ } } };
  const ui = { zoom: null, dark: false, liveAt: 0, frame: 0, replay: null, row: 0, perfetto: null, wide: 0 };

  // The parts of the page, made once.
  const message = h("div", { class: "fl-message", role: "alert", hidden: true });
  const status = h("span", { class: "fl-status", role: "status", "aria-live": "polite" });
  const big = h("strong", { class: "fl-big" });
  const spread = h("span", { class: "fl-spread" });
  const strip = h("span", { class: "fl-strip" });
  const pills = h("div", { class: "fl-pills", role: "group", "aria-label": "about this result" });
  const learnt = h("p", { class: "fl-learnt", "aria-live": "polite" });
  const advice = h("p", { class: "fl-advice" });
  const heading = h("div", { class: "fl-heading" });
  const tabs = h("div", { class: "fl-views", role: "tablist", "aria-label": "views" });
  const crumbs = h("nav", { class: "fl-crumbs", "aria-label": "where this view is" });
  const chart = h("div", { class: "fl-chart" });
  const plot = h("div", { class: "fl-plot", hidden: true });
  const table = h("details", { class: "fl-table" }, h("summary", {}, "the same as a table"), h("div", { role: "region", tabindex: "0", "aria-label": "the same as a table" }));
  const answer = h("pre", { class: "fl-answer", role: "region", tabindex: "0", "aria-label": "the answer" });
  const toggles = h("div", { class: "fl-toggles", role: "group", "aria-label": "the recipe's toggles" });
  const history = h("div", { class: "fl-history" });
  const earlier = h("details", { class: "fl-earlier", hidden: true });
  const copies = h("details", { class: "fl-copies" }, h("summary", {}, "copy the recipe"), h("div"));
  const tip = h("div", { class: "fl-tip", role: "tooltip", hidden: true });
  const help = h("div", { class: "fl-help", role: "dialog", "aria-label": "keys and words", hidden: true, tabindex: "-1" });
  const button = (name, action, about, attributes = {}) =>
    h("button", { type: "button", "data-tip": about, onclick: action, ...attributes }, name);
  const stop = button("stop", () => press("stop"), "end what runs at the end of its stage or step (s)");
  const undo = button("undo", () => press("undo"), "back to the recipe before (u)");
  const dark = button("◐", () => { remembered.set("fl-dark", String(!ui.dark)); themed(); }, "a dark page or a light one; as JupyterLab's theme until chosen", { "aria-label": "dark" });
  const actions = h("div", { class: "fl-actions" },
    button("run", () => press("run"), "run the recipe once more (r)", { class: "fl-primary" }), stop, undo,
    button("baseline", () => send("Use", { recipe: "baseline" }), "the preset baseline: plain PyTorch (b)"),
    button("fastest", () => send("Use", { recipe: "fastest" }), "the preset fastest: the best exact recipe known here (f)"),
    dark, button("?", () => helped(), "keys and words", { "aria-label": "keys and words" }));
  const ask = asking();
  const load = loading();
  const views = h("div", { class: "fl-seen", role: "tabpanel", "aria-label": "the view" }, crumbs, load.box, chart, plot);
  const head = h("header", { class: "fl-head" }, h("div", { class: "fl-line" }, h("span", { class: "fl-ttft", "data-tip": WORDS[0][1] }, "TTFT"), big, spread, strip, actions));
  const shown = h("div", { class: "fl-shown" }, pills, learnt, advice, tabs, views, heading, answer, table);
  const note = h("div", { class: "fl-note" });
  const root = h("section", { class: "fl-bench", "aria-label": "workbench", "data-lm-suppress-shortcuts": "true" },
    ask.box, message, head, h("div", { class: "fl-body" }, h("div", { class: "fl-side" }, status, toggles, note), shown), history, earlier, copies, help, tip);
  el.append(root);
  freeSticky(el);

  // The question.
  function asking() {
    const fill = (field) => (text) => send("Fill", { field, text });
    const label = (name, about, ...inside) => h("label", { class: `fl-field fl-of-${name.replace(" ", "-")}`, "data-tip": about }, h("span", {}, name), ...inside);
    const entry = (field, about, attributes = {}) => {
      const input = h("input", { type: "text", "aria-label": field, ...attributes, onchange: () => fill(field)(input.value) });
      return { box: label(field, about, input), show: (value, failed) => { if (failed || input !== document.activeElement) input.value = value; } };
    };
    // A list of what there is, and an entry for all else, which counts at Enter. options: names, or {text, about, unmet}.
    const picker = (name, about, other, field = name, example = other) => {
      const input = h("input", { type: "text", placeholder: example, "aria-label": other, hidden: true,
        onkeydown: (event) => { if (event.key === "Enter" && input.value.trim()) { fill(field)(input.value); leave(); } else if (event.key === "Escape") leave(); } });
      const list = h("select", { "aria-label": name, onchange: () => { if (list.value === "\0") { input.hidden = false; input.value = ""; input.focus(); list.value = list.dataset.value; } else fill(field)(list.value); } });
      const leave = () => { input.hidden = true; list.focus(); };
      return { box: label(name, about, list, input), show: (options, value) => {
        const known = options.map((option) => option.text === undefined ? { text: option } : option);
        if (!known.some(({ text }) => text === value)) known.push({ text: value });
        const why = ({ about, unmet }) => unmet ? `cannot run here: ${unmet}` : about;
        list.dataset.value = value;
        list.replaceChildren(...known.map((one) => h("option", { value: one.text, title: why(one), "aria-description": why(one), disabled: Boolean(one.unmet) }, one.text)), h("option", { value: "\0" }, `${other}…`));
        list.value = value;
        list.closest("label").dataset.tip = [about, ...known.filter(({ unmet }) => unmet).map((one) => `${one.text} ${why(one)}`)].join("\n");
      } };
    };
    const fields = {
      checkpoint: picker("checkpoint", "what is loaded: built in, random weights of a real geometry, or what the hub's cache holds", "a folder or hub id"),
      pictures: picker("pictures", "drop, paste or choose files anywhere on the panel; paths are separated by commas", "a path"),
      size: picker("size", "pictures are measured as they are, within a box of the same aspect ratio, or resized exactly", "W×H"),
      rival: picker("to beat", "the bar to beat: an engine that runs in the same rounds", "address", "rival", "http://host:8000/v1"),
    };
    const texts = {
      max_pixels: entry("max_pixels", "the limit on the area of a resized picture; empty is the checkpoint's own", { placeholder: "default", inputmode: "numeric" }),
      prompt: entry("prompt", "the text after the pictures", {}),
      tokens: entry("tokens", "how many tokens to make; the end-of-text token is ignored", { inputmode: "numeric" }),
      repeats: entry("repeats", "measured rounds after each change; an interval needs 6", { inputmode: "numeric" }),
    };
    const files = h("input", { type: "file", accept: "image/*", multiple: true, hidden: true, onchange: () => { take([...files.files], false); files.value = ""; } });
    const preview = h("span", { class: "fl-preview" });
    const choose = button("files…", () => files.click(), "one or several pictures; dropped with Shift, they are added", { "aria-label": "choose files" });
    const box = h("div", { class: "fl-ask" }, preview, h("div", { class: "fl-fields" }, fields.checkpoint.box, fields.pictures.box, choose, files, fields.size.box, texts.max_pixels.box,
      texts.prompt.box, texts.tokens.box, texts.repeats.box, fields.rival.box));
    // What is being typed stays; what failed is put back.
    return { box, show(failed) {
      const [asked, choices] = [model.get("asked"), model.get("choices")];
      if (asked.checkpoint === undefined) return;
      const pictures = asked.pictures.join(", ");
      fields.checkpoint.show(choices.checkpoints, asked.checkpoint);
      fields.pictures.show(choices.photographs, pictures);
      fields.size.show(choices.boxes, asked.size);
      fields.rival.show(choices.rivals, asked.rival);
      for (const [name, field] of Object.entries(texts)) field.show(asked[name], failed);
      preview.replaceChildren(...asked.previews.map((src, number) => h("img", { src, alt: asked.pictures[number] ?? "a picture" })));
      note.textContent = choices.note;
    } };
  }

  // The load view: its fields, and what was measured, above the figures.
  function loading() {
    const tell = () => send("Send", { at_once: how.value, rate: how.value ? "" : rate.value.trim(), n: n.value.trim(), against: against.value });
    const pressed = (event) => { if (event.key === "Enter" && !go.disabled) tell(); };
    const label = (name, about, ...inside) => h("label", { class: "fl-field", "data-tip": about }, h("span", {}, name), ...inside);
    const how = h("select", { "aria-label": "how requests arrive", onchange: () => { rated(); if (!how.value) rate.focus(); } },
      ...["1", "4", "8", "16", "32"].map((number) => h("option", { value: number }, `${number} at once`)), h("option", { value: "" }, "at a rate"));
    const rate = h("input", { type: "text", inputmode: "decimal", "aria-label": "requests a second", placeholder: "2.5", onkeydown: pressed });
    const n = h("input", { type: "text", inputmode: "numeric", "aria-label": "requests", onkeydown: pressed });
    const against = h("select", { "aria-label": "held against" });
    const [at, many] = [label("a second", "on average, at random (Poisson)", rate), label("requests", "how many; the interval of a median needs 6, that of a p90 about 40", n)];
    const go = button("load", tell, "send them: each has a picture of its own, so that no cache flatters", { class: "fl-primary fl-send" });
    const halt = button("stop the load", () => press("stop"), "what was measured of it is not kept");
    const toggled = button("toggles of schedule", () => toSlot("schedule"), "which requests share a step: the toggles on the left");
    const [reason, progress, said] = ["fl-bad fl-reason", "fl-progress", "fl-said"].map((name) => h("div", { class: name }));
    const found = h("div", { class: "fl-scroll", role: "region", tabindex: "0", "aria-label": "percentiles" });
    const box = h("div", { class: "fl-load", role: "group", "aria-label": "load", hidden: true }, h("div", { class: "fl-line" }, label("arrivals", "so many at once, the next when one ends; or so many a second", how), at, many,
      label("against", "what gets the same requests afterwards", against), go, halt, toggled), reason, progress, said, found);
    const rated = () => { at.hidden = Boolean(how.value); };
    let fields = "";
    return { box, show() {
      const [told, live] = [model.get("loaded") ?? {}, model.get("live")];
      box.hidden = model.get("shown").view !== "load" || told.others === undefined;
      if (box.hidden) return;
      const [loads, mine] = [live.state === "under load", JSON.stringify([told.at_once, told.rate, told.n, told.against, told.others])];
      if (mine !== fields) { // what is being typed stays
        fields = mine;
        if (told.at_once && ![...how.options].some(({ value }) => value === told.at_once)) how.prepend(h("option", { value: told.at_once }, `${told.at_once} at once`));
        [how.value, rate.value, n.value] = [told.at_once, told.rate, told.n];
        const why = ({ about, unmet }) => unmet ? `cannot be: ${unmet}` : about;
        against.replaceChildren(...told.others.map((one) => h("option", { value: one.text, title: why(one), "aria-description": why(one), disabled: Boolean(one.unmet) }, one.text)));
        against.value = told.against;
        against.closest("label").dataset.tip = ["what gets the same requests afterwards", ...told.others.map((one) => `${one.text}: ${why(one)}`)].join("\n");
        rated();
      }
      go.disabled = Boolean(told.unmet) || loads;
      reason.textContent = told.unmet ? `This cannot be put under load: ${told.unmet}` : "";
      halt.hidden = !loads;
      progress.textContent = loads ? live.progress : "";
      said.replaceChildren(...told.said.map((text) => h("p", {}, text)));
      found.hidden = told.rows.length === 0;
      found.replaceChildren(tableFor(told.columns, told.rows));
    } };
  }
  const tableFor = (columns, rows) => h("table", {}, h("thead", {}, h("tr", {}, columns.map((name) => h("th", { scope: "col" }, name)))),
    h("tbody", {}, rows.map((row) => h("tr", {}, row.map((cell) => h("td", {}, cell))))));
  async function take(files, add) {
    if (files.length === 0) return;
    const buffers = await Promise.all(files.map((file) => file.arrayBuffer()));
    send("Take", { names: files.map((file) => file.name || "pasted picture"), add }, buffers);
  }

  // The toggles: one tab stop, arrows within.
  let radios = [];
  function showChoices() {
    const { toggles: every = [], views: names = [] } = model.get("choices");
    radios = [];
    const slots = [...new Set(every.map((toggle) => toggle.slot))].map((slot) => {
      const rows = every.filter((toggle) => toggle.slot === slot).map((toggle) => {
        const options = toggle.options.map((option) => {
          const about = `${toggle.path} = ${option.value}: ${option.does} (${option.exact ? "exact" : "approximate"})`;
          return h("button", { type: "button", role: "radio", "aria-checked": "false", tabindex: "-1", "data-value": JSON.stringify(option.value),
            "data-tip": option.unmet ? `cannot run here: ${option.unmet}. ${about}` : about, "aria-disabled": option.unmet ? "true" : null, class: option.unmet ? "fl-unmet" : null,
            "aria-description": option.unmet ? `cannot run here: ${option.unmet}` : option.does,
            onclick: (event) => option.unmet ? said(`${toggle.path}=${option.value} cannot run here: ${option.unmet}`) : choose(event.currentTarget, toggle.path, option.value),
          }, option.exact ? String(option.value) : `≈ ${option.value}`);
        });
        const unmet = toggle.options.filter((option) => option.unmet).length;
        const more = unmet ? button(`+${unmet}`, () => row.classList.toggle("fl-all"), `${unmet} that cannot run here, and why`, { class: "fl-more", tabindex: "-1", "aria-label": `show ${unmet} options that cannot run here` }) : null;
        const saving = h("span", { class: "fl-saving" });
        const group = h("div", { role: "radiogroup", "aria-label": toggle.path, "data-path": toggle.path }, options);
        const row = h("div", { class: "fl-toggle" }, h("span", { class: "fl-name", "data-tip": `${toggle.path}, from plain to special: ${toggle.options.map((option) => option.value).join(", ")}` }, toggle.name), group, more, saving);
        radios.push({ path: toggle.path, group, options, saving, row });
        return row;
      });
      return h("details", { class: "fl-slot", open: !ui.narrow, "data-slot": slot }, h("summary", {}, slot, h("span", { class: "fl-changed" })), rows);
    });
    const jump = h("div", { class: "fl-jump" }, [...new Set(every.map((toggle) => toggle.slot))].map((slot) =>
      button(slot, () => toSlot(slot), `to the toggles of ${slot}`, { tabindex: "-1" })));
    toggles.replaceChildren(jump, ...slots);
    tabs.replaceChildren(...names.map(([name, about], number) => h("button", { type: "button", role: "tab", "data-view": name, "data-tip": `${about} (${number + 1})`, onclick: () => look(name) }, name)));
    ask.show(false);
    showChosen();
    showAdvised();
    showTabs();
  }
  function toSlot(slot) {
    const at = toggles.querySelector(`details[data-slot="${slot}"]`);
    at.open = true;
    toggles.scrollTop = at.offsetTop - toggles.firstChild.offsetHeight;
  }
  function choose(option, path, value) {
    for (const other of option.parentElement.children) other.setAttribute("aria-checked", String(other === option));
    status.textContent = "asked";
    send("Choose", { path, value });
  }
  function showChosen() {
    const { values = {}, moved = [], undoable, texts = {} } = model.get("chosen");
    const changed = {};
    radios.forEach(({ path, options, row }, at) => {
      options.forEach((option, number) => {
        const chosen = option.dataset.value === JSON.stringify(values[path]);
        option.setAttribute("aria-checked", String(chosen));
        option.tabIndex = chosen && at === Math.min(ui.row, radios.length - 1) ? 0 : -1;
        if (chosen && number > 0) changed[path.split(".")[0]] = (changed[path.split(".")[0]] ?? 0) + 1;
      });
      row.classList.toggle("fl-moved", moved.includes(path));
    });
    for (const slot of toggles.querySelectorAll(".fl-slot")) slot.querySelector(".fl-changed").textContent = changed[slot.dataset.slot] ? `${changed[slot.dataset.slot]} beyond the baseline` : "";
    undo.disabled = !undoable;
    copies.lastChild.replaceChildren(...Object.entries(texts).map(([name, text]) => h("div", { class: "fl-copy" },
      button(`copy ${name}`, () => copied(text, name), `the recipe as ${name}`), h("pre", { role: "region", tabindex: "0", "aria-label": `the recipe as ${name}` }, text))));
  }
  function copied(text, name) {
    navigator.clipboard?.writeText(text);
    status.textContent = navigator.clipboard ? `${name} copied` : text; // a page that may not copy shows it
    status.dataset.tip = text;
  }
  function showAdvised() {
    const { savings = {}, sentence = "", path, value } = model.get("advised");
    const most = Math.max(...Object.values(savings).map(([, saved]) => Math.abs(saved)), 0.001);
    for (const { path: at, saving } of radios) {
      const known = savings[at];
      saving.replaceChildren();
      saving.removeAttribute("data-tip");
      if (!known) continue;
      const [option, saved, low, high] = known;
      const sure = low > 0 ? "fl-saves" : high < 0 ? "fl-costs" : "fl-unsure";
      saving.append(h("i", { class: sure, style: `width:${Math.max(2, 14 * Math.abs(saved) / most)}px` }), `${saved > 0 ? "−" : "+"}${Math.abs(saved).toFixed(Math.abs(saved) < 9.95 ? 1 : 0)}`);
      saving.dataset.tip = `${at}=${option} would ${saved > 0 ? "save" : "cost"} ${ms(Math.abs(saved))} of TTFT here (${low?.toFixed(2)} to ${high?.toFixed(2)} ms)${low > 0 || high < 0 ? "" : ": no difference shown"}`;
    }
    advice.replaceChildren(sentence);
    if (path) advice.append(" ", button("try it", () => send("Choose", { path, value }), `${path}=${value}`, { class: "fl-primary fl-try" }));
  }

  // What goes on.
  function showLive() {
    const live = model.get("live");
    ui.liveAt = performance.now();
    const state = live.state === "running" && live.stages?.length ? `running ${live.stages.at(-1)[0]}` : live.state;
    status.textContent = [live.starting, state, live.progress].filter(Boolean).join(" · ");
    status.dataset.tip = status.textContent;
    root.dataset.state = live.state; // for whoever waits for it
    root.classList.toggle("fl-busy", Boolean(live.busy || live.starting));
    stop.disabled = !live.busy && !live.starting;
    said(live.error);
    if (live.error && live.error !== ui.error) ask.show(true);
    ui.error = live.error;
    answer.textContent = live.state === "running" && live.text ? live.text : (model.get("shown").answer ?? "");
    showStrip();
    load.show();
    cancelAnimationFrame(ui.frame);
    if (ui.arrived && !arriving()) drawView();
    if (watched()) grow();
    else if (ui.grew) { ui.grew = false; showResult(); }
  }
  const elapsed = () => (model.get("live").elapsed ?? 0) + performance.now() - ui.liveAt;
  function watched() {
    const live = model.get("live");
    return live.busy && live.elapsed !== null && live.elapsed !== undefined && live.stages?.length > 0 && !live.text && elapsed() > SLOW && (model.get("shown").view ?? "waterfall") === "waterfall";
  }
  function grow() {
    const { stages, expected } = model.get("live");
    const now = elapsed();
    ui.grew = true;
    big.textContent = ms(now);
    root.classList.add("fl-counting");
    spread.textContent = "and counting";
    const bars = stages.map(([name, start, end]) => [name, "host", start, (end ?? now) - start]);
    const outline = expected.map(([name, start, end]) => [name, "host", start, end - start]);
    const host = {};
    for (const [name, , , length] of bars) host[name] = (host[name] ?? 0) + length;
    const ends = expected.map(([, , end]) => end);
    drawWaterfall({ recipe: { label: "this run", bars, host, device: {}, files: {}, ttft: now, open: true },
      before: outline.length ? { label: "the last run", bars: outline, host: {}, device: {}, ttft: Math.max(...ends) } : null, rival: null, floors: {} });
    ui.frame = requestAnimationFrame(() => { if (watched()) grow(); });
  }
  function said(text) {
    message.hidden = !text;
    message.replaceChildren(text ?? "", button("×", () => { message.hidden = true; }, "away with it", { "aria-label": "dismiss" }));
  }
  function showStrip() {
    const [live, { recipe, rival }] = [model.get("live"), model.get("shown")];
    const rounds = Object.keys(live.rounds ?? {}).length ? live.rounds : recipe ? { [rival?.label ?? "rival"]: rival?.rounds ?? [], [recipe.label]: recipe.rounds } : {};
    const every = Object.values(rounds).flat().map(([ms]) => ms);
    if (every.length === 0) return strip.replaceChildren();
    const [least, most] = [Math.min(...every), Math.max(...every)];
    const colours = HUES[ui.dark ? "dark" : "light"];
    const x = (value) => 5 + 80 * (most > least ? (value - least) / (most - least) : 0.5);
    const colour = (label) => label === "this recipe" ? colours.blue : label === "the run before" ? colours.orange : colours.rival;
    const lines = Object.entries(rounds).map(([label, dots], line) => dots.map(([ms, disturbed]) =>
      s("circle", { cx: x(ms), cy: 5 + 7 * line, r: disturbed ? 2 : 2.5, stroke: disturbed ? colour(label) : "none", fill: disturbed ? "none" : colour(label) })));
    const about = Object.entries(rounds).map(([label, dots]) =>
      `${label}: ${dots.map(([ms, disturbed]) => ms.toFixed(1) + (disturbed ? ` (${disturbed})` : "")).join(", ")} ms`).join("\n");
    strip.dataset.tip = `rounds, a dot each; hollow: others disturbed it, so it counts for nothing\n${about}`;
    strip.replaceChildren(s("svg", { width: 90, height: 4 + 7 * Math.max(lines.length, 2), role: "img", "aria-label": `TTFT of rounds. ${about}` }, lines));
  }

  // The result that is looked at.
  function showResult() {
    const result = model.get("shown");
    if (result.number === undefined || watched()) return;
    root.classList.remove("fl-counting");
    big.textContent = result.headline || (ui.headline ?? "…");
    big.classList.toggle("fl-stale", !result.headline);
    if (result.headline) ui.headline = result.headline;
    spread.textContent = [result.spread, result.headline ? "" : result.cold, result.tpot && result.headline ? `TPOT ${result.tpot}` : ""].filter(Boolean).join(" · ");
    pills.replaceChildren(...result.pills.map(({ text, state, about }) => h("span", { class: `fl-pill fl-${state}`, "data-tip": about, tabindex: "0" }, text)));
    learnt.textContent = result.learnt;
    heading.replaceChildren(h("div", {}, result.heading), h("div", {}, result.detail), h("div", { class: "fl-no-before", hidden: !result.no_before }, result.no_before), h("div", { class: "fl-of-earlier", hidden: !result.earlier }, result.earlier),
      h("div", { class: "fl-tools" }, result.view === "waterfall" && [button("replay slowly", replay, "the run again, as long as two seconds"), button("PNG", png, "this waterfall as a picture")],
        button("Perfetto", perfetto, "this run's trace in ui.perfetto.dev, in a window of its own"),
        button(result.link ? "copy link" : "copy as Python line", () => copied(result.link ? location.origin + location.pathname + result.link : result.line, result.link ? "link" : "Python line"), `what opens this question, recipe and result again${result.link ? "" : " in a notebook"}, where it is kept`, { class: "fl-link-again" }),
        button("export all", () => press("export"), "page, records, Perfetto traces and PNG, into a new folder beside the notebook")));
    if (!model.get("live").busy) answer.textContent = result.answer;
    showTabs();
    showStrip();
    drawView();
  }
  function showTabs() {
    const view = model.get("shown").view ?? "waterfall";
    for (const tab of tabs.children) {
      tab.setAttribute("aria-selected", String(tab.dataset.view === view));
      tab.tabIndex = tab.dataset.view === view ? 0 : -1;
    }
    // Where the view is: the waterfall, a stage, its blocks or layers, one of these, and its operations.
    const to = (name, go) => [h("button", { type: "button", class: "fl-link", onclick: go }, name), " › "];
    const blocks = view === "operations" ? Object.entries(OPENS).find(([stage]) => ui.inside && ui.inside !== stage && partOf(stage, ui.inside)) : null;
    const opened = Object.entries(OPENS).find(([, name]) => name === view);
    const chooses = crumbs.contains(document.activeElement);
    const home = to("waterfall", () => look("waterfall"));
    if (opened) crumbs.replaceChildren(...home, opened[0], " › ", view);
    else if (view === "operations") crumbs.replaceChildren(...home, ...(blocks ? [blocks[0], " › ", ...to(blocks[1], () => look(blocks[1]))] : []), ui.inside ? `${ui.inside} › ` : "", "operations");
    else crumbs.replaceChildren();
    if (!opened && view !== "operations") return;
    const parts = partsOf(opened?.[0]);
    if (parts.length) crumbs.append(" ", h("select", { "aria-label": "operations of", onchange: (event) => open(event.target.value) },
      h("option", { value: "" }, opened ? "operations of…" : "the whole request"), ...parts.map((name) => h("option", { value: name, selected: view === "operations" && name === ui.inside }, name))));
    if (chooses) crumbs.querySelector("select")?.focus(); // who chooses by keyboard goes on doing so
  }
  // Whether a block or layer is one of a stage's, by its name; and the parts that a drawn view can open, of a stage or all.
  const partOf = (stage, name) => name.startsWith({ vit: "vit.", prefill: "language." }[stage]);
  function partsOf(stage) {
    const figure = model.get("figure");
    if (figure.view !== model.get("shown").view) return [];
    const { data, layout } = JSON.parse(figure.figure);
    return stage ? [...new Set(data.flatMap(({ y }) => y))] : Object.keys(layout.meta?.ranges ?? {});
  }
  const open = (name) => {
    ui.inside = name;
    if (model.get("shown").view === "operations") { showTabs(); drawView(); } else look("operations");
  };
  const look = (view) => {
    if (view === "load") toSlot("schedule");
    for (const tab of tabs.children) tab.setAttribute("aria-selected", String(tab.dataset.view === view));
    send("Look", { view });
  };
  function drawView() {
    const result = model.get("shown");
    load.show();
    const waterfall = result.view === "waterfall";
    learnt.hidden = advice.hidden = result.view === "load"; // they are about one request alone
    chart.hidden = !waterfall;
    plot.hidden = waterfall;
    if (waterfall) {
      drawWaterfall(result);
      const others = series(result).filter((run) => run !== result.recipe);
      return showTable(["stage", ...series(result).map(({ label }) => `${label}, ms`), ...others.map(({ label }) => `this recipe against ${label}`)],
        rowsOf(result).map((stage) => [stage, ...series(result).map((run) => stageText(run, stage)), ...others.map((run) => changeText(result.recipe, run, stage))]));
    }
    ui.arrived = arriving();
    if (ui.arrived) {
      purge(0);
      plot.replaceChildren(...drawArrived(model.get("arrived")));
      return showTable([], []);
    }
    const figure = model.get("figure");
    if (result.lacks || figure.view !== result.view || figure.about !== `${result.view} of ${result.number}`) {
      purge(0);
      plot.replaceChildren(h("p", { class: "fl-grey" }, result.lacks || `${result.view}: being measured…`));
      return showTable([], []);
    }
    showTable(figure.columns, figure.rows);
    if (!libraries.plotly) {
      if (libraries.waiting.push(drawView) === 1) press("plotly");
      return undefined;
    }
    const width = roomOf();
    if (width === 0) return undefined;
    const drawn = [figure.figure, ...figure.more];
    if (!plot.firstChild?.data) plot.replaceChildren();
    purge(drawn.length);
    drawn.forEach((text, number) => {
      if (!plot.children[number]) plot.append(h("div"));
      const { data, layout } = JSON.parse(text);
      if (ui.dark) darken(data, layout);
      for (const name of Object.keys(layout)) if (/^yaxis/.test(name)) layout[name].fixedrange = true;
      plot.children[number].style.height = `${layout.height}px`; // plotly has each fill all of the room
      const range = result.view === "operations" ? layout.meta?.ranges?.[ui.inside] : null;
      if (range) layout.xaxis.range = range;
      libraries.plotly.react(plot.children[number], data, { ...layout, width, uirevision: `${figure.about} ${ui.inside ?? ""}` }, { displaylogo: false, modeBarButtons: [["toImage", "resetScale2d"]] });
    });
    plot.firstChild.removeAllListeners("plotly_click");
    if (Object.values(OPENS).includes(result.view)) plot.firstChild.on("plotly_click", ({ points }) => open(points[0].y));
    return undefined;
  }
  // Requests of a load under way, a row each, as they end; plotly's figure of all comes in their place.
  const arriving = () => {
    const [result, { result: of, rows = [] }] = [model.get("shown"), model.get("arrived") ?? {}];
    return result.view === "load" && of === result.number && rows.length > 0 && model.get("live").state === "under load";
  };
  function drawArrived({ label, rows }) {
    const [width, colours] = [roomOf(), HUES[ui.dark ? "dark" : "light"]];
    const [until, tall] = [1.02 * Math.max(...rows.flatMap(([, bars]) => bars.map(([, start, length]) => start + length))), Math.max(3, Math.min(16, Math.floor(330 / rows.length)))];
    const [room, height] = [width - LABEL - 12, AXIS + rows.length * tall + 4];
    const x = (value) => LABEL + room * value / until;
    const looks = (stage) => WAITS.includes(stage) ? { fill: colours.grid } : { fill: colours[HUE_OF[stage] ?? "grey"], "fill-opacity": stage === "decode" ? 0.55 : 1 };
    const about = `${label}: ${rows.length} ${rows.length === 1 ? "request has" : "requests have"} ended`;
    return [h("p", { class: "fl-grey" }, `${about}; a row each, from its arrival: waits are grey, the answer after its first text is pale red`),
      s("svg", { width, height, role: "img", "aria-label": about, style: `font:${FONT}`, class: "fl-arrived" },
        timeAxis(0, until, room, x, height, colours),
        rows.map(([number, bars], row) => s("g", { "data-request": number },
          tall > 10 ? s("text", { x: LABEL - 8, y: AXIS + row * tall + tall - 4, "text-anchor": "end", fill: colours.ink }, `request ${number}`) : null,
          bars.map(([stage, start, length]) => s("rect", { x: x(start), y: AXIS + row * tall, width: Math.max(x(start + length) - x(start), 0.5), height: tall > 5 ? tall - 2 : tall, ...looks(stage) })))))];
  }
  // Lets go of plotly's figures from that number on.
  function purge(first) {
    for (const one of [...plot.children].slice(first)) { if (one.data) libraries.plotly.purge(one); one.remove(); }
  }
  function darken(data, layout) {
    const { paper, ink, grid } = HUES.dark;
    Object.assign(layout, { paper_bgcolor: paper, plot_bgcolor: paper, font: { ...layout.font, color: ink } });
    delete layout.template;
    for (const name of Object.keys(layout)) if (/^[xy]axis/.test(name)) Object.assign(layout[name], { showgrid: name[0] === "x", gridcolor: grid, linecolor: grid, zerolinecolor: grid });
    for (const note of layout.annotations ?? []) if (note.bgcolor) note.bgcolor = paper;
    for (const shape of layout.shapes ?? []) if (shape.line?.color === HUES.light.ink) shape.line.color = ink;
    for (const { marker } of data) {
      if (marker?.color === "white") Object.assign(marker, { color: paper, line: { color: ink } });
      else if (marker?.color === HUES.light.ink) marker.color = ink;
      else if (PALE[marker?.color]) marker.color = PALE[marker.color];
      if (marker?.line?.color === HUES.light.paper.toUpperCase()) marker.line.color = paper;
    }
  }
  function showTable(columns, rows) {
    table.hidden = columns.length === 0;
    table.lastChild.replaceChildren(tableFor(columns, rows));
  }

  // Pixels for the view; while a theme changes JupyterLab hides the page.
  const roomOf = () => Math.floor(views.clientWidth || ui.wide);

  // The waterfall: a row a stage; the bar to beat thin above, this recipe solid, the run before as an outline.
  const series = ({ rival, recipe, before }) => [rival, recipe, before].filter(Boolean);
  const rowsOf = (result) => {
    const names = [result.recipe, result.before, result.rival].filter(Boolean).flatMap(({ bars }) => bars.map(([name]) => name));
    return [...new Set(names.filter((name) => name !== "unaccounted")), ...(names.includes("unaccounted") ? ["unaccounted"] : [])];
  };
  const stageText = (run, stage) => run.host[stage] === undefined ? "–" : run.host[stage].toFixed(3) + (run.device[stage] === undefined ? "" : ` · device ${run.device[stage].toFixed(3)}`);
  const changeText = (run, other, stage) => {
    const [ours, theirs] = [run.host[stage], other.host[stage]];
    return ours === undefined || !theirs ? "–" : `${ours < theirs ? "−" : "+"}${Math.abs(ours - theirs).toFixed(3)} ms (${percent(ours / theirs)})`;
  };
  function drawWaterfall(result) {
    const width = roomOf();
    if (width === 0) return;
    const colours = HUES[ui.dark ? "dark" : "light"];
    const rows = rowsOf(result);
    const longest = Math.max(result.recipe.ttft, result.rival?.ttft ?? 0, result.recipe.open ? (result.before?.ttft ?? 0) : 0) * 1.02;
    const [from, to] = ui.zoom ?? [0, longest];
    const room = width - LABEL - NUMBERS;
    const x = (value) => LABEL + room * (value - from) / (to - from);
    const bottom = AXIS + rows.length * ROW;
    const [marks, height] = legend(result, colours, bottom, width);
    const [left, right] = [LABEL, LABEL + room];
    const bar = ([, , start, length], top, thick, attributes) => {
      const [a, b] = [Math.max(x(start), left), Math.min(x(start + length), right)];
      return b < left || a > right ? null : s("rect", { x: a, y: top, width: Math.max(b - a, 1), height: thick, ...attributes });
    };
    const colour = (stage) => colours[HUE_OF[stage] ?? "grey"];
    const lines = rows.map((stage, number) => {
      const top = AXIS + number * ROW;
      const mine = (run, lane) => (run?.bars ?? []).filter(([name, of]) => name === stage && of === lane);
      const [device, beside] = [mine(result.recipe, "device"), mine(result.recipe, "beside")];
      const [solid, split] = [device.length || beside.length ? 6 : 11, top + 15];
      const parts = [
        ...mine(result.rival, "host").map((one) => bar(one, top + 3, 4, { fill: colours.rival, class: "fl-rival" })),
        ...mine(result.rival, "own").map((one) => bar(one, top + 3, 4, { fill: colours.rival, "fill-opacity": 0.5, class: "fl-own" })),
        ...mine(result.recipe, "host").map((one) => bar(one, top + 9, solid, { fill: colour(stage), class: "fl-solid" })),
        ...device.map((one) => bar(one, split, 6, { fill: "url(#fl-hatch)", stroke: colour(stage), class: "fl-device" })),
        ...beside.map((one) => bar(one, split, 6, { fill: colour(stage), "fill-opacity": 0.5, class: "fl-beside" })),
        ...mine(result.recipe, "unaccounted").map((one) => bar(one, top + 9, 12, { fill: colours.paper, stroke: colours.ink, class: "fl-solid" })),
        ...mine(result.rival, "unaccounted").map((one) => bar(one, top + 3, 4, { fill: colours.paper, stroke: colours.rival, class: "fl-rival" })),
        ...["host", "beside", "device"].flatMap((lane) => mine(result.before, lane)).map((one) => bar(one, top + 7, 16, { fill: "none", stroke: colours.soft, "stroke-dasharray": "3 2", class: "fl-before" })),
      ];
      const own = result.recipe.host[stage];
      const numbers = own === undefined ? "–" : `${ms(own)} · ${percent(own / result.recipe.ttft)}`;
      const floor = result.floors[stage];
      const opens = OPENS[stage] ?? (result.recipe.files[stage]?.startsWith("fastvl_lab/") && own !== undefined ? "operations" : undefined);
      const enter = () => { if (OPENS[stage]) look(opens); else open(stage); };
      const line = s("g", { class: "fl-stage", role: "button", tabindex: number === Math.min(ui.stage ?? 0, rows.length - 1) ? 0 : -1, "data-stage": stage, "aria-label": about(result, stage).replaceAll("\n", ", ") },
        s("rect", { x: 0, y: top, width, height: ROW, fill: number % 2 ? "transparent" : ui.dark ? "#ffffff08" : "#00000006", class: "fl-target" }),
        s("text", { x: LABEL - 8, y: top + 17, "text-anchor": "end", fill: colours.ink }, OPENS[stage] && !result.recipe.open ? `${stage} ›` : stage),
        ...parts, floor ? s("line", { x1: x(floorAt(result, stage, floor)), x2: x(floorAt(result, stage, floor)), y1: top + 5, y2: top + 24, stroke: colours.ink, "stroke-width": 2, class: "fl-floor" }) : null,
        s("text", { x: width - 4, y: top + 17, "text-anchor": "end", fill: colours.ink, class: "fl-number" }, numbers));
      line.addEventListener("mouseenter", (event) => point(event, about(result, stage)));
      line.addEventListener("mousemove", (event) => point(event, about(result, stage)));
      line.addEventListener("mouseleave", unpoint);
      line.addEventListener("focus", () => { ui.stage = number; point({ target: line }, about(result, stage)); });
      line.addEventListener("blur", unpoint);
      line.addEventListener("click", () => opens && !ui.dragged && enter());
      line.addEventListener("keydown", (event) => {
        const step = { ArrowUp: -1, ArrowDown: 1 }[event.key];
        if (event.key === "Enter" && opens) enter();
        else if (step) { event.preventDefault(); event.stopPropagation(); chart.querySelectorAll(".fl-stage")[Math.max(0, Math.min(rows.length - 1, number + step))].focus(); }
      });
      return line;
    });
    const mark = (value, stroke, dash, name) => value < from || value > to ? [] : [s("line", { x1: x(value), x2: x(value), y1: AXIS - 4, y2: bottom, stroke, "stroke-width": 1.5, "stroke-dasharray": dash, class: name })];
    const title = result.recipe.open ? "a run under way" : `waterfall of #${result.number}: TTFT ${ms(result.recipe.ttft)}`;
    const focused = chart.contains(document.activeElement) ? document.activeElement.dataset?.stage : null;
    const drawing = s("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": title, style: `font:${FONT}` },
      s("defs", {}, s("pattern", { id: "fl-hatch", width: 5, height: 5, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" }, s("rect", { width: 2, height: 5, fill: colours.ink }))),
      ...timeAxis(from, to, room, x, bottom, colours),
      ...lines, ...mark(result.recipe.ttft, colours.ink, "2 2", "fl-ttft-line"), ...(result.rival ? mark(result.rival.ttft, colours.rival, "2 2", "fl-rival-line") : []),
      ...marks);
    zoomable(drawing, from, to, room);
    chart.replaceChildren(drawing, ui.zoom ? button("whole axis", () => { ui.zoom = null; drawView(); }, "back to the whole time (or double click)", { class: "fl-unzoom" }) : "");
    if (focused) chart.querySelector(`[data-stage="${focused}"]`)?.focus();
  }
  const floorAt = (result, stage, floor) => (result.recipe.bars.find(([name]) => name === stage)?.[2] ?? 0) + floor;
  // What the bars mean, in as many lines as the width takes, and where the last of them ends.
  function legend(result, colours, top, width) {
    const [device, beside] = ["device", "beside"].map((one) => result.recipe.bars.some(([, lane]) => lane === one));
    const parts = [["this recipe", { fill: colours.blue }], result.rival && [`${result.rival.label} (thin)`, { fill: colours.rival }], result.before && [`before: ${result.before.label}`, { fill: "none", stroke: colours.soft, "stroke-dasharray": "3 2" }],
      device && ["device", { fill: "url(#fl-hatch)", stroke: colours.ink }], beside && ["another thread", { fill: colours.blue, "fill-opacity": 0.5 }], Object.keys(result.floors).length > 0 && ["│ floor", null]].filter(Boolean);
    let [at, y] = [LABEL, top + 15];
    const wide = (text) => { ruler.font = FONT.replace("12px", "11px"); return ruler.measureText(text).width; };
    const drawn = parts.flatMap(([name, look]) => {
      const mark = look ? 16 : 0;
      let shown = name;
      const fits = (from) => from + mark + wide(name) <= width - 4;
      if (!fits(at)) [at, y] = [fits(LABEL) ? LABEL : 8, at === LABEL ? y : y + 15];
      while (wide(shown) > width - 12 - mark && shown.length > 2) shown = `${shown.slice(0, -2)}…`;
      const from = at;
      at += mark + wide(shown) + 14;
      return [look ? s("rect", { x: from, y: y - 9, width: 12, height: 9, ...look }) : null,
        s("text", { x: from + mark, y, fill: colours.soft, style: "font-size:11px", class: "fl-legend" }, shown, shown === name ? null : s("title", {}, name))];
    });
    return [drawn, y + 5];
  }
  function about(result, stage) {
    const { recipe, rival, before, floors } = result;
    const own = recipe.bars.filter(([name]) => name === stage);
    const lines = [recipe.host[stage] === undefined ? `${stage} · ${own.length ? "beside others" : "not in this run"}` : `${stage} · ${ms(recipe.host[stage])} · ${percent(recipe.host[stage] / recipe.ttft)} of TTFT`];
    for (const lane of ["host", "beside", "device", "unaccounted"]) {
      const times = own.filter(([, of]) => of === lane).map(([, , start, length]) => `${start.toFixed(2)} → ${(start + length).toFixed(2)}`);
      if (times.length) lines.push(`${times.slice(0, 3).join(", ")}${times.length > 3 ? ` and ${times.length - 3} more` : ""} ms, ${lane}`);
    }
    const held = (name, run) => {
      if (!run || run.host[stage] === undefined) return;
      const change = recipe.host[stage] === undefined || run.host[stage] === 0 ? "" : ` (${recipe.host[stage] > run.host[stage] ? "+" : "−"}${Math.abs(100 * (recipe.host[stage] / run.host[stage] - 1)).toFixed(0)} %)`;
      lines.push(`${name}: ${ms(run.host[stage])}${change}`);
    };
    held("before", before);
    held(rival?.label, rival);
    if (floors[stage]) lines.push(`floor: ${ms(floors[stage])}`);
    const told = recipe.files[stage] ?? rival?.files[stage];
    if (told) lines.push(told);
    if ((OPENS[stage] || recipe.files[stage]?.startsWith("fastvl_lab/")) && recipe.host[stage] !== undefined && !recipe.open) lines.push(`click: ${OPENS[stage] ?? "its operations"}`);
    return lines.join("\n");
  }
  // Lines and numbers of a time axis, down to the bottom; at most 5, of which each has 80 pixels.
  function timeAxis(from, to, room, x, bottom, colours) {
    const rough = (to - from) / Math.min(5, Math.max(1, room / 80));
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((times) => times * power).find((one) => one >= rough);
    const decimals = Math.max(0, -Math.floor(Math.log10(step)));
    const ticks = [];
    for (let tick = Math.ceil(from / step) * step; tick <= to; tick += step) ticks.push(tick);
    return ticks.map((tick) => s("g", {}, s("line", { x1: x(tick), x2: x(tick), y1: AXIS - 4, y2: bottom, stroke: colours.grid }),
      s("text", { x: x(tick), y: 12, "text-anchor": "middle", fill: colours.soft }, to >= 1000 ? `${(tick / 1000).toFixed(decimals + 2)} s` : `${tick.toFixed(decimals)} ms`)));
  }
  function zoomable(drawing, from, to, room) {
    const time = (event) => from + (to - from) * (event.clientX - drawing.getBoundingClientRect().left - LABEL) / room;
    drawing.addEventListener("pointerdown", (event) => {
      ui.dragged = false;
      const start = time(event);
      const end = (later) => {
        window.removeEventListener("pointerup", end);
        const [low, high] = [Math.max(0, Math.min(start, time(later))), Math.max(start, time(later))];
        if ((high - low) / (to - from) < 0.02 || !drawing.isConnected) return;
        ui.dragged = true;
        ui.zoom = [low, Math.min(high, to)];
        setTimeout(drawView);
      };
      window.addEventListener("pointerup", end);
    });
    drawing.addEventListener("dblclick", () => { ui.zoom = null; drawView(); });
  }
  function replay() {
    ui.zoom = null;
    drawView();
    const bars = chart.querySelectorAll("rect.fl-solid, rect.fl-beside, rect.fl-device");
    const [began, last] = [performance.now(), 2000];
    const { recipe } = model.get("shown");
    const end = Number(chart.querySelector(".fl-ttft-line").getAttribute("x1"));
    const edges = [...bars].map((one) => [one, Number(one.getAttribute("x")), Number(one.getAttribute("width"))]);
    cancelAnimationFrame(ui.replay);
    const step = () => {
      const share = Math.min(1, (performance.now() - began) / last);
      const at = LABEL + (end - LABEL) * share;
      for (const [one, from, wide] of edges) one.setAttribute("width", Math.max(0, Math.min(wide, at - from)));
      big.textContent = ms(recipe.ttft * share);
      if (share < 1) ui.replay = requestAnimationFrame(step);
      else showResult();
    };
    step();
  }
  function png() {
    const drawing = chart.querySelector("svg");
    if (!drawing) return;
    const [result, colours] = [model.get("shown"), HUES[ui.dark ? "dark" : "light"]];
    const [width, height] = [Number(drawing.getAttribute("width")), Number(drawing.getAttribute("height"))];
    const image = new Image();
    image.onload = () => {
      const canvas = h("canvas", { width: 2 * width, height: 2 * (height + 44) });
      const on = canvas.getContext("2d");
      on.scale(2, 2);
      on.fillStyle = colours.paper;
      on.fillRect(0, 0, width, height + 44);
      on.fillStyle = colours.ink;
      on.font = `bold ${FONT}`;
      on.fillText(`TTFT ${result.headline || result.cold} · ${result.spread}`, 8, 16);
      on.font = FONT;
      on.fillText(result.heading, 8, 34, width - 16);
      on.drawImage(image, 0, 44);
      h("a", { href: canvas.toDataURL("image/png"), download: `waterfall-${result.number}.png` }).click();
    };
    const copy = drawing.cloneNode(true);
    image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(new XMLSerializer().serializeToString(copy))}`;
  }
  function perfetto() {
    ui.perfetto = window.open("https://ui.perfetto.dev");
    if (ui.perfetto) press("trace");
    else said("the browser opened no window for ui.perfetto.dev: let this page open one");
  }
  function traced({ kind, title }, buffers) {
    if (kind !== "trace" || !ui.perfetto) return;
    const buffer = buffers[0].buffer.slice(buffers[0].byteOffset, buffers[0].byteOffset + buffers[0].byteLength);
    const ping = setInterval(() => ui.perfetto.postMessage("PING", "https://ui.perfetto.dev"), 50);
    const ready = ({ data }) => {
      if (data !== "PONG") return;
      clearInterval(ping);
      window.removeEventListener("message", ready);
      ui.perfetto.postMessage({ perfetto: { buffer, title } }, "https://ui.perfetto.dev");
    };
    window.addEventListener("message", ready);
    setTimeout(() => clearInterval(ping), 20000);
  }

  // The history: newest first; a click shows, a shift-click holds against. Below it what earlier sessions have kept, which has numbers below 0.
  const lines = new Map();
  const tableOf = (second) => h("div", { class: "fl-scroll" }, h("table", {}, h("thead", {}, h("tr", {}, ["★", second, "what changed", "TTFT", "against the bar to beat", "parity", "note", ""].map((name) => h("th", { scope: "col" }, name)))), h("tbody")));
  function showHistory() {
    const rows = model.get("history");
    if (rows.length === 0) return;
    if (!history.firstChild) {
      history.append(h("div", { class: "fl-line" }, h("h3", {}, "history"), h("span", { class: "fl-grey" }, "click a row to show it, shift-click to hold the shown one against it"),
        button("measure side by side", () => { const { number, against } = model.get("shown"); send("Measure", { number, against }); }, "the shown recipe, the one it is held against, and the bar to beat, in shuffled rounds")), tableOf("#"));
    }
    showRows(history, rows);
  }
  function showEarlier() {
    const { rows = [], skipped = "" } = model.get("earlier");
    earlier.hidden = rows.length === 0 && !skipped;
    if (!earlier.firstChild) {
      const forget = button("forget them", () => press("forget"), "delete all of these that are not pinned, also on disk");
      earlier.append(h("summary", {}), h("div", { class: "fl-line" }, h("span", { class: "fl-grey" }), forget), tableOf("when"));
      earlier.querySelector("thead").rows[0].cells[2].textContent = "recipe and question";
    }
    earlier.firstChild.textContent = `earlier sessions: ${rows.length} ${rows.length === 1 ? "result" : "results"}${rows.length ? `, the newest of ${rows[0].when}` : ""}`;
    earlier.querySelector(".fl-grey").textContent = skipped;
    showRows(earlier, rows);
  }
  function showRows(part, rows) {
    const { number: at, against } = model.get("shown");
    const body = part.querySelector("tbody");
    const most = Math.max(...rows.map((row) => row.milliseconds));
    const order = [...rows].sort((a, b) => b.pinned - a.pinned || b.number - a.number);
    for (const row of order) {
      const known = lines.get(row.number);
      const text = JSON.stringify([row, most]);
      if (known?.text === text || known?.line.querySelector("input:focus")) continue; // a note that is being written stays
      const name = row.when ? `the result of ${row.when}` : row.number;
      const mark = (fields) => send("Mark", { number: row.number, pinned: row.pinned, note: row.note, ...fields });
      const note = h("input", { type: "text", value: row.note, "aria-label": `note on ${name}`, placeholder: "note", onchange: () => mark({ note: note.value }) });
      const line = h("tr", { tabindex: "0", "data-number": row.number, onclick: (event) => { if (!event.target.closest("button, input")) send("Look", event.shiftKey ? { against: row.number } : { number: row.number }); },
        onmousedown: (event) => { if (event.shiftKey && !event.target.closest("input")) event.preventDefault(); }, // selects no text
        onkeydown: (event) => { if (event.key === "Enter" && event.target === line) send("Look", event.shiftKey ? { against: row.number } : { number: row.number }); } },
      h("td", {}, h("button", { type: "button", class: "fl-link", "aria-pressed": String(row.pinned), "aria-label": `pin ${name}`, onclick: () => mark({ pinned: !row.pinned }) }, row.pinned ? "★" : "☆")),
      h("td", {}, row.when || String(row.number)), h("td", { "data-tip": `${row.recipe}\n${row.question}` }, row.changed, row.when ? h("div", { class: "fl-grey" }, row.question) : null, row.elsewhere ? h("div", { class: "fl-elsewhere" }, `measured elsewhere: ${row.elsewhere}`) : null),
      h("td", { class: "fl-time" }, h("i", { style: `width:${60 * row.milliseconds / most}px` }), row.ttft, row.spread ? h("div", { class: "fl-grey" }, row.spread) : null), h("td", {}, row.ratio || "–"), h("td", {}, row.parity), h("td", {}, note),
      h("td", {}, button("use", () => send("Use", { number: row.number }), "take this recipe"), " ",
        button("×", () => send("Delete", { number: row.number }), row.when ? "forget this result, also on disk" : "delete this row", { "aria-label": row.when ? `forget ${name}` : `delete ${name}` })));
      if (known) known.line.replaceWith(line);
      lines.set(row.number, { line, text });
    }
    order.forEach(({ number }, place) => { const { line } = lines.get(number); if (body.children[place] !== line) body.insertBefore(line, body.children[place] ?? null); });
    for (const [number, { line }] of lines) {
      if (!body.contains(line)) continue;
      if (!rows.some((row) => row.number === number)) { line.remove(); lines.delete(number); unpoint(); continue; }
      line.classList.toggle("fl-at", number === at);
      line.classList.toggle("fl-against", number === against);
      line.setAttribute("aria-current", String(number === at));
    }
  }

  // Tips, help, keys, theme, size.
  function point(event, text) {
    if (!text) return;
    tip.textContent = text;
    tip.hidden = false;
    const [room, box] = [root.getBoundingClientRect(), event.target.getBoundingClientRect()];
    const x = (event.clientX ?? box.left + box.width / 3) - room.left + 14;
    const below = (event.clientY === undefined ? box.bottom : Math.max(event.clientY + 12, box.bottom)) - room.top + 6;
    tip.style.left = `${Math.max(4, Math.min(x, room.width - tip.offsetWidth - 8))}px`;
    tip.style.top = `${below}px`;
  }
  const unpoint = () => { tip.hidden = true; };
  const tipped = (event) => { const at = event.target.closest?.("[data-tip]"); if (at) point({ target: at }, at.dataset.tip); };
  root.addEventListener("mouseover", tipped);
  root.addEventListener("focusin", tipped);
  root.addEventListener("mouseout", (event) => { if (event.target.closest("[data-tip]")) unpoint(); });
  root.addEventListener("focusout", unpoint);
  root.addEventListener("pointerdown", unpoint);
  function helped(open = help.hidden) {
    const list = (pairs) => h("dl", {}, pairs.map(([name, about]) => [h("dt", {}, name), h("dd", {}, about)]));
    help.hidden = !open;
    help.replaceChildren(h("h3", {}, "keys"), list(KEYS), h("h3", {}, "words"), list(WORDS), button("close", () => helped(false), "or Escape"));
    if (open) help.focus();
  }
  root.addEventListener("keydown", (event) => {
    event.stopPropagation(); // nothing of this is the notebook's
    if (event.key === "Escape") { helped(false); unpoint(); return; }
    if (event.target.closest("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
    const radio = event.target.closest("[role=radio]");
    const tab = event.target.closest("[role=tab]");
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key] ?? 0;
    const down = { ArrowUp: -1, ArrowDown: 1 }[event.key] ?? 0;
    if (radio && (step || down)) {
      event.preventDefault();
      const at = radios.findIndex(({ group }) => group.contains(radio));
      if (down) {
        ui.row = Math.max(0, Math.min(radios.length - 1, at + down));
        radios[ui.row].row.closest("details").open = true;
        const { options } = radios[ui.row];
        options.find((option) => option.getAttribute("aria-checked") === "true")?.focus();
      } else {
        const can = radios[at].options.filter((option) => !option.classList.contains("fl-unmet"));
        const next = can[(can.indexOf(radio) + step + can.length) % can.length];
        ui.row = at;
        next.focus();
        if (next !== radio) next.click();
      }
    } else if (tab && step) {
      event.preventDefault();
      const every = [...tabs.children];
      const next = every[(every.indexOf(tab) + step + every.length) % every.length];
      next.focus();
      next.click();
    } else if (/^[1-9]$/.test(event.key)) tabs.children[Number(event.key) - 1]?.click();
    else if (event.key === "r") press("run");
    else if (event.key === "s") press("stop");
    else if (event.key === "u") press("undo");
    else if (event.key === "b") send("Use", { recipe: "baseline" });
    else if (event.key === "f") send("Use", { recipe: "fastest" });
    else if (event.key === "?") helped();
  });
  root.addEventListener("click", (event) => { const radio = event.target.closest("[role=radio]"); if (radio) ui.row = Math.max(0, radios.findIndex(({ group }) => group.contains(radio))); });
  root.addEventListener("dragover", (event) => { event.preventDefault(); root.classList.add("fl-drop"); });
  root.addEventListener("dragleave", () => root.classList.remove("fl-drop"));
  root.addEventListener("drop", (event) => { event.preventDefault(); event.stopPropagation(); root.classList.remove("fl-drop"); take([...event.dataTransfer.files], event.shiftKey); });
  root.addEventListener("paste", (event) => { const files = [...(event.clipboardData?.files ?? [])]; if (files.length) { event.preventDefault(); event.stopPropagation(); take(files, event.shiftKey); } });
  root.tabIndex = -1; // so that a click anywhere takes keys and pastes here

  function themed() {
    const chosen = remembered.get("fl-dark");
    const page = document.body.dataset.jpThemeLight;
    const theirs = page === undefined ? matchMedia("(prefers-color-scheme: dark)").matches : page === "false";
    ui.dark = chosen === null ? theirs : chosen === "true";
    root.classList.toggle("fl-dark", ui.dark);
    if (document.body.dataset.voila || !document.querySelector(".jp-LabShell")) { // a page of its own; Voila is built on the shell too
      const { paper } = HUES[ui.dark ? "dark" : "light"];
      document.documentElement.style.setProperty("--jp-layout-color0", paper);
      document.body.style.setProperty("--jp-layout-color0", paper);
      document.body.style.background = paper;
    }
    dark.setAttribute("aria-pressed", String(ui.dark));
    showResult();
  }
  const changed = new MutationObserver(() => { remembered.set("fl-dark", String(document.body.dataset.jpThemeLight === "false")); themed(); });
  changed.observe(document.body, { attributeFilter: ["data-jp-theme-light"] });
  const sized = new ResizeObserver(() => {
    const narrow = root.clientWidth < 720;
    if (root.classList.toggle("fl-narrow", narrow) !== ui.narrow) for (const slot of toggles.querySelectorAll("details")) slot.open = !narrow;
    ui.narrow = narrow;
    if (views.clientWidth === ui.wide || views.clientWidth === 0) return;
    ui.wide = views.clientWidth;
    drawView();
  });
  sized.observe(root);

  const listeners = { "change:choices": showChoices, "change:asked": () => ask.show(false), "change:chosen": showChosen, "change:advised": showAdvised,
    "change:live": showLive, "change:shown": () => { ui.zoom = null; showResult(); showHistory(); showEarlier(); }, "change:figure": () => { showTabs(); drawView(); }, "change:loaded": load.show, "change:arrived": () => { if (arriving()) drawView(); }, "change:history": showHistory, "change:earlier": showEarlier, "msg:custom": traced };
  for (const [name, listener] of Object.entries(listeners)) model.on(name, listener);
  themed();
  showChoices();
  showLive();
  showResult();
  showHistory();
  showEarlier();
  press("open");
  return () => {
    sized.disconnect();
    changed.disconnect();
    cancelAnimationFrame(ui.frame);
    cancelAnimationFrame(ui.replay);
    for (const [name, listener] of Object.entries(listeners)) model.off(name, listener);
    purge(0);
  };
}

// JupyterLab lets an output scroll by itself; the head could not stay at the top of the notebook.
function freeSticky(el) {
  setTimeout(() => {
    for (let at = el.parentElement; at && !at.matches(".jp-WindowedPanel-outer, .jp-Notebook, body"); at = at.parentElement) {
      if (at.matches("[class*='jp-OutputArea'], [class*='jp-Cell']")) Object.assign(at.style, { overflow: "visible", minWidth: "0", contain: "none" });
    }
  });
}
