"""How records are indexed, moved and told apart."""

import numpy
import pytest
import torch

from rftcore.sampling import records

VALUES = torch.arange(10.0).reshape(5, 2)


@pytest.mark.parametrize("index", [0, 4, -5, -1, numpy.int64(3), torch.tensor(2)])
def test_a_number_keeps_the_dimension(index):
    assert torch.equal(VALUES[records.row_index(index, 5, "5 rows")], VALUES[int(index)][None])


@pytest.mark.parametrize("index", [5, -6, 100])
def test_a_number_out_of_range(index):
    with pytest.raises(IndexError, match=rf"index {index} is out of range for 5 rows\."):
        records.row_index(index, 5, "5 rows")


@pytest.mark.parametrize(
    "index",
    [
        slice(1, 4, 2),
        [0, -1, 0],
        (),
        torch.tensor([3, 1], dtype=torch.int32),
        torch.tensor([True, False, False, True, True]),
        [False, False, True, False, False],
        torch.tensor([2]),
    ],
)
def test_rows_are_pytorchs(index):
    rows = records.row_index(index, 5, "5 rows")
    assert isinstance(rows, slice) or rows.dtype == torch.int64
    right = VALUES[torch.as_tensor(index, dtype=torch.long) if index == () else index if isinstance(index, slice)
                   else torch.as_tensor(index).to(torch.as_tensor(index).dtype)]  # fmt: skip
    assert torch.equal(VALUES[rows], right)


@pytest.mark.parametrize("count", [4, 6])
def test_a_mask_of_another_length(count):
    with pytest.raises(IndexError, match=rf"mask of shape \({count},\) does not index 5 rows; it must be \(5,\)"):
        records.row_index(torch.ones(count, dtype=torch.bool), 5, "5 rows")


def test_whole_numbers():
    found = records.whole_numbers([1, 2], "steps", "(N,)", (1,))
    assert found.dtype == torch.int64 and found.tolist() == [1, 2]
    assert records.whole_numbers(torch.tensor([[1]], dtype=torch.int32), "steps", "(N, S)", (1, 2)).tolist() == [[1]]
    for wrong in ([1.0], torch.tensor([True]), [[1]], torch.tensor(1)):
        with pytest.raises(ValueError, match=r"steps must be whole numbers \(N,\), got torch"):
            records.whole_numbers(wrong, "steps", "(N,)", (1,))
    with pytest.raises(ValueError, match="steps is empty"):
        records.whole_numbers([], "steps", "(N,)", (1,))


def test_a_destination_is_a_device_alone():
    assert records.destination("a record", "cpu") == (torch.device("cpu"), False)
    assert records.destination("a record", device="meta", non_blocking=True) == (torch.device("meta"), True)
    for wrong in ((torch.float16,), ("cpu", torch.bfloat16), (torch.ones(1).half(),)):
        with pytest.raises(ValueError, match="a record keeps its dtypes"):
            records.destination("a record", *wrong)


def test_what_is_stored_has_no_graph_and_its_own_memory():
    part = (VALUES * torch.ones(1, requires_grad=True))[:1]
    stored = records.stored(part)
    assert torch.equal(stored, part) and not stored.requires_grad
    assert stored.untyped_storage().nbytes() == 8 and stored.data_ptr() != part.data_ptr()
    assert records.sent(torch.tensor([1]), torch.device("meta")).device.type == "meta"


def test_differences_are_named():
    assert records.difference({"a": 1, "b": 2}, {"b": 2, "a": 1}) == ""
    assert records.difference({"b": 1, "a": 1}, {"a": 2, "c": 3}) == "a 1 and 2, b 1 and None, c None and 3"


def test_settings_have_to_agree():
    records.check_same_settings("records", [{"a": 1}, {"a": 1}, {"a": 1}])
    records.check_same_settings("records", [{"a": 1}])
    with pytest.raises(ValueError, match="records of different settings do not join: a 1 and 2"):
        records.check_same_settings("records", [{"a": 1}, {"a": 1}, {"a": 2}])
    # A record may know more than is asked.
    records.check_made_with("records", {"a": 1, "more": 2}, {"a": 1})
    with pytest.raises(ValueError, match="made with other settings than this sampler's: a None and 1"):
        records.check_made_with("records", {}, {"a": 1})
