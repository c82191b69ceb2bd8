"""`python -m fastvl_lab.measure.sweep plan.yaml`: have workers measure a plan, go on with one that was left, or print it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fastvl_lab.errors import FastvlError, counted, sentence
from fastvl_lab.grid.merge import GridResult
from fastvl_lab.grid.plan import Plan, estimate, read, runs
from fastvl_lab.grid.run import check, merger_of, run
from fastvl_lab.measure.sweep import LAUNCHERS, told_failure

# As a shell has it after a Ctrl-C.
_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Arguments: those of the process, if None. Ends the process with an exit code of 1 where a plan is refused or cells failed."""
    parser = argparse.ArgumentParser(prog="python -m fastvl_lab.measure.sweep", description=__doc__)
    parser.add_argument("plan", type=Path, help="a YAML file, whose keys are the parameters of notebooks/ttft_sweep.ipynb and more")
    parser.add_argument("--dry-run", action="store_true", help="print the cells, what is done, and an estimate; start nothing")
    parser.add_argument("--launcher", choices=LAUNCHERS, help="who starts the workers (the plan's, else local)")
    parser.add_argument("--workers", type=int, help="how many (the plan's, else as many as this machine has devices)")
    parser.add_argument("--output-dir", help="the shared folder (the plan's, else runs/ and the plan's name)")
    parser.add_argument("--retry-failed", action="store_true", help="measure cells again that failed")
    parser.add_argument("--merge", action="store_true", help="start nothing; write the report of what is done")
    given = parser.parse_args(arguments)
    changes = {name: value for name in ("launcher", "workers", "output_dir") if (value := getattr(given, name)) is not None}
    try:
        plan = read(given.plan, **changes)
        check(plan)
        if given.dry_run:
            print(described(plan))
            return
        result = merger_of(plan).merge() if given.merge else run(plan, again=given.retry_failed)
        written = result.write()
    except FastvlError as error:
        sys.exit(f"error: {sentence(error)}")
    except KeyboardInterrupt:
        print("stopped, and every worker with it; running again goes on with the cells that are not done", file=sys.stderr)
        sys.exit(_INTERRUPTED)
    print(_summary(result))
    print(f"report: {written[-1]}")
    sys.exit(bool(result.errors))


def described(plan: Plan) -> str:
    """The plan as text: a line a cell, with its state and seconds, then how long the rest will take."""
    merger = merger_of(plan)
    taken, states = merger.seconds(), {row["cell"]: row["state"] for row in merger.merge().cells}
    seconds = estimate(plan, taken)
    width = max(len(cell.label) for cell in plan.cells)
    lines = [
        f"{cell.id}  {cell.label:<{width}}  {counted(len(cell.settings['recipes']), 'recipe'):>10}  {runs(cell.settings):>4} runs  "
        f"{seconds[cell.id]:>6.0f} s  {states[cell.id]}"
        for cell in plan.cells
    ]
    settings = plan.settings
    left = sum(seconds[cell.id] for cell in plan.cells if states[cell.id] == "not measured")
    source = f"by what {counted(len(taken), 'cell')} took" if taken else "a guess until a cell is done"
    minutes = counted(round(left / (settings.workers or 1) / 60), "minute")
    return "\n".join(
        [
            *lines,
            f"{counted(len(plan.cells), 'cell')} in {settings.output_dir}, {list(states.values()).count('done')} done; launcher "
            f"{settings.launcher}, {counted(settings.workers, 'worker') if settings.workers else 'a worker a device'}",
            f"left: about {minutes}{'' if settings.workers else ' of one device'} ({source})",
        ]
    )


def _summary(result: GridResult) -> str:
    done = sum(row["state"] == "done" for row in result.cells)
    return "\n".join([*map(told_failure, result.errors), *result.notes, f"{done} of {len(result.cells)} cells are done"])


if __name__ == "__main__":
    main()
