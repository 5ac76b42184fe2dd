"""Every training loop against the same loop by hand: the gradient before each optimizer step, in fp64, to 1e-11."""

import pytest
import tiny
import tiny_models
import torch
from by_hand import ByHand, ValueByHand
from diffusers import DDPMPipeline, StableDiffusionPipeline

from rftcore.rewards import declare
from rftcore.training import Trainer
from rftcore.training.algorithm_configs import ALGORITHMS
from rftcore.training.parsing import build

STEPS = 4


@declare(differentiable=True)
def likes(images, prompts, metadata=None):
    """Each prompt likes another brightness."""
    wanted = torch.tensor([sum(map(ord, prompt)) % 7 / 7 for prompt in prompts], dtype=images.dtype)
    return -5 * (images - wanted[:, None, None, None]).square().mean(dim=(1, 2, 3)) + images[:, 0].mean(dim=(1, 2))


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pixels")
    tiny_models.save("pixels", folder)
    return folder


class Pair:
    """A run and the same by hand, with the UNet's evaluations and the reward's counted."""

    def __init__(self, folder, output_dir, algorithm, train, kind="sd", prediction_type="epsilon", **groups):
        load = {"sd": StableDiffusionPipeline, "pixels": DDPMPipeline}[kind]
        options = {"safety_checker": None} if kind == "sd" else {}
        pipes = [load.from_pretrained(folder, **options).to(torch.float64) for _ in range(2)]
        for pipe in pipes:
            pipe.scheduler.register_to_config(prediction_type=prediction_type)
        values = tiny.values(folder, output_dir, **groups)
        values["sampling"] = {"num_inference_steps": STEPS, "guidance_scale": tiny_models.GUIDANCE[kind], "eta": 1.0}
        values["sampling"] |= groups.get("sampling", {})
        values["train"] = {
            "batch_size": 2,
            "max_grad_norm": None,
            "learning_rate": 1e-3,
            "max_train_steps": 2520,
            **train,
        }
        if kind == "pixels":
            values["prompts"] = [""]
        config = build(ALGORITHMS[algorithm], values)
        self.evaluations = self.queries = 0

        @declare(differentiable=True)
        def reward(images, prompts, metadata=None):
            self.queries += len(images)
            return likes(images, prompts)

        self.trainer = Trainer(config, reward=reward, pipeline=pipes[0])
        self.method = self.trainer.method
        unet = self.trainer.engine.model
        self.parameters = {name: p for name, p in unet.named_parameters() if p.requires_grad}
        source = torch.Generator().manual_seed(3)
        for parameter in self.parameters.values():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=source, dtype=torch.float64)
        unet.conv_in.register_forward_pre_hook(self._count)
        self.hand = ByHand(pipes[1], self.trainer, likes)

    def _count(self, module, inputs):
        self.evaluations += len(inputs[0])

    def epoch(self, epoch=1):
        """Updates of an epoch, with an optimizer step after each."""
        self.evaluations = self.queries = 0
        counted = [0, 0]
        for update in self.method.epoch(epoch):
            counted[0] += update.unet_evaluations
            counted[1] += update.reward_queries
            yield update
            self.trainer.optimizer.step()
            self.trainer.optimizer.zero_grad()
            self.hand.follow()
        assert counted == [self.evaluations, self.queries]

    def gradient(self):
        return {name: parameter.grad for name, parameter in self.parameters.items()}

    def check(self, expected, tolerance=1e-11):
        ours = torch.cat([self.gradient()[name].flatten() for name in expected])
        theirs = torch.cat([gradient.flatten() for gradient in expected.values()])
        assert ours.isfinite().all() and torch.linalg.norm(theirs) > 0
        assert torch.linalg.norm(ours - theirs) <= tolerance * torch.linalg.norm(theirs)


def alignprop_loss(r):
    return 0.01 * (r - 10).abs()


def refl_loss(r):
    return 1e-3 * torch.relu(2 - r)


def draft_loss(r):
    return -r


@pytest.mark.parametrize(
    ("algorithm", "train", "loss", "options"),
    [
        ("draft", {}, draft_loss, {}),
        ("draft", {"guidance_gradient": "positive"}, draft_loss, {}),
        ("draft", {}, draft_loss, {"sampling": {"eta": 0.0}, "prediction_type": "v_prediction"}),
        ("draft", {"gradient_accumulation_steps": 2}, draft_loss, {"sampling": {"scheduler": "ddpm", "eta": None}}),
        ("draft", {}, draft_loss, {"memory": {"budget": "2MiB"}}),
        ("draft", {"backprop_steps": 1, "gradient_accumulation_steps": 2}, draft_loss, {}),
        (
            "alignprop",
            {"truncation": "released", "truncation_low": 0, "truncation_high": 4},
            alignprop_loss,
            {"seed": 2},
        ),
        ("alignprop", {"truncation": "paper"}, alignprop_loss, {}),
        ("refl", {"first_step": 1, "last_step": 3}, refl_loss, {"seed": 1}),
        ("drtune", {"train_steps": 2, "earliest_stop": 3}, draft_loss, {"seed": 1}),
    ],
)
def test_reward_gradients(model, tmp_path, algorithm, train, loss, options):
    pair = Pair(model, tmp_path, algorithm, train, **options)
    path = pair.method._drawn_path(1)
    for _ in pair.epoch():
        pair.hand.reward_gradient(1, loss, path, positive_only="guidance_gradient" in train)
        pair.check(pair.hand.take())


@pytest.mark.parametrize(
    ("algorithm", "train", "options"),
    [
        ("draft_lv", {"noise_draws": 2}, {}),
        ("draft_lv", {"gradient_accumulation_steps": 2}, {"prediction_type": "v_prediction"}),
        ("draft_plus", {"backprop_steps": 2, "kl_coeff": 0.7}, {}),
        ("draft_plus", {"backprop_steps": 1, "gradient_accumulation_steps": 2}, {}),
    ],
)
def test_reward_gradients_of_several_terms(model, tmp_path, algorithm, train, options):
    pair = Pair(model, tmp_path, algorithm, train, **options)
    for _ in pair.epoch():
        getattr(pair.hand, algorithm)(1)
        pair.check(pair.hand.take())


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm"])
def test_reward_gradients_of_an_unconditional_model(pixels, tmp_path, scheduler):
    sampling = {"scheduler": scheduler, "eta": 1.0 if scheduler == "ddim" else None}
    pair = Pair(pixels, tmp_path, "draft", {"backprop_steps": 3}, kind="pixels", sampling=sampling)
    for _ in pair.epoch():
        pair.hand.reward_gradient(1, draft_loss, pair.method._drawn_path(1))
        pair.check(pair.hand.take())


@pytest.mark.parametrize(
    ("kind", "epochs", "train", "options"),
    [
        (
            "sd",
            2,
            {
                "inner_epochs": 2,
                "statistics_min_count": 3,
                "statistics_buffer_size": 3,
                "advantage_clip": 1.2,
                "clip_range": 1e-3,
            },
            {},
        ),
        (
            "sd",
            1,
            {
                "inner_epochs": 2,
                "per_prompt_statistics": False,
                "timestep_fraction": 0.5,
                "gradient_accumulation_steps": 2,
            },
            {"prediction_type": "v_prediction"},
        ),
        ("sd", 1, {"loss": "sf", "batch_size": 6, "gradient_accumulation_steps": 3}, {}),
        ("sd", 1, {}, {"sampling": {"scheduler": "ddpm", "eta": None}}),
        ("pixels", 1, {}, {}),
    ],
)
def test_ddpo(model, pixels, tmp_path, kind, epochs, train, options):
    """The optimizer's steps leave the clip range."""
    train = {"samples_per_epoch": 6, "clip_range": 5e-3, **train}
    pair = Pair(model if kind == "sd" else pixels, tmp_path, "ddpo", train, kind=kind, **options)
    remembered, ratios = {}, []
    for epoch in range(1, epochs + 1):
        for _, expected in zip(pair.epoch(epoch), pair.hand.ddpo(epoch, remembered), strict=True):
            pair.check(expected)
            ratios += pair.hand.ratios
    if pair.trainer.config.train.loss == "is":
        outside = [abs(ratio - 1) > pair.trainer.config.train.clip_range for ratio in ratios]
        assert 0.1 < sum(outside) / len(outside) < 0.9


@pytest.mark.parametrize(
    "train",
    [
        {"kl": "exact", "kl_weight": 0.3},
        {"kl": "uniform", "kl_weight": 0.3, "reward_filter": True, "value_minibatches": 2, "value_updates": 2},
    ],
)
def test_dpok(model, tmp_path, train):
    """Two epochs, of which the buffer does not hold all."""
    train = {
        "samples_per_epoch": 3,
        "buffer_size": 20,
        "batch_size": 8,
        "gradient_accumulation_steps": 2,
        "policy_steps": 2,
        "value_batch_size": 7,
        "value_learning_rate": 1e-2,
        "clip_range": 5e-4,
        **train,
    }
    pair = Pair(model, tmp_path, "dpok", train)
    value, ratios = ValueByHand(pair.hand, pair.method.value), []
    for epoch in (1, 2):
        for _, expected in zip(pair.epoch(epoch), pair.hand.dpok(epoch, value), strict=True):
            pair.check(expected)
            ratios += pair.hand.ratios
    for name, parameter in pair.method.value.named_parameters():
        assert torch.linalg.norm(parameter - value.weights[name]) <= 1e-11 * torch.linalg.norm(parameter)
    outside = [abs(ratio - 1) > pair.trainer.config.train.clip_range for ratio in ratios]
    assert 0.1 < sum(outside) / len(outside) < 0.9


@pytest.mark.parametrize(
    ("algorithm", "train", "options"),
    [
        ("rwr", {"weighting": "dense", "temperature": 3.0, "gradient_accumulation_steps": 2}, {}),
        ("rwr", {"weighting": "dense", "per_prompt": True}, {"prediction_type": "v_prediction"}),
        ("rwr", {"weighting": "sparse", "top": 0.5}, {}),
        (
            "rwr",
            {"weighting": "sparse", "top": 0.5, "per_prompt": True},
            {"sampling": {"scheduler": "ddpm", "eta": None}},
        ),
        ("sft", {"regulariser": "kl_o", "gamma": 0.3, "gradient_accumulation_steps": 2}, {}),
        ("sft", {"regulariser": "kl_d", "gamma": 0.3, "beta": 0.8}, {}),
    ],
)
def test_regressions(model, tmp_path, algorithm, train, options):
    train = {"samples_per_epoch": 6, "batch_size": 2, "inner_epochs": 1, **train}
    pair = Pair(model, tmp_path, algorithm, train, **options)
    for _, expected in zip(pair.epoch(), pair.hand.regression(1), strict=True):
        pair.check(expected)
