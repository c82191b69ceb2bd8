"""A result in words and numbers for the page: the waterfall's bars, the headline with its spread, what was learnt, the history."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from itertools import zip_longest

from fastvl_lab.catalogue import Target, toggles
from fastvl_lab.measure.audit import audit
from fastvl_lab.measure.compare import Comparison
from fastvl_lab.measure.load import Load, findings
from fastvl_lab.measure.recipes import STOCK, stages_of
from fastvl_lab.measure.samples import Interval, RunSample
from fastvl_lab.recipe import Recipe
from fastvl_lab.run import Run, in_words, milliseconds
from fastvl_lab.trace import LANES, STAGES
from fastvl_lab.view.tables import load_percentile_frame
from fastvl_lab.view.workbench.messages import Advised, Arrived, Dot, Loaded, Pill, Rival, Row, Series, Shown
from fastvl_lab.view.workbench.session import BEFORE, RECIPE, Advice, Arrivals, Question, Result, Served, candidates

_BUSY = 3.0  # the slowest warm round over the fastest, from which a machine is busy with something else


def _range(low: float, high: float) -> str:
    """An interval of ms, without its unit."""
    return " to ".join(f"{ms:.{0 if abs(ms) >= 10 else 1 if abs(ms) >= 1 else 2}f}" for ms in (low, high))


def named(label: str) -> str:
    """An engine as a sentence has it."""
    return "Transformers" if label == STOCK else label


def series(run: Run, label: str, rounds: Sequence[Dot] = ()) -> Series:
    """What the page draws of a run."""
    trace, own = run.trace, run.own_spans()
    bars: list[tuple[str, str, float, float]]
    bars = [(s.name, lane, s.start_ns / 1e6, s.duration_ns / 1e6) for lane in LANES for s in trace.within_ttft(lane)]
    bars += [("unaccounted", "unaccounted", start / 1e6, (end - start) / 1e6) for start, end in trace.gaps()]
    bars += [(s.name, "own", s.start_ns / 1e6, s.duration_ns / 1e6) for s in own]
    files = {stage: f"fastvl_lab/{file}" for stage, file in STAGES.items() if run.recipe is not None}
    files |= {span.name: f"by the clock of {run.account.source}" for span in own if run.account is not None}
    stages = {stage: ns / 1e6 for stage, ns in trace.stages().items()} | {span.name: span.duration_ns / 1e6 for span in own}
    return Series(
        label=label,
        ttft=run.ttft * 1e3,
        bars=tuple(bars),
        host=stages | {"unaccounted": trace.unaccounted_ns / 1e6},
        device={stage: ns / 1e6 for stage, ns in trace.stages("device").items()},
        files=files,
        rounds=tuple(rounds),
    )


def shown(
    result: Result,
    other: Result | None,
    *,
    view: str,
    against: int,
    pending: bool,
    apart: str = "",
    lacks: str = "",
    link: str = "",
    line: str = "",
) -> Shown:
    """The result beside the bar to beat and `other`, the result that it is held against.

    pending: whether it is still being measured; then the number of its first, cold run is no headline. apart: what is other here
    than where it was measured. lacks, link, line: as `Shown` has them.
    """
    run, comparison = result.shown, result.comparison
    before, label, why = _before(result, other)
    rival = result.reference
    cold = run.kind == "cold"
    first = f"first run {milliseconds(run.ttft * 1e3)} (cold: compiling, caches)" if cold else ""
    ttft = milliseconds(run.ttft * 1e3)
    return Shown(
        number=result.number,
        heading=f"{called(result)} · {about_question(result.question)} · {result.recipe.text(run_device(run))}",
        detail=f"{run.subtitle()} · {run.device} {run.dtype}",
        headline="" if cold and pending else ttft,
        spread="measuring…" if cold and pending else spread(result),
        tpot="" if run.tpot is None else milliseconds(run.tpot * 1e3),
        cold=first,
        learnt=learnt(result),
        pills=tuple(pills(result)),
        recipe=series(run, RECIPE, _dots(comparison, RECIPE)),
        rival=None if rival is None else series(rival, rival.engine, _dots(comparison, rival.engine)),
        before=None if before is None else series(before, label),
        no_before=why,
        floors={stage: seconds * 1e3 for stage, seconds in (result.floors or {}).items()},
        answer=run.text + (" (random weights: only the time counts)" if _random(result.question.checkpoint) else ""),
        view=view,
        against=against,
        earlier=_of_an_earlier_session(result, apart),
        lacks=lacks,
        link=link,
        line=line,
    )


def called(result: Result) -> str:
    """A result as a sentence has it: its number, or when an earlier session made it."""
    return f"#{result.number}" if result.number > 0 else f"the result of {date(result.when)}"


def date(when: float) -> str:
    """Seconds since 1970 as a day and a minute here."""
    return time.strftime("%d %b %Y %H:%M", time.localtime(when))


def elsewhere(theirs: Mapping[str, str], ours: Mapping[str, str], *, checkpoint: bool = True) -> str:
    """What differs in where two results were measured, as far as ours is known; checkpoint: whether both are of the same one."""
    every = dict.fromkeys([*ours, *(theirs if "weights" in ours else ())])  # before a checkpoint is loaded not all of ours is known
    names = [name for name in every if checkpoint or name not in ("dtype", "weights")]
    apart = [name for name in names if theirs.get(name) != ours.get(name)]
    said = [f"{name} {theirs.get(name, 'none')}, not {ours.get(name, 'none')}" for name in apart if name != "weights"]
    return "; ".join([*said, *(["other weights"] if "weights" in apart else [])])


def _of_an_earlier_session(result: Result, apart: str) -> str:
    if result.number > 0:
        return ""
    said = f"of an earlier session, {date(result.when)}"
    return f"{said}, and measured elsewhere ({apart}): it is held against nothing of here" if apart else said


def run_device(run: Run) -> str:
    """The type of the device that a recipe's text is for."""
    return "cpu" if run.device.startswith("CPU") else "cuda"


def _random(checkpoint: str) -> bool:
    return checkpoint.startswith(("tiny-", "random:"))


def about_question(question: Question) -> str:
    """In a line: checkpoint, pictures, prompt."""
    prompt = question.prompt if len(question.prompt) <= 40 else f"{question.prompt[:39]}…"
    return f"{question.checkpoint} · {question.about_picture()} · “{prompt}” · {question.max_new_tokens} tokens"


def _before(result: Result, other: Result | None) -> tuple[Run | None, str, str]:
    """The run to outline and what differs in it; or why there is none."""
    if other is None:
        return None, "", ""
    if other.question != result.question:
        return None, "", f"not held against {called(other)}: it was asked something else ({changes(result, other)})"
    if apart := elsewhere(other.where, result.where):
        return None, "", f"not held against {called(other)}: it was measured elsewhere ({apart})"
    label = f"{called(other)} ({changes(result, other) or 'the same recipe'})"
    if result.comparison is not None and result.before == other.recipe:
        return result.comparison.representative(BEFORE), label, ""
    if other.shown.kind != result.shown.kind:
        ours, theirs = in_words(result.shown.kind), in_words(other.shown.kind)
        return None, "", f"not held against {called(other)}: this run is {ours}, and that one {theirs}"
    return other.shown, f"{label}, measured at another time", ""


def changes(before: Result | None, result: Result) -> str:
    """What the second has that the first has not, in a few words."""
    if before is None:
        return result.recipe.text(run_device(result.run))
    ours, theirs = result.question, before.question
    said = [
        f"{name} {new}"
        for name, old, new in (
            ("checkpoint", theirs.checkpoint, ours.checkpoint),
            ("picture", theirs.about_picture(), ours.about_picture()),
            ("prompt", f"“{theirs.prompt}”", f"“{ours.prompt}”"),
            ("tokens", theirs.max_new_tokens, ours.max_new_tokens),
        )
        if old != new
    ]
    said += recipe_changes(before.recipe, result.recipe)
    return few(said, 3)


def recipe_changes(before: Recipe, recipe: Recipe) -> list[str]:
    """The toggles that differ, as the second has them; the name of a preset where it is one and many differ."""
    different = [f"{t.path}={recipe.value(t.path)}" for t in toggles() if recipe.value(t.path) != before.value(t.path)]
    if len(different) > 3 and recipe == Recipe.baseline():
        return ["baseline"]
    return different


def dot(sample: RunSample) -> Dot:
    """A round as the page draws it."""
    return sample.run.ttft * 1e3, sample.use.why if sample.disturbed and sample.use else ""


def _dots(comparison: Comparison | None, label: str) -> list[Dot]:
    """Every round of the kind that is compared; of that of the shown run where there is none."""
    if comparison is None:
        return []
    mine = [s for s in comparison.samples if s.engine == label and s.round >= 0]
    compared = [s for s in mine if s.kind == comparison.compared(label)]
    return [dot(s) for s in compared or mine if compared or s.kind == comparison.representative(label).kind]


def _rounds(comparison: Comparison | None, label: str) -> list[float]:
    """The same as ms of TTFT, without those that were disturbed."""
    return [ms for ms, disturbed in _dots(comparison, label) if not disturbed]


def spread(result: Result) -> str:
    """How far the rounds of a result lie apart, or what its one run was."""
    if result.shown.kind == "cold":
        return "cold: the first of its shape"
    if not (rounds := _rounds(result.comparison, RECIPE)):
        busy = any(disturbed for _, disturbed in _dots(result.comparison, RECIPE))
        return "the machine was busy in every round" if busy else f"one run, {in_words(result.shown.kind)}"
    return f"{milliseconds(min(rounds)).removesuffix(' ms')} to {milliseconds(max(rounds))} in {len(rounds)} rounds"


def _busy(comparison: Comparison, *labels: str) -> str | None:
    """What says that the machine was busy with something else: what others used, or how far the rounds of these lie apart."""
    of_each = [_rounds(comparison, label) for label in labels]
    if not all(of_each):
        dots = [why for label in labels for _, why in _dots(comparison, label)]
        worst = max(filter(None, dots), default=None)
        return worst and f"{worst}, in {sum(map(bool, dots))} of {len(dots)} rounds"
    apart = max(max(rounds) / min(rounds) for rounds in of_each)
    return f"rounds lie ×{apart:.0f} apart" if apart >= _BUSY else None


def as_fast(ratio: Interval | None, than: str) -> tuple[str, str]:
    """A ratio of times to the first token as a sentence, and how sure it is: "good", "bad" or "plain"."""
    if ratio is None:
        return f"no warm rounds to compare with {than}", "plain"
    if ratio.low != ratio.low:
        return f"too few rounds to compare with {than}: 6 are needed", "plain"
    median, low, high = ratio
    if low > 1 or high < 1:
        said = f"{median:.2f}× as fast as {than} to the first token ({low:.2f}–{high:.2f}×)"
        return said, "good" if low > 1 else "bad"
    return f"no difference from {than} shown ({low:.2f}–{high:.2f}×)", "plain"


def pills(result: Result) -> list[Pill]:
    """Parity in plain words, ratios where they may be printed, and what an audit finds."""
    comparison, run = result.comparison, result.shown
    if comparison is None:
        return [
            Pill(text="not compared yet", state="plain", about="parity and ratios come with the rounds beside the bar to beat"),
            _audited(result),
        ]
    reference, found = comparison.reference, [_parity(result)]
    rival = named(reference)
    if run.kind == "cache_hit":
        theirs = comparison.representative(reference).ttft * 1e3
        found.append(
            Pill(
                text=f"cache hit: {milliseconds(run.ttft * 1e3)}, where {rival} computes all of it in {milliseconds(theirs)}",
                state="plain",
                about="something of an earlier request was used again: no whole request's time, so no ratio of it is given",
            )
        )
    elif result.parity:
        pairs = [(reference, rival, result.speedup)]
        if BEFORE in comparison.engines:
            pairs.append((BEFORE, "before", result.against_before))
        about = "the median of ratios paired by round, with its 95% confidence interval; below six rounds none is printed"
        busy = {name: why for label, name, _ in pairs if (why := _busy(comparison, RECIPE, label)) is not None}
        if busy:  # said once: it is one machine
            text = f"machine busy: {next(iter(busy.values()))}, no ratio to {' or '.join(busy)}"
            found.append(Pill(text=text, state="bad", about=about))
        for _, name, ratio in pairs:
            if name not in busy:
                text, state = as_fast(ratio, name)
                found.append(Pill(text=text, state=state, about=about))
    return [*found, _audited(result)]


def _parity(result: Result) -> Pill:
    checked, comparison = result.checked, result.comparison
    assert checked is not None
    assert comparison is not None
    if not checked.holds:
        return Pill(text=f"✗ other tokens: {checked.why}", state="bad", about="so its time is compared with nothing")
    if checked.moved is None:
        return Pill(text=f"✓ {checked.sentence}", state="good", about="it computes what Transformers computes on the same weights")
    text = "✓ same tokens as Transformers on this recipe's pixels" if checked.by == "tokens" else f"✓ {checked.sentence}"
    theirs = comparison.checks[comparison.reference].expected
    pairs = enumerate(zip_longest(checked.expected, theirs), start=1)
    other = next((number for number, (ours, stock) in pairs if ours != stock), None)
    apart = "no token differs" if other is None else f"first other token: {other}"
    return Pill(
        text=f"{text}; pixels alone move logits by {checked.moved:.2g}, {apart}",
        state="good" if other is None else "plain",
        about="its pixels are made another way than the stock ones; Transformers was run on them too, and made the same tokens",
    )


def _audited(result: Result) -> Pill:
    about = (
        "whether the numbers can be what they say: tokens held back, times below what the device can do, stages that do not add up"
    )
    if result.audit.ok:
        return Pill(text="audit ✓", state="good", about=about)
    return Pill(text=f"audit: {result.audit.findings[0].sentence}", state="bad", about=about)


def learnt(result: Result) -> str:
    """What a change has brought, and what is left of the bar to beat."""
    comparison, before = result.comparison, result.before
    if comparison is None:
        return ""
    left, stood = result.shown.ttft * 1e3, comparison.representative(comparison.reference).ttft * 1e3
    floor = sum(seconds for stage, seconds in (result.floors or {}).items() if stage != "decode") * 1e3
    so_far = f"{milliseconds(left)} left of" if left <= stood else f"{milliseconds(left)}, over the"
    said = f"{so_far} {milliseconds(stood)} that {named(comparison.reference)} takes"
    said += f"; floor {milliseconds(floor)}." if floor else "."
    if before is None or BEFORE not in comparison.engines:
        return said
    changed, saved = few(recipe_changes(before, result.recipe), 2), comparison.saving(RECIPE, BEFORE)
    if _busy(comparison, RECIPE, BEFORE):
        return f"{changed}: the machine is too busy to say what it saves. {said}"
    if saved is None or saved.low != saved.low:
        return (
            f"{changed}: {'parity does not hold' if result.parity is False else 'too few warm rounds'} to say what it saves. {said}"
        )
    interval = f"({_range(saved.low, saved.high)} ms)"
    if saved.low > 0:
        return f"{changed} saves {milliseconds(saved.median)} {interval}. {said}"
    if saved.high < 0:
        return f"{changed} costs {milliseconds(-saved.median)} ({_range(-saved.high, -saved.low)} ms). {said}"
    return f"{changed}: no saving shown {interval}. {said}"


def few(said: list[str], most: int) -> str:
    """The first of them, and how many more there are."""
    return ", ".join(said[:most]) + (f" and {len(said) - most} more" if len(said) > most else "")


def advised(
    advice: Advice | None, last: Result | None, recipe: Recipe, question: Question, target: Target, fastest: Recipe
) -> Advised:
    """What each toggle would save of those that the recipe has not yet, and the next to try, with how sure that is."""
    if advice is None or advice.question != question:
        here = last is not None and (last.recipe, last.question) == (recipe, question)
        return _first_advice(last, target, fastest) if last is not None and here else Advised()
    savings = {path: (value, *saved) for path, (value, saved) in advice.savings.items() if recipe.value(path) != value}
    beside = "" if advice.recipe == recipe else "; measured before the last change"
    by_saving = sorted(savings, key=lambda path: -savings[path][1])
    best = next((path for path in by_saving if savings[path][2] > 0), None)
    likely = next((path for path in by_saving if savings[path][1] > 0), None)
    if best is not None:
        value, saved, low, high = savings[best]
        sentence = f"Next best: {best}={value} saves about {milliseconds(saved)} here ({_range(low, high)}{beside})."
    elif likely is not None:
        value, saved, low, high = savings[likely]
        sentence = (
            f"No saving is sure on this machine now; {likely}={value} may save {milliseconds(saved)} ({_range(low, high)}{beside})."
        )
    else:
        return Advised(savings=savings, sentence="Nothing known would save more here.")
    return Advised(savings=savings, sentence=sentence, path=best or likely or "", value=value)


def _first_advice(last: Result, target: Target, fastest: Recipe) -> Advised:
    """Before anything is measured: what the fastest known recipe has elsewhere, by the longest stage that it works in."""
    if last.shown.kind == "cold" or not (known := candidates(last, target, fastest)):
        return Advised()
    path, (value, _) = known[0]
    stages = last.shown.trace.stages()
    stage = max(stages_of(path), key=lambda stage: stages.get(stage, 0), default="")
    if stage not in stages:  # nothing that the request spends time in
        return Advised()
    share = stages[stage] / 1e9 / last.shown.ttft
    return Advised(savings={}, sentence=f"{stage} takes {share:.0%} of TTFT. Try {path}={value}.", path=path, value=value)


def loaded(result: Result, arrivals: Arrivals, against: str, others: Sequence[Rival], unmet: str) -> Loaded:
    """The load view beside its figures. against, others, unmet: as `Loaded` has them."""
    loads = result.loads or {}
    frame = load_percentile_frame(loads) if loads else None
    return Loaded(
        at_once="" if arrivals.concurrency is None else str(arrivals.concurrency),
        rate="" if arrivals.rate is None else f"{arrivals.rate:g}",
        n=str(arrivals.n),
        against=against,
        others=tuple(others),
        unmet=unmet,
        said=() if frame is None else (*(_served(label, load) for label, load in loads.items()), *_against(loads)),
        columns=() if frame is None else tuple(frame.columns),
        rows=() if frame is None else tuple(tuple(map(str, row)) for row in frame.itertuples(index=False)),
    )


def arrived(result: int, served: Sequence[Served]) -> Arrived:
    """What has ended of a load under way: of each request its stages up to its first text, and a bar for the rest of its answer."""
    first = min((one.begun for one in served), default=0)
    rows = []
    for one in served:
        trace, since = one.trace, one.begun - first
        spans = [(span.name, span.start_ns, span.end_ns) for span in trace.within_ttft()]
        spans.append(("decode", trace.first_chunk_ns, trace.end_ns))
        bars = tuple((name, round((since + start) / 1e6, 3), round((end - start) / 1e6, 3)) for name, start, end in spans)
        rows.append((one.number, bars))
    return Arrived(result=result, label=served[-1].label if served else "", rows=tuple(sorted(rows)))


def _served(label: str, load: Load) -> str:
    """What became of a load, in a line; and what of it cannot be, if an audit finds such."""
    failed = f", {len(load.failures)} failed ({next(iter(load.failures.values()))})" if load.failures else ""
    found = audit(load)
    cannot_be = "" if found.ok else f"; audit: {found.findings[0].sentence}"
    return (
        f"{label}: {load.tokens_per_second:.1f} tokens and {load.requests_per_second:.2f} requests a second, "
        f"{len(load.runs)} requests in {load.seconds:.2f} s, {load.how}{failed}{cannot_be}"
    )


def _against(loads: Mapping[str, Load]) -> list[str]:
    reference = next((label for label in loads if label != RECIPE), None)
    return [] if reference is None else findings(loads, reference)


def row(result: Result, before: Result | None, *, pinned: bool, note: str) -> Row:
    """Its line of the history."""
    run, comparison, checked = result.shown, result.comparison, result.checked
    ratio, parity = "", "not checked"
    if comparison is not None and checked is not None:
        parity = "✗ other tokens" if not checked.holds else "✓ on its pixels" if checked.moved is not None else "✓ same tokens"
        known = result.speedup is not None and result.speedup.low == result.speedup.low and run.kind != "cache_hit"
        if result.speedup is not None and known and not _busy(comparison, RECIPE, comparison.reference):
            ratio = f"{result.speedup.median:.2f}× ({result.speedup.low:.2f}–{result.speedup.high:.2f})"
    return Row(
        number=result.number,
        changed=changes(before, result) or "again",
        ttft=f"{milliseconds(run.ttft * 1e3)}{'' if run.kind == 'warm' else f' {in_words(run.kind)}'}",
        milliseconds=run.ttft * 1e3,
        ratio=ratio,
        parity=parity,
        question=about_question(result.question),
        recipe=result.recipe.text(run_device(run)),
        pinned=pinned,
        note=note,
    )


def texts(recipe: Recipe, question: Question, device: str, *, fastest: Recipe | None = None) -> Mapping[str, str]:
    """The recipe to copy: as Python, as YAML, and as the command that serves it; fastest: what that means on a lab here."""
    text, served = recipe.text(device), recipe.text(device, fastest=fastest)
    yaml = "\n".join(
        f"{slot}:\n" + "\n".join(f"  {name}: {json.dumps(value)}" for name, value in values.items())
        for slot, values in recipe.to_dict().items()
    )
    return {
        "Python": f'recipe = fl.Recipe.parse("{text}", "{device}")',
        "YAML": yaml,
        "serve": f'python -m fastvl_lab.serve --checkpoint {question.checkpoint} --recipe "{served}"',
    }
