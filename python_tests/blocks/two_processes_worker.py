"""One rank of test_two_processes.py: a user's loop around an accelerated UNet, by itself stock; saves its gradients."""

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from against_stock import assert_served, inputs, make
from torch.nn.parallel import DistributedDataParallel

import rftcore

BATCH = 4


def problem(unused):
    """The same UNet on every rank; with some adapters that no loss reaches."""
    torch.manual_seed(0)
    unet = make()
    if unused:
        unet.unused = torch.nn.Linear(3, 3).double()
    return unet


def loss_of(unet, part):
    arguments = inputs(batch=BATCH, leaves=())
    return (
        unet(*(arguments[name][part] for name in ("sample", "timestep", "encoder_hidden_states"))).sample.pow(2).mean()
    )


def gradients(unet):
    found = {name.removeprefix("module."): p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None}
    unet.zero_grad()
    return found


def main(folder, rank):
    results = {}
    for case in ("before", "after", "DistributedDataParallel", "unused", "block"):
        unused = case == "unused"
        accelerator = Accelerator(
            cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=unused)]
        )
        several = accelerator.num_processes > 1
        unet = problem(unused)
        if several and case != "after":
            rftcore.accelerate(unet, recompute="block" if case == "block" else "none")
        if case == "DistributedDataParallel":
            unet = DistributedDataParallel(unet) if several else unet
        else:
            unet = accelerator.prepare(unet)
        if several and case == "after":
            rftcore.accelerate(unet)
        count = BATCH // accelerator.num_processes
        start = accelerator.process_index * count
        for _ in range(2):
            accelerator.backward(loss_of(unet, slice(start, start + count)))
            results[case] = gradients(unet)
        first, second = slice(start, start + count // 2), slice(start + count // 2, start + count)
        with accelerator.no_sync(unet):
            accelerator.backward(loss_of(unet, first) / 2)
        if several:
            results[f"{case}, not synchronised"] = {
                n: p.grad.clone() for n, p in unet.named_parameters() if p.grad is not None
            }
        accelerator.backward(loss_of(unet, second) / 2)
        results[f"{case}, accumulated"] = gradients(unet)
        if several:
            assert_served(unet)
    torch.save(results, folder / f"{rank}.pt")
