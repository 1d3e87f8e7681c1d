"""The plain PyTorch loop: ``python -m benchmarks.loop RUN THREADS``.

It does not use the project's thread and memory settings, like any plain script.
"""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.rounds import context_from_arguments, serve
from benchmarks.workloads import plain_loop

if __name__ == "__main__":
    ctx, threads = context_from_arguments()
    torch.set_num_threads(threads)
    serve(partial(next, plain_loop(ctx)))
