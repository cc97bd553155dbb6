"""Hidden states of a live model: what goes into and comes out of its blocks, read by hooks while the graph runs.

They are no outputs of the graph, which would have to keep all of them for every call. The last one is often what a norm makes of the
last block's output; that module is called once more, unless a pass has put something into it.
"""

import contextlib
import functools
from dataclasses import dataclass

from ..errors import Refused
from ..graph import attribute, path_of


@dataclass(frozen=True)
class HiddenStates:
    """field of the output → for each hidden state, (kind, module path, block path); None where it cannot be told.

    kind "into", "from": what the block takes or gives. "through": what the module makes of the block's output. "still": the same, in
    eval mode only, since something else (a dropout) stands behind the module.
    """

    fields: dict[str, tuple[tuple[str, str, str], ...] | None]

    @classmethod
    def of(cls, found, blocks, owner):
        """From what `learn.hidden_of` found, the blocks of a graph, and the path that all paths are to be relative to."""
        return cls({field: _sources(states, set(blocks), f"{owner}." if owner else "") for field, states in found.items()})

    def asked(self, live, given, what):
        """{} (for `watching` to fill) where a call asks for hidden states, None where not. Raises Refused where they cannot be had."""
        wanted = given.get("output_hidden_states")
        if wanted is None:
            wanted = getattr(live.config, "output_hidden_states", False)
        if not wanted:
            return None
        if wanted is not True or not self.fields or None in self.fields.values():
            raise Refused(
                f"{what}: output_hidden_states={wanted!r}; hidden states that are not what goes in and out of blocks are no outputs of the graph.\n"
                "Ask for True, or ask the original model."
            )
        kinds = {path: kind for states in self.fields.values() for kind, path, _ in states if kind in ("through", "still")}
        if live.training and "still" in kinds.values():
            raise Refused(
                f"{what}: output_hidden_states=True in training mode, but a dropout stands behind the last one.\n"
                "Read the blocks with forward hooks."
            )
        graph = getattr(live, "graph", None)
        rewritten = sorted(kinds.keys() & {path_of(node) for node in graph.nodes if node.meta.get("made")}) if graph is not None else []
        if rewritten:
            raise Refused(
                f"{what}: output_hidden_states=True, but {rewritten[0]}, which makes the last one, was rewritten.\n"
                "Read the blocks with forward hooks."
            )
        return {}

    @contextlib.contextmanager
    def watching(self, live, watched):
        """While a graph runs: note in `watched` what goes into and out of the blocks."""

        def into(module, args, block):
            watched.setdefault(("into", block), args[0])

        def out(module, args, output, block):
            watched["from", block] = output[0] if isinstance(output, tuple) else output

        handles = []
        for kind, _, block in {state for states in self.fields.values() for state in states}:
            module = attribute(live, block)
            if kind == "into":
                handles.append(module.register_forward_pre_hook(functools.partial(into, block=block)))
            else:
                handles.append(module.register_forward_hook(functools.partial(out, block=block)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def collect(self, live, watched):
        """field → tuple of hidden states, from what was noted; fields of blocks that did not run are left out."""
        found = {}
        for field, states in self.fields.items():
            if all(("into" if kind == "into" else "from", block) in watched for kind, _, block in states):
                last = lambda path, block: attribute(live, path)(watched["from", block])
                found[field] = tuple(watched[kind, block] if kind in ("into", "from") else last(path, block) for kind, path, block in states)
        return found


def _sources(states, blocks, owner):
    found = []
    for takes, gives, made in states:
        into = next((path for path in takes if path in blocks), None)
        out = next((path for path in gives if path in blocks), None)
        module, before = next(((path, before) for path, source in made for before in source if before in blocks), (None, None))
        if out is not None:
            state = ("from", out, out)
        elif module is not None:
            alone = all(f"{module}.".startswith(f"{path}." if path else "") for path in gives)
            state = ("through" if alone else "still", module, before)
        elif into is not None:
            state = ("into", into, into)
        else:
            return None
        found.append((state[0], state[1].removeprefix(owner), state[2].removeprefix(owner)))
    return tuple(found)
