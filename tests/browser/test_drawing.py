"""The front end on a page without a kernel: what it draws of the records that it is told, and whether all can read it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from plotly.offline import get_plotlyjs

import fastvl_lab.view.workbench
from fastvl_lab import Lab, Recipe, Request, photo
from fastvl_lab.measure.profile import Operation, Profile
from fastvl_lab.trace import Span
from fastvl_lab.view.workbench import messages, showing
from fastvl_lab.view.workbench.controls import controls
from fastvl_lab.view.workbench.session import Picture, Question, Result
from fastvl_lab.view.workbench.views import views

FILES = Path(fastvl_lab.view.workbench.__file__).parent
# A model as anywidget has it, with the records as they are.
SHOW = """async ([code, records]) => {
  const bench = await import(URL.createObjectURL(new Blob([code], { type: "text/javascript" })));
  const listeners = {};
  window.sent = [];
  window.tell = (name, record) => { records[name] = record; (listeners[`change:${name}`] ?? []).forEach((listen) => listen()); };
  const model = { get: (name) => records[name], on: (name, listen) => (listeners[name] ??= []).push(listen), off() {},
    send: (content) => window.sent.push(content) };
  window.hear = (content, text) => listeners["msg:custom"].forEach((listen) => listen(content, [new TextEncoder().encode(text)]));
  const widget = bench.default();
  widget.initialize({ model });
  widget.render({ model, el: document.querySelector("main") });
}"""
# Of every text on the page, what it says and how its colour stands to what lies behind it (WCAG 2, 1.4.3).
CONTRASTS = """() => {
  const parse = (colour) => (colour.match(/[\\d.]+/g) ?? []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255).map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (at) => { for (; at; at = at.parentElement) { const c = parse(getComputedStyle(at).backgroundColor);
    if (c.length === 3 || c[3] === 1) return c; } return [255, 255, 255]; };
  const ratio = (a, b) => { const [high, low] = [light(a), light(b)].sort((x, y) => y - x); return (high + 0.05) / (low + 0.05); };
  const root = document.querySelector(".fl-bench");
  const texts = [...root.querySelectorAll("*")].filter((at) => at.checkVisibility() && !at.disabled && !at.closest("svg, option") &&
    [...at.childNodes].some((node) => node.nodeType === 3 && node.data.trim()));
  const marks = [...root.querySelectorAll("svg text, svg rect.fl-solid, svg rect.fl-rival, svg circle")];
  const paper = behind(root);
  const fill = (at) => {
    const { fill, stroke } = getComputedStyle(at);
    return parse(fill).every((part, i) => part === paper[i]) ? parse(stroke) : parse(fill);
  };
  const named = (at) => at.textContent || at.getAttribute("class") || "dot";
  return [...texts.map((at) => [at.textContent.slice(0, 40), 4.5, ratio(parse(getComputedStyle(at).color), behind(at))]),
    ...marks.map((at) => [named(at), at.tagName === "text" ? 4.5 : 3, ratio(fill(at), paper)])];
}"""
NAMELESS = """() => [...document.querySelectorAll(".fl-bench :is(button, input, select, [role])")]
  .filter((at) => at.checkVisibility() && !(at.getAttribute("aria-label") || at.textContent.trim() || at.closest("label")))
  .map((at) => at.outerHTML.slice(0, 120))"""


@pytest.fixture
def records(labs: dict[str, Lab]) -> dict[str, Any]:
    """Three lanes, as if a device had done each stage a little later, and a thread had unpacked; and two results in the history."""
    lab, recipe = labs["tiny-qwen2.5-vl"], Recipe.baseline()
    picture = photo("astronaut", (168, 140))
    request = Request(images=[picture], prompt="What?", max_new_tokens=3, ignore_eos=True)
    run = lab.run(request, recipe)
    later = [dataclasses.replace(s, lane="device", start_ns=s.start_ns + 10**5, end_ns=s.end_ns + 10**5) for s in run.trace.spans]
    beside = [dataclasses.replace(s, lane="beside") for s in run.trace.spans if s.name == "decode_image"]
    spans: tuple[Span, ...] = (*run.trace.spans, *later, *beside)
    run = dataclasses.replace(run, trace=dataclasses.replace(run.trace, spans=spans))
    question = Question(
        checkpoint="tiny-qwen2.5-vl", pictures=(Picture(source=picture, name="a.jpg"),), prompt="What?", max_new_tokens=3
    )
    first = Result(number=1, when=1.7e9, where={}, question=question, recipe=recipe, run=run, held={}, floors={"vit": 1e-3})
    second = dataclasses.replace(first, number=2)
    row = showing.row(first, None, pinned=False, note="")
    earlier = [
        dataclasses.replace(row, number=-1, when="14 Nov 2026 22:13", spread="9 to 10 ms in 6 rounds"),
        dataclasses.replace(row, number=-2, when="13 Nov 2026 09:00", elsewhere="torch 2.9.0, not 2.10.0"),
    ]
    made = controls(lambda: recipe, lambda *_: None, lambda: lab.checkpoint.target)
    values = {path: control.value for path, control in made.items()}
    drawn, frame = views()["tokens over time"].draw(second, first)
    savings = {"vit.rope": ("halves", 2.0, 1.0, 3.0), "vit.norms": ("native", -1.0, -2.0, -0.5)}
    told = {
        "choices": messages.Choices(
            toggles=tuple(control.described() for control in made.values()),
            views=tuple((view.name, view.about) for view in views().values()),
            checkpoints=("tiny-qwen2.5-vl",),
            photographs=("coffee",),
            boxes=("as it is",),
            rivals=(
                messages.Rival(text="transformers", about="as it is"),
                messages.Rival(text="vllm", about="a server", unmet="no program vllm on the PATH"),
                messages.Rival(text="sglang", about="a server"),
            ),
            note="",
        ),
        "asked": messages.Asked(
            checkpoint="tiny-qwen2.5-vl",
            pictures=("a.jpg",),
            previews=(),
            size="as it is",
            max_pixels="",
            prompt="What?",
            tokens=3,
            repeats=6,
            rival="transformers",
        ),
        "chosen": messages.Chosen(values=values, moved=("vit.tower",), undoable=True, texts={"Python": "recipe"}),
        "live": messages.Live(state="idle", busy=False, error="an error"),
        "shown": showing.shown(second, first, view="waterfall", against=0, pending=False),
        "figure": messages.Figure(
            view="tokens over time",
            about="tokens over time of 2",
            figure=drawn.to_json(),
            more=(drawn.to_json(),),
            columns=tuple(frame.columns),
            rows=tuple(tuple(map(str, row)) for row in frame.itertuples(index=False)),
        ),
        "loaded": messages.Loaded(
            at_once="8",
            rate="",
            n="32",
            against="nothing",
            others=(
                messages.Rival(text="nothing", about="this recipe alone"),
                messages.Rival(text="the run before", about="", unmet="there is none"),
            ),
            said=("this recipe: 100.0 tokens a second",),
            columns=("ms (95% CI)", "of", "p50"),
            rows=(("TTFT", "this recipe", "10.0"),),
        ),
        "history": tuple(showing.row(result, None, pinned=False, note="") for result in (first, second)),
        "earlier": messages.Earlier(rows=tuple(earlier)),
        "advised": messages.Advised(savings=savings, sentence="Next best: vit.rope.", path="vit.rope", value="halves"),
    }
    return {name: messages.to_json(record) for name, record in told.items()}


@pytest.fixture
def show(page: Any, records: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """Open the page with the records, which may be changed before."""

    def open_page() -> dict[str, Any]:
        failures: list[str] = []
        page.on("pageerror", lambda error: failures.append(str(error)))
        page.set_content(f"<style>{(FILES / 'bench.css').read_text()}</style><body data-jp-theme-light='true'><main></main>")
        page.evaluate(SHOW, [(FILES / "bench.js").read_text(), records])
        page.wait_for_selector(".fl-stage" if records["shown"] else ".fl-bench", state="attached")
        assert failures == []
        return records

    return open_page


def test_host_and_device_are_two_lanes_of_a_row_and_the_run_before_an_outline(page: Any, show: Callable[..., Any]) -> None:
    shown = show()["shown"]
    for lane, look in (("host", "solid"), ("device", "device")):
        widths = {float(bar.get_attribute("width")) for bar in page.locator(f"rect.fl-{look}").all()}
        gaps = [bar for bar in shown["recipe"]["bars"] if bar[1] == "unaccounted" and lane == "host"]
        assert page.locator(f"rect.fl-{look}").count() == sum(bar[1] == lane for bar in shown["recipe"]["bars"]) + len(gaps)
        assert max(widths) > 50
    assert page.locator("rect.fl-before").count() == sum(bar[1] != "unaccounted" for bar in shown["before"]["bars"])
    assert page.locator("rect.fl-beside").count() == sum(bar[1] == "beside" for bar in shown["recipe"]["bars"]) > 0
    assert "another thread" in page.locator(".fl-legend").all_text_contents()
    assert page.locator("line.fl-floor").count() == 1
    page.locator(".fl-stage[data-stage='vit']").hover()
    tip = page.locator(".fl-tip").inner_text()
    for said in ("ms, host", "ms, device", "before: ", "floor: 1.00 ms", "fastvl_lab/vit/"):
        assert said in tip


def test_the_table_has_units_and_what_the_recipe_takes_more_or_less(
    page: Any, show: Callable[..., Any], records: dict[str, Any]
) -> None:
    records["shown"]["before"]["label"] = "#1"
    for run, ms in (("recipe", {"vit": 30.0, "emit": 0.001}), ("before", {"vit": 40.0, "emit": 0.0})):
        records["shown"][run] |= {"host": ms, "device": {}, "ttft": 100.0}
    show()
    table = page.locator(".fl-table")
    assert table.locator("th").all_text_contents() == ["stage", "this recipe, ms", "#1, ms", "this recipe against #1"]
    rows = {cells[0]: cells[1:] for row in table.locator("tbody tr").all() if (cells := row.locator("td").all_text_contents())}
    assert rows["vit"] == ["30.000", "40.000", "−10.000 ms (75 %)"]
    assert rows["emit"] == ["0.001", "0.000", "–"]
    assert page.locator(".fl-stage[data-stage='emit'] .fl-number").text_content() == "0.001 ms · <0.1 %"


def test_a_round_that_others_disturbed_is_a_hollow_dot_that_says_why(
    page: Any, show: Callable[..., Any], records: dict[str, Any]
) -> None:
    records["live"]["rounds"] = {"this recipe": [[10.0, ""], [11.0, ""], [90.0, "others used 1.3 of 2 cores"]]}
    show()
    looks = [dot.get_attribute("fill") == "none" for dot in page.locator(".fl-strip circle").all()]
    assert looks == [False, False, True]
    assert "90.0 (others used 1.3 of 2 cores)" in page.locator(".fl-strip").get_attribute("data-tip")


@pytest.mark.parametrize("light", ["true", "false"])
def test_all_can_be_read_and_has_a_name(page: Any, show: Callable[..., Any], light: str) -> None:
    show()
    page.evaluate("(light) => { document.body.dataset.jpThemeLight = light; }", light)
    page.wait_for_function(
        "(dark) => document.querySelector('.fl-bench').classList.contains('fl-dark') === dark", arg=light == "false"
    )
    found = page.evaluate(CONTRASTS)
    assert len(found) > 100
    assert [(text, round(ratio, 2)) for text, least, ratio in found if ratio < least] == []
    assert page.evaluate(NAMELESS) == []
    stops = page.locator(".fl-toggles [tabindex='0']").count()
    assert stops == 1  # arrows lead from there


@pytest.mark.parametrize("light", ["true", "false"], ids=["light", "dark"])
def test_axe_finds_no_serious_barrier_whatever_the_page_shows(
    page: Any, show: Callable[..., Any], records: dict[str, Any], barriers: Callable[..., list[str]], light: str
) -> None:
    result, rows = records["shown"], records["history"]
    records |= {"shown": {}, "history": [], "live": messages.to_json(messages.Live(state="starting", busy=True))}
    show()
    page.evaluate("(light) => { document.body.dataset.jpThemeLight = light; }", light)
    dark = "(dark) => document.querySelector('.fl-bench').classList.contains('fl-dark') === dark"
    page.wait_for_function(dark, arg=light == "false")
    found = {"before the first result": barriers(".fl-bench")}

    tell = "([name, record]) => window.tell(name, record)"
    page.evaluate(tell, ["live", messages.to_json(messages.Live(state="idle", busy=False))])
    page.evaluate(tell, ["shown", result])
    page.evaluate(tell, ["history", rows])
    page.wait_for_selector(".fl-history tbody tr")
    found["a result"] = barriers(".fl-bench")
    page.evaluate("() => document.querySelectorAll('.fl-bench details').forEach((one) => { one.open = true; })")
    page.locator(".fl-more").first.click()
    page.locator(".fl-history tbody tr").nth(1).click()
    page.locator(".fl-stage[data-stage='vit']").hover()
    assert page.locator(".fl-tip").is_visible()
    found["all of it unfolded, and a tip"] = barriers(".fl-bench")

    page.evaluate(tell, ["live", messages.to_json(messages.Live(state="idle", busy=False, error="broken.jpg is no picture"))])
    assert page.get_by_role("alert").is_visible()
    found["an error"] = barriers(".fl-bench")
    page.keyboard.press("?")
    assert page.get_by_role("dialog").is_visible()
    found["the help"] = barriers(".fl-bench")
    page.keyboard.press("Escape")

    page.evaluate(tell, ["shown", result | {"view": "tokens over time"}])
    page.evaluate("(library) => window.hear({ kind: 'plotly' }, library)", get_plotlyjs())
    page.wait_for_selector(".fl-plot .scatterlayer .point")
    found["a view by plotly"] = barriers(".fl-bench")
    page.evaluate(tell, ["shown", result | {"view": "load"}])
    page.evaluate(tell, ["figure", records["figure"] | {"view": "load", "about": f"load of {result['number']}"}])
    page.wait_for_selector(".fl-load table")
    assert page.locator(".fl-plot .js-plotly-plot").count() == 2
    found["a load"] = barriers(".fl-bench")
    page.set_viewport_size({"width": 600, "height": 800})
    page.wait_for_selector(".fl-narrow")
    found["a narrow page"] = barriers(".fl-bench")
    assert {state: lines for state, lines in found.items() if lines} == {}


FOCUSED = """() => {
  const at = document.activeElement;
  const name = at.getAttribute("aria-label") ?? at.textContent.trim();
  return at === document.body ? null : [at.getAttribute("role") ?? at.localName, name];
}"""


def test_few_stops_of_tab_lead_through_the_whole_page(page: Any, show: Callable[..., Any]) -> None:
    show()
    stops: list[tuple[str, str]] = []
    for _ in range(100):
        page.keyboard.press("Tab")
        if (at := page.evaluate(FOCUSED)) is None:
            break
        stops.append(tuple(at))
    else:
        raise AssertionError("Tab does not leave the page")
    assert all(name for _, name in stops)
    assert stops.index(("button", "run")) < 16
    assert [role for role, _ in stops].count("radio") == 1  # arrows lead to the other options and toggles
    assert [name for role, name in stops if role == "tab"] == ["waterfall"]
    assert sum("of TTFT" in name for role, name in stops if role == "button") == 1  # and to the other stages
    for named in (
        ("select", "checkpoint"),
        ("button", "try it"),
        ("button", "replay slowly"),
        ("region", "the answer"),
        ("button", "delete 1"),
    ):
        assert named in stops


def test_a_click_is_seen_before_the_kernel_has_answered(page: Any, show: Callable[..., Any]) -> None:
    show()
    page.locator("[data-path='vit.rope']").get_by_role("radio", name="halves").click()
    assert page.evaluate("window.sent.at(-1)") == {"kind": "Choose", "path": "vit.rope", "value": "halves"}
    assert page.locator("[data-path='vit.rope'] [aria-checked='true']").inner_text() == "halves"
    page.locator(".fl-history tbody tr").nth(1).click(modifiers=["Shift"])
    assert page.evaluate("window.sent.at(-1)") == {"kind": "Look", "against": 1}
    page.get_by_role("button", name="try it").click()
    assert page.evaluate("window.sent.at(-1)") == {"kind": "Choose", "path": "vit.rope", "value": "halves"}
    assert page.locator(".fl-saves").count() == page.locator(".fl-costs").count() == 1
    for number, wish in enumerate(page.evaluate("window.sent")):
        assert messages.from_json(wish), number


def test_the_bar_to_beat_is_chosen_from_a_list_or_its_address_is_typed(page: Any, show: Callable[..., Any]) -> None:
    show()
    sent = "window.sent.filter(({ kind }) => kind === 'Fill')"
    field, chosen = page.get_by_label("to beat", exact=True), page.locator(".fl-of-to-beat input")
    options = {option.inner_text(): option for option in field.locator("option").all()}
    assert list(options) == ["transformers", "vllm", "sglang", "address…"]
    assert [name for name, option in options.items() if option.is_disabled()] == ["vllm"]
    assert options["vllm"].get_attribute("title") == "cannot run here: no program vllm on the PATH"
    field.hover()
    assert "vllm cannot run here: no program vllm on the PATH" in page.locator(".fl-tip").inner_text()
    field.select_option("sglang")
    assert page.evaluate(sent) == [{"kind": "Fill", "field": "rival", "text": "sglang"}]
    assert chosen.is_hidden()
    field.select_option(label="address…")
    assert chosen.get_attribute("placeholder") == "http://host:8000/v1"
    page.keyboard.type("http://127.0.0.1:8000/v1")  # it has the focus
    assert len(page.evaluate(sent)) == 1  # nothing is asked at every key
    page.keyboard.press("Enter")
    assert page.evaluate(sent)[1:] == [{"kind": "Fill", "field": "rival", "text": "http://127.0.0.1:8000/v1"}]
    assert chosen.is_hidden()
    field.select_option(label="address…")
    page.keyboard.type("http://")
    page.keyboard.press("Escape")
    assert len(page.evaluate(sent)) == 2
    assert chosen.is_hidden()


def test_a_start_shows_how_far_it_is_and_can_be_stopped(page: Any, show: Callable[..., Any]) -> None:
    show()
    stop = page.locator(".fl-actions").get_by_role("button", name="stop")
    assert stop.is_disabled()
    live = messages.Live(state="idle", busy=False, starting="vllm starts, 12 s: loading weights")
    page.evaluate("(live) => window.tell('live', live)", messages.to_json(live))
    assert "vllm starts, 12 s: loading weights" in page.locator(".fl-status").inner_text()
    assert page.locator(".fl-busy").count() == 1
    stop.click()
    assert page.evaluate("window.sent.at(-1)") == {"kind": "Press", "button": "stop"}
    failed = messages.Live(state="idle", busy=False, error="vllm ended with exit code 1 before it was ready: no such model")
    page.evaluate("(live) => window.tell('live', live)", messages.to_json(failed))
    assert "no such model" in page.get_by_role("alert").inner_text()
    assert stop.is_disabled()


def test_a_stage_opens_down_to_its_operations(page: Any, show: Callable[..., Any], records: dict[str, Any]) -> None:
    def part(name: str, stage: str, start: float, end: float) -> Operation:
        return Operation(name=name, lane="host", stage=stage, start_us=start, end_us=end)

    seen = Profile(
        stages=(part("vit", "", 0, 5000), part("prefill", "", 5000, 9000)),
        layers=(part("vit.block.0", "vit", 1000, 2000), part("language.layer.0", "prefill", 6000, 7000)),
        operations=(part("aten::linear", "vit", 1100, 1900), part("aten::roll", "prefill", 6100, 6200)),
    )
    drawn, frame = views()["operations"].draw(cast("Result", SimpleNamespace(profile=seen)), None)
    assert list(frame["operation"]) == ["aten::linear", "aten::roll"]
    shown = show()["shown"]
    page.evaluate("(library) => window.hear({ kind: 'plotly' }, library)", get_plotlyjs())
    for stage, view in (("vit", "ViT blocks"), ("preprocess", "operations")):
        page.locator(f".fl-stage[data-stage='{stage}']").click()
        assert page.evaluate("window.sent.at(-1)") == {"kind": "Look", "view": view}
    tell = "([name, record]) => window.tell(name, record)"
    page.evaluate(tell, ["shown", shown | {"view": "operations"}])
    figure = records["figure"] | {"view": "operations", "about": f"operations of {shown['number']}", "figure": drawn.to_json()}
    page.evaluate(tell, ["figure", figure | {"more": []}])
    crumbs, parts = page.locator(".fl-crumbs"), page.get_by_label("operations of")
    at = "() => document.querySelector('.fl-plot .js-plotly-plot')._fullLayout.xaxis.range"
    for name, said, range_ in (
        ("vit.block.0", "waterfall › vit › ViT blocks › vit.block.0 › operations", [1, 2]),
        ("language.layer.0", "waterfall › prefill › decoder layers › language.layer.0 › operations", [6, 7]),
        ("vit", "waterfall › vit › operations", [0, 5]),
    ):
        parts.select_option(name)
        page.wait_for_function(f"(expected) => JSON.stringify(({at})()) === JSON.stringify(expected)", arg=range_)
        assert crumbs.inner_text().startswith(said)
        assert parts.input_value() == name
    crumbs.get_by_role("button", name="waterfall").click()
    assert page.evaluate("window.sent.at(-1)") == {"kind": "Look", "view": "waterfall"}


def test_a_load_says_how_it_arrives_and_what_it_cannot_be_held_against(page: Any, show: Callable[..., Any]) -> None:
    records = show()
    page.evaluate("([shown]) => window.tell('shown', shown)", [records["shown"] | {"view": "load"}])
    sent = "window.sent.filter(({ kind }) => kind === 'Send')"
    how, rate, go = page.get_by_label("how requests arrive"), page.get_by_label("requests a second"), page.locator(".fl-send")
    assert rate.is_hidden()
    assert [one.is_disabled() for one in page.get_by_label("held against").locator("option").all()] == [False, True]
    go.click()
    how.select_option("at a rate")
    page.keyboard.type("2.5")  # it has the focus
    page.keyboard.press("Enter")
    asked = {"kind": "Send", "n": "32", "against": "nothing"}
    assert page.evaluate(sent) == [asked | {"at_once": "8", "rate": ""}, asked | {"at_once": "", "rate": "2.5"}]
    assert all(messages.from_json(wish) for wish in page.evaluate(sent))
    page.get_by_label("requests", exact=True).fill("7")
    page.evaluate("(loaded) => window.tell('loaded', loaded)", records["loaded"] | {"said": ["more"]})
    assert page.get_by_label("requests", exact=True).input_value() == "7"  # what is typed stays
    page.evaluate("(loaded) => window.tell('loaded', loaded)", records["loaded"] | {"unmet": "it needs another device"})
    assert go.is_disabled()
    assert page.locator(".fl-reason").inner_text() == "This cannot be put under load: it needs another device"
    assert page.evaluate(NAMELESS) == []


def test_rows_of_a_load_come_while_it_runs(page: Any, show: Callable[..., Any]) -> None:
    records, tell = show(), "([name, record]) => window.tell(name, record)"
    number = records["shown"]["number"]
    page.evaluate(tell, ["shown", records["shown"] | {"view": "load", "lacks": "press load"}])
    page.evaluate(tell, ["live", messages.to_json(messages.Live(state="under load", busy=True, progress="request 1 of 3"))])
    rows: list[tuple[int, tuple[tuple[str, float, float], ...]]] = [
        (0, (("queued", 0.0, 2.0), ("vit", 2.0, 3.0), ("decode", 5.0, 5.0))),
        (2, (("queued", 0.0, 6.0), ("vit", 6.0, 3.0), ("decode", 9.0, 11.0))),
    ]
    drawn = page.locator("svg.fl-arrived")
    for result, n, seen in ((number + 1, 2, 0), (number, 1, 1), (number, 2, 2)):  # those of another result are not shown
        page.evaluate(tell, ["arrived", messages.to_json(messages.Arrived(result=result, label="it", rows=tuple(rows[:n])))])
        assert drawn.locator("[data-request]").count() == seen
    assert drawn.locator("text", has_text="request").all_text_contents() == ["request 0", "request 2"]
    assert drawn.get_attribute("aria-label") == "it: 2 requests have ended"
    (start, end), (_, last) = (
        (box["x"], box["x"] + box["width"])
        for row in drawn.locator("[data-request]").all()
        if (box := row.locator("rect").last.bounding_box())
    )
    assert (last - start) / (end - start) == pytest.approx(3, abs=0.05)  # (20 - 5) / 5 ms: one axis
    page.evaluate(tell, ["live", messages.to_json(messages.Live(state="stopped", busy=False))])
    assert drawn.count() == 0
    assert "press load" in page.locator(".fl-plot").inner_text()


LEGEND = """() => {
  const room = document.querySelector(".fl-chart svg").getBoundingClientRect();
  return [...document.querySelectorAll(".fl-legend")].map((text) => {
    const box = text.getBoundingClientRect();
    const inside = box.left >= room.left && box.right <= room.right && box.bottom <= room.bottom;
    return [text.textContent, inside, text.getAttribute("y")];
  });
}"""


@pytest.mark.parametrize(("width", "lines"), [(1280, 1), (760, 3), (380, 3)])
def test_the_legend_takes_as_many_lines_as_it_needs(page: Any, show: Callable[..., Any], width: int, lines: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    show()
    found = page.evaluate(LEGEND)
    assert [text for text, inside, _ in found if not inside] == []
    assert found[0][0] == "this recipe"
    assert any(text.startswith("before: ") for text, *_ in found)
    assert found[-1][0] == "│ floor"
    assert len({y for *_, y in found}) == lines


def test_a_row_of_the_history_is_deleted(page: Any, show: Callable[..., Any]) -> None:
    records = show()
    page.get_by_role("button", name="delete 1", exact=True).click()
    assert page.evaluate("window.sent.at(-1)") == {"kind": "Delete", "number": 1}
    page.evaluate("(rows) => window.tell('history', rows)", records["history"][1:])
    assert [row.get_attribute("data-number") for row in page.locator(".fl-history tbody tr").all()] == ["2"]


def test_results_of_earlier_sessions_are_shown_held_against_and_forgotten_by_keyboard(page: Any, show: Callable[..., Any]) -> None:
    records = show()
    sent = "window.sent.at(-1)"
    rows = page.locator(".fl-earlier tbody tr")
    assert not rows.first.is_visible()
    assert page.locator(".fl-earlier summary").inner_text() == "earlier sessions: 2 results, the newest of 14 Nov 2026 22:13"
    page.locator(".fl-earlier summary").focus()
    page.keyboard.press("Enter")
    assert [row.get_attribute("data-number") for row in rows.all()] == ["-1", "-2"]  # newest first
    assert "a.jpg as it is" in rows.first.inner_text()
    assert "9 to 10 ms in 6 rounds" in rows.first.inner_text()
    assert "measured elsewhere: torch 2.9.0, not 2.10.0" in rows.nth(1).inner_text()
    found = page.evaluate(CONTRASTS)
    assert [(text, round(ratio, 2)) for text, least, ratio in found if ratio < least] == []
    assert page.evaluate(NAMELESS) == []
    rows.first.focus()
    page.keyboard.press("Enter")
    assert page.evaluate(sent) == {"kind": "Look", "number": -1}
    rows.nth(1).focus()
    page.keyboard.press("Shift+Enter")
    assert page.evaluate(sent) == {"kind": "Look", "against": -2}
    page.get_by_role("button", name="forget the result of 13 Nov 2026 09:00").press("Enter")
    assert page.evaluate(sent) == {"kind": "Delete", "number": -2}
    page.get_by_role("button", name="forget them").press("Enter")
    assert page.evaluate(sent) == {"kind": "Press", "button": "forget"}
    page.evaluate("(shown) => window.tell('shown', shown)", records["shown"] | {"number": -1, "earlier": "of an earlier session"})
    assert rows.first.get_attribute("aria-current") == "true"
    assert page.locator(".fl-of-earlier").inner_text() == "of an earlier session"
    page.evaluate("() => window.tell('earlier', { rows: [], skipped: '' })")
    assert page.locator(".fl-earlier").is_hidden()
    assert page.locator(".fl-history tbody tr").count() == 2


def test_a_link_or_a_line_of_python_is_copied(page: Any, show: Callable[..., Any]) -> None:
    records = show()
    page.evaluate(
        "() => Object.defineProperty(navigator, 'clipboard', { value: { writeText: (text) => { window.copied = text; } } })"
    )
    for link, name in (("?recipe=baseline&result=x", "copy link"), ("", "copy as Python line")):
        page.evaluate("(shown) => window.tell('shown', shown)", records["shown"] | {"link": link, "line": "fl.workbench('a')"})
        page.get_by_role("button", name=name, exact=True).click()
        assert page.evaluate("window.copied").endswith(link or "fl.workbench('a')")


def test_a_run_under_way_grows_and_counts(page: Any, show: Callable[..., Any]) -> None:
    show()
    stages = [["decode_image", 0.0, 300.0], ["vit", 310.0, None]]
    live = messages.Live(
        state="running", busy=True, elapsed=900.0, stages=tuple(map(tuple, stages)), expected=(("vit", 10.0, 4000.0),)
    )  # type: ignore[arg-type]
    page.evaluate("(live) => window.tell('live', live)", messages.to_json(live))
    width = "Number(document.querySelector('.fl-stage[data-stage=vit] .fl-solid').getAttribute('width'))"
    before, counted = page.evaluate(width), page.locator(".fl-big").inner_text()
    page.wait_for_function(f"(before) => {width} > before + 5", arg=before, timeout=10_000)
    assert page.locator(".fl-big").inner_text() != counted
    assert page.locator("rect.fl-before").count() == 1  # how long it took the last time
    page.evaluate("(live) => window.tell('live', live)", messages.to_json(dataclasses.replace(live, state="idle", busy=False)))
    page.wait_for_function("() => !document.querySelector('.fl-counting') && document.querySelectorAll('.fl-stage').length > 5")


def test_what_is_being_typed_stays_and_what_cannot_be_read_is_put_back(page: Any, show: Callable[..., Any]) -> None:
    records = show()
    tokens, prompt = page.get_by_label("tokens", exact=True), page.get_by_label("prompt", exact=True)
    tokens.fill("many")
    tokens.press("Enter")
    assert page.evaluate("window.sent.at(-1)") == {"kind": "Fill", "field": "tokens", "text": "many"}
    page.evaluate("(live) => window.tell('live', live)", records["live"] | {"error": "tokens is 'many'"})
    assert tokens.input_value() == "3"
    prompt.fill("Why")
    page.evaluate("(asked) => window.tell('asked', asked)", records["asked"] | {"previews": ["data:,"], "tokens": 4})
    assert (prompt.input_value(), tokens.input_value()) == ("Why", "4")
    note = page.get_by_label("note on 1")
    note.fill("the go")
    slower = records["history"][1] | {"milliseconds": 10 * records["history"][1]["milliseconds"]}
    page.evaluate("(rows) => window.tell('history', rows)", [records["history"][0], slower])
    assert note.input_value() == "the go"
    note.press("Enter")
    assert page.evaluate("window.sent.at(-1)") == {"kind": "Mark", "number": 1, "pinned": False, "note": "the go"}


def test_a_replay_reaches_the_end_of_the_run_where_it_counts_to(
    page: Any, show: Callable[..., Any], records: dict[str, Any]
) -> None:
    shown = records["shown"]
    shown["recipe"] |= {"ttft": 100.0, "bars": [["prefill", "host", 0.0, 100.0]], "host": {"prefill": 100.0}, "device": {}}
    shown["rival"] = {**shown["recipe"], "label": "transformers", "ttft": 400.0, "rounds": []}
    shown |= {"before": None, "headline": "100 ms"}
    show()
    full = float(page.locator(".fl-solid").get_attribute("width"))
    page.evaluate("""() => { window.seen = []; new MutationObserver(() => {
      const bar = document.querySelector(".fl-solid");
      window.seen.push([parseFloat(document.querySelector(".fl-big").textContent), Number(bar.getAttribute("width"))]);
    }).observe(document.querySelector(".fl-big"), { childList: true }); }""")
    page.get_by_role("button", name="replay slowly").click()
    page.wait_for_function("() => window.seen.length > 3 && window.seen.at(-1)[0] === 100")
    for ms, width in page.evaluate("window.seen"):
        assert width / full == pytest.approx(ms / 100, abs=0.02)
