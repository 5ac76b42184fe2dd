"""Objects added and removed, with a small OWL-ViT, against PIL, its processor's settings and its own forward."""

import numpy as np
import pytest
import torch
from tiny_rewards import as_pil, assert_same, pixel_gradient
from torch.nn.functional import interpolate
from transformers import CLIPTokenizer, OwlViTConfig, OwlViTForObjectDetection

from rftcore import rewards
from rftcore.digits.vocabulary import write_tokenizer
from rftcore.rewards import RewardSpecError

try:
    from transformers.models.owlvit.image_processing_pil_owlvit import OwlViTImageProcessorPil
except ImportError:
    # Its name in transformers 4.
    from transformers import OwlViTImageProcessor as OwlViTImageProcessorPil

SIDE = 64
QUERIES = ["the digit 3", "a 7"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("owlvit")
    write_tokenizer(folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    model = OwlViTForObjectDetection(
        OwlViTConfig(
            text_config={
                "vocab_size": len(tokenizer),
                "hidden_size": 24,
                "max_position_embeddings": 12,
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id,
                **layers,
            },
            vision_config={"hidden_size": 32, "image_size": SIDE, "patch_size": 16, **layers},
            projection_dim=24,
        )
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        # Not what a transformers version starts with.
        for name, parameter in sorted(model.named_parameters()):
            if "norm" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        # Logits of about one, which tell boxes, queries and images apart.
        for layer, bias in ((model.class_head.logit_shift, 0.3), (model.class_head.logit_scale, 1.0)):
            layer.weight.mul_(0.05)
            layer.bias.fill_(bias)
        # Nearly constant over a patch: PIL's rounding to 8 bits, which the reward does not do, then averages out.
        patches = model.owlvit.vision_model.embeddings.patch_embedding.weight
        patches.copy_((patches.mean(dim=(2, 3), keepdim=True) * 16 + patches / 20) * 5e-3)
    model.save_pretrained(folder)
    return folder


def made(folder, kind, **options):
    return rewards.load(f"owlvit_{kind}", options={"model": str(folder), "queries": QUERIES, **options})


def pictures(height=96, width=81):
    """(3, 3, H, W) in [0, 1], of 8 bits."""
    coarse = torch.rand((3, 3, 7, 7), generator=torch.Generator().manual_seed(1))
    return (interpolate(coarse, (height, width), mode="bilinear") * 255).round() / 255


def by_hand(folder, image):
    """Every box's probability for every query (boxes, Q) of one image, by PIL, the processor and the whole model."""
    model = OwlViTForObjectDetection.from_pretrained(folder).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    ids = tokenizer(QUERIES, padding="max_length", max_length=12, return_tensors="pt")
    (picture,) = as_pil(image[None])
    processor = OwlViTImageProcessorPil(size={"height": SIDE, "width": SIDE})
    pixels = torch.tensor(np.stack(processor(picture)["pixel_values"]))
    with torch.no_grad():
        return model(pixel_values=pixels, **ids).logits[0].double().sigmoid()


# Without a resize nothing is rounded.
@pytest.mark.parametrize(
    ("size", "tolerance"), [((SIDE, SIDE), 1e-5), ((96, 81), 1e-3), ((40, 150), 1e-3)], ids=["same", "larger", "wide"]
)
def test_equals_the_processor_and_the_model_one_image_at_a_time(folder, size, tolerance):
    images = pictures(*size)
    boxes = torch.stack([by_hand(folder, image) for image in images])  # (B, boxes, Q)
    best = boxes.amax(dim=1)
    expected = {
        ("addition", False): best.mean(-1),
        ("addition", True): best.log().mean(-1),
        ("removal", False): 1 - best.mean(-1),
        ("removal", True): (1 - best).log().mean(-1),
    }
    for (kind, log), scores in expected.items():
        reward = made(folder, kind, log=log)
        with torch.no_grad():
            torch.testing.assert_close(reward(images, ["a"] * 3).double(), scores, rtol=tolerance, atol=0)
        assert reward.unit == ("nats" if log else "probability")
    # Told apart by more than the tolerance.
    assert best.std(0).min() > 2e-3 and (best[:, 0] - best[:, 1]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["addition", "removal"])
def test_gradient_reaches_pixels_and_recomputing_changes_nothing(folder, kind):
    recomputed, kept = (made(folder, kind, checkpointing=checkpointing) for checkpointing in (True, False))
    gradient = pixel_gradient(recomputed, pictures(64, 64), ["a"] * 3)
    assert (gradient.abs().amax(dim=(2, 3)) > 0).all()
    assert_same(gradient, pixel_gradient(kept, pictures(64, 64), ["a"] * 3))
    assert not any(parameter.requires_grad for parameter in recomputed.function.parameters())


@pytest.mark.parametrize("factor", [1e4, 1e-6])
def test_fp16_has_a_gradient_of_any_size(folder, factor):
    images, low = pictures(64, 64), made(folder, "addition", dtype="fp16")
    wanted = pixel_gradient(made(folder, "addition"), images, ["a"] * 3)
    found = pixel_gradient(lambda *given: factor * low(*given), images, ["a"] * 3) / factor
    assert (found - wanted).norm() < 0.03 * wanted.norm()


def test_autocast_changes_nothing_and_a_lower_dtype_little(folder):
    images = pictures(64, 64)
    with torch.no_grad():
        expected = made(folder, "addition")(images, ["a"] * 3)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_same(made(folder, "addition")(images, ["a"] * 3), expected)
        lower = made(folder, "addition", dtype="bf16")(images, ["a"] * 3)
    assert lower.dtype == torch.float32
    torch.testing.assert_close(lower, expected, rtol=0.1, atol=0)


def test_an_image_without_a_box_keeps_its_gradient_and_the_others(folder, monkeypatch):
    """Logits of -8 and 3: the first image shows nothing, and neither result depends on the other."""
    reward = made(folder, "addition", queries=QUERIES[0])
    images = pictures()[:2].requires_grad_()
    logits = reward.function.logits(images)
    shifted = logits + (torch.tensor([[-8.0], [3.0]]) - logits.detach())
    monkeypatch.setattr(reward.function, "logits", lambda images: shifted)
    slopes = []
    for log in (False, True):
        reward.function.log = log
        (gradient,) = torch.autograd.grad(reward(images, ["a"] * 2).sum(), images, retain_graph=True)
        slopes.append(gradient.abs().amax(dim=(1, 2, 3)))
    assert (slopes[0] > 0).all()
    # In nats the image without the object has the larger share: 1 - p against p (1 - p).
    (unit,) = torch.autograd.grad(logits.sum(), images)
    unit = unit.abs().amax(dim=(1, 2, 3))
    p = torch.tensor([-8.0, 3.0]).sigmoid()
    torch.testing.assert_close(slopes[0], p * (1 - p) * unit, rtol=1e-4, atol=0)
    torch.testing.assert_close(slopes[1], (1 - p) * unit, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        ([], "give the text of what to look for"),
        (["a 7", " "], "give the text of what to look for"),
        ("a 7 " * 8, "OWL-ViT reads 12; shorten it"),
    ],
)
def test_wrong_queries(folder, queries, message):
    with pytest.raises(RewardSpecError, match=message):
        made(folder, "removal", queries=queries)


def test_queries_must_be_given(folder):
    with pytest.raises(RewardSpecError, match="needs queries"):
        rewards.load("owlvit_addition", options={"model": str(folder)})
