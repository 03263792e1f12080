"""Host memory is used again, but never while anything can still see it."""

import threading

import pytest
import torch

from fastdeitlt.data.augment import buffers

SHAPE = (3, 50, 50, 8)


@pytest.fixture(autouse=True)
def no_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "_arrays", type(buffers._arrays)(maxlen=4))


def address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_memory_nobody_holds_is_used_again_for_any_type_and_shape() -> None:
    first = address(buffers.empty(SHAPE, torch.float32))
    again = buffers.empty((90_000,), torch.bfloat16)
    assert address(again) != first, "another size"
    other = buffers.empty((60_000,), torch.int32)
    assert address(other) == first
    assert other.shape == (60_000,)
    assert other.dtype == torch.int32


@pytest.mark.parametrize("held", ["tensor", "view", "graph", "numpy", "another thread"])
def test_memory_in_use_is_not(held: str) -> None:
    tensor = buffers.empty(SHAPE, torch.float32).fill_(7.0)
    seen: list[object] = []
    match held:
        case "tensor":
            seen.append(tensor)
        case "view":
            seen.append(tensor[1:, :3].permute(0, 3, 1, 2))
        case "graph":  # the product keeps the tensor for its backward pass
            weight = torch.ones((), requires_grad=True)
            seen.append((tensor * weight).sum())
        case "numpy":
            seen.append(tensor.numpy()[0])
        case "another thread":
            release = threading.Event()
            thread = threading.Thread(target=lambda kept=tensor: release.wait(10), args=())
            thread.start()
    first = address(tensor)
    del tensor
    new = buffers.empty(SHAPE, torch.float32)
    assert address(new) != first
    if held == "another thread":
        release.set()
        thread.join()
    seen.clear()


def test_small_and_device_tensors_are_left_to_the_allocator() -> None:
    buffers.empty((8, 8), torch.float32)
    assert not buffers._arrays


def test_no_more_are_kept_than_said() -> None:
    held = [buffers.empty(SHAPE, torch.float32) for _ in range(9)]
    assert len(buffers._arrays) == 4
    assert len({address(tensor) for tensor in held}) == 9
