"""What the recipes for GPUs of 8 to 80 GB take on them, as `rftcore plan --recipe` predicts: no weights, no clock.

Everything: weights, LoRA with its gradients and AdamW, the reward by its shapes in fp32, decoding, transients, and
0.7 GiB for the CUDA context. Of the GiB in a recipe's name 4% are left alone: cards report up to 3% less, and an
allocator's pieces do not fit into each other without rest.
"""

from __future__ import annotations

import re

from benchmarks import harness
from rftcore.commands.plan import predict
from rftcore.commands.plan_options import PlanOptions
from rftcore.commands.plan_recipe import options_of
from rftcore.training import recipes

_TIER = re.compile(r"_(\d+)gb$")
# Of a card's memory, what a recipe may take.
TAKEN = 0.96


def tiers() -> dict[str, int]:
    """The recipes that are made for a GPU, and its GiB."""
    return {name: int(found[1]) for name in recipes.names() if (found := _TIER.search(name))}


def main() -> None:
    rows = []
    for name, gib in sorted(tiers().items(), key=lambda tier: (tier[0].split("_")[:2], tier[1])):
        options = options_of(name)
        prediction = predict(PlanOptions(recipe=name, device_memory=f"{TAKEN * gib:g}GiB", **options))
        plan = prediction.plan
        rows.append(
            {
                "recipe": name,
                "device_gib": gib,
                "peak_gib": prediction.peak_bytes / 2**30,
                "at_once": options.get("trained_at_once") or options["batch"],
                "differentiated": plan.differentiated or "1 at a time",
                "replayed": plan.replays if plan.differentiated else "",
                "extra_percent": plan.extra_percent if plan.differentiated else "",
                "reward": options["reward_memory"],
                "reward_gib": prediction.held["reward"] / 2**30,
                "options": options,
            }
        )
    harness.report("tiers", rows, {"reward weights": "fp32", "context_gib": 0.7})


if __name__ == "__main__":
    main()
