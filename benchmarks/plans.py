"""What chains of the published models take on whole devices, as `rftcore plan` predicts: no weights, no clock.

Weights, LoRA r=4 on the attention with its gradients and AdamW, decoding and transients; without the reward's model.
"""

from __future__ import annotations

from benchmarks import harness
from rftcore.commands.plan import predict
from rftcore.commands.plan_options import PlanOptions

# Model, images, steps, differentiated steps, GiB of the device, and the most that may run twice, in percent.
CASES = (
    *(("sd15", 4, 50, 50, gib, most) for gib, most in ((3.5, None), (8, 90), (12, 79), (24, 47))),
    *(("sd15", 4, 50, 50, gib, most) for gib, most in ((40, 26), (80, 15), (110, 8))),
    ("sd15", 4, 50, 1, 6.5, 0),
    ("sdxl", 1, 50, 5, 16, None),
)


def main() -> None:
    rows = []
    for model, batch, steps, differentiated, gib, most in CASES:
        options = PlanOptions(
            model=model, batch=batch, steps=steps, backprop_steps=differentiated, device_memory=f"{gib}GiB"
        )
        prediction = predict(options)
        plan = prediction.plan
        rows.append(
            {
                "model": f"{model}, {prediction.size} px",
                "batch": batch,
                "steps": steps,
                "differentiated": differentiated,
                "device_gib": gib,
                "peak_gib": prediction.peak_bytes / 2**30,
                "memory_budget_mib": plan.budget // 2**20,
                "stored": plan.differentiated - plan.replays,
                "replayed": plan.replays,
                "replay_batch": plan.replay_batch if plan.replays else "",
                "decoder": prediction.decoder_level,
                "extra_percent": plan.extra_percent,
                "asked_percent": "" if most is None else most,
                "tflop": prediction.flops / 1e12,
            }
        )
    harness.report("plans", rows, {"dtype": "bf16", "rank": 4, "guidance_scale": 7.5})


if __name__ == "__main__":
    main()
