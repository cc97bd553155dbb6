"""What `torch.vmap` maps, written as ops on whole tensors.

    vmap(lambda i: j <= i)(rows)    -->    le(j, view(rows, …))

Transformers makes masks so, place by place. The rules of functorch do it below autograd, and so below the level at which the rest is traced.
"""

import contextlib
import threading

import torch
from torch._functorch import apis
from torch._functorch.autograd_function import custom_function_call
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode, _temp_remove_pre_dispatch_torch_function_mode, disable_proxy_modes_tracing, get_proxy_mode
from torch.overrides import TorchFunctionMode

_UNSEEN = (torch._C._set_grad_enabled, torch.amp.autocast_mode._enter_autocast, custom_function_call)


class _Plain(TorchFunctionMode):
    """Refuses, inside of a map, what says how gradients or dtypes go: below autograd nothing of it would be written down."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in _UNSEEN:
            raise RuntimeError(f"{getattr(function, '__name__', function)} inside of torch.vmap is not written down")
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def whole_maps():
    """While inside, a trace in this thread writes what is mapped as ops on whole tensors; a module that stays one call is run in another thread, as ever."""
    run, thread = apis.vmap_impl, threading.get_ident()

    def traced(*given, **rest):
        mode = get_proxy_mode() if threading.get_ident() == thread else None
        if mode is None:
            return run(*given, **rest)
        with disable_proxy_modes_tracing(), _temp_remove_pre_dispatch_torch_function_mode(), ProxyTorchDispatchMode(mode.tracer, "real"), _Plain():
            return run(*given, **rest)

    apis.vmap_impl = traced
    try:
        yield
    finally:
        apis.vmap_impl = run
