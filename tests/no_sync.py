"""A mode in which the host must not wait for the device."""

from torch.utils._python_dispatch import TorchDispatchMode

SYNCS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique", "equal", "item")


class NoSync(TorchDispatchMode):
    """Fails on operators that make the host wait for the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert not any(name.startswith(sync) for sync in SYNCS), f"host sync: {function}"
        return function(*args, **(kwargs or {}))
