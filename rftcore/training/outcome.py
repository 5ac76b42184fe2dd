"""The files of a run's end: figures, pictures, model card. Written by the main process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from rftcore.training import report, weights
from rftcore.training.evaluation import grids
from rftcore.training.evaluation.scale_sweep import Sweep

if TYPE_CHECKING:
    from rftcore.training.trainer import Trainer


def write(run: Trainer, scales: Sweep | None, *, peak_gib: float) -> dict[str, Any]:
    """Saves the weights, proves that they reload, writes the rest, and returns what results.json holds.

    Raises: RunError where the weights do not reload.
    """
    directory, model = run.directory, run.engine.model
    weights.save(model, directory.path)
    figures = report.results(
        run.config,
        run.progress,
        run.judges,
        validation_prompts=run.validation.prompts[: run.validation.distinct],
        train_prompts=run.engine.plan.prompts,
        peak_gib=peak_gib,
        reload_error=weights.verify_reload(model, directory.path),
        sweep=scales,
        stopped=run.stop_reason,
    )
    before, after = _grid(run, 0), _grid(run, run.progress.step)
    if before is not None and after is not None:
        directory.write("before_after.png", grids.png(grids.before_after(before, after)))
    if scales is not None:
        directory.write("lora_scales.png", grids.png(_of_scales(run, scales)))
    directory.write("results.json", figures)
    directory.write("README.md", _model_card(run, figures))
    return figures


def _model_card(run: Trainer, figures: dict[str, Any]) -> str:
    base = run.assembly.base_model
    usage = weights.usage(run.engine.model, run.assembly.base_lines, '"path/to/this/folder"')
    return report.model_card(run.config, base, figures, usage)


def _of_scales(run: Trainer, scales: Sweep) -> Image.Image:
    known, found = {0.0: 0, 1.0: run.progress.step}, {}
    for scale in scales.measures:
        grid = scales.grids.get(scale) or _grid(run, known[scale])
        if grid is not None:
            found[f"LoRA x {scale:g}"] = grid
    return grids.first_columns(found, grids.columns(run.config.eval.num_validation_images))


def _grid(run: Trainer, step: int) -> Image.Image | None:
    """The grid of an earlier evaluation."""
    path = Path(run.directory.path, run.directory.sample_grid(step))
    if path.exists():
        with Image.open(path) as grid:
            return grid.convert("RGB")
    run.bar.note(f"{path} is gone, so the pictures at the end lack it")
    return None
