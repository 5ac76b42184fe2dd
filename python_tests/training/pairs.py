"""A run and the same by hand, in fp64, with what both evaluate counted."""

import copy
import functools
from unittest.mock import patch

import tiny
import tiny_models
import torch
from by_hand import ByHand
from diffusers import DDPMPipeline, StableDiffusionPipeline

from rftcore.rewards import declare
from rftcore.sampling.denoiser import Denoiser
from rftcore.training import Trainer
from rftcore.training.algorithm_configs import ALGORITHMS
from rftcore.training.parsing import build

STEPS = 4


@declare(differentiable=True)
def likes(images, prompts, metadata=None):
    """Each prompt likes another brightness."""
    wanted = torch.tensor([sum(map(ord, prompt)) % 7 / 7 for prompt in prompts], dtype=images.dtype)
    return -5 * (images - wanted[:, None, None, None]).square().mean(dim=(1, 2, 3)) + images[:, 0].mean(dim=(1, 2))


@functools.cache
def loaded(folder, kind):
    """The pipeline in fp64."""
    if kind == "pixels":
        return DDPMPipeline.from_pretrained(folder).to(torch.float64)
    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None).to(torch.float64)


class Pair:
    """A run and the same by hand, with the UNet's evaluations and the reward's counted."""

    def __init__(
        self,
        folder,
        output_dir,
        algorithm,
        train,
        kind="sd",
        prediction_type="epsilon",
        function=likes,
        planned=True,
        **groups,
    ):
        pipes = [copy.deepcopy(loaded(folder, kind)) for _ in range(2)]
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
        def counted(images, prompts, metadata=None):
            self.queries += len(images)
            return function(images, prompts)

        self.trainer = Trainer(config, reward=counted, pipeline=pipes[0])
        self.method = self.trainer.method
        unet = self.trainer.engine.model
        self.parameters = {name: p for name, p in unet.named_parameters() if p.requires_grad}
        source = torch.Generator().manual_seed(3)
        for parameter in self.parameters.values():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=source, dtype=torch.float64)
        if not planned:
            # What a hook does cannot be planned for: every step is replayed, and no time goes into a plan.
            unet.register_forward_pre_hook(lambda module, inputs: None)
        self.hand = ByHand(pipes[1], self.trainer, function)

    def _count(self, evaluate):
        """Rows of the UNet's input; a hook on the UNet would change how its memory is planned."""

        def counted(denoiser, x, *arguments, guided, **options):
            # What is planned with has no data.
            if type(x) is torch.Tensor:
                self.evaluations += len(x) * (2 if guided else 1)
            return evaluate(denoiser, x, *arguments, guided=guided, **options)

        return counted

    def epoch(self, epoch=1):
        """Updates of an epoch, with an optimizer step after each."""
        self.evaluations = self.queries = 0
        counted = [0, 0]
        with patch.object(Denoiser, "__call__", self._count(Denoiser.__call__)):
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
