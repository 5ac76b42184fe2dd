"""The images of step 0 as drift is measured from them: kept in the output folder, so that a resumed run finds them."""

from __future__ import annotations

from collections.abc import Mapping

from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from rftcore.training.run_directory import RunDirectory

NAME = "samples/step-000000.safetensors"


def save(directory: RunDirectory, features: dict[str, Tensor]) -> None:
    """Writes the features (N, ...) of each space."""
    directory.write(NAME, to_bytes({space: tensor.contiguous() for space, tensor in features.items()}))


def load(directory: RunDirectory, features: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """What `save` wrote; None where it is gone, unreadable or not of as many images, of the same size, as `features`."""
    try:
        stored = load_file(directory.path / NAME)
    except (OSError, SafetensorError):
        return None
    fits = all(stored[space].shape == features[space].shape for space in stored.keys() & features.keys())
    return stored if fits else None
