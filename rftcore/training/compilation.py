"""The UNet through torch.compile, once its gradient is shown to be the one it has without."""

from __future__ import annotations

import torch
from torch import Tensor

from rftcore.errors import UsageError
from rftcore.sampling.conditioning import Conditioning
from rftcore.sampling.denoiser import Denoiser
from rftcore.training.batches import generator
from rftcore.training.engine import Engine

BACKEND = "inductor"


def compile_unet(engine: Engine) -> None:
    """Compiles the UNet in place: its parameters keep their names, and what wraps it stays.

    Checked on one sample at one time: Inductor has been seen to give gradients that are 20% off (torch 2.13 on a CPU,
    diffusers' own UNet with a LoRA), and a run that learns from them says nothing.

    Raises: UsageError where it does not compile, or the compiled UNet's output or gradient is another one.
    """
    model = engine.model
    output, gradient = _evaluate(engine)
    try:
        model.compile(backend=BACKEND)
        compiled_output, compiled_gradient = _evaluate(engine)
    except Exception as error:  # whatever a compiler and its toolchain raise
        raise UsageError(
            f"memory.compile=true: the UNet does not compile here ({_first_line(error)}); set memory.compile=false"
        ) from error
    # Half precision fuses and rounds elsewhere; a miscompiled layer is far beyond both.
    allowed = 5e-2 if engine.config.mixed_precision != "no" else 1e-3
    for what, value, expected in (("output", compiled_output, output), ("gradient", compiled_gradient, gradient)):
        difference = float(torch.linalg.norm(value - expected) / torch.linalg.norm(expected))
        if not difference <= allowed:
            raise UsageError(
                f"memory.compile=true: the compiled UNet's {what} differs from the UNet's own by {difference:.2g} "
                f"relative, and {allowed:g} is allowed: torch {torch.__version__} miscompiles it on "
                f"{engine.device.type}. Set memory.compile=false"
            )


def _evaluate(engine: Engine) -> tuple[Tensor, Tensor]:
    """The UNet's output for noise at an early time, and the gradient of its mean square, flat, in fp32 or wider."""
    denoiser, guided = Denoiser(engine.model), engine.branches == 2
    given = engine.inputs.batch([engine.plan.prompt(1, 0)])
    names = ("prompt_embeds", "negative_prompt_embeds", "added_cond_kwargs", "negative_added_cond_kwargs")
    built = Conditioning.build(*(given.get(name) for name in names), guided=guided)
    conditioning = denoiser.told(built, engine.config.sampling.guidance_scale).joined()
    size = engine.sample_size if isinstance(engine.sample_size, tuple) else (engine.sample_size,) * 2
    noise = torch.randn(1, denoiser.config.in_channels, *size, generator=generator("compilation"))
    time = torch.tensor(engine.scheduler.config.num_train_timesteps // 2, device=engine.device)
    with torch.enable_grad():
        output = denoiser(noise.to(engine.device), time, conditioning, guided=guided)
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        # Not backward(): DistributedDataParallel would take it for a step's.
        gradients = torch.autograd.grad(
            output.square().mean(), [*denoiser.trainable().values()], allow_unused=True, materialize_grads=True
        )
    return output.detach(), torch.cat([gradient.flatten().to(output.dtype) for gradient in gradients])


def _first_line(error: Exception) -> str:
    # Dynamo wraps what a backend raises, in many lines.
    error = getattr(error, "inner_exception", error)
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
