"""``python -m benchmarks.apps``: an app in the shape of Flower's quickstart, in process and in Flower's Ray simulation.

Both are started from the command line: ``fedbn run``, and ``flwr run`` on a SuperLink that is already running. The app
measures its rounds, from the start of the strategy to the end of each evaluation.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from fedbn_simulations.engines.ray import federation_config
from fedbn_simulations.flower.processes import ProcessGroup
from fedbn_simulations.flower.superlink import SuperLink
from fedbn_simulations.report.documents import replace_block
from fedbn_simulations.results.formatting import markdown_table

APP = Path(__file__).parent / "lenet"

Row = dict[str, str]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.apps", description=__doc__)
    parser.add_argument("--clients", default="10,100", help="comma-separated numbers of clients")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--examples", type=int, default=80, help="examples of a client; 80 %% are for training")
    parser.add_argument("--backends", default="serial,processes", help="comma-separated backends of fedbn run")
    parser.add_argument("--no-ray", action="store_true", help="do not measure Flower's Ray simulation")
    parser.add_argument("--into", type=Path, help="also update the block `apps` of this document")
    args = parser.parse_args(argv)
    rows: list[Row] = []
    processes = ProcessGroup()
    with processes.workspace() as directory:
        link = SuperLink(directory, ("--simulation",), processes=processes)
        if not args.no_ray:
            link.start()

        def on_ray(nodes: int, config: str) -> None:
            settings = federation_config(nodes, len(os.sched_getaffinity(0)), "cpu")
            link.run_app(APP, "--federation-config", settings, "--run-config", config)

        def with_backend(backend: str, nodes: int, config: str) -> None:
            command = [sys.executable, "-m", "fedbn", "run", str(APP), "--num-supernodes", str(nodes), "-c", config]
            subprocess.run([*command, "--backend", backend], check=True, capture_output=True)

        for nodes in map(int, args.clients.split(",")):
            config = f"num-server-rounds={args.rounds} examples={args.examples}"
            for backend in args.backends.split(","):
                rows.append(measure(f"fedbn run, {backend}", partial(with_backend, backend), nodes, config))
            if not args.no_ray:
                rows.append(measure("flwr run, Ray", on_ray, nodes, config))
            print(markdown_table(rows), file=sys.stderr)
    table = markdown_table(rows)
    print(table)
    if args.into:
        replace_block(args.into, "apps", table)
    return 0


def measure(name: str, run: Callable[[int, str], None], nodes: int, config: str) -> Row:
    """Seconds of the whole command, of the first round, and the median of the later rounds."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "times.json"
        start = time.perf_counter()
        run(nodes, f"{config} out='{out}'")
        total = time.perf_counter() - start
        times = json.loads(out.read_text())
    seconds = [end - begin for begin, end in itertools.pairwise(times)]
    return {
        "clients": str(nodes),
        "command": name,
        "total s": f"{total:.1f}",
        "first round s": f"{seconds[0]:.2f}",
        "later rounds s": f"{statistics.median(seconds[1:]):.2f}",
    }


if __name__ == "__main__":
    sys.exit(main())
