"""Several rewards as one, and what rewards are made with."""

import pytest
import torch

import rftcore
from rftcore import rewards
from rftcore.rewards import RewardSpecError, WeightedSum, declare, weighted_sum


@declare(differentiable=True, unit="grey", range=(0, 1), downloads=("nothing",), licence="none")
def mean(images, prompts, metadata=None, *, gain=1.0):
    return gain * images.mean((1, 2, 3))


@declare(differentiable=True)
def square(images, prompts, metadata=None):
    return images.square().mean((1, 2, 3))


@declare(differentiable=False)
def size(images, prompts, metadata=None):
    return images.detach().round().sum((1, 2, 3))


@declare(differentiable=True)
class Distance:
    def __init__(self, target, power=2):
        self.target, self.power = target, power
        self.device = "cpu"

    def __call__(self, images, prompts, metadata=None):
        return -(images - self.target).abs().pow(self.power).mean((1, 2, 3))

    def to(self, device):
        self.device = device
        return self


def summed(*parts):
    return weighted_sum([(rewards.load(function), weight) for function, weight in parts])


def test_a_sum_is_that_of_its_parts_and_says_what_they_were():
    reward, images = summed((mean, 2.0), (square, -0.5)), torch.rand(3, 3, 4, 4, dtype=torch.float64)
    images.requires_grad_()
    total, parts = reward.with_parts(images, ["a"] * 3)
    assert reward.parts == ("mean", "square") and set(parts) == set(reward.parts)
    torch.testing.assert_close(total, 2 * parts["mean"] - 0.5 * parts["square"])
    assert not any(values.requires_grad for values in parts.values())
    (gradient,) = torch.autograd.grad(total.sum(), images)
    torch.testing.assert_close(gradient, (2 - images) / 48)
    assert torch.equal(reward(images, ["a"] * 3), total)


def test_a_sum_has_a_gradient_where_all_parts_have():
    assert summed((mean, 1), (square, 1)).differentiable
    broken = summed((mean, 1), (size, 1))
    assert not broken.differentiable
    with pytest.raises(RewardSpecError, match="DRaFT.*'weighted_sum', of which 'size' declares differentiable=False"):
        rewards.check_differentiable(broken, "DRaFT")


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("images_per_call", [1, 2])
def test_scores_have_a_sums_parts(images_per_call, gradient):
    latents = torch.rand(3, 3, 4, 4, dtype=torch.float64, requires_grad=gradient)
    given = {"images_per_call": images_per_call, "return_stats": True}
    total, stats = rftcore.score(None, latents, summed((mean, 3), (square, 1)), ["a"] * 3, **given)
    images = rftcore.decode(None, latents)
    torch.testing.assert_close(stats["parts"]["mean"], mean(images, []).detach())
    torch.testing.assert_close(total, 3 * mean(images, []) + square(images, []))
    assert rftcore.score(None, latents, rewards.load(mean), ["a"] * 3, **given)[1]["parts"] == {}
    assert "parts" not in rftcore.score(None, latents, mean, ["a"] * 3, **given)[1]


def test_images_that_are_scored_again_count_once_among_the_parts():
    @declare(differentiable=True)
    def steep(images, prompts, metadata):
        return (images.half() * float(metadata[0])).float().mean((1, 2, 3)) * images.numel()

    with torch.autocast("cpu", dtype=torch.float16):
        latents = torch.rand(3, 3, 4, 4, requires_grad=True)
        _, stats = rftcore.score(None, latents, summed((steep, 1)), ["a"] * 3, [1, 100, 2], return_stats=True)
    assert stats["parts"]["steep"].shape == (3,)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "no reward"),
        ([(mean, 1), (mean, 2)], "'mean' is in the weighted sum twice"),
        ([(mean, 0)], "weight 0; .*eval.held_out_reward"),
        ([(mean, float("nan"))], "weight nan"),
        ([(mean, 10**400)], "weight 1000"),
        ([(mean, "10")], "weight '10'; it must be a finite number"),
    ],
)
def test_sums_that_cannot_be(parts, message):
    with pytest.raises(RewardSpecError, match=message):
        WeightedSum([(rewards.load(function), weight) for function, weight in parts])


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (lambda images: images.mean(), r"gave \(\) for 2 images"),
        (lambda images: images.mean().reshape(1), r"gave \(1,\) for 2 images"),
        (lambda images: images.mean((2, 3))[:, :1], r"gave \(2, 1\) for 2 images"),
        (lambda images: [0.5] * len(images), "gave list for 2 images"),
        (lambda images: images.detach().mean((1, 2, 3)), "what it gave does not depend differentiably"),
    ],
)
def test_what_a_sum_would_hide_of_a_part_is_an_error(part, message):
    @declare(differentiable=True)
    def wrong(images, prompts, metadata=None):
        return part(images)

    with pytest.raises(RewardSpecError, match=f"'wrong' of a weighted sum .*{message}"):
        summed((mean, 1), (wrong, 1))(torch.rand(2, 3, 4, 4, requires_grad=True), ["a"] * 2)


def test_a_part_without_a_gradient_serves_where_none_is_asked_for():
    images, reward = torch.rand(2, 3, 4, 4), summed((mean, 1), (size, 1))
    torch.testing.assert_close(reward(images, ["a"] * 2), mean(images, []) + size(images, []))
    images.requires_grad_()
    torch.testing.assert_close(reward(images, ["a"] * 2), mean(images, []) + size(images, []))
    with torch.no_grad():
        assert summed((mean, 1), (square, 1))(images, ["a"] * 2).shape == (2,)


def test_declarations_arrive():
    reward = rewards.load(mean)
    assert (reward.unit, reward.range, reward.downloads, reward.licence) == ("grey", (0, 1), ("nothing",), "none")


def test_options_make_a_class_and_are_given_to_a_function():
    images = torch.rand(2, 3, 4, 4)
    distance = rewards.load(Distance, options={"target": 0.5, "power": 1})
    assert distance.name == "Distance" and distance.differentiable
    torch.testing.assert_close(distance(images, ["a"] * 2), -(images - 0.5).abs().mean((1, 2, 3)))
    assert distance.to("meta").function.device == "meta"
    louder = rewards.load(mean, options={"gain": 3.0})
    assert louder.name == "mean" and louder.unit == "grey"
    torch.testing.assert_close(louder(images, ["a"] * 2), 3 * images.mean((1, 2, 3)))


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        (Distance, {}, "'Distance' needs target; set reward.options: {Distance: {target: ...}}"),
        (Distance, {"target": 1, "pwer": 2}, "no option 'pwer'; did you mean 'power'. it takes target, power"),
        (mean, {"gane": 2}, "no option 'gane'; did you mean 'gain'"),
        (square, {"gain": 2}, "no option 'gain'; it takes none"),
        (mean, {"images": 2}, "no option 'images'"),
        ("symmetry", {"kind": 3}, "'symmetry' has the option kind=3; it must be 'left_right' or"),
    ],
)
def test_options_that_cannot_be(spec, options, message):
    with pytest.raises(RewardSpecError, match=message):
        rewards.load(spec, options=options)


@pytest.mark.parametrize("gradient", [True, False])
def test_a_sum_that_is_not_finite_says_which_part_is_not(gradient):
    @declare(differentiable=True)
    def broken(images, prompts, metadata=None):
        return images.mean((1, 2, 3)) / torch.tensor([1.0, 0.0])[: len(images)]

    latents = torch.rand(2, 3, 4, 4, requires_grad=gradient)
    with pytest.raises(ValueError, match=r"'weighted_sum' \(of which 'broken'\) returned inf for the prompt 'b'"):
        rftcore.score(None, latents, summed((mean, 1), (broken, 1)), ["a", "b"], images_per_call=2)
