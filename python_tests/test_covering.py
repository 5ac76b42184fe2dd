"""The few of a product that `make test` runs."""

import itertools

import pytest
from covering import covering


@pytest.mark.parametrize("strength", [1, 2])
@pytest.mark.parametrize("sizes", [(3,), (2, 2), (7, 3, 2, 2), (4, 4, 4)])
def test_whatever_comes_together_is_there_in_few(sizes, strength):
    names = "abcd"[: len(sizes)]
    product = [dict(zip(names, values, strict=True)) for values in itertools.product(*map(range, sizes))]
    few = [product[place] for place in covering(product, strength)]
    for some in itertools.combinations(names, min(strength, len(names))):
        assert {tuple(each[name] for name in some) for each in few} == set(
            itertools.product(*(range(sizes[names.index(name)]) for name in some))
        )
    least = sorted(sizes)[-strength:]
    assert len(few) <= 1.5 * least[0] * (least[-1] if len(least) > 1 else 1)


def test_of_nothing_nothing_is_chosen():
    assert covering([], 2) == []
