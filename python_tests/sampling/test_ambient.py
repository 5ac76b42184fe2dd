"""Autocast, attention kernels and random numbers, put back for a replay."""

import torch
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends, sdpa_kernel

from rftcore.sampling.ambient import Ambient, RandomState

CPU = torch.device("cpu")


def test_autocast_is_restored_and_caches_nothing():
    weight, x = torch.ones(2, 2, requires_grad=True), torch.ones(2, 2)
    with torch.autocast("cpu", dtype=torch.float16):
        inside = Ambient.capture(CPU)
    outside = Ambient.capture(CPU)
    with inside.restored():
        assert (x @ weight).dtype == torch.float16 and torch.get_autocast_dtype("cpu") == torch.float16
        assert not torch.is_autocast_cache_enabled()
        with outside.restored():
            assert (x @ weight).dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu") and (x @ weight).dtype == torch.float32


def test_of_a_gpu_both_devices_are_captured():
    assert [kind for kind, *_ in Ambient.capture(torch.device("cuda")).autocast] == ["cpu", "cuda"]
    assert [kind for kind, *_ in Ambient.capture(CPU).autocast] == ["cpu"]


def test_attention_kernels_come_back_in_their_order():
    order = [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]
    before = _cur_sdpa_kernel_backends(with_priority=True)
    for chosen in (order, order[::-1], order[:1]):
        with sdpa_kernel(chosen, set_priority=True):
            captured = Ambient.capture(CPU)
        with captured.restored():
            assert _cur_sdpa_kernel_backends(with_priority=True) == chosen
        assert _cur_sdpa_kernel_backends(with_priority=True) == before


def test_random_numbers_are_drawn_again():
    state = RandomState.capture(CPU)
    assert not state.drawn_from()
    first = torch.rand(3)
    assert state.drawn_from()
    with state.restored():
        assert not state.drawn_from()
        assert torch.equal(torch.rand(3), first)
    following = torch.rand(3)
    with state.restored():
        torch.rand(7)
    torch.manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        pass
    assert not torch.equal(following, first)


def test_what_was_there_before_comes_back():
    state = RandomState.capture(CPU)
    torch.rand(5)
    here = torch.get_rng_state()
    with state.restored():
        torch.rand(1)
    assert torch.equal(torch.get_rng_state(), here)
