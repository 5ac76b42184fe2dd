"""What came of a run: results.json, the table printed at the end, and the model card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rftcore.rewards import Reward
from rftcore.training import parsing
from rftcore.training.checkpoint import Progress
from rftcore.training.config import RunConfig
from rftcore.training.validation import Mean


def results(
    config: RunConfig,
    progress: Progress,
    judges: Sequence[Reward],
    *,
    validation_prompts: Sequence[str],
    train_prompts: Sequence[str],
    peak_gib: float,
    reload_error: float,
) -> dict[str, Any]:
    """The run's figures. The first judge is the trained reward; the change is paired, image by image."""
    before, after = progress.evaluations[0], progress.evaluations[progress.step]
    rows = {}
    for number, judge in enumerate(judges):
        pairs = list(zip(before[judge.name], after[judge.name], strict=True))
        rows[judge.name] = {
            "role": "trained" if number == 0 else "held out",
            "unit": judge.unit,
            "before": asdict(Mean.of([old for old, _ in pairs])),
            "after": asdict(Mean.of([new for _, new in pairs])),
            "change": asdict(Mean.of([new - old for old, new in pairs])),
        }
    return {
        "algorithm": config.algorithm,
        "steps": progress.step,
        "rewards": rows,
        "evaluation": {
            "prompts": len(validation_prompts),
            "prompts_also_trained_on": len(set(validation_prompts) & set(train_prompts)),
            "images_per_prompt": config.eval.num_validation_images,
            "images": len(validation_prompts) * config.eval.num_validation_images,
            "seed": config.eval.seed,
        },
        **asdict(progress.counters),
        "peak_memory_gib": peak_gib,
        "lora_reload_error": reload_error,
    }


def table(figures: dict[str, Any]) -> str:
    """The results for a terminal."""
    lines = [f"{'reward':<34}{'before':>18}{'after':>18}{'change':>18}"]
    for name, row in figures["rewards"].items():
        cells = "".join(f"{_plus_minus(row[key], sign=key == 'change'):>18}" for key in ("before", "after", "change"))
        title = f"{name} ({row['role']}, {row['unit']})"
        lines.append(f"{title:<34}{cells}")
    lines += [
        f"mean ± standard error over {_evaluated_on(figures['evaluation'])}",
        f"{figures['steps']} steps, {figures['reward_queries']} reward queries, "
        f"{figures['unet_evaluations']} UNet evaluations, {figures['wall_clock_s']:.1f} s, "
        f"peak memory {figures['peak_memory_gib']:.2f} GiB",
    ]
    return "\n".join(lines)


def model_card(config: RunConfig, base: str, figures: dict[str, Any]) -> str:
    """README.md of the output folder, with the hub's front matter."""
    rows = "\n".join(
        f"| {name} | {row['role']} | {row['unit']} | "
        + " | ".join(_plus_minus(row[key], sign=key == "change") for key in ("before", "after", "change"))
        + " |"
        for name, row in figures["rewards"].items()
    )
    embedded = base == "rftcore.digits"
    source = "rftcore.digits.path()" if embedded else repr(base)
    imports = ["import rftcore"] * embedded + ["from diffusers import StableDiffusionPipeline"]
    return f"""---
library_name: diffusers
base_model: {base}
tags:
- text-to-image
- lora
- reward-fine-tuning
- {config.algorithm}
---

# LoRA of {base}, fine-tuned on the reward {next(iter(figures["rewards"]))}

Trained with rftcore ({config.algorithm}), {figures["steps"]} optimizer steps of {config.train.batch_size} samples.

```python
{chr(10).join(imports)}

pipeline = StableDiffusionPipeline.from_pretrained({source})
pipeline.load_lora_weights("path/to/this/folder")
```

![before and after, from the same noise](before_after.png)

| reward | role | unit | before | after | change |
|---|---|---|---|---|---|
{rows}

Mean ± standard error over {_evaluated_on(figures["evaluation"])}.
{figures["reward_queries"]} reward queries, {figures["unet_evaluations"]} UNet evaluations, \
{figures["wall_clock_s"]:.1f} s, peak memory {figures["peak_memory_gib"]:.2f} GiB.

```yaml
{parsing.to_yaml(config).rstrip()}
```
"""


def _evaluated_on(evaluation: dict[str, Any]) -> str:
    seen = evaluation["prompts_also_trained_on"]
    kind = "held-out prompts" if not seen else f"validation prompts ({seen} of them trained on)"
    return (
        f"{evaluation['prompts']} {kind} x {evaluation['images_per_prompt']} images = {evaluation['images']}, "
        "the same noise before and after"
    )


def _plus_minus(value: dict[str, float], *, sign: bool) -> str:
    return f"{value['mean']:{'+' if sign else ''}.3f} ± {value['standard_error']:.3f}"
