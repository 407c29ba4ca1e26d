"""A study whose quality is a formula of the setting: what the search does does not depend on a checkpoint."""

from pathlib import Path

from hga_compile.configs.catalogue import gpu_card, model_card
from hga_compile.configs.loader import load_profile
from hga_compile.tuning.latency import Latency
from hga_compile.tuning.measure import Quality
from hga_compile.tuning.search import Goal, metrics, run_screen
from hga_compile.tuning.space import Space
from hga_compile.tuning.storage import make_sampler, open_storage, open_study

FACTS = {"model": "qwen3-30b", "gpu": "rtx5090"}


def goal(tiers=("host",), context=65536, gpu="rtx5090", max_delta_nll=0.1):
    card, device = model_card("qwen3-30b"), gpu_card(gpu)
    space = Space(load_profile("default"), tiers, layers=48)
    return Goal(card, device, context, space, Latency(card, device, context, None), 8192, max_delta_nll)


def change(routing):
    """Less with every byte that is read."""
    share = routing.budget.fraction * (2 if routing.summary == "lowbit" else 1)
    return 0.01 / share / routing.bits**0.3 * routing.group_size**0.4


def quality(profile):
    found = change(profile.routing)
    one = {"kl": found, "delta_nll": found, "top1": 0.9, "attended": 0.03, "kv_bytes": 0.03}
    one["summary_bytes"] = profile.routing.bits / 64
    return Quality(**one, by_text={"emma@8192": one})


def screen(place: str | Path, wanted=None, *, trials=20, seed=0, sampler="tpe", resume=False, changed=change):
    """Run the cheap stage and return its study."""
    wanted = wanted or goal()
    study = open_study(
        open_storage(str(place)), "s", make_sampler(sampler, seed), metrics(wanted, "change"), FACTS, resume
    )
    run_screen(study, wanted, changed, trials=trials, timeout=None, jobs=1, told=lambda *_: None)
    return study


if __name__ == "__main__":
    import sys
    import time

    def slowly(routing):
        print("trial", flush=True)
        time.sleep(float(sys.argv[2]))
        return change(routing)

    screen(sys.argv[1], changed=slowly, trials=50)
