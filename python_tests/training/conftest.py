"""The tiny pipeline on disk, once for all tests of the trainer."""

import pytest
import torch
from tiny import build_pipeline


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Folder of the tiny pipeline."""
    folder = tmp_path_factory.mktemp("tiny-pipeline")
    build_pipeline(folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """More threads only wait for each other on tensors this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
