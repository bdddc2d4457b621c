"""An accelerator that is the CPU's memory and arithmetic, but whose tensors no operator takes beside the CPU's.

What a GPU refuses is refused here without one: operands on two devices, a NumPy view of memory that is not the CPU's.
It is PyTorch's backend for out-of-tree devices, written in Python: `installed` registers it, for good, so this belongs
in a process of its own. Its tensors wrap those of the CPU that hold their values; every operator is called with these.
"""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import torch
from torch.utils import _pytree as tree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "simulated"
CPU = torch.device("cpu")
aten = torch.ops.aten
MOVES = (aten._to_copy.default, aten.copy_.default, aten._copy_from_and_resize.default)  # these may see two devices
VALUES = (aten._local_scalar_dense.default, aten.equal.default, aten.is_same_size.default)  # these give no tensors


class Simulated(torch.Tensor):
    """A tensor of the accelerator; `inner` has its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        found = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=torch.device(NAME, 0),
        )
        found.inner = inner
        return found

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatched(func, args, kwargs or {})

    def __repr__(self):
        return f"Simulated({self.inner!r})"

    def tolist(self):
        return self.inner.tolist()

    def data_ptr(self):
        return self.inner.data_ptr()

    def untyped_storage(self):
        return self.inner.untyped_storage()

    def numpy(self, **options):
        raise TypeError(f"can't convert {NAME} device type tensor to numpy. Use Tensor.cpu() first.")


class Factories(TorchDispatchMode):
    """Inside, what makes tensors makes them on the accelerator where it is asked to."""

    def __enter__(self):
        self._before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor makes them on the CPU and then moves them
        return super().__enter__()

    def __exit__(self, *error):
        torch._C._set_only_lift_cpu_tensors(self._before)
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return dispatched(func, args, kwargs or {})


class Module:
    """What PyTorch asks the module of a device for, as `torch.cuda` has it."""

    def is_initialized(self):
        return True

    def is_available(self):
        return True

    def current_device(self):
        return 0

    def device_count(self):
        return 1

    def _is_in_bad_fork(self):
        return False

    def manual_seed(self, seed):
        pass

    def manual_seed_all(self, seed):
        pass

    def synchronize(self, device=None):
        pass

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device=0):
        return torch.get_rng_state()

    def set_rng_state(self, state, device=0):
        torch.set_rng_state(state)

    def device(self, index):
        return nullcontext()

    def get_device_properties(self, device=None):
        return SimpleNamespace(name=NAME, max_compute_units=8, total_memory=2**34)


def dispatched(func, args, kwargs):
    """Call an operator with the values; what comes out is on the accelerator if the operands or ``device`` are."""
    flat, spec = tree.tree_flatten((args, kwargs))
    there = [each for each in flat if isinstance(each, Simulated)]
    if func.namespace == "optimum_sab" and there:
        with Factories():
            return implementations()[func.__name__.partition(".")[0]](*args, **kwargs)
    if there and func not in MOVES:
        for each in flat:
            if isinstance(each, torch.Tensor) and not isinstance(each, Simulated) and each.dim():
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, but found at least two devices, {NAME}:0 and "
                    f"{each.device}! ({func})"
                )
    values = [each.inner if isinstance(each, Simulated) else CPU if is_there(each) else each for each in flat]
    args_of_values, kwargs_of_values = tree.tree_unflatten(values, spec)
    found = func(*args_of_values, **kwargs_of_values)
    if func in VALUES:
        return found
    on = bool(there) if kwargs.get("device") is None else is_there(kwargs["device"])
    if func is aten.copy_.default:
        on = isinstance(args[0], Simulated)
    given = {id(value): each for value, each in zip(values, flat, strict=True) if isinstance(each, Simulated)}

    def wrapped(value):
        if id(value) in given:  # in place: the tensor itself
            return given[id(value)]
        return Simulated(value) if on and isinstance(value, torch.Tensor) else value

    return tree.tree_map(wrapped, found)


def is_there(device):
    """Whether this is the accelerator."""
    return isinstance(device, torch.device) and device.type == NAME


def implementations():
    """Our operators, which are called with tensors of the accelerator as they would be with those of a GPU."""
    from optimum_sab.ops import experts, operator

    return {
        "binary_linear": operator._forward,
        "stacked_linear": operator._stacked,
        "binary_linear_transposed": operator._transposed,
        "experts_linear": experts._forward,
        "experts_linear_transposed": experts._transposed,
    }


@contextmanager
def installed():
    """Registers the accelerator; inside, PyTorch uses it. Gives it."""
    _setup_privateuseone_for_python_backend(NAME, Module())
    with Factories(), torch.autograd.set_multithreading_enabled(False):  # the mode is of this thread
        yield torch.device(NAME)
