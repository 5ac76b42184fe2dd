"""What came of a run: results.json, the table printed at the end, and the model card."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rftcore.rewards import Reward
from rftcore.training import parsing
from rftcore.training.checkpoint import Progress
from rftcore.training.config import RunConfig
from rftcore.training.evaluation import alarm, early_stop
from rftcore.training.evaluation.scale_sweep import Sweep
from rftcore.training.evaluation.validation import DIVERSITY, DRIFT, Mean, diversity_left


def results(
    config: RunConfig,
    progress: Progress,
    judges: Sequence[Reward],
    *,
    validation_prompts: Sequence[str],
    train_prompts: Sequence[str],
    peak_gib: float,
    reload_error: float,
    sweep: Sweep | None = None,
    stopped: str | None = None,
) -> dict[str, Any]:
    """The run's figures. The first judge is the trained reward; the change is paired, image by image."""
    before, after = progress.evaluations[0], progress.evaluations[progress.step]
    rows = {}
    for number, judge in enumerate(judges):
        pairs = list(zip(before[judge.name], after[judge.name], strict=True))
        rows[judge.name] = {
            "role": "trained" if number == 0 else "held out",
            "unit": judge.unit,
            "before": _mean([old for old, _ in pairs]),
            "after": _mean([new for _, new in pairs]),
            "change": _mean([new - old for old, new in pairs]),
        }
    trained, *held_out = [judge.name for judge in judges]
    return {
        "algorithm": config.algorithm,
        "steps": progress.step,
        "stopped": stopped,
        "rewards": rows,
        "drift": _drift(after),
        "diversity": _diversity(after, before),
        "alarms": alarm.alarms(trained, held_out, after, before),
        "best": _best(progress, held_out[0]) if held_out else None,
        "lora_scales": None if sweep is None else _scales(sweep, rows, before),
        "evaluation": {
            "prompts": len(validation_prompts),
            "prompts_also_trained_on": len(set(validation_prompts) & set(train_prompts)),
            "images_per_prompt": config.eval.num_validation_images,
            "images": len(validation_prompts) * config.eval.num_validation_images,
            "seed": config.eval.seed,
        },
        **asdict(progress.counters),
        "time/sweep_s": None if sweep is None else sweep.seconds,
        "peak_memory_gib": peak_gib,
        "lora_reload_error": reload_error,
    }


def _mean(values: Sequence[float]) -> dict[str, float | None]:
    """For JSON, which knows no NaN: what no image has a value for is None."""
    return {key: value if math.isfinite(value) else None for key, value in asdict(Mean.of(values)).items()}


def _drift(measures: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Space -> mean distance from step 0's images; eps: from the model without its adapter."""
    found = {name.removeprefix(DRIFT): values for name, values in measures.items() if name.startswith(DRIFT)}
    return {space: _mean(values) for space, values in found.items()}


def _diversity(after: Mapping[str, Sequence[float]], before: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Space -> mean distance between a prompt's images, before and after, and what share of it is left."""
    found = {}
    for name in after:
        if name.startswith(DIVERSITY) and name in before:
            left = diversity_left(name, after, before)
            found[name.removeprefix(DIVERSITY)] = {
                "before": statistics.fmean(before[name]),
                "after": statistics.fmean(after[name]),
                "left": left if math.isfinite(left) else None,
            }
    return found


def _best(progress: Progress, judge: str) -> dict[str, Any]:
    step = early_stop.best_step(progress.evaluations, judge)
    return {"judge": judge, "step": step, **_mean(progress.evaluations[step][judge])}


def _scales(sweep: Sweep, rewards: Mapping[str, Any], before: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    return [
        {
            "scale": scale,
            "rewards": {name: _mean(measures[name]) for name in rewards},
            "drift": _drift(measures),
            "diversity": _diversity(measures, before),
        }
        for scale, measures in sweep.measures.items()
    ]


def table(figures: dict[str, Any]) -> str:
    """The results for a terminal."""
    lines = [f"{'reward':<34}{'before':>18}{'after':>18}{'change':>18}"]
    for name, row in figures["rewards"].items():
        cells = "".join(f"{_plus_minus(row[key], sign=key == 'change'):>18}" for key in ("before", "after", "change"))
        title = f"{name} ({row['role']}, {row['unit']})"
        lines.append(f"{title:<34}{cells}")
    lines += [f"mean ± standard error over {_evaluated_on(figures['evaluation'])}", *_guards(figures)]
    if figures["lora_scales"]:
        lines += ["", *(f"{cells[0]:<34}" + "".join(f"{cell:>18}" for cell in cells[1:]) for cells in _sweep(figures))]
    lines += [
        f"{figures['steps']} steps, {figures['reward_queries']} reward queries, "
        f"{figures['unet_evaluations']} UNet evaluations, {figures['wall_clock_s']:.1f} s{_sweep_time(figures)}, "
        f"peak memory {figures['peak_memory_gib']:.2f} GiB",
    ]
    return "\n".join(lines)


def model_card(config: RunConfig, base: str, figures: dict[str, Any], usage: str) -> str:
    """README.md of the output folder, with the hub's front matter; `usage` are the lines of Python that load it."""
    rows = "\n".join(
        f"| {name} | {row['role']} | {row['unit']} | "
        + " | ".join(_plus_minus(row[key], sign=key == "change") for key in ("before", "after", "change"))
        + " |"
        for name, row in figures["rewards"].items()
    )
    lora = config.train.weights == "lora"
    guards = "\n".join(f"- {sentence}" for sentence in _guards(figures))
    return f"""---
library_name: diffusers
base_model: {base}
tags:
- {"unconditional-image-generation" if "DDPMPipeline" in usage or "DDIMPipeline" in usage else "text-to-image"}
{"- lora" if lora else "- full-fine-tuning"}
- reward-fine-tuning
- {config.algorithm}
---

# {"LoRA" if lora else "UNet"} of {base}, fine-tuned on the reward {next(iter(figures["rewards"]))}

Trained with rftcore ({config.algorithm}), {figures["steps"]} optimizer steps of {config.train.batch_size} samples.

```python
{usage}
```

![before and after, from the same noise](before_after.png)

| reward | role | unit | before | after | change |
|---|---|---|---|---|---|
{rows}

Mean ± standard error over {_evaluated_on(figures["evaluation"])}.
{figures["reward_queries"]} reward queries, {figures["unet_evaluations"]} UNet evaluations, \
{figures["wall_clock_s"]:.1f} s{_sweep_time(figures)}, peak memory {figures["peak_memory_gib"]:.2f} GiB.

{guards}
{_scales_section(figures)}
```yaml
{parsing.to_yaml(config).rstrip()}
```
"""


def _guards(figures: dict[str, Any]) -> Iterator[str]:
    """A sentence for each thing that tells learning from exploiting the reward."""
    drift, diversity, best = figures["drift"], figures["diversity"], figures["best"]
    if drift:
        where = ", ".join(f"{space} {value['mean']:.3g}" for space, value in drift.items())
        yield f"drift from step 0: {where}"
    for space, value in diversity.items():
        if value["left"] is not None:
            yield f"diversity among a prompt's images: {value['left']:.0%} of step 0's ({space})"
    if best is not None:
        kept = "before training" if best["step"] == 0 else "kept in best/"
        yield f"the held-out {best['judge']} was best at step {best['step']}: {_plus_minus(best, sign=False)} ({kept})"
    if figures["stopped"]:
        yield f"stopped early: {figures['stopped']}"
    for sentence in figures["alarms"]:
        yield f"ALARM: {sentence}"


def _sweep(figures: dict[str, Any]) -> Iterator[list[str]]:
    """The rows of the table of scales, its head first."""
    scales = figures["lora_scales"]
    rewards, spaces = list(scales[0]["rewards"]), list(scales[-1]["drift"])
    diversity = list(scales[-1]["diversity"])
    yield ["LoRA x", *rewards, *(f"drift {space}" for space in spaces), *(f"diversity {space}" for space in diversity)]
    for row in scales:
        yield [
            f"{row['scale']:g}",
            *(_plus_minus(row["rewards"][name], sign=False) for name in rewards),
            *(_cell(row["drift"].get(space, {}).get("mean"), ".3g") for space in spaces),
            *(_cell(row["diversity"].get(space, {}).get("left"), ".0%") for space in diversity),
        ]


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _scales_section(figures: dict[str, Any]) -> str:
    if not figures["lora_scales"]:
        return ""
    head, *rows = _sweep(figures)
    lines = [head, ["---"] * len(head), *rows]
    cells = "\n".join(f"| {' | '.join(row)} |" for row in lines)
    return f"\nThe LoRA at other scales, from the same noise:\n\n![LoRA scales](lora_scales.png)\n\n{cells}\n"


def _sweep_time(figures: dict[str, Any]) -> str:
    seconds = figures["time/sweep_s"]
    return "" if not seconds else f" (and {seconds:.1f} s for LoRA scales)"


def _evaluated_on(evaluation: dict[str, Any]) -> str:
    seen = evaluation["prompts_also_trained_on"]
    kind = "held-out prompts" if not seen else f"validation prompts ({seen} of them trained on)"
    return (
        f"{evaluation['prompts']} {kind} x {evaluation['images_per_prompt']} images = {evaluation['images']}, "
        "the same noise before and after"
    )


def _plus_minus(value: dict[str, float | None], *, sign: bool) -> str:
    if value["mean"] is None:
        return "none scored"
    return f"{value['mean']:{'+' if sign else ''}.3f} ± {value['standard_error']:.3f}"
