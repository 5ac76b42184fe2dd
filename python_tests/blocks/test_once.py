"""rftcore.blocks.once: values made once a chain change no output and no gradient."""

import copy

import pytest
import torch
from against_stock import assert_equal, inputs, make, randomise_adapters, results
from checks import relative_error
from diffusers import AutoencoderKL, UNet2DConditionModel
from models import UNETS
from peft import LoraConfig, inject_adapter_in_model

import rftcore
from rftcore.blocks import layers, once

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "time_emb_proj"]
TIMESTEPS = torch.tensor([901, 500, 7])


def adapted(kind="sd1", dropout=0.0, targets=TARGETS, **options):
    unet = make(kind, lora=False, **options)
    unet.requires_grad_(False)
    config = LoraConfig(r=2, lora_alpha=3, lora_dropout=dropout, target_modules=targets)
    inject_adapter_in_model(config, unet)
    return randomise_adapters(unet)


def conditioning(arguments):
    added = arguments.get("added_cond_kwargs")
    return {"encoder_hidden_states": arguments.get("encoder_hidden_states"), "added_cond_kwargs": added}


def chain(unet, kind="sd1", once_a_chain=False, arguments=None, rows=None, **computing):
    """The states of three steps that feed one another, and the gradients of everything that has one."""
    arguments = inputs(kind) if arguments is None else arguments
    x = arguments.pop("sample")
    arguments.pop("timestep")
    unet.zero_grad()
    values = once.compute(unet, TIMESTEPS, **conditioning(arguments), **computing) if once_a_chain else None
    states = [x]
    for step, t in enumerate(TIMESTEPS):
        with once.given(unet, values.at(step) if once_a_chain else {}):
            states.append(0.5 * states[-1] + unet(states[-1], t, **arguments, **computing, return_dict=False)[0])
    (states[-1].square().sum() + states[1].sum()).backward()
    leaves = {"x": x, "text": arguments.get("encoder_hidden_states"), **dict(unet.named_parameters())}
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf is not None}
    return {"last": states[-1].detach(), **gradients}


def assert_once_is_exact(unet, kind="sd1", **options):
    expected = chain(unet, kind, **options)
    assert sum(gradient is not None for gradient in expected.values()) > 8
    assert_equal(chain(unet, kind, once_a_chain=True, **options), expected, bound=1e-12)


@pytest.mark.covering(1)
@pytest.mark.parametrize("kind", UNETS)
@pytest.mark.parametrize("level", ["none", "qkv", "block"])
def test_a_chain_is_exact(kind, level):
    assert_once_is_exact(rftcore.accelerate(adapted(kind), level), kind)


@pytest.mark.parametrize("kind", UNETS)
def test_trained_in_full_it_is_exact(kind):
    assert_once_is_exact(rftcore.accelerate(make(kind, lora=False)), kind)


@pytest.mark.parametrize(
    "options",
    [
        {"resnet_time_scale_shift": "scale_shift"},
        {"resnet_skip_time_act": True, "time_embedding_act_fn": "silu"},
        {"layers_per_block": 2, "transformer_layers_per_block": 2},
        {"only_cross_attention": True},
        {"mid_block_type": None},
        {"act_fn": "mish"},
    ],
    ids=str,
)
def test_builds(options):
    assert_once_is_exact(rftcore.accelerate(adapted(**options)))


def test_blocks_take_what_they_are_given():
    """Other values than they would compute have their effect, and the layers that made them are not called."""
    unet = rftcore.accelerate(adapted("sdxl"))
    arguments = inputs("sdxl")
    values = once.compute(unet, arguments["timestep"][:1], **conditioning(arguments))
    expected = unet(**arguments, return_dict=False)[0]
    names = set(values.text) | set(values.time)
    reached = {name for name, _ in unet.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v", "time_emb_proj"))}
    assert names == reached | {"time_embedding", "add_embedding"}
    for name in names - {"time_embedding", "add_embedding"}:
        with once.given(unet, {**values.at(0), name: 2 * values.at(0)[name]}):
            assert relative_error(unet(**arguments, return_dict=False)[0], expected) > 1e-9, name


def test_what_is_missing_is_computed():
    unet = rftcore.accelerate(adapted())
    arguments = inputs()
    arguments["timestep"] = TIMESTEPS[:1]
    expected = results(unet, arguments)
    values = once.compute(unet, TIMESTEPS, arguments["encoder_hidden_states"].detach()).at(0)
    for names in ([], list(values.keys())[:5], [name for name in values if name.endswith("to_k")], list(values)[-3:]):
        with once.given(unet, {name: values[name].detach() for name in names}):
            found = unet(**arguments, return_dict=False)[0]
        assert relative_error(found, expected["output"]) <= 1e-13


def test_in_other_dtypes():
    """A product of one row may be summed in another order than that of many."""
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        unet = rftcore.accelerate(adapted().to(dtype))
        arguments = inputs(dtype=dtype, leaves=())
        values = once.compute(unet, TIMESTEPS, arguments["encoder_hidden_states"])
        with torch.no_grad():
            arguments["timestep"] = TIMESTEPS[1]
            expected = unet(**arguments).sample
            with once.given(unet, values.at(1)):
                assert relative_error(unet(**arguments).sample, expected) <= bound


def test_under_autocast():
    unet = rftcore.accelerate(adapted().float())

    def step(once_a_chain):
        arguments = inputs(dtype=torch.float32)
        arguments["timestep"] = TIMESTEPS[1]
        unet.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            values = once.compute(unet, TIMESTEPS, arguments["encoder_hidden_states"])
            assert values.time["mid_block.resnets.0.time_emb_proj"].dtype == torch.bfloat16
            with once.given(unet, values.at(1) if once_a_chain else {}):
                output = unet(**arguments).sample
        output.float().square().sum().backward()
        return [output, *(p.grad for p in unet.parameters() if p.grad is not None)]

    expected = step(False)
    for mine, theirs in zip(step(True), expected, strict=True):
        assert mine.dtype == theirs.dtype
        assert relative_error(mine, theirs) <= 3e-2


def test_micro_batches_take_rows():
    unet = rftcore.accelerate(adapted("sdxl"))
    arguments = inputs("sdxl", leaves=())
    arguments["timestep"] = TIMESTEPS[2]
    values = once.compute(unet, TIMESTEPS, **conditioning(arguments)).at(2)
    whole = unet(**arguments).sample
    for row in range(2):
        rows = slice(row, row + 1)
        part = {k: v[rows] if torch.is_tensor(v) and v.dim() else v for k, v in arguments.items()}
        part["added_cond_kwargs"] = {k: v[rows] for k, v in arguments["added_cond_kwargs"].items()}
        given = {name: value if value.shape[0] == 1 else value[rows] for name, value in values.items()}
        with once.given(unet, given):
            assert relative_error(unet(**part).sample, whole[rows]) <= 1e-13


def test_rows_that_do_not_fit():
    unet = rftcore.accelerate(adapted())
    arguments = inputs()
    values = once.compute(unet, TIMESTEPS, arguments["encoder_hidden_states"]).at(0)
    name = "mid_block.attentions.0.transformer_blocks.0.attn2"
    for layer in ("to_k", "to_v"):
        values[f"{name}.{layer}"] = values[f"{name}.{layer}"][:1]
    with once.given(unet, values), pytest.raises(ValueError, match=r"is given as .* for 2 rows"):
        unet(**arguments)
    with once.given(unet, {"time_embedding": torch.zeros(3, 64).double()}), pytest.raises(ValueError, match="3 rows"):
        unet(**arguments)


def test_adapters_scaled_and_switched():
    unet = rftcore.accelerate(adapted())
    other = LoraConfig(r=3, lora_alpha=3, target_modules=TARGETS)
    unet.add_adapter(other, adapter_name="other")
    rftcore.accelerate(unet)
    randomise_adapters(unet)
    plain = chain(unet)["last"]
    for change in (
        lambda: unet.set_adapter("default"),
        lambda: unet.set_adapters(["default", "other"], [0.3, 0.9]),
        lambda: unet.set_adapter("other"),
    ):
        change()
        assert_once_is_exact(unet)
        assert_once_is_exact(unet, cross_attention_kwargs={"scale": 0.4})
    unet.disable_adapters()
    expected, found = chain(unet)["last"], chain(unet, once_a_chain=True)["last"]
    assert relative_error(found, expected) <= 1e-13 < relative_error(plain, expected)


def test_adapters_with_dropout_compute_as_usual():
    unet = rftcore.accelerate(adapted(dropout=0.5).train())
    found = once.compute(unet, TIMESTEPS, inputs()["encoder_hidden_states"])
    assert set(found.time) == {"time_embedding"} and not found.text
    states = []
    for once_a_chain in (False, True):
        torch.manual_seed(5)
        states.append(chain(unet, once_a_chain=once_a_chain)["last"])
    assert relative_error(*states) <= 1e-13
    assert len(once.compute(unet.eval(), TIMESTEPS, inputs()["encoder_hidden_states"]).time) > 5


def test_with_stock_blocks_in_between():
    unet = rftcore.accelerate(adapted(layers_per_block=2))
    for name in (
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2",
        "up_blocks.1.resnets.0.conv1",
        "up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_k",
        "mid_block.resnets.0.time_emb_proj",
        "mid_block.attentions.0",
    ):
        unet.get_submodule(name).register_forward_hook(lambda module, args, output: None)
    found = once.compute(unet, TIMESTEPS, inputs()["encoder_hidden_states"])
    assert "up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_k" not in found.text
    assert "mid_block.resnets.0.time_emb_proj" not in found.time
    assert_once_is_exact(unet)


def test_blocks_whose_input_is_changed_on_the_way_are_left_alone():
    """A hook that gives a block other text: its keys and values are not those of the chain's text."""

    def other_text(module, args, kwargs):
        return args, {**kwargs, "encoder_hidden_states": 2 * kwargs["encoder_hidden_states"]}

    unet = rftcore.accelerate(adapted())
    unet.down_blocks[0].register_forward_pre_hook(other_text, with_kwargs=True)
    unet.up_blocks[1].attentions[0].register_forward_pre_hook(other_text, with_kwargs=True)
    assert_once_is_exact(unet)


def test_a_block_copied_within_the_model():
    unet = rftcore.accelerate(adapted(layers_per_block=2))
    unet.up_blocks[1].attentions[1] = copy.deepcopy(unet.up_blocks[1].attentions[2])
    for parameter in unet.up_blocks[1].attentions[1].parameters():
        parameter.data.mul_(1.1)
    assert_once_is_exact(unet)


def test_attention_masks_and_controlnet_residuals():
    unet = rftcore.accelerate(adapted())
    mask = torch.tensor([[1, 1, 1, 0, 0]] * 2).bool()

    def arguments():
        made = inputs()
        generator = torch.Generator().manual_seed(1)
        shapes = [(2, 16, 8, 8), (2, 16, 8, 8), (2, 16, 4, 4), (2, 32, 4, 4)]
        residuals = [torch.randn(shape, generator=generator).double() for shape in shapes]
        made["down_block_additional_residuals"] = residuals
        made["mid_block_additional_residual"] = torch.randn(2, 32, 4, 4, generator=generator).double()
        return made

    assert_equal(chain(unet, arguments=arguments(), once_a_chain=True), chain(unet, arguments=arguments()), 1e-12)
    masked = [
        chain(unet, arguments={**inputs(), "encoder_attention_mask": mask}, once_a_chain=o) for o in (True, False)
    ]
    assert_equal(*masked, 1e-12)


def test_adapters_on_the_embeddings_and_copies():
    unet = adapted("sdxl", targets=[*TARGETS, "linear_1", "linear_2"])
    rftcore.accelerate(unet)
    assert_once_is_exact(unet, "sdxl")
    assert_once_is_exact(copy.deepcopy(unet), "sdxl")
    unet.train()
    for name, module in unet.named_modules():
        if "lora_dropout" in name and name.endswith("lora_dropout") and "add_embedding" in name:
            module["default"] = torch.nn.Dropout(0.5)
    assert any("drops out" in reason for reason in once.reasons(unet))


def test_no_graph_no_gradient():
    unet = rftcore.accelerate(adapted())
    with torch.no_grad():
        values = once.compute(unet, TIMESTEPS, inputs()["encoder_hidden_states"])
    assert not any(t.requires_grad for t in (*values.text.values(), *values.time.values()))


def test_restored_and_nested():
    unet = rftcore.accelerate(adapted())
    arguments = inputs(leaves=())
    values = once.compute(unet, arguments["timestep"][:1], arguments["encoder_hidden_states"])
    arguments["timestep"] = arguments["timestep"][0]
    plain = unet(**arguments).sample
    with once.given(unet, {name: 2 * value for name, value in values.at(0).items()}):
        with once.given(unet, {}):
            assert torch.equal(unet(**arguments).sample, plain)
        assert not torch.equal(unet(**arguments).sample, plain)
    assert torch.equal(unet(**arguments).sample, plain)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (rftcore.restore, "not accelerated"),
        (lambda u: u.register_forward_pre_hook(lambda module, args: None), "may change what it is called with"),
        (lambda u: setattr(u, "forward", u.forward), "UNet2DConditionModel.forward was replaced"),
        (lambda u: setattr(u, "get_aug_embed", u.get_aug_embed), "get_aug_embed was replaced"),
        (lambda u: setattr(u, "encoder_hid_proj", torch.nn.Identity()), "encoder_hid_proj"),
        (lambda u: u.enable_gradient_checkpointing(), "gradient checkpointing"),
        (lambda u: u.time_embedding.register_forward_hook(lambda *_: None), "embedding of the model has hooks"),
        (lambda u: u.time_embedding.linear_1.register_forward_hook(lambda *_: None), "has hooks"),
    ],
)
def test_reasons(change, reason):
    unet = rftcore.accelerate(adapted())
    assert once.reasons(unet) == []
    change(unet)
    assert any(reason in why for why in once.reasons(unet)), once.reasons(unet)
    with pytest.raises(ValueError, match="once for all steps"):
        once.compute(unet, TIMESTEPS, inputs()["encoder_hidden_states"])


def test_reasons_of_other_models():
    vae = AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    assert once.reasons(rftcore.accelerate(vae)) == ["module is a AutoencoderKL, which has no timesteps"]
    classes = rftcore.accelerate(make(lora=False, class_embed_type="timestep"))
    assert once.reasons(classes) == ["the model has class_embedding"]

    class Own(UNet2DConditionModel):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    unet = make(lora=False)
    unet.__class__ = Own
    assert once.reasons(rftcore.accelerate(unet)) == ["Own.forward was replaced"]


def test_timesteps_that_are_no_list():
    unet = rftcore.accelerate(adapted())
    with pytest.raises(ValueError, match=r"timesteps is \(\); it must be \(T,\)"):
        once.compute(unet, TIMESTEPS[0], inputs()["encoder_hidden_states"])


@pytest.mark.parametrize("kind", UNETS)
def test_programs_are_planned_for_as_they_run(kind):
    """A budget's choices are found: the layers' programs with given values are those that `layers` writes."""
    unet = rftcore.accelerate(adapted(kind), "auto", memory_budget="1MiB")
    arguments = inputs(kind)
    values = once.compute(unet, TIMESTEPS, **conditioning(arguments)).at(0)
    with once.given(unet, values):
        unet(**arguments)
        found = {layer.name: layer for layer in layers.layers(unet, 2, 8, 8, torch.float64)}
    (choices,) = unet.conv_in.forward.place.serving.budget._choices.values()
    assert choices.keys() == found.keys()
    assert all(choice.drop is not None for choice in choices.values())
    assert found.keys() == {layer.name for layer in layers.layers(unet, 2, 8, 8, torch.float64, given=True)}
    taken = [name for layer in found.values() for name in layer.program.inputs if name.endswith("embedding")]
    assert len(taken) == len([name for name in values if name.endswith("time_emb_proj")])
