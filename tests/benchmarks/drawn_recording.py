"""A recording for tests: routed sets that are drawn."""

import numpy as np
from recorded import Recording

from hga_compile.configs.budget import Budget
from hga_compile.configs.routing import Routing
from hga_compile.kernels.plan import plan_queries

ROUTING = Routing(budget=Budget(fraction=0.1, tokens=16), dense_below=0, centre_tokens=16)


def drawn(tokens=1024, steps=12, heads=6, seed=0):
    """A recording whose sets are drawn: sinks, window, and as many others as the plan has."""
    random = np.random.default_rng(seed)
    groups = np.zeros((steps, heads, tokens // 4), np.bool_)
    for step in range(steps):
        length = tokens - steps + 1 + step
        plan = plan_queries(ROUTING, length - 1, 1, None)
        end, window, last = int(plan.sink_end), int(plan.window), -(-length // 4)
        for head in range(heads):
            groups[step, head, :end] = groups[step, head, window:last] = True
            own = random.choice(np.arange(end, window), int(plan.taken), replace=False)
            groups[step, head, own] = True
    return Recording(groups, tokens, ROUTING, {"text": {"name": "drawn"}, "model": {"name": "none"}})
