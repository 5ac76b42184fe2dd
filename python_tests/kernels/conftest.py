"""Where there is a GPU, the tests of kernels run on it, elsewhere in Triton's interpreter."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _on_the_gpu():
    if torch.cuda.is_available():
        with torch.device("cuda"):
            yield
    else:
        yield
