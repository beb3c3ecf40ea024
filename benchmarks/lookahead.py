"""Can a planner's forecast be made asynchronously, at a gain? ``python benchmarks/lookahead.py``.

The forecast that is blended into the gate is one fixed K x K matrix, made once a call, and one product with it a token.
Medians: what decoding takes a token, and how much more with ``lookahead`` than without; the blend and the matrix by
themselves; and what it takes to hand the blend to another thread and to fetch it, with nothing else to do. The last is
what an asynchronous worker costs before it gains anything: where it is more than the blend, no overlap can pay.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from stepladder.eval.decode import generate
from stepladder.models.heads.belief import gate, lookahead
from stepladder.models.zoo import spec


def seconds(run: Callable[[], object], calls: int) -> float:
    """Median of several calls."""
    found = []
    for _ in range(calls):
        begun = time.perf_counter()
        run()
        found.append(time.perf_counter() - begun)
    return statistics.median(found)


def main() -> int:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    for name, value in {"plans": 8, "vocab": 8192, "width": 256, "horizon": 2, "tokens": 64, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    torch.set_num_threads(1)

    def build(horizon: int) -> torch.nn.Module:
        torch.manual_seed(0)
        fields = {"width": options.width, "depth": 2, "plans": options.plans, "lookahead": horizon}
        return spec("apelr_v2", executor="gru", **fields).build(options.vocab).eval()

    models = {"with": build(options.horizon), "without": build(0)}
    prompt = [np.arange(3, 35)]
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(options.rounds):
        for name, model in models.items():
            run = lambda model=model: generate(model, prompt, max_new=options.tokens, eos=None)  # noqa: E731
            times[name].append(seconds(run, 1) / options.tokens)
    chain = models["with"].head.chain()
    blend = lookahead(chain.moves_KK, options.horizon, 0.25)
    log_b = torch.randn(1, 1, options.plans).log_softmax(-1)
    with torch.no_grad(), ThreadPoolExecutor(1) as pool:
        alone = seconds(lambda: gate(log_b, blend, 1.0), 2000)
        matrix = seconds(lambda: lookahead(chain.moves_KK, options.horizon, 0.25), 2000)
        handed = seconds(lambda: pool.submit(gate, log_b.clone(), blend, 1.0).result(), 2000)
    token = statistics.median(times["with"])
    extra = token - statistics.median(times["without"])
    print(f"torch {torch.__version__}, K={options.plans} V={options.vocab} D={options.width} horizon {options.horizon}")
    print(f"a token: {1e3 * token:.2f} ms; with the forecast less without: {1e3 * extra:+.2f} ms")
    print(f"blend {1e6 * alone:.0f} us, matrix {1e6 * matrix:.0f} us: {(alone + matrix) / token:.1%} of a token")
    print(f"blend by another thread {1e6 * handed:.0f} us: {handed / alone:.1f} times the blend itself")
    return 0


if __name__ == "__main__":
    sys.exit(main())
