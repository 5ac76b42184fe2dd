"""The prompts of a run: those it trains on, and those it is evaluated on."""

from __future__ import annotations

from rftcore import prompts
from rftcore.errors import UsageError
from rftcore.training.config import EvalConfig, RunConfig


def train_and_validation(config: RunConfig) -> tuple[list[str], list[str]]:
    """Training and validation prompts, in the config's template.

    With `held_out_share` both are sides of `config.prompts`. They are split before they are filled in, so that another
    template leaves every prompt on its side.

    Raises: UsageError where validation prompts are given besides; rftcore.prompts.PromptsError.
    """
    train = prompts.load(config.prompts)
    given = config.eval.validation_prompts
    if config.held_out_share is None:
        validation = prompts.load(given)
    elif given != EvalConfig().validation_prompts:
        raise UsageError(
            f"held_out_share={config.held_out_share} evaluates a part of prompts={_short(config.prompts)}, and "
            f"eval.validation_prompts={_short(given)} names others: leave one of the two out"
        )
    else:
        train, validation = prompts.split(train, config.held_out_share)
    if config.prompt_template is not None:
        train, validation = (prompts.fill(side, config.prompt_template) for side in (train, validation))
    return train, validation


def _short(source: str | list[str]) -> str:
    return repr(source) if isinstance(source, str) else f"(a list of {len(source)})"
