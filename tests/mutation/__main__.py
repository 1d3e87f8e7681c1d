"""Mutation score of each package: ``python -m tests.mutation --help``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
import tomllib
from collections import Counter, defaultdict
from pathlib import Path

from tests.helpers import ROOT
from tests.mutation.runner import Runner
from tests.mutation.sampling import draw
from tests.mutation.selection import likely_tests, sources

ACCEPTED = Path(__file__).with_name("accepted.toml")
LIVED = ("survived", "untested")


def main():
    options = parse()
    known = packages()
    parts = {part: known.get(part, [part]) for part in options.parts or known}
    sample = {part: draw(ROOT, modules, options.count, options.seed) for part, modules in parts.items()}
    outcomes = read(options.session)
    pending = [
        mutant
        for mutants in sample.values()
        for mutant in mutants
        if mutant.key not in outcomes or (options.again and outcomes[mutant.key]["outcome"] in LIVED)
    ]
    if pending:
        options.session.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as work, options.session.open("a", encoding="utf-8") as session:
            runner = Runner(ROOT, Path(work), options.marks)
            for mutant in pending:
                start = time.monotonic()
                outcome, test = runner.outcome(mutant, likely_tests(mutant.module, runner.tree))
                seconds = round(time.monotonic() - start, 1)
                line = dataclasses.asdict(mutant) | {"outcome": outcome, "test": test, "seconds": seconds}
                print(json.dumps(line), file=session, flush=True)
    print(report(sample, read(options.session), accepted()))


def parse():
    parser = argparse.ArgumentParser("python -m tests.mutation", description="Run the likely tests of sampled mutants.")
    parser.add_argument("parts", nargs="*", help="packages or modules, such as fedbn/online; all packages by default")
    parser.add_argument("--count", type=int, default=6, help="mutants of each part")
    parser.add_argument("--seed", type=int, default=0, help="key of the sample")
    parser.add_argument("--session", type=Path, default=ROOT / "results/mutants.jsonl", help="outcomes; is continued")
    parser.add_argument("--again", action="store_true", help="run the survivors of the session again")
    parser.add_argument("--marks", default="not slow and not ray", help="pytest's option -m")
    return parser.parse_args()


def packages():
    """Modules of each package: ``fedbn`` for the modules at its top, ``fedbn/online`` for all below it."""
    found = defaultdict(list)
    for module in sources(ROOT):
        found["/".join(Path(module).parts[:-1][:2])].append(module)
    return found


def read(session):
    """Last outcome of each mutant of a session."""
    lines = session.read_text(encoding="utf-8").splitlines() if session.is_file() else []
    return {line["key"]: line for line in map(json.loads, lines)}


def accepted():
    """Survivors that were examined, by module and changed line."""
    entries = tomllib.loads(ACCEPTED.read_text(encoding="utf-8")).get("mutant", [])
    return {(e["module"], e["before"], e["after"]): e for e in entries}


def report(sample, outcomes, known):
    """Score of each part, and all survivors."""
    counts, survivors = defaultdict(Counter), []
    for part, mutant in ((part, m) for part, mutants in sample.items() for m in mutants if m.key in outcomes):
        outcome = outcomes[mutant.key]["outcome"]
        entry = known.get((mutant.module, mutant.before, mutant.after), {})
        if outcome in LIVED:
            outcome = "equivalent" if entry.get("equivalent") else outcome
            diff = f"  - {mutant.before}\n  + {mutant.after}"
            survivors.append(
                f"{mutant.module}:{mutant.line} {outcome}\n{diff}\n    {entry.get('reason', 'not examined')}"
            )
        counts[part][outcome] += 1
    lines = [f"{'':28}{'mutants':>9}{'killed':>9}{'survived':>10}{'equivalent':>12}{'score':>8}"]
    for part, c in [*counts.items(), ("all", sum(counts.values(), Counter()))]:
        killed, lived = c["killed"] + c["timeout"], sum(c[name] for name in LIVED)
        score = f"{killed / (killed + lived):.0%}" if killed + lived else "-"
        lines.append(f"{part:28}{sum(c.values()):9}{killed:9}{lived:10}{c['equivalent']:12}{score:>8}")
    return "\n".join([*lines, *survivors])


if __name__ == "__main__":
    main()
