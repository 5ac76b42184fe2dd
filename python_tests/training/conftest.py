"""The tiny pipeline on disk, once for all tests of the trainer."""

import pytest
import tiny_models
import torch
from tiny import build_pipeline


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Folder of the tiny pipeline."""
    folder = tmp_path_factory.mktemp("tiny-pipeline")
    build_pipeline(folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A folder with a pipeline of each kind that is served."""
    paths = {kind: tmp_path_factory.mktemp(kind) for kind in tiny_models.BUILDERS}
    for kind, path in paths.items():
        tiny_models.save(kind, path)
    return paths


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """More threads only wait for each other on tensors this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
