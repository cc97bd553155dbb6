"""What ties the parts of a kernel together: one op with a meaning, a fast way to run it, and one node wherever a graph is traced.

    lora_linear = Op(reference, launch)

    reference   the op in plain torch: documentation, oracle, pattern of `fuse`, fall-back, ONNX expansion
    launch      what eager code calls; a registered op costs more on the way in than the plain ops that it replaces
    overload    torch.ops.rewrite.<file>.default: one node for torch.compile, torch.export and our own graphs; it carries both

What an op may say of itself for `fuse`: `over`, `uncoded`, `turned`, `pattern` (rewrite/occurrence); `everywhere`, found in the model's own nodes too; `unfit`, why it does not stand for
an occurrence, or None; `sign`, what an occurrence cannot be without; `shared`, how many first arguments those have in common that become one op.
"""

import torch


def cast_once(call, kind, *given):
    """call(*given) where autocast is on for a device of a kind: each floating tensor is cast once, for all that reads it, and not again inside."""
    dtype = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):
        return call(*[t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in given])


class Op:
    """An op named after the file of its reference, or `name`. `fake` gives an empty result of the right shape and dtype where the reference would be slow to ask."""

    def __init__(self, reference, launch, fake=None, name=None):
        self.reference, self.launch = reference, launch
        self.name = name or reference.__module__.rpartition(".")[2]
        definition = torch.library.custom_op(f"rewrite::{self.name}", reference, mutates_args=())
        definition.register_fake(fake or reference)
        self.definition = definition
        self.overload = getattr(torch.ops.rewrite, self.name).default
        self.overload.made_by, self.overload.reference, self.overload.launch = self, reference, launch

    def differentiates(self, keep, backward):
        """Give the registered op its rule: `keep(ctx, inputs, output)` and `backward(ctx, *grads)`. Returns the op."""
        self.definition.register_autograd(backward, setup_context=keep)
        return self

    def __call__(self, *args):
        return self.overload(*args)
