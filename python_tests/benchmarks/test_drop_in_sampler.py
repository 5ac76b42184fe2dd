"""Other people's sampling and re-scoring, and ours in their place: the same in fp64, and a difference is seen."""

import pytest
import torch
from diffusers import DDIMScheduler

from benchmarks import ddpo_loop
from benchmarks.ddpo_loop import ETA, GUIDANCE, STEPS, Loop, SamplerLoop, ddim_step_with_log_prob
from benchmarks.drop_in_sampler import SAMPLER, STOCK, Training, comparisons, differences, fp64
from benchmarks.programs import LATENT_SIZE_FP64, NO_TRL, exact_tables, save_pipeline
from rftcore import CheckpointedSampler

COMPARISONS = comparisons()
needs_trl = pytest.mark.skipif(NO_TRL is not None, reason=f"TRL 0.23.1 does not import: {NO_TRL}")


class EndsAtOne:
    """A scheduler whose own last step would have no noise; ddpo-pytorch's has, and `final_step="clamp"`."""

    def load(self, folder):
        super().load(folder)
        self.pipe.scheduler = DDIMScheduler.from_config(self.pipe.scheduler.config, set_alpha_to_one=True)


class LoopToOne(EndsAtOne, Loop):
    pass


class SamplerLoopToOne(EndsAtOne, SamplerLoop):
    pass


class Unclamped(SamplerLoopToOne):
    """Ends as the scheduler does."""

    def to(self, dtype):
        super().to(dtype)
        options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "eta": ETA}
        self.sampler = CheckpointedSampler(self.pipe.unet, self.pipe.scheduler, **options)

    def log_prob(self, rows, steps):
        return super().log_prob(rows, steps.clamp(max=STEPS - 2))  # the last has no density


class Lost(SamplerLoop):
    """Trains on the first step in place of each sample's own."""

    def log_prob(self, rows, steps):
        return super().log_prob(rows, torch.zeros_like(steps))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("pipeline"), LATENT_SIZE_FP64)


@pytest.mark.parametrize("name", COMPARISONS)
def test_the_same_in_fp64(name, folder):
    with fp64():
        _, seen = differences(COMPARISONS[name], folder, torch.float64)
    assert seen[SAMPLER] and max(seen[SAMPLER].values()) < 1e-11


@pytest.mark.slow
def test_the_same_in_fp32(folder):
    _, seen = differences(COMPARISONS[Loop.name], folder, torch.float32)
    assert set(seen[SAMPLER]) == {"latents", "log_probs", "losses", "gradients"}
    assert max(seen[SAMPLER].values()) < 1e-4


def seen_between(stock, ours, folder, dtype):
    programs = {STOCK: stock, SAMPLER: ours}
    ways = {name: lambda folder, dtype, p=program: Training(p, folder, dtype) for name, program in programs.items()}
    return differences(ways, folder, dtype)[1][SAMPLER]


def test_the_last_step_has_noise_with_any_scheduler(folder):
    with fp64():
        assert max(seen_between(LoopToOne, SamplerLoopToOne, folder, torch.float64).values()) < 1e-11


@pytest.mark.parametrize(
    "stock, wrong, columns",
    [
        (LoopToOne, Unclamped, ["latents", "log_probs", "losses", "gradients"]),
        pytest.param(Loop, Lost, ["losses", "gradients"], marks=pytest.mark.slow),
    ],
)
def test_another_chain_or_loss_is_seen(stock, wrong, columns, folder):
    seen = seen_between(stock, wrong, folder, torch.float32)
    assert min(seen[column] for column in columns) > 1e-3


def test_the_loop_steps_as_diffusers_and_torch_say(monkeypatch):
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
    scheduler.set_timesteps(STEPS)
    exact_tables(scheduler)
    x, eps, noise = torch.randn(3, 2, 4, 3, 5, dtype=torch.float64).unbind(0)
    t = scheduler.timesteps[1]
    expected = scheduler.step(eps, t, x, eta=ETA, variance_noise=noise).prev_sample
    mean = scheduler.step(eps, t, x, eta=ETA, variance_noise=torch.zeros_like(noise)).prev_sample
    monkeypatch.setattr(ddpo_loop, "randn_tensor", lambda *args, **kwargs: noise)
    drawn, log_prob = ddim_step_with_log_prob(scheduler, eps, t, x)
    torch.testing.assert_close(drawn, expected, rtol=1e-12, atol=0)
    density = torch.distributions.Normal(mean, (expected - mean) / noise).log_prob(expected)
    torch.testing.assert_close(log_prob, density.flatten(1).mean(1), rtol=1e-9, atol=0)
    _, again = ddim_step_with_log_prob(scheduler, eps, t.expand(2), x, expected)
    torch.testing.assert_close(again, log_prob, rtol=1e-12, atol=0)


@needs_trl
def test_trl_and_the_pipeline_in_its_place_draw_the_same_with_a_generator(folder):
    from benchmarks.drop_in_sampler import DefaultDDPOStableDiffusionPipeline, SamplerPipeline, Sampling

    states = []
    for pipeline in (DefaultDDPOStableDiffusionPipeline, SamplerPipeline):
        run = Sampling(pipeline, folder, torch.float32)
        torch.manual_seed(0)
        output = run.pipeline(**run.arguments, generator=torch.Generator().manual_seed(5))
        states.append(torch.stack(output.latents))
    torch.testing.assert_close(*states, rtol=1e-5, atol=1e-5)


@needs_trl
def test_trl_trainers_go_on_the_same(folder):
    from benchmarks.drop_in_sampler import AlignProp, Ddpo, SamplerAlignProp, SamplerDdpo, fill_adapters

    with fp64():
        for stock, ours in ((AlignProp, SamplerAlignProp), (Ddpo, SamplerDdpo)):
            losses = []
            for program in (stock, ours):
                run = program(folder, fill_adapters, dtype=torch.float64)
                for _ in range(3):
                    run.step()
                losses.append(torch.tensor(run.losses))
            assert losses[0].std() > 1e-3
            torch.testing.assert_close(*losses, rtol=1e-8, atol=1e-8)
