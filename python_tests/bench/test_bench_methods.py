"""Which methods a comparison has, by name and pattern."""

import pytest

from rftcore.bench.methods import method, methods, needed, select
from rftcore.errors import UsageError


def names(*arguments):
    return [each.name for each in select(*arguments)]


def test_patterns_choose_in_one_order_whatever_theirs():
    chosen = names("rftcore*, stock*,stock", "draft", 1)
    checkpoints = ["stock", "stock+steps", "stock+blocks", "stock+steps+blocks"]
    assert chosen == [*checkpoints, "rftcore", *(f"rftcore@{name}" for name in checkpoints), "rftcore@least"]
    assert names("rftcore@500MiB,rftcore", "draft", 1) == ["rftcore", "rftcore@500MiB"]


def test_a_work_has_the_switches_that_mean_something_there():
    assert not any("steps" in name for name in methods("ddpo", 2))
    assert not any("blocks" in name or "@" in name for name in methods("sampling", 1))
    assert any("images" in name for name in methods("draft", 2)) and not any("images" in n for n in methods("draft", 1))
    for work in ("train_step", "draft", "ddpo", "dpok", "sampling"):
        assert {name.partition("+")[0].partition("@")[0] for name in methods(work, 2)} == {
            "stock", "fp32_lora", "autocast", "compile", "rftcore",
        }  # fmt: skip


def test_a_name_says_what_is_done():
    made = method("compile@0.3+steps")
    assert made.compiled == 0.3 and made.steps and not made.blocks and not made.sampler
    ours = method("rftcore@stock+steps")
    assert ours.budget == "stock+steps" and ours.sampler and ours.score and not ours.steps
    merged = method("rftcore+merged")
    assert merged.merged and not merged.planned
    assert method("fp32_lora").refusal("fp32") and not method("fp32_lora").refusal("bf16")


def test_the_bytes_of_a_method_that_is_not_chosen_are_counted():
    assert [each.name for each in needed(select("rftcore@stock+steps", "draft", 1))] == ["stock", "stock+steps"]
    assert needed(select("stock,rftcore,rftcore@least", "draft", 1)) == []


@pytest.mark.parametrize("given", ["stok", "rftcore@lots", "stock+images", "rftcore@"])
def test_what_names_nothing_is_refused_with_what_is_there(given):
    with pytest.raises(UsageError, match=r"--methods .* names nothing that does draft; .*known: .*rftcore@least"):
        select(given, "draft", 1)
