"""Walking through a graph: what a value is made of, and where it goes.

    live      values that depend on what is in the inputs (sizes alone do not count)
    content   live values, and those made from learned tables that affine ops work on (queries of a decoder, latents)
    shape     ops that only move or copy numbers
    cone      everything between a value and the places where the walk stops

All walks are iterative and stop at the nearest affine op, so that an analysis of a whole model is linear in its depth.
"""

import operator

import torch

from ..graph import HOST, attribute, select, shape, unless

_VIEWS = frozenset("""
    view _unsafe_view reshape transpose permute t mT numpy_T expand expand_as broadcast_to contiguous clone alias unsqueeze squeeze flatten unflatten
    movedim moveaxis swapaxes swapdims slice select narrow split split_with_sizes chunk unbind unsafe_chunk unsafe_split unsafe_split_with_sizes
    tensor_split roll flip repeat repeat_interleave tile cat stack concat concatenate rot90 pixel_shuffle pixel_unshuffle view_as reshape_as
    lift_fresh_copy
""".split())  # fmt: skip
_CASTS = frozenset("to _to_copy type_as detach detach_ lift_fresh float half bfloat16 double requires_grad_".split())
_DROPS = frozenset("dropout native_dropout feature_dropout alpha_dropout dropout_".split())
_NARROWING = frozenset("""
    slice select narrow split split_with_sizes chunk unbind unsafe_chunk unsafe_split unsafe_split_with_sizes tensor_split
""".split())  # fmt: skip
# the axes are arranged otherwise, nothing is dropped or doubled
_REORDERS = frozenset("""
    view _unsafe_view reshape transpose permute t mT contiguous clone alias unsqueeze squeeze flatten unflatten movedim moveaxis
""".split())  # fmt: skip
# what is written into the result does not reach the argument
_COPIES = frozenset("index index_select cat stack concat repeat clone contiguous roll flip repeat_interleave tile to _to_copy dropout".split())
_NONLINEAR = frozenset("""
    relu relu_ gelu gelu_ silu silu_ sigmoid sigmoid_ tanh tanh_ elu elu_ selu celu leaky_relu leaky_relu_ hardswish hardswish_ hardsigmoid hardtanh
    hardtanh_ mish mish_ softplus prelu relu6 relu6_ glu pow square exp erf log_sigmoid log_sigmoid_forward softsign abs sin cos threshold rrelu
    hardshrink expm1
""".split())  # fmt: skip
_ARITHMETIC = frozenset("""
    add add_ sub sub_ mul mul_ div div_ neg clamp clamp_ clamp_min clamp_max masked_fill rsub reciprocal rsqrt sqrt minimum maximum
""".split())  # fmt: skip
_ELEMENTWISE = _ARITHMETIC | _NONLINEAR - {"glu"}
_SOFTMAX = frozenset({"softmax", "_softmax", "_safe_softmax"})
_SCALINGS = frozenset({"mul", "mul_", "div", "div_"})
_SHAPED_LIKE = frozenset("new_empty new_zeros new_ones new_full empty_like zeros_like ones_like full_like rand_like randn_like sym_size".split())
_ASKING = HOST - {operator.getitem, select, unless}  # functions of a value's size, dtype or device
PRODUCTS = frozenset("matmul mm bmm baddbmm addmm addbmm einsum linalg_vecdot dot mv".split())
ATTENTIONS = frozenset("""
    scaled_dot_product_attention _scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention
    _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_attention_math flex_attention
""".split())  # fmt: skip
_MIXING = PRODUCTS | ATTENTIONS | frozenset("""
    cumsum cumprod logcumsumexp cummax associative_scan scan while_loop cond stft fft_fft fft_fft2 fft_rfft convolution conv1d conv2d conv3d
""".split())  # fmt: skip


def op_name(node):
    """`linear` for aten.linear.default, the bare name of another operator; "" for what is none (size arithmetic, getitem, modules)."""
    if node.target is unless:
        return "dropout"
    if node.op != "call_function" or node.target in HOST:
        return ""
    packet = getattr(node.target, "overloadpacket", None)
    return packet.__name__ if packet is not None else getattr(node.target, "__name__", str(node.target))


def value(node):
    """The fake tensor of a node, or None where its value is no tensor."""
    val = node.meta.get("val")
    return val if isinstance(val, torch.Tensor) else None


def is_float(node):
    val = value(node)
    return val is not None and val.dtype.is_floating_point


def tensors(node):
    """The inputs of a node that are tensors or lists of them, in order (not sizes, dtypes, flags)."""
    inputs = node.args[:1] if node.target is unless else node.all_input_nodes
    return [n for n in inputs if isinstance(n.meta.get("val"), (torch.Tensor, list, tuple)) or n.op == "call_module"]


class Flow:
    """Facts about each node of a graph that every analysis reads, made in one pass over it."""

    def __init__(self, graph):
        self.graph = graph
        self.nodes = list(graph.nodes)
        self.place = {node: i for i, node in enumerate(self.nodes)}
        self.name = {node: op_name(node) if node.op != "call_module" or self.is_opaque(node) else "dropout" for node in self.nodes}
        self.reads = {node: () if self.name[node] in _SHAPED_LIKE or node.target in _ASKING else tensors(node) for node in self.nodes}
        self.content = frozenset()
        self._shapes = {}
        self.rows = {}  # what a way looks like → the rows that come by it, filled by affine.py
        self.writes = self._writes()
        self.live = self._onward(set())
        self.content = self.live
        self.affine = {}  # operation → Affine, filled by affine.py
        self.stream = set()  # values on a residual stream, filled by branches.py
        self.embeddings = {}  # lookup → Affine, filled by affine.py

    def _writes(self):
        """Tensor → the ops that write into a part of it (`k[..., :n] = x`): to a reader of the tensor they are inputs."""
        writes = {}
        for node in self.nodes:
            if not (isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable):
                continue
            base = node.args[0]
            while self.is_view(base) and self.name[base] not in _COPIES and isinstance(base.args[0], torch.fx.Node):
                base = base.args[0]
            if base is not node.args[0] and base.op == "call_function":
                writes.setdefault(base, []).append(node)
        return writes

    def _onward(self, seeds):
        """The nodes that depend on inputs or opaque modules, or on one of the seeds."""
        found = set(seeds)
        for node in self.nodes:
            if node.op in ("placeholder", "call_module") or any(n in found for n in self.reads[node]):
                found.add(node)
        fresh = {base for base, ops in self.writes.items() if base not in found and any(n in found for op in ops for n in self.reads[op])}
        return self._onward(seeds | fresh) if fresh else found

    def add_learned(self):
        """Count as content what affine ops make of values that depend on no input (learned queries); called when `affine` is known."""
        queue = [affine.x for affine in self.affine.values() if affine.x not in self.live and affine.x.op == "call_function"]
        seeds = set(queue)
        for node in queue:
            for parent in tensors(node):
                if parent not in seeds and parent.op == "call_function" and is_float(parent):
                    seeds.add(parent)
                    queue.append(parent)
        learned = {node for node, affine in self.affine.items() if node not in self.live}
        if learned:
            self.content = self._onward(seeds | learned)

    def sources(self, node, stop=()):
        """`(inside, operations)`: the cone of a value, and the affine ops among its ends that do not stand on a stream."""
        inside, ends = self.cone(node, stop, floats=True)
        return inside, [end for end in ends if end in self.affine and end not in self.stream and end not in stop]

    def parents(self, node):
        """The tensor inputs of a node that carry content, and what was written into it later."""
        found = [n for n in self.reads[node] if n in self.content]
        return found + [op for op in self.writes[node] if op in self.content] if node in self.writes else found

    def strip(self, node, drops=True, scales=True):
        """The value behind reorderings and casts (and dropout, and a multiplication with a number)."""
        while True:
            name = self.name[node]
            if name in _REORDERS or name in _CASTS or (drops and name in _DROPS):
                node = node.args[0]
            elif name == "slice" and self._is_whole(node):
                node = node.args[0]
            elif scales and name in _SCALINGS and len(self.parents(node)) == 1 and self._is_number(node):
                node = self.parents(node)[0]
            else:
                return node

    def _is_whole(self, node):
        return self.same_shape(node, node.args[0])

    def same_shape(self, *nodes):
        """Whether the values are tensors of one shape; sizes are compared as expressions, so that no guard is asked for."""
        shapes = {self._shapes[n] if n in self._shapes else self._shapes.setdefault(n, None if value(n) is None else shape(n)) for n in nodes}
        return len(shapes) == 1 and None not in shapes

    def _is_number(self, node):
        """Whether a binary op has a number, or a tensor of one element, beside its content."""
        others = [a for a in node.args if not (isinstance(a, torch.fx.Node) and a in self.content)]
        return all(not isinstance(a, torch.fx.Node) or value(a) is None or value(a).dim() == 0 for a in others)

    def cone(self, node, stop=(), floats=False):
        """`(inside, ends)`: the nodes that make a value, back to the nearest affine op, stream value, placeholder or member of `stop`.

        Both are ordered by distance and hold nodes with content alone. The value itself may be an end. `floats` leaves out masks and indices.
        """
        inside, ends, queue, seen = [], [], [node], {node}
        for current in queue:
            if current in self.affine or current in self.stream or current in stop or current.op in ("placeholder", "get_attr"):
                ends.append(current)
                continue
            inside.append(current)
            for parent in self.parents(current):
                if parent not in seen and not (floats and value(parent) is not None and not is_float(parent)):
                    seen.add(parent)
                    queue.append(parent)
        return inside, ends

    def reaches(self, source, target):
        """Whether `source` is an ancestor of `target`, and whether an affine op, an attention or an opaque module lies between."""
        floor, seen, stack = self.place[source], {target}, [(target, False)]
        found = False
        while stack:
            node, worked = stack.pop()
            if node is source:
                found = True
                if worked:
                    return True, True
                continue
            worked = worked or node in self.affine or self.is_mixing(node)
            for parent in self.parents(node):
                if self.place[parent] >= floor and (parent not in seen or parent is source):
                    seen.add(parent)
                    stack.append((parent, worked))
        return found, False

    def onward(self, node, stop=()):
        """The nearest affine ops that read a value (directly or through anything but a stream value), in graph order."""
        found, queue, seen = set(), [node], {node}
        bases = {op: base for base, ops in self.writes.items() for op in ops} if self.writes else {}
        for current in queue:
            for user in (*current.users, *(bases[current].users if current in bases else ())):
                if user in seen:
                    continue
                seen.add(user)
                if user in self.affine:
                    found.add(user)
                elif user in self.stream or user in stop or user.op == "output":
                    continue
                else:
                    queue.append(user)
        return sorted(found, key=self.place.__getitem__)

    def is_opaque(self, node):
        """Whether a node calls what could not be captured; a call that hands its input on in eval mode counts as a dropout."""
        return node.op == "call_module" and node.target not in self.graph.training_only

    def is_nonlinear(self, node):
        return self.name[node] in _NONLINEAR

    def is_mixing(self, node):
        """Whether an op mixes positions: a product of two activations, a scan, an opaque module."""
        return self.name[node] in _MIXING or self.is_opaque(node)

    def is_softmax(self, node):
        return self.name[node] in _SOFTMAX

    def is_elementwise(self, node):
        return self.name[node] in _ELEMENTWISE

    def is_view(self, node):
        name = self.name[node]
        if name in ("index", "index_select"):
            return [n for n in tensors(node) if n in self.content] == [node.args[0]]
        return name in _VIEWS or name in _CASTS or name in _DROPS or node.target is operator.getitem

    def narrows(self, node):
        """Whether a view may leave out a part."""
        if self.name[node] in ("index", "index_select"):
            return self.is_view(node)
        return self.name[node] in _NARROWING and not (self.name[node] == "slice" and self._is_whole(node))

    def has_window(self, operation):
        """Whether an affine op is a convolution over more than one place."""
        affine = self.affine[operation]
        return affine.kind == "conv" and any(size != 1 for size in value(affine.w).shape[2:])

    def constant(self, node):
        """The integers of a value without content (a list of indices), or None where they depend on sizes or cannot be had."""
        if node in self.content or is_float(node):
            return None
        if node.op == "get_attr":
            tensor = attribute(self.graph.root, node.target)
            return tensor if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta" else None
        if node.op != "call_function" or any(value(n) is None for n in node.all_input_nodes):
            return None
        known = {n: self.constant(n) for n in node.all_input_nodes}
        if any(v is None for v in known.values()):
            return None
        return node.target(*torch.fx.node.map_arg(node.args, known.get), **torch.fx.node.map_arg(node.kwargs, known.get))

