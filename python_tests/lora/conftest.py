"""The tiny pipelines and LoRAs, once for all tests of LoRA files."""

import copy

import pytest
import tiny_loras

from rftcore.lora import files

COMPONENTS = {"sd1": ["unet", "text_encoder"], "sdxl": ["unet", "text_encoder", "text_encoder_2"]}


@pytest.fixture(scope="session")
def stock_pipelines():
    return {kind: tiny_loras.pipeline(kind) for kind in COMPONENTS}


@pytest.fixture
def make_pipeline(stock_pipelines):
    """A fresh copy, without adapters."""
    return lambda kind: copy.deepcopy(stock_pipelines[kind])


@pytest.fixture(scope="session")
def shapes(stock_pipelines):
    """Of each kind, the layers that a LoRA can be on; diffusers loads none on a text encoder's projection."""
    return {
        kind: {
            name: shape
            for name, shape in tiny_loras.adaptable(pipe, COMPONENTS[kind]).items()
            if not name.endswith("text_projection")
        }
        for kind, pipe in stock_pipelines.items()
    }


@pytest.fixture(scope="session")
def two(shapes, tmp_path_factory):
    """Of each kind, two LoRAs that share some layers, with their files: [(LoRA, path), ...]."""
    folder = tmp_path_factory.mktemp("loras")
    found = {}
    for kind in COMPONENTS:
        loras = [tiny_loras.make(shapes[kind], seed, every=every) for seed, every in ((0, 2), (1, 3))]
        found[kind] = [
            (lora, files.write(lora, folder / f"{kind}-{name}.safetensors"))
            for name, lora in zip("ab", loras, strict=True)
        ]
    return found
