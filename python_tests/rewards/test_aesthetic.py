"""The aesthetic predictor: one affine map, of features of length 1."""

import pytest
import torch
from safetensors.torch import save_file
from tiny_rewards import SIZE, as_pil, assert_same, eight_bit_images, pil_clip_processor, pixel_gradient, save_clip
from torch import nn
from transformers import CLIPModel

from rftcore import rewards
from rftcore.rewards import RewardSpecError
from rftcore.rewards.aesthetic import Aesthetic
from rftcore.rewards.affine_head import folded


def head(features=24):
    """LAION's layers, with its dropout, drawn larger than at their start."""
    layers = nn.Sequential(
        nn.Linear(features, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )
    generator = torch.Generator().manual_seed(2)
    for parameter in layers.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * (2 / parameter.shape[-1]) ** 0.5
    # Away from zero, as scores are.
    layers[-1].bias.data.fill_(2.0)
    return layers.eval()


def state(layers):
    return {f"layers.{name}": tensor for name, tensor in layers.state_dict().items()}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    save_clip(folder)
    torch.save(state(head()), folder / "sac+logos+ava1-l14-linearMSE.pth")
    return str(folder), str(folder / "sac+logos+ava1-l14-linearMSE.pth")


def test_the_folded_map_is_the_layers():
    """At the shapes of ViT-L/14, on features of length 1, and in fp32 as it is computed."""
    layers = head(768)
    slope, offset = folded(state(layers))
    assert slope.shape == (768,) and offset.shape == () and slope.dtype is torch.float64
    features = nn.functional.normalize(torch.randn(50, 768, dtype=torch.float64), dim=-1)
    wanted = layers.double()(features)[:, 0]
    assert wanted.std() > 0.01
    torch.testing.assert_close(features @ slope + offset, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        (features.float() @ slope.float() + offset.float()).double(), wanted, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(("size", "rtol"), [((61, 50), 1e-3), ((SIZE, SIZE), 1e-5)])
def test_scores_are_the_slow_ones(places, size, rtol):
    folder, file = places
    images = eight_bit_images(3, *size)
    model, processor, layers = CLIPModel.from_pretrained(folder, dtype=torch.float64), pil_clip_processor(SIZE), head()
    wanted = []
    with torch.no_grad():
        for image in as_pil(images):
            pixels = processor(images=image, return_tensors="pt")["pixel_values"].double()
            vision = model.vision_model(pixel_values=pixels)
            features = model.visual_projection(vision.pooler_output)
            wanted.append(layers.double()(features / features.norm())[0, 0])
    reward = Aesthetic(folder, file)
    found = reward(images, ["any"] * 3)
    torch.testing.assert_close(found.double(), torch.stack(wanted), rtol=rtol, atol=0)
    assert found.std() > 0.03
    # By the file's folder, its safetensors, and through the registry.
    assert_same(Aesthetic(folder, folder)(images, [""] * 3), found)
    loaded = rewards.load("aesthetic", options={"model": folder, "head": file})
    assert loaded.differentiable
    assert_same(loaded(images, [""] * 3), found)


def test_safetensors_first(places, tmp_path):
    other = {name: tensor * 2 for name, tensor in state(head()).items()}
    save_file(other, tmp_path / "sac+logos+ava1-l14-linearMSE.safetensors")
    torch.save(state(head()), tmp_path / "sac+logos+ava1-l14-linearMSE.pth")
    assert torch.equal(Aesthetic(places[0], str(tmp_path)).slope, folded(other)[0].float())


def test_gradient_and_memory(places):
    images = eight_bit_images(2, 40, 40)
    ours, plain = Aesthetic(*places), Aesthetic(*places, checkpointing=False)
    gradient = pixel_gradient(ours, images, ["", ""])
    assert (gradient != 0).all()
    assert_same(gradient, pixel_gradient(plain, images, ["", ""]))
    # The text tower is not held.
    assert not any("text" in name for name, _ in ours.named_parameters())


def test_heads_that_do_not_fit(places, tmp_path):
    layers = state(head())
    for name, tensors, message in (
        ("few", {k: v for k, v in layers.items() if k != "layers.4.bias"}, "layers.4.bias is missing"),
        ("many", layers | {"layers.9.weight": torch.ones(1, 1)}, "layers.9.weight, too"),
        ("wide", state(head(32)), "takes 32 features, and the model .* gives 24"),
        ("torn", layers | {"layers.2.weight": torch.ones(128, 9)}, "is no aesthetic predictor"),
        ("two", layers | {"layers.7.weight": torch.ones(2, 16), "layers.7.bias": torch.ones(2)}, "gives 2 numbers"),
    ):
        torch.save(tensors, tmp_path / f"{name}.pth")
        with pytest.raises(RewardSpecError, match=f"'aesthetic' cannot load head='.*{name}.pth': .*{message}"):
            Aesthetic(places[0], str(tmp_path / f"{name}.pth"))
