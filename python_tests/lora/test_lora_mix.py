"""Mixtures of LoRAs: stock diffusers' images of both, the singular values' errors, and what cannot be mixed."""

import math

import pytest
import torch
from tiny_loras import assert_same_changes, assert_same_layers, changes, make

from rftcore.errors import UsageError
from rftcore.lora import algebra, diff, files
from rftcore.lora.layers import Layer, Lora
from rftcore.lora.mix import mix


def sum_of(*weighted):
    total = {}
    for weight, lora in weighted:
        for name, value in changes(lora).items():
            total[name] = total.get(name, 0) + weight * value
    return total


def output(pipe):
    """The UNet's and the text encoders' outputs for one input."""
    source = torch.Generator().manual_seed(0)
    config = pipe.unet.config
    given = {"encoder_hidden_states": torch.randn(2, 5, config.cross_attention_dim, generator=source)}
    if config.addition_embed_type:
        given["added_cond_kwargs"] = {
            "text_embeds": torch.randn(2, 10, generator=source),
            "time_ids": torch.randn(2, 6, generator=source),
        }
    latents = torch.randn(2, 4, 8, 8, generator=source)
    with torch.no_grad():
        tokens = torch.arange(8).reshape(2, 4)
        encoders = [getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2")]
        text = [model(tokens, output_hidden_states=True).hidden_states[-1] for model in encoders if model is not None]
        return [pipe.unet(latents, 500, **given).sample, *text]


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_mixture_is_what_diffusers_makes_of_both(kind, make_pipeline, two, tmp_path):
    (a, path_a), (b, path_b) = two[kind]
    mixture = mix([("a", a, 0.7), ("b", b, -0.3)])
    assert mixture.error < 1e-7 and mixture.worst_error < 1e-6
    assert_same_changes(changes(mixture.lora), sum_of((0.7, a), (-0.3, b)))
    base, stock, mixed = (make_pipeline(kind) for _ in range(3))
    stock.load_lora_weights(path_a, adapter_name="a")
    stock.load_lora_weights(path_b, adapter_name="b")
    stock.set_adapters(["a", "b"], [0.7, -0.3])
    mixed.load_lora_weights(files.write(mixture.lora, tmp_path / "c.safetensors"))
    for plain, expected, found in zip(output(base), output(stock), output(mixed), strict=True):
        assert torch.linalg.norm(expected - plain) > 1e-2 * torch.linalg.norm(plain)
        assert torch.linalg.norm(found - expected) <= 1e-5 * torch.linalg.norm(expected)


def test_one_with_weight_one_is_bit_exact(shapes):
    lora = make(shapes["sdxl"], every=5)
    assert_same_layers(mix([("a", lora, 1.0)]).lora, lora)
    assert_same_layers(mix([("a", lora, 1.0), ("b", make(shapes["sdxl"], seed=1), 0.0)]).lora, lora)
    half = make(shapes["sdxl"], every=5, dtype=torch.float16)
    found = mix([("a", half, 1.0)]).lora
    assert all(torch.equal(found.layers[name].up, layer.up.float()) for name, layer in half.layers.items())


@pytest.mark.parametrize("rank", [1, 3, 5, 100])
def test_the_nearest_of_a_rank(rank, two):
    (a, _), (b, _) = two["sd1"]
    mixture = mix([("a", a, 0.7), ("b", b, 0.3)], rank=rank)
    off, whole, worst = 0.0, 0.0, (0.0, "")
    for name, exact in sum_of((0.7, a), (0.3, b)).items():
        layer, values = mixture.lora.layers[name], torch.linalg.svdvals(exact)
        assert layer.rank <= rank
        lost = math.sqrt(float((values[rank:] ** 2).sum()))
        off, whole = math.hypot(off, lost), math.hypot(whole, float(torch.linalg.norm(exact)))
        worst = max(worst, (lost / float(torch.linalg.norm(exact)), name))
        found = changes(Lora({name: layer}))[name]
        assert float(torch.linalg.norm(found - exact)) == pytest.approx(lost, rel=1e-5, abs=1e-5)
    assert mixture.error == pytest.approx(off / whole, rel=1e-5, abs=1e-6)
    assert mixture.worst_error == pytest.approx(worst[0], rel=1e-5, abs=1e-6)
    if rank < 5:
        assert mixture.worst_layer == worst[1] and mixture.error > 0.01


def test_what_is_lost_to_a_dtype_is_told(two):
    (a, _), (b, _) = two["sd1"]
    found = mix([("a", a, 0.7), ("b", b, 0.3)], dtype=torch.bfloat16)
    assert all(layer.up.dtype == torch.bfloat16 for layer in found.lora.layers.values())
    assert 1e-4 < found.error < 1e-2
    with pytest.raises(UsageError, match="does not fit into torch.float16; give --dtype fp32"):
        mix([("a", a, 1e6)], dtype=torch.float16)


def test_loras_that_cancel(two):
    """Nothing is left to be a share of but the rounding of what was summed."""
    a, _ = two["sd1"][0]
    none = mix([("a", a, 0.7), ("a", a, -0.7)])
    assert none.error < 1e-12 and none.worst_error < 1e-12
    assert max(float(value.norm()) for value in changes(none.lora).values()) < 1e-12


def test_loras_that_cannot_be_mixed(two, shapes):
    a, other = two["sd1"][0][0], two["sdxl"][0][0]
    with pytest.raises(UsageError, match=r"b.s is of another base model than a.s: unet\.\S+ changes a weight of \("):
        mix([("a.s", a, 1.0), ("b.s", other, 1.0)])
    name = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    first, second = (
        Lora({f"{name}{i}"[:-1]: Layer(torch.ones(1, n), torch.ones(8, 1), 1.0)}) for i, n in enumerate((768, 1024))
    )
    with pytest.raises(UsageError, match=r"changes a weight of \(8, 1024\) there, and of \(8, 768\) here"):
        mix([("a.s", first, 1.0), ("b.s", second, 1.0)])
    elsewhere = Lora({name.replace("to_k", "to_v"): second.layers[name]})
    with pytest.raises(UsageError, match=r"b.s is of another base model than a.s: .* sd2 .*to_v.* of sd1"):
        mix([("a.s", first, 1.0), ("b.s", elsewhere, 1.0)])
    with pytest.raises(UsageError, match="every weight is 0"):
        mix([("a.s", a, 0.0)])


def test_norms_see_small_differences(two):
    layer = next(iter(two["sd1"][0][0].layers.values()))
    near = Layer(layer.down, layer.up.double() * (1 + 1e-12), layer.alpha)
    whole = algebra.norm((1.0, layer))
    assert whole == pytest.approx(float(torch.linalg.norm(changes(Lora({"unet.a": layer}))["unet.a"])), rel=1e-12)
    assert algebra.norm((1.0, near), (-1.0, layer)) == pytest.approx(1e-12 * whole, rel=1e-2)


def test_differences_by_block(two):
    (a, _), (b, _) = two["sdxl"]
    whole_a, whole_b = changes(a), changes(b)
    rows = {row.name: row for row in diff.diff(a, b)}
    assert [*rows][-1] == "all" and {"unet.down_blocks.1", "unet.mid_block", "text_encoder_2"} < rows.keys()
    for name, row in rows.items():
        names = [n for n in {**whole_a, **whole_b} if name in ("all", n) or n.startswith(f"{name}.")]
        shapes = {n: whole_a.get(n, whole_b.get(n)).shape for n in names}
        first, second = (
            torch.cat([whole.get(n, torch.zeros(shapes[n])).double().flatten() for n in names])
            for whole in (whole_a, whole_b)
        )
        assert row.layers == len(names)
        assert row.first == pytest.approx(float(first.norm())) and row.second == pytest.approx(float(second.norm()))
        assert row.change == pytest.approx(float((second - first).norm() / first.norm()))
        assert row.cosine == pytest.approx(float(first @ second / first.norm() / second.norm()), abs=1e-12, nan_ok=True)
    same = diff.diff(a, mix([("a", a, 2.0)]).lora)[-1]
    assert same.change == pytest.approx(1.0) and same.cosine == pytest.approx(1.0)
    alone = diff.diff(a, None)[-1]
    assert alone.first == pytest.approx(rows["all"].first) and alone.second == 0 and math.isnan(alone.cosine)
    with pytest.raises(UsageError, match=r"of other base models: unet\.\S+ changes a weight of"):
        diff.diff(a, two["sd1"][0][0])
