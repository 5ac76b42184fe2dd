"""A LoRA and a whole UNet of each kind of pipeline: every part learns, and a user loads what was saved."""

import copy
from types import SimpleNamespace

import pytest
import tiny
import tiny_models
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

import rftcore
from rftcore.sampling.adapters import adapters_off
from rftcore.training import RunError, UsageError, pipeline, weights
from rftcore.training.config import LoraConfig, ModelConfig, SamplingConfig
from rftcore.training.models import usage

CPU = torch.device("cpu")
PROMPTS = tiny.TRAIN_PROMPTS[:2]
KINDS = [pytest.param(kind, marks=[] if kind == "sd" else pytest.mark.slow) for kind in tiny_models.BUILDERS]


def load(folder):
    return DiffusionPipeline.from_pretrained(folder)


def config(kind, **lora):
    """What `attach` reads of a run's config."""
    return SimpleNamespace(
        lora=LoraConfig(**{"rank": 2, **lora}), train=SimpleNamespace(weights=kind), mixed_precision="no"
    )


def moved(unet):
    """After training: every trained parameter is somewhere else, B of the LoRA included."""
    with torch.no_grad():
        for parameter in weights.trainable(unet).values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return unet


def draft_1(pipe, kind, unet=None):
    """One backward of a reward through the last of 3 steps, as the trainer composes it."""
    settings = SamplingConfig(num_inference_steps=3, guidance_scale=tiny_models.GUIDANCE[kind], eta=1.0)
    size = pipeline.sample_size(pipe, settings)
    prompts = [""] * 2 if pipeline.unconditional(pipe) else PROMPTS
    inputs = pipeline.encode_prompts(pipe, prompts, "", CPU, size)
    sampler = rftcore.CheckpointedSampler(
        unet or pipe.unet,
        pipeline.scheduler(pipe, settings),
        num_inference_steps=3,
        guidance_scale=settings.guidance_scale,
        eta=settings.eta,
        backprop_steps=1,
    )
    noise = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    trajectory = sampler(**inputs.batch(prompts), batch_size=2, sample_size=size, generator=noise)
    decoder = pipeline.vae(pipe)
    if decoder is not None:
        decoder.requires_grad_(False)
    # "none": random weights saturate most pixels, and a clamp would leave some of them without a gradient.
    reward = rftcore.score(decoder, trajectory.latents, tiny.brightness, prompts, clamp="none")
    (-reward.mean()).backward()
    return sampler, inputs, trajectory, prompts


def gradients(unet):
    return torch.cat([parameter.grad.flatten() for parameter in weights.trainable(unet).values()])


@pytest.mark.covering(1)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trained", ["lora", "full"])
def test_every_module_learns_and_accelerated_gradients_are_stocks(folders, kind, trained):
    found = []
    for accelerated in (False, True):
        pipe = load(folders[kind])
        for model in (pipe.unet, pipeline.vae(pipe)):
            if model is not None:
                model.to(torch.float64)
        weights.attach(pipe, config(trained), seed=0)
        assert weights.silent(pipe.unet) == list(weights.trained_modules(pipe.unet))
        torch.manual_seed(1)
        moved(pipe.unet)
        if accelerated:
            rftcore.accelerate(pipe.unet)
        draft_1(pipe, kind)
        assert not accelerated or not rftcore.report(pipe.unet).stock
        assert weights.silent(pipe.unet) == []
        found.append(gradients(pipe.unet))
    assert found[0].dtype == torch.float64
    assert torch.linalg.norm(found[0] - found[1]) <= 1e-11 * torch.linalg.norm(found[0])


@pytest.mark.parametrize("kind", KINDS)
def test_first_backward_of_a_fresh_lora_reaches_every_module(folders, kind):
    """B = 0: A has no gradient yet, B has."""
    pipe = load(folders[kind])
    weights.attach(pipe, config("lora"), seed=0)
    draft_1(pipe, kind)
    assert weights.silent(pipe.unet) == []
    names = list(weights.trained_modules(pipe.unet))
    assert len(names) >= 8 and all(name.endswith(("to_q", "to_k", "to_v", "to_out.0")) for name in names)
    broken = next(name for name in weights.trainable(pipe.unet) if "lora_B" in name)
    pipe.unet.get_parameter(broken).grad.zero_()
    assert weights.silent(pipe.unet) == [broken.partition(".lora_")[0]]


@pytest.mark.parametrize("kind", tiny_models.BUILDERS)
def test_adapter_is_the_seeds_alone_and_starts_without_effect(folders, kind):
    adapters = []
    for noise, seed in ((1, 0), (2, 0), (2, 1)):
        pipe = load(folders[kind])
        torch.manual_seed(noise)
        weights.attach(pipe.unet, config("lora"), seed=seed)
        adapters.append(torch.cat([value.detach().flatten() for value in weights.trainable(pipe.unet).values()]))
        assert all(not value.any() for name, value in weights.trainable(pipe.unet).items() if "lora_B" in name)
    assert torch.equal(adapters[0], adapters[1]) and not torch.equal(adapters[0], adapters[2])


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_off_is_the_base_model(folders, kind):
    pipe = load(folders[kind])
    base = copy.deepcopy(pipe.unet)
    weights.attach(pipe, config("lora"), seed=0)
    moved(pipe.unet)
    rftcore.accelerate(pipe.unet)
    sampler, inputs, trajectory, prompts = draft_1(pipe, kind)
    arguments = inputs.batch(prompts)
    x = trajectory.states[1]
    with torch.no_grad():
        off = sampler.predict(x, 500, **arguments, adapter=False)
        on = sampler.predict(x, 500, **arguments)
        scheduler = pipeline.scheduler(pipe, SamplingConfig())
        other = rftcore.CheckpointedSampler(
            base, scheduler, num_inference_steps=3, guidance_scale=tiny_models.GUIDANCE[kind], backprop_steps=0
        )
        wanted = other.predict(x, 500, **arguments)
    assert torch.linalg.norm(off - wanted) < 1e-5 * torch.linalg.norm(wanted)
    assert torch.linalg.norm(on - wanted) > 1e-3 * torch.linalg.norm(wanted)
    with adapters_off(pipe.unet):
        pass
    assert all(parameter.requires_grad for parameter in weights.trainable(pipe.unet).values())
    _, divergence = sampler.log_prob(trajectory, [0], reference="exact")
    assert bool((divergence > 0).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trained", ["lora", "full"])
def test_what_is_saved_is_loaded_by_the_lines_that_say_how(folders, tmp_path, kind, trained):
    pipe = load(folders[kind])
    weights.attach(pipe, config(trained, alpha=3.0), seed=0)
    moved(pipe.unet)
    rftcore.accelerate(pipe.unet)
    saved = weights.save(pipe.unet, tmp_path)
    assert saved.exists() and weights.verify_reload(pipe.unet, tmp_path) < 1e-4
    base = usage.lines(ModelConfig(str(folders[kind])), type(pipe))
    lines = weights.usage(pipe.unet, base, repr(str(tmp_path)))
    scope = {}
    exec(lines, scope)
    theirs = scope["pipeline"].unet
    assert type(scope["pipeline"]) is type(pipe) and type(theirs) is type(pipe.unet)
    with torch.no_grad():
        ours, again, base = (weights._probe(unet) for unet in (pipe.unet, theirs, load(folders[kind]).unet))
    assert torch.linalg.norm(ours - again) < 1e-5 * torch.linalg.norm(ours)
    assert torch.linalg.norm(ours - base) > 1e-3 * torch.linalg.norm(ours)
    # Saved once more over it, after another update.
    moved(pipe.unet)
    with pytest.raises(RunError, match="does not reload"):
        weights.verify_reload(pipe.unet, tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    weights.save(pipe.unet, tmp_path)
    assert weights.verify_reload(pipe.unet, tmp_path) < 1e-4
    assert {path.name for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("kind", tiny_models.BUILDERS)
def test_a_lora_file_that_lost_its_effect_is_refused(folders, tmp_path, kind):
    pipe = load(folders[kind])
    weights.attach(pipe, config("lora"), seed=0)
    moved(pipe.unet)
    file = weights.save(pipe.unet, tmp_path)
    state = load_file(file)
    save_file({name: torch.zeros_like(value) if "lora_B" in name else value for name, value in state.items()}, file)
    with pytest.raises(RunError, match=f"{file.name} does not reload"):
        weights.verify_reload(pipe.unet, tmp_path)


def test_verifying_makes_no_second_unet(folders, tmp_path):
    """There may be no room for it: beside the adapter, a small probe's activations are all it takes."""
    pipe = load(folders["sdxl"])
    weights.attach(pipe, config("lora"), seed=0)
    moved(pipe.unet)
    weights.save(pipe.unet, tmp_path)
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    frozen = {p.data_ptr() for p in pipe.unet.parameters() if not p.requires_grad}
    base = weights._base(pipe.unet)
    assert {p.data_ptr() for p in base.parameters()} == frozen
    assert not any(tensor.is_meta for tensor in [*base.parameters(), *base.buffers()])
    assert weights.verify_reload(pipe.unet, tmp_path) < 1e-4
    after = pipe.unet.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in before.items())


def test_one_weight_that_was_not_saved_is_named(folders, tmp_path):
    """Changed by less than the output's own rounding."""
    pipe = load(folders["pixels"])
    weights.attach(pipe, config("full"), seed=0)
    weights.save(pipe.unet, tmp_path)
    with torch.no_grad():
        pipe.unet.conv_out.bias[0] += 1e-6
    with pytest.raises(RunError, match="unet does not reload: conv_out.bias is not what was trained"):
        weights.verify_reload(pipe.unet, tmp_path)


def test_low_precision_has_masters_of_fp32(folders, tmp_path):
    """A bf16 base with an fp32 adapter; and a bf16 pipeline that is trained whole is trained in fp32."""
    pipe = load(folders["sd"]).to(torch.bfloat16)
    weights.attach(pipe, config("lora"), seed=0)
    assert {parameter.dtype for parameter in weights.trainable(pipe.unet).values()} == {torch.float32}
    assert pipe.unet.dtype == torch.bfloat16
    moved(pipe.unet)
    weights.save(pipe.unet, tmp_path)
    weights.verify_reload(pipe.unet, tmp_path)
    # By less than an output of bf16 shows.
    last = [value for name, value in weights.trainable(pipe.unet).items() if "lora_B" in name][-1]
    with torch.no_grad():
        last[0, 0] *= 1.02
    with pytest.raises(RunError, match="does not reload: .*lora_B is not what was trained"):
        weights.verify_reload(pipe.unet, tmp_path)
    pipe = load(folders["sd"]).to(torch.bfloat16)
    weights.attach(pipe, config("full"), seed=0)
    assert {parameter.dtype for parameter in pipe.unet.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("trained", "precision", "dtype"),
    [
        ("full", "bf16", torch.float32),
        ("full", "no", torch.float32),
        ("lora", "bf16", torch.bfloat16),
        ("lora", "fp16", torch.float16),
    ],
)
def test_master_dtype(trained, precision, dtype):
    run = config(trained)
    run.mixed_precision = precision
    assert weights.master_dtype(run) == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_whole_unet_under_autocast(folders, tmp_path, kind):
    """As accelerate prepares it: fp32 masters get fp32 gradients of bf16 arithmetic, and what is saved reloads."""
    pipe = load(folders[kind])
    weights.attach(pipe, config("full"), seed=0)
    rftcore.accelerate(pipe.unet)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        unet = Accelerator(mixed_precision="bf16", cpu=True).prepare(pipe.unet)
        draft_1(pipe, kind, unet)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert weights.silent(pipe.unet) == []
    rounded = gradients(pipe.unet)
    exact = load(folders[kind])
    weights.attach(exact, config("full"), seed=0)
    draft_1(exact, kind)
    difference = torch.linalg.norm(rounded - gradients(exact.unet)) / torch.linalg.norm(rounded)
    # Neither without autocast nor something else.
    assert rounded.dtype == torch.float32 and 1e-4 < difference < 0.2
    weights.save(pipe.unet, tmp_path)
    assert weights.verify_reload(pipe.unet, tmp_path) < 1e-5


@pytest.mark.parametrize("kind", tiny_models.BUILDERS)
@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["to_q", "to_kk"], "lora.target_modules='to_kk' is no module of the UNet2D.*did you mean 'to_k'"),
        (["to_out.1.x"], "lora.target_modules='to_out.1.x' is no module.*did you mean 'to_out.0'"),
        (["zzz"], "lora.target_modules='zzz' is no module.*known: .*conv1.*to_q"),
        (["to_q", "to_out"], "lora.target_modules='to_out' is .*to_out, a ModuleList, .*did you mean 'to_out.0'"),
    ],
)
def test_names_that_match_no_layer(folders, kind, targets, message):
    with pytest.raises(UsageError, match=message):
        weights.attach(load(folders[kind]), config("lora", target_modules=targets), seed=0)


def test_a_unet_that_has_an_adapter_already_is_refused(folders):
    pipe = load(folders["pixels"])
    weights.attach(pipe, config("lora"), seed=0)
    for trained in ("lora", "full"):
        with pytest.raises(UsageError, match="has an adapter already.*fuse_lora"):
            weights.attach(pipe, config(trained), seed=0)
