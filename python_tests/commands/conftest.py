"""LoRAs, once for all tests of the commands."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from samples import ENDINGS

from rftcore import digits
from rftcore.training import weights as training_weights
from rftcore.training.algorithm_configs import DraftConfig
from rftcore.training.config import LoraConfig


@pytest.fixture(scope="session")
def loras(tmp_path_factory):
    """Two folders as training leaves them, with adapters that do something."""
    folders = []
    for seed in range(2):
        folder = tmp_path_factory.mktemp("lora")
        unet = UNet2DConditionModel.from_pretrained(digits.path(), subfolder="unet")
        config = DraftConfig(lora=LoraConfig(rank=3, alpha=2, target_modules=ENDINGS))
        training_weights.attach(unet, config, seed)
        torch.manual_seed(seed)
        for name, parameter in training_weights.trainable(unet).items():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        training_weights.save(unet, folder)
        folders.append(folder)
    return folders
