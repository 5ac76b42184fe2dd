"""The line of the drop-in table changes what autograd keeps, and not one loss."""

import pytest
import torch

from benchmarks.drop_in import LINES, STOCK, Diffusers, difference, save_pipeline


def trained(folder, line, *, first=False, learning_rate=None):
    program = Diffusers(folder, LINES[line], first=first, dtype=torch.float64)
    if learning_rate is not None:
        program.optimizer.param_groups[0]["lr"] = learning_rate
    for _ in range(3):
        program.step()
    return program


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("pipeline"), latent_size=8)


@pytest.fixture(scope="module")
def stock(folder):
    return trained(folder, STOCK)


def test_training_moves_the_losses(folder, stock):
    assert difference(trained(folder, STOCK, learning_rate=0.0).losses, stock.losses) > 1e-3


@pytest.mark.parametrize("first", [False, True], ids=["after the adapter", "before it"])
@pytest.mark.parametrize("line", [line for line in LINES if "rftcore" in line])
def test_one_line_same_losses_in_less_memory(folder, stock, line, first):
    ours = trained(folder, line, first=first)
    assert difference(ours.losses, stock.losses) < 1e-10
    assert ours.saved_mib() < 0.8 * stock.saved_mib()
