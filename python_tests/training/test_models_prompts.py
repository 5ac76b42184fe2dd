"""Clip skip, tokens of textual inversion, and text that is too long, as the pipeline's own call has them."""

import warnings

import pytest
import tiny
import torch

from rftcore.training import UsageError, pipeline
from rftcore.training.config import ModelConfig, SamplingConfig

CPU = torch.device("cpu")
PROMPTS = tiny.TRAIN_PROMPTS[:2]


def load(folder, layers=None):
    """With text encoders of 4 layers, which have some to leave out."""
    pipe = pipeline.load(ModelConfig(pretrained_model_name_or_path=str(folder)), torch.float32)
    for name in ("text_encoder", "text_encoder_2") if layers else ():
        if hasattr(pipe, name):
            old = getattr(pipe, name)
            old.config.num_hidden_layers = layers
            torch.manual_seed(5)
            setattr(pipe, name, type(old)(old.config).eval())
    return pipe


def encode(pipe, clip_skip=None, prompts=PROMPTS):
    return pipeline.encode_prompts(pipe, prompts, "", CPU, 8, clip_skip).batch(prompts)


@torch.no_grad()
def by_hand(pipe, prompts, clip_skip):
    """The text encoder's states before its last `clip_skip` layers, normalised as the last ones are."""
    encoder = pipe.text_encoder
    length = pipe.tokenizer.model_max_length
    tokens = pipe.tokenizer(prompts, padding="max_length", max_length=length, return_tensors="pt").input_ids
    states = encoder(tokens, output_hidden_states=True).hidden_states[-(clip_skip + 1)]
    return getattr(encoder, "text_model", encoder).final_layer_norm(states)


def of_the_call(pipe, prompts, clip_skip):
    """What the UNet is given by the pipeline's own call, the negative prompts' part first."""
    seen = {}

    def keep(module, arguments, given):
        seen.setdefault("rows", given["encoder_hidden_states"])

    pipe.unet.register_forward_pre_hook(keep, with_kwargs=True)
    pipe.set_progress_bar_config(disable=True)
    pipe(prompts, num_inference_steps=1, guidance_scale=2.0, clip_skip=clip_skip, height=16, width=16)
    return seen["rows"]


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_clip_skip_is_that_of_the_pipelines_own_call(folders, kind):
    # SD's own call fails with transformers 5.6: its last norm has moved.
    truth = {
        "sd": lambda pipe: torch.cat([by_hand(pipe, ["", ""], 2), by_hand(pipe, PROMPTS, 2)]),
        "sdxl": lambda pipe: of_the_call(pipe, PROMPTS, 2),
    }
    expected = truth[kind](load(folders[kind], layers=4))
    ours, without = encode(load(folders[kind], layers=4), 2), encode(load(folders[kind], layers=4), 1)
    assert torch.allclose(torch.cat([ours["negative_prompt_embeds"], ours["prompt_embeds"]]), expected, atol=1e-6)
    assert not torch.allclose(ours["prompt_embeds"], without["prompt_embeds"], atol=1e-2)


@pytest.mark.parametrize(("kind", "most"), [("sd", 3), ("sdxl", 2)])
def test_a_clip_skip_that_leaves_nothing(folders, kind, most):
    encode(load(folders[kind], layers=4), most)
    with pytest.raises(UsageError, match=f"sampling.clip_skip={most + 1}, and text_encoder has 4 .*at most {most} can"):
        encode(load(folders[kind], layers=4), most + 1)
    with pytest.raises(UsageError, match="sampling.clip_skip=-1 must be at least 0"):
        encode(load(folders[kind], layers=4), -1)
    with pytest.raises(UsageError, match="clip_skip=1, and the DDPMPipeline has no text encoder"):
        pipeline.check_sampling(load(folders["pixels"]), SamplingConfig(guidance_scale=1.0, clip_skip=1))


def test_no_guidance_is_asked_for_by_its_own_value(folders):
    with pytest.raises(UsageError, match="guidance_scale=0.0 would weigh.*set sampling.guidance_scale=1.0"):
        pipeline.check_sampling(load(folders["sdxl"]), SamplingConfig(guidance_scale=0.0))


def test_tokens_of_textual_inversion(folders):
    """A word of two vectors is two tokens; the pipeline writes it out."""
    pipe = load(folders["sd"])
    pipe.load_textual_inversion({"<mine>": torch.randn(2, 16)})
    prompts = ["a <mine>", "a handwritten one"]
    expected, _ = pipe.encode_prompt(prompts, CPU, 1, do_classifier_free_guidance=False)
    tokens = pipe.tokenizer(pipe.maybe_convert_prompt("a <mine>", pipe.tokenizer)).input_ids
    assert len(tokens) == 5
    assert torch.allclose(encode(pipe, prompts=prompts)["prompt_embeds"], expected, atol=1e-6)


def test_text_that_is_cut_off_is_shown_once(folders):
    pipe = load(folders["sd"])
    room = pipe.tokenizer.model_max_length - 2
    words = " ".join(["handwritten"] * room)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        encode(load(folders["sd"]), prompts=[words])
    with pytest.warns(UserWarning, match="longer than the") as told:
        encode(pipe, prompts=[f"{words} one two", "a handwritten one", f"a {words} three"])
    (message,) = [str(warning.message) for warning in told if "longer than" in str(warning.message)]
    assert message.startswith(f"2 prompt(s) are longer than the {room} tokens")
    assert "ends before 'one two'" in message and "ends before 'handwritten three'" in message
