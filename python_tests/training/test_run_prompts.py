"""Which prompts a run trains on and which it is evaluated on."""

import pytest

from rftcore import prompts
from rftcore.errors import UsageError
from rftcore.training import DraftConfig
from rftcore.training.config import EvalConfig
from rftcore.training.run_prompts import train_and_validation


def test_both_as_given():
    config = DraftConfig(prompts=["cat"], eval=EvalConfig(validation_prompts=["dog"]))
    assert train_and_validation(config) == (["cat"], ["dog"])


def test_held_out_share_and_template():
    config = DraftConfig(prompts="simple_animals", held_out_share=0.2, prompt_template="{a} in a garden")
    train, validation = train_and_validation(config)
    sides = prompts.split(prompts.load("simple_animals"), 0.2)
    assert [train, validation] == [prompts.fill(side, "{a} in a garden") for side in sides]
    assert not set(train) & set(validation)


def test_held_out_share_beside_validation_prompts():
    config = DraftConfig(prompts=["cat"], held_out_share=0.2, eval=EvalConfig(validation_prompts="my.prompts"))
    with pytest.raises(UsageError, match=r"held_out_share=0.2 .*\(a list of 1\).*eval.validation_prompts='my.prompts'"):
        train_and_validation(config)
