"""Batches, epochs and processes that do not divide: the error names the nearest number that does."""

import pytest

from rftcore.errors import UsageError
from rftcore.training.algorithm_configs import ALGORITHMS, batch_shares
from rftcore.training.parsing import build

NOISE = {"sampling": {"scheduler": "ddim", "eta": 1.0}}


@pytest.mark.parametrize(
    ("batch", "processes", "accumulation", "nearest"),
    [(7, 2, 2, 8), (6, 4, 1, 8), (5, 1, 4, 4), (1, 2, 1, 2), (10, 4, 1, 8), (3, 2, 8, 16)],
)
def test_batch_into_processes_and_accumulation(batch, processes, accumulation, nearest):
    train = {"batch_size": batch, "gradient_accumulation_steps": accumulation}
    config = build(ALGORITHMS["draft"], {"train": train})
    message = (
        rf"train.batch_size={batch} does not divide into {processes} process\(es\) x "
        rf"train.gradient_accumulation_steps={accumulation}; the nearest that does is {nearest}$"
    )
    with pytest.raises(UsageError, match=message):
        batch_shares(config, processes)
    config.train.batch_size = nearest
    assert batch_shares(config, processes) == (nearest // processes, nearest // processes // accumulation)


@pytest.mark.parametrize("algorithm", ["ddpo", "dpok", "rwr", "sft"])
def test_samples_of_an_epoch_into_processes(algorithm):
    train = {"samples_per_epoch": 9, "batch_size": 9, "gradient_accumulation_steps": 1, "max_train_steps": 45}
    config = build(ALGORITHMS[algorithm], {"train": train, **NOISE})
    config.train.batch_size = 8
    with pytest.raises(UsageError, match=r"train.samples_per_epoch=9 does not divide into 2 process\(es\).* is 8$"):
        batch_shares(config, 2)
    assert batch_shares(config, 1) == (8, 8)


@pytest.mark.parametrize(
    ("algorithm", "train", "message"),
    [
        ("ddpo", {"samples_per_epoch": 10, "batch_size": 4}, "samples_per_epoch=10 .*batch_size=4; the nearest .* is 8"),
        ("ddpo", {"samples_per_epoch": 3, "batch_size": 4}, "samples_per_epoch=3 .*batch_size=4; the nearest .* is 4"),
        ("ddpo", {"samples_per_epoch": 8, "batch_size": 4, "max_train_steps": 5}, "max_train_steps=5 .* of 2 .* is 4$"),
        ("dpok", {"policy_steps": 5, "max_train_steps": 12}, "max_train_steps=12 .* of 5 .* is 10$"),
        ("dpok", {"policy_steps": 5, "max_train_steps": 1}, "max_train_steps=1 .* of 5 .* is 5$"),
        ("rwr", {"samples_per_epoch": 8, "batch_size": 4, "max_train_steps": 11}, "max_train_steps=11 .* of 10 .* is 10$"),
    ],
)  # fmt: skip
def test_epochs_and_steps(algorithm, train, message):
    with pytest.raises(UsageError, match=message):
        build(ALGORITHMS[algorithm], {"train": train, **NOISE})
