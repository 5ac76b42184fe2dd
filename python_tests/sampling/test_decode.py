"""Decoding and scoring: values, gradients, memory, and the mistakes a reward can make."""

import pytest
import torch
from diffusers import AutoencoderKL

import rftcore
from benchmarks.memory import PeakBytes
from rftcore.sampling import RewardError


@pytest.fixture
def vae():
    def make(dtype=torch.float64, **config):
        return AutoencoderKL(
            block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, sample_size=16,
            **{"scaling_factor": 0.5, "force_upcast": False, **config},
        ).to(dtype).eval()  # fmt: skip

    return make


def brightness_of_top(images, prompts, metadata=None):
    return images[:, :, :3].pow(2).mean((1, 2, 3)) * torch.tensor([len(p) for p in prompts])


def test_decode_undoes_every_scaling(vae):
    latents = torch.randn(3, 4, 8, 8, dtype=torch.float64)
    model = vae()
    expected = model.decode(latents / 0.5).sample / 2 + 0.5
    torch.testing.assert_close(rftcore.decode(model, latents, clamp="none"), expected)
    images = rftcore.decode(model, latents)
    assert images.min() >= 0 and images.max() <= 1
    torch.testing.assert_close(images, expected.clamp(0, 1))
    shifted = vae(shift_factor=0.25)
    expected = shifted.decode(latents / 0.5 + 0.25).sample / 2 + 0.5
    torch.testing.assert_close(rftcore.decode(shifted, latents, clamp="none"), expected)
    mean, std = [0.1, -0.2, 0.3, 0.4], [1.0, 2.0, 0.5, 1.5]
    playground = vae(latents_mean=mean, latents_std=std)
    unscaled = latents * torch.tensor(std).view(1, 4, 1, 1) / 0.5 + torch.tensor(mean).view(1, 4, 1, 1)
    expected = playground.decode(unscaled).sample / 2 + 0.5
    torch.testing.assert_close(rftcore.decode(playground, latents, clamp="none"), expected)
    torch.testing.assert_close(rftcore.decode(None, latents, clamp="none"), latents / 2 + 0.5)


def test_clamps_and_their_gradients(vae):
    latents = (5 * torch.randn(3, 4, 8, 8, dtype=torch.float64)).requires_grad_()
    model = vae()
    raw, stats = rftcore.decode(model, latents, clamp="none", return_stats=True)
    outside = ((raw < 0) | (raw > 1)).double().flatten(1).mean(1)
    torch.testing.assert_close(stats["saturated"], outside)
    through = rftcore.decode(model, latents, clamp="straight_through")
    hard = rftcore.decode(model, latents)
    torch.testing.assert_close(through, hard)
    (plain,) = torch.autograd.grad(raw.sum(), latents)
    (straight,) = torch.autograd.grad(through.sum(), latents)
    torch.testing.assert_close(straight, plain)
    with pytest.raises(ValueError, match="clamp='soft'"):
        rftcore.decode(model, latents, clamp="soft")


def test_force_upcast_leaves_the_module_alone(vae):
    model = vae(torch.float16, force_upcast=True)
    latents = torch.randn(1, 4, 8, 8, requires_grad=True)
    images = rftcore.decode(model, latents, clamp="none")
    expected = rftcore.decode(vae_like(model), latents, clamp="none")
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, expected)
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert torch.autograd.grad(images.sum(), latents)[0].abs().sum() > 0


def vae_like(model):
    wide = AutoencoderKL.from_config(model.config).eval()
    wide.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    return wide


@pytest.mark.parametrize("images_per_call", [1, 2, 5])
@pytest.mark.parametrize("clamp", ["hard", "straight_through"])
def test_score_equals_decode_then_reward(vae, images_per_call, clamp):
    model = vae()
    prompts = ["a", "bb", "ccc", "dddd", "eeeee"]
    latents = torch.randn(5, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64)
    expected = brightness_of_top(rftcore.decode(model, latents, clamp=clamp), prompts)
    (expected_grad,) = torch.autograd.grad((expected * weight).sum(), latents)
    rewards, stats = rftcore.score(
        model, latents, brightness_of_top, prompts, images_per_call=images_per_call, clamp=clamp, return_stats=True
    )
    torch.testing.assert_close(rewards, expected)
    assert stats["saturated"].shape == (5,)
    # .sum() hands the backward an expanded gradient
    (grad,) = torch.autograd.grad((rewards * weight).sum(), latents, retain_graph=True)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-11, atol=1e-13)
    (grad,) = torch.autograd.grad(rewards.sum(), latents)
    (whole,) = torch.autograd.grad(
        brightness_of_top(rftcore.decode(model, latents, clamp=clamp), prompts).sum(), latents
    )
    torch.testing.assert_close(grad, whole, rtol=1e-11, atol=1e-13)


def test_score_keeps_one_image_in_memory(vae):
    """What the graph holds between forward and backward is one gradient of the latents' size."""
    model = vae()
    latents = torch.randn(4, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    sizes = []

    def watched(images, prompts, metadata=None):
        sizes.append(len(images))
        return brightness_of_top(images, prompts)

    rewards = rftcore.score(model, latents, watched, ["a"] * 4)
    assert sizes == [1, 1, 1, 1]
    node = rewards.grad_fn
    assert sum(t.untyped_storage().nbytes() for t in node.saved_tensors) == latents.untyped_storage().nbytes()


def test_metadata_and_prompts_arrive(vae):
    seen = []

    def reward(images, prompts, metadata):
        seen.append((list(prompts), list(metadata)))
        return images.mean((1, 2, 3))

    latents = torch.randn(3, 4, 8, 8, dtype=torch.float64)
    rftcore.score(vae=vae(), latents=latents, reward=reward, prompts=list("abc"), metadata=[1, 2, 3], images_per_call=2)
    assert seen == [(["a", "b"], [1, 2]), (["c"], [3])]


def declared(images, prompts, metadata=None):
    return images.mean((1, 2, 3))


declared.differentiable = False


@pytest.mark.parametrize(("reward", "message"), [
    (declared, "declared not differentiable"),
    (lambda images, *_: images.detach().mean((1, 2, 3)), "cut the graph"),
    (lambda images, *_: (images.mean((1, 2, 3)) > 0.5).double(), "cut the graph"),
    (lambda images, *_: torch.full((len(images),), 1.0, requires_grad=True) * 2, "cut the graph"),
    (lambda images, *_: images.mean(), r"shape \(\); it must return .* shape\s+\(1,\)"),
    (lambda images, *_: images.mean((1, 2, 3)).unsqueeze(1), r"shape \(1, 1\)"),
    (lambda images, *_: 3.0, "returned float"),
    (lambda images, *_: images.mean((1, 2, 3)) * float("nan"), "returned nan for the prompt 'x'"),
    (lambda images, *_: images.mean((1, 2, 3)) / 0.0, "returned inf for the prompt 'x'"),
    (lambda images, *_: (images.mean((1, 2, 3)) * 0).sqrt(), "gradient of reward .* is NaN or inf"),
])  # fmt: skip
def test_bad_rewards(vae, reward, message):
    latents = torch.randn(2, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RewardError, match=message):
        rftcore.score(vae(), latents, reward, ["x", "y"])


@pytest.mark.parametrize("gradient", [True, False])
def test_an_image_with_a_broken_reward_is_named_among_others(gradient):
    latents = torch.zeros(3, 3, 4, 4, requires_grad=gradient)
    latents.data[1:] = float("nan")
    with pytest.raises(RewardError, match=r"returned nan for the prompt 'y' and 1 more \('z'\)"):
        rftcore.score(None, latents, lambda images, *_: images.mean((1, 2, 3)), ["x", "y", "z"], clamp="none")


@pytest.mark.parametrize("images_per_call", [1, 2, 4])
def test_dropped_samples_have_no_reward_and_no_gradient(vae, images_per_call):
    """The others' rewards and gradients are those of a score without them, whatever is made of the dropped ones'."""

    def reward(images, prompts, metadata):
        return torch.stack([rewards_of[prompt](image.mean()) for image, prompt in zip(images, prompts, strict=True)])

    rewards_of = {
        "nan": lambda mean: mean * float("nan"),
        "inf": lambda mean: mean / 0.0,
        "steep": lambda mean: (mean * 0).sqrt(),
        "sound": lambda mean: mean,
    }

    decoder, prompts, settings = vae(), ["nan", "sound", "inf", "steep", "sound"], {"images_per_call": images_per_call}
    latents = torch.randn(5, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    rewards, stats = rftcore.score(decoder, latents, reward, prompts, **settings, on_nan="drop", return_stats=True)
    assert stats["dropped"].tolist() == rewards.isnan().tolist() == [True, False, True, True, False]
    (gradient,) = torch.autograd.grad((rewards * torch.arange(5)).nansum(), latents, retain_graph=True)
    (unmasked,) = torch.autograd.grad((rewards * torch.arange(5)).square().nansum(), latents)
    assert torch.equal(unmasked[[0, 2, 3]], torch.zeros_like(unmasked[[0, 2, 3]])), "a gradient of NaN arrives there"
    alone = latents.detach()[[1, 4]].requires_grad_()
    expected = rftcore.score(decoder, alone, reward, ["sound"] * 2)
    torch.testing.assert_close(rewards[[1, 4]], expected, rtol=1e-12, atol=0)
    (expected_gradient,) = torch.autograd.grad(expected[0] + 4 * expected[1], alone)
    torch.testing.assert_close(gradient[[1, 4]], expected_gradient, rtol=1e-11, atol=1e-13)
    assert torch.equal(gradient[[0, 2, 3]], torch.zeros_like(gradient[[0, 2, 3]]))
    with torch.no_grad():
        measured = rftcore.score(decoder, latents, reward, prompts, **settings, on_nan="drop")
    assert measured.isnan().tolist() == [True, False, True, False, False], "a steep reward is none that is missing"


def test_dropping_gives_a_smaller_scale_of_fp16_its_chance():
    def reward(images, prompts, metadata):
        return (images.half() * float(metadata[0])).float().mean((1, 2, 3)) * images.numel()

    latents = torch.rand(3, 3, 4, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.float16):
        rewards = rftcore.score(None, latents, reward, ["a"] * 3, [1, 100, 1e6], on_nan="drop")
    assert rewards.isnan().tolist() == [False, False, True]
    (gradient,) = torch.autograd.grad(rewards.nansum(), latents)
    assert torch.equal(gradient, torch.tensor([0.5, 50, 0]).reshape(-1, 1, 1, 1).expand_as(gradient))


@pytest.mark.parametrize("gradient", [True, False])
def test_the_device_is_waited_for_once_a_score(gradient, monkeypatch):
    waits = []
    for name in ("__bool__", "__float__", "__int__", "item", "tolist"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, real=real, name=name: waits.append(name) or real(self))
    latents = torch.rand(5, 3, 4, 4, requires_grad=gradient)
    rftcore.score(None, latents, lambda images, *_: images.mean((1, 2, 3)), ["x"] * 5)
    assert waits == ["tolist"]


def test_only_images_whose_gradient_overflows_in_fp16_are_scored_again():
    seen = []

    def reward(images, prompts, metadata):
        seen.append(prompts[0])
        return (images.half() * float(metadata[0])).float().mean((1, 2, 3)) * images.numel()

    latents = torch.rand(3, 3, 4, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.float16):
        rewards = rftcore.score(None, latents, reward, ["a", "b", "c"], [1, 100, 2])
    assert seen == ["a", "b", "c", "b"]
    (grad,) = torch.autograd.grad(rewards.sum(), latents)
    assert torch.equal(grad, torch.tensor([0.5, 50, 1]).reshape(-1, 1, 1, 1).expand_as(grad))
    with torch.autocast("cpu", dtype=torch.float16), pytest.raises(RewardError, match="an overflow in fp16"):
        rftcore.score(None, latents, lambda *a: reward(*a) * 1e4, ["a", "b", "c"], [1, 100, 2])


def test_bad_arguments(vae):
    latents = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="list of 2 strings.*list of length 1"):
        rftcore.score(vae(), latents, brightness_of_top, ["x"])
    with pytest.raises(ValueError, match="list of 2 strings.*str"):
        rftcore.score(vae(), latents, brightness_of_top, "xy")
    with pytest.raises(ValueError, match="metadata"):
        rftcore.score(vae(), latents, brightness_of_top, ["x", "y"], [1])
    with pytest.raises(ValueError, match="on_nan='skip' is not known; allowed are 'stop', 'drop'"):
        rftcore.score(vae(), latents, brightness_of_top, ["x", "y"], on_nan="skip")
    with pytest.raises(ValueError, match="images_per_call=0"):
        rftcore.score(vae(), latents, brightness_of_top, ["x", "y"], images_per_call=0)
    with torch.inference_mode():
        inferred = latents + 1
    with pytest.raises(ValueError, match="inference_mode"):
        rftcore.score(vae(), inferred, brightness_of_top, ["x", "y"])
    with torch.no_grad():
        assert not rftcore.score(vae(), inferred, declared, ["x", "y"]).requires_grad


@pytest.mark.parametrize("clamp", ["hard", "straight_through", "none"])
def test_images_decoded_again_have_the_gradient_of_images_decoded_once(vae, clamp):
    """For a reward of the batch as a whole: each image's reward depends on every image."""
    model = vae().requires_grad_(False)
    latents = torch.randn(5, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(5, dtype=torch.float64)

    def loss(images_per_call):
        images = rftcore.decode(model, latents, images_per_call=images_per_call, clamp=clamp)
        features = images.flatten(1)
        return (weights * (features - features.mean(0)).square().mean(1)).sum()

    once, again = loss(5), loss(2)
    (expected,), (found,) = torch.autograd.grad(once, latents), torch.autograd.grad(again, latents)
    torch.testing.assert_close(again, once, rtol=1e-12, atol=0)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-14)


def test_one_part_is_decoded_once(vae):
    """Its graph is what the memory of one part is for; of several, each is decoded again for its gradient."""
    model, calls = vae().requires_grad_(False), []
    model.decoder.register_forward_hook(lambda *_: calls.append(1))
    latents = torch.randn(2, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    for images_per_call, expected in ((2, 1), (1, 4)):
        calls.clear()
        rftcore.decode(model, latents, images_per_call=images_per_call).sum().backward()
        assert len(calls) == expected


def test_second_derivatives_are_refused(vae):
    """Of what is decoded again, or differentiated with the reward: they would be wrong, not slow."""
    model = vae().requires_grad_(False)
    latents = torch.randn(2, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    for made in (rftcore.decode(model, latents), rftcore.score(model, latents, brightness_of_top, ["x", "y"])):
        (grad,) = torch.autograd.grad(made.square().sum(), latents, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            grad.sum().backward()


def test_decoding_holds_the_graph_of_one_image(vae):
    model = vae(torch.float32).requires_grad_(False)

    def peak(count):
        latents = torch.randn(count, 4, 16, 16, requires_grad=True)
        with PeakBytes() as bytes_:
            rftcore.decode(model, latents).square().mean().backward()
        return bytes_.peak

    one, four = peak(1), peak(4)
    images = 4 * 3 * 32 * 32 * 4
    assert four <= one + 8 * images


def test_decoding_again_notices_a_changed_decoder(vae):
    model = vae().requires_grad_(False)
    latents = torch.randn(2, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    images = rftcore.decode(model, latents)
    with torch.no_grad():
        model.decoder.conv_in.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        images.sum().backward()


def test_a_trained_decoder_gets_its_gradient(vae):
    model = vae()
    rftcore.decode(model, torch.randn(2, 4, 8, 8, dtype=torch.float64, requires_grad=True)).sum().backward()
    assert model.decoder.conv_in.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("gradient", [True, False])
def test_an_image_that_is_not_finite_has_no_reward(gradient):
    """Whatever a reward that rounds or compares makes of it."""

    def bright(images, *_):
        return (images > 0.5).to(images).mean((1, 2, 3)) + 0 * images.nan_to_num().sum((1, 2, 3))

    latents = torch.ones(2, 3, 4, 4)
    latents[1, 0, 0, 0] = float("nan")
    latents.requires_grad_(gradient)
    rewards = rftcore.score(None, latents, bright, ["a", "b"], on_nan="drop")
    assert rewards.isnan().tolist() == [False, True]
    with pytest.raises(RewardError, match="returned nan for the prompt 'b'"):
        rftcore.score(None, latents, bright, ["a", "b"])


def test_a_callers_autocast_is_not_that_of_a_rewards_backward():
    """A reward that computed outside of it is differentiated outside of it, to the last bit."""
    weight = torch.randn(48, 48, generator=torch.Generator().manual_seed(0))

    def reward(images, *_):
        with torch.autocast("cpu", enabled=False):
            return (images.flatten(1) @ weight).square().sum(1)

    latents = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    found = []
    for enabled in (False, True):
        piece = latents.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            rewards = rftcore.score(None, piece, reward, ["a", "b"])
        found.append(torch.autograd.grad(rewards.sum(), piece)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("gradient", [True, False])
def test_one_image_is_a_batch_and_none_is_not(gradient):
    latents = torch.full((1, 3, 2, 2), 0.5, requires_grad=gradient)
    rewards = rftcore.score(None, latents, lambda images, *_: images.mean((1, 2, 3)), ["x"])
    assert rewards.tolist() == [0.75] and rewards.requires_grad == gradient
    with pytest.raises(ValueError, match="latents holds no images"):
        rftcore.score(None, latents[:0], lambda images, *_: images.mean((1, 2, 3)), [])


def test_small_gradients_of_images_decoded_again_survive_fp16(vae):
    """1e-8 is below what fp16 holds; 2^12 times that is not."""
    model, latents = vae(torch.float16).requires_grad_(False), torch.randn(2, 4, 8, 8, requires_grad=True)
    weights = 1e-8 * torch.randn(2, 3, 16, 16)
    (ours,) = torch.autograd.grad((rftcore.decode(model, latents, clamp="none") * weights).sum(), latents)
    images = rftcore.decode(model.float(), latents, clamp="none", images_per_call=2)
    (right,) = torch.autograd.grad((images * weights).sum(), latents)
    assert (ours - right).norm() < 0.05 * right.norm()


@pytest.mark.parametrize("clamp", ["hard", "straight_through", "none"])
def test_images_beyond_both_bounds(clamp):
    latents = torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0], requires_grad=True)
    images, stats = rftcore.decode(None, latents.reshape(1, 1, 1, 5), clamp=clamp, return_stats=True)
    bounded = clamp != "none"
    assert images.flatten().tolist() == [0 if bounded else -4, 0, 0.5, 1, 1 if bounded else 5]
    assert stats["saturated"].tolist() == pytest.approx([0.4]) and not stats["saturated"].requires_grad
    images.sum().backward()
    through = 0.0 if clamp == "hard" else 0.5
    assert latents.grad.tolist() == [through, 0.5, 0.5, 0.5, through]


def test_what_is_said_beside_rewards_has_no_gradient(vae):
    latents = torch.randn(2, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    rewards, stats = rftcore.score(vae(), latents, brightness_of_top, ["x", "y"], return_stats=True)
    assert rewards.requires_grad and not any(value.requires_grad for value in stats.values())
