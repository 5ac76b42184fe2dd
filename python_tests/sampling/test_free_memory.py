"""Memory that is free: of the machine, of the control groups that limit a process, of the rank that has least."""

from types import SimpleNamespace

import psutil
import pytest
import torch

from rftcore.sampling import free_memory, plans


def group(folder, limit, used, cached, version):
    names = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes"), 2: ("memory.max", "memory.current")}[version]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\n")


def machine(root, lines):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(lines)


def test_a_control_group_of_the_second_version_limits(tmp_path):
    machine(tmp_path, "0::/job/step\n")
    group(tmp_path / "sys/fs/cgroup/job/step", "max", 700, 0, 2)
    group(tmp_path / "sys/fs/cgroup/job", 1000, 700, 100, 2)
    assert list(free_memory._left_of_control_groups(tmp_path)) == [400]


def test_a_control_group_of_the_first_version_limits(tmp_path):
    machine(tmp_path, "5:cpu,cpuacct:/\n4:memory:/slurm/job\n0::/\n")
    group(tmp_path / "sys/fs/cgroup/memory/slurm/job", 1000, 300, 50, 1)
    group(tmp_path / "sys/fs/cgroup/memory", 9000, 300, 0, 1)
    assert list(free_memory._left_of_control_groups(tmp_path)) == [750, 8700]


def test_a_containers_own_group_is_the_root(tmp_path):
    machine(tmp_path, "0::/../../docker/123\n")
    group(tmp_path / "sys/fs/cgroup", 1000, 400, 0, 2)
    assert 600 in free_memory._left_of_control_groups(tmp_path)


def test_a_machine_without_control_groups(tmp_path):
    assert list(free_memory._left_of_control_groups(tmp_path)) == []


def test_a_margin_is_left(monkeypatch):
    monkeypatch.setattr(free_memory, "_of_host", lambda: 10 * 2**30)
    assert free_memory.free_memory(torch.device("cpu")) == int(9.5 * 2**30) - 256 * 2**20
    monkeypatch.setattr(free_memory, "_of_host", lambda: 10)
    assert free_memory.free_memory(torch.device("cpu")) == 0


def test_the_machines_memory_is_asked():
    assert 0 < free_memory.free_memory(torch.device("cpu")) < psutil.virtual_memory().total


@pytest.fixture
def one_process():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_the_least_of_all_ranks_counts(one_process, monkeypatch):
    asked = []

    def reduced(tensor, op):
        asked.append((int(tensor), op))
        tensor.fill_(123)

    monkeypatch.setattr(torch.distributed, "all_reduce", reduced)
    assert free_memory.free_memory(torch.device("cpu")) == 123
    assert asked[0][0] > 0 and asked[0][1] == torch.distributed.ReduceOp.MIN


def test_ranks_wait_for_each_other_once(monkeypatch):
    """At the first chain, which all of them have; later ones plan with no more than what was the least then."""
    answers = iter([100, 70, 200])
    asked = []

    def free(device, of_all_ranks=True):
        asked.append(of_all_ranks)
        return next(answers)

    monkeypatch.setattr(plans, "free_memory", free)
    made = plans.Plans(SimpleNamespace(ddp=object()), None, None, None, guided=False)
    assert [made._free(torch.device("cpu")) for _ in range(3)] == [100, 70, 100]
    assert asked == [True, False, False]
