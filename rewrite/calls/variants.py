"""Which calls of a model are captured: the main one, and those by which it generates."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.utils.generic import find_labels

from ..errors import Refused
from .inputs import Examples, setting, sizes_like
from .learn import FAILURES, Loss, arrival, call, hidden_of, is_default, loss_of
from .leaves import FullLayer, leaves, rebuild
from .slots import unpadded

IDS = {"input_ids", "attention_mask", "token_type_ids", "position_ids", "decoder_input_ids", "decoder_attention_mask", "decoder_position_ids"}
BESIDE_TOKENS = {"bbox", "image_attention_mask", "image_embeds_position_mask"}  # one entry for each token, that a model reads beside them


@dataclass(frozen=True)
class Variant:
    """One call of the model that is to be captured.

    name: "forward" (the main one), "past", "encoder", "first" or "next".
    owner: the path of the module that is called ("" is the model).
    kwargs: the example call, name → tensor, cache or constant; `leaves(kwargs)` gives the names of the placeholders.
    dims: leaf name → {dimension: symbol}; what is not named is static. A symbol is a name ("batch", "length", "past", "target") or a
    sum of two ("past+length").
    mode: "both" (captured in training and in eval mode, then aligned) or "eval" (flags by analogy with the main graph).
    defaults: input name → what leaving it out means: "ones", "zeros" or "positions" (arange from the past's length on).
    counted: those of "positions" that count what the attention mask lets through, padding being place -1 (OPT).
    first: the place of the first token, where a default is "positions".
    padding: the token that has no place, where a default is "unpadded": positions behind it count the other tokens (RoBERTa).
    labels: names of the inputs that give a loss; `loss`: how it follows from the outputs, None where the graph computes it.
    shifts: how the model makes `decoder_input_ids` of the labels where they are left out: the name of its method, a function of (labels,
    pad id, start id), or None if it does not.
    hidden: where its hidden states come from, see `hidden_of`.
    ignored: arguments that the model takes and never looks at.
    notes: what could not be captured, for the report.
    """

    name: str
    owner: str = ""
    kwargs: dict[str, object] = field(default_factory=dict)
    dims: dict[str, dict[int, str]] = field(default_factory=dict)
    mode: str = "both"
    defaults: dict[str, str] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    loss: Loss | None = None
    shifts: str | Callable | None = None
    hidden: dict[str, tuple] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    counted: tuple[str, ...] = ()
    first: int = 0
    padding: int | None = None


def is_hugging_face(model):
    """Whether this is a transformers model, whose forward can be called from its config alone."""
    return all(hasattr(model, name) for name in ("config", "main_input_name", "can_generate"))


def variants(model, example=None, refused=None):
    """The calls to capture, the main one first.

    model: a transformers model (then `example` may be None: inputs are made from the config; or a dict of its forward's arguments),
    or any nn.Module with `example`, a dict of arguments or a tuple of them in order. Models on the meta device get inputs there.
    refused: why a call with images (or audio) could not be captured; the calls are those of the text then.
    Raises Refused if there is no example and none can be made, or if the model does not accept it.
    """
    if not is_hugging_face(model):
        return [_plain(model, example)]
    calls = _Calls(model, example, refused)
    main = replace(calls.forward(), counted=calls.counted, first=calls.first, padding=calls.padding)
    if not model.can_generate():
        return [main]
    if not calls.examples.takes_use_cache:
        return [main, *(calls.apart() if calls.encoded is not None else ())]
    try:
        return [main, *(calls.encoder_decoder() if model.config.is_encoder_decoder else [replace(calls.past(), counted=calls.counted, first=calls.first, padding=calls.padding)])]
    except (Refused, *FAILURES) as reason:
        main = replace(main, notes=(*main.notes, f"no variant with a cache: {(str(reason) or type(reason).__name__).splitlines()[0]}"))
        return [main, *(calls.apart() if calls.encoded is not None else ())]


class _Calls:
    """The calls of one transformers model. `output` is what a first call returns, as tensors without values."""

    def __init__(self, model, example, refused=None):
        self.model, self.examples = model, Examples(model)
        names = find_labels(type(model))
        reasons = []
        for self.inputs, self.notes in self.examples.candidates(refused) if example is None else [(dict(example), ())]:
            if example is not None and isinstance(self.inputs.get(model.main_input_name), torch.Tensor):
                self.examples.sizes = sizes_like(self.examples.sizes, self.inputs[model.main_input_name])
            self.labels = {name: self.inputs.pop(name) for name in names if name in self.inputs}
            self.cached = {"use_cache": True} if model.can_generate() and self.examples.takes_use_cache else {}
            try:
                self.output, self.hidden = self._ask()
                break
            except FAILURES as reason:
                reasons.append(reason)
        else:
            what = "the inputs made from its config; hand over others: example={…}" if example is None else "the example given"
            raise Refused(f"{type(model).__name__} does not accept {what}.\n{type(reasons[0]).__name__}: {reasons[0]}") from reasons[0]
        self.labels = self.labels or self.examples.labels(names, self.output)
        self.encoded = self._encode() if model.config.is_encoder_decoder and "encoder_outputs" in self.examples.parameters else None
        self.padding = setting(model.config.get_text_config(), "pad_token_id")
        self.first = 0
        self.defaults, self.counted = self._defaults(), ()
        if "attention_mask" in self.examples.parameters and {"position_ids", "token_type_ids"} & set(self.defaults):
            self._behind_padding()

    def _ask(self):
        """What the model returns to its inputs, and where its hidden states come from."""
        unmasked = {name: value for name, value in self.inputs.items() if not name.endswith("attention_mask") or name.startswith(("image_", "pixel_"))}
        seen = []
        try:
            output, _, _ = call(self.model, {**unmasked, **self.cached, "output_hidden_states": True}, seen=seen)
            return output, hidden_of(output, seen)
        except FAILURES:
            pass
        try:
            return call(self.model, {**unmasked, **self.cached})[0], {}
        except FAILURES:
            if not self.cached:
                raise
        self.cached = {"use_cache": False}
        return call(self.model, {**unmasked, **self.cached})[0], {}

    def forward(self):
        """The main variant: no cache; labels where the graph computes a loss from them."""
        constants = {"use_cache": False} if self.examples.takes_use_cache else {}
        constants |= {"use_mems": False} if "use_mems" in self.examples.parameters else {}  # XLNet's cache, kept in eval mode alone
        # without masks: the model looks at their values, which meta tensors do not have
        bare = {name: value for name, value in self.inputs.items() if name not in self.defaults}
        given, loss, ignores = loss_of(self.model, {**bare, **self.cached}, self.labels) if self.labels else (False, None, False)
        inputs = self.inputs | {name: self._default(name, kind) for name, kind in self.defaults.items() if name not in self.inputs}
        inputs |= self.labels if given and loss is None else {}
        return Variant(
            "forward",
            kwargs={**inputs, **constants},
            dims=self._dims(inputs),
            defaults=self.defaults,
            labels=tuple(self.labels) if given else (),
            loss=loss,
            shifts=self._shifts() if given else None,
            hidden=self.hidden,
            ignored=("num_items_in_batch",) if given and ignores else (),
            notes=self.notes,
        )

    def past(self):
        """Decoders: new tokens behind a cache of any length, 0 included."""
        strange = set(self.inputs) - IDS
        if strange:
            raise Refused(f"{', '.join(sorted(strange))} would have to come with the tokens.")
        if "past_key_values" not in self.output:
            raise Refused("what it keeps between calls is not a cache of keys and values; generate with use_cache=False.")
        sizes, examples = self.examples.sizes, self.examples
        length = self.inputs["input_ids"].shape[1]
        cache, dims = self._cache(self.output.past_key_values, "past_key_values", sizes.past, "past")
        inputs = {name: value for name, value in self.inputs.items() if name not in ("attention_mask", "position_ids")}
        if "attention_mask" in examples.parameters:
            inputs["attention_mask"] = examples.mask(sizes.past + length, first=True)
            dims["attention_mask"] = {0: "batch", 1: "past+length"}
        if "position_ids" in examples.parameters:
            inputs["position_ids"] = examples.positions(length, sizes.past)
        return Variant(
            "past",
            kwargs={**inputs, "past_key_values": cache, "use_cache": True},
            dims=self._dims(inputs) | dims,
            mode="eval",
            defaults=self.defaults,
        )

    def _encoder(self):
        path, kwargs, _, _ = self.encoded
        return Variant(
            "encoder",
            path,
            kwargs,
            self._dims(kwargs),
            "eval",
            {name: kind for name, kind in self.defaults.items() if name in kwargs},
            hidden={"hidden_states": states for field, states in self.hidden.items() if field == "encoder_hidden_states"},
        )

    def apart(self):
        """The encoder alone and the decoder on its outputs, without a cache: `generate` calls the one, then the other."""
        _, _, outputs, dims = self.encoded
        mask = {name: self.inputs[name] for name in ("attention_mask",) if name in self.inputs}
        inputs = {**mask, **self._decoder_inputs(0), "encoder_outputs": outputs}
        constants = {"use_cache": False} if self.examples.takes_use_cache else {}
        return self._encoder(), Variant("decoder", "", {**inputs, **constants}, self._dims(inputs) | dims, "eval", self.defaults)

    def encoder_decoder(self):
        """The encoder alone, the decoder's first call on its outputs, and the next ones behind a cache."""
        _, _, outputs, dims = self.encoded
        encoder = self._encoder()
        mask = {name: self.inputs[name] for name in ("attention_mask",) if name in self.inputs}
        first = {**mask, **self._decoder_inputs(0), "encoder_outputs": outputs}
        empty = EncoderDecoderCache(DynamicCache(), DynamicCache())
        own, own_dims = self._cache(self.output.past_key_values.self_attention_cache, "past_key_values.self", self.examples.sizes.past, "past")
        found = self.output.past_key_values.cross_attention_cache
        source = next(iter(dims.values())).get(1)
        cross, cross_dims = self._cache(found, "past_key_values.cross", found.layers[0].keys.shape[2], source)
        later = {**mask, **self._decoder_inputs(self.examples.sizes.past), "encoder_outputs": outputs}
        longer = {"decoder_attention_mask": {0: "batch", 1: "past+target"}} if "decoder_attention_mask" in later else {}
        return [
            encoder,
            Variant("first", "", {**first, "past_key_values": empty, "use_cache": True}, self._dims(first) | dims, "eval", self.defaults),
            Variant(
                "next",
                "",
                {**later, "past_key_values": EncoderDecoderCache(own, cross), "use_cache": True},
                self._dims(later) | dims | own_dims | cross_dims | longer,
                "eval",
                self.defaults,
            ),
        ]

    def _encode(self):
        """(path of the encoder, its arguments, example outputs, their dims)."""
        encoder = self.model.get_encoder()
        path = next(name for name, module in self.model.named_modules() if module is encoder)
        parameters = inspect.signature(encoder.forward).parameters
        kwargs = {name: value for name, value in self.inputs.items() if name in parameters and not name.startswith("decoder_")}
        output, _, _ = call(self.model, {name: value for name, value in kwargs.items() if name != "attention_mask"}, owner=path)
        names, tensors, tree = leaves(output)
        values = [self.examples.floats(*tensor.shape).to(tensor.dtype) for tensor in tensors]
        main = kwargs[self.model.main_input_name]
        symbol = self._dims({self.model.main_input_name: main})[self.model.main_input_name].get(1)
        dims = {}
        for name, tensor in zip(names, tensors):
            dims[f"encoder_outputs.{name}"] = {0: "batch"}
            if symbol and tensor.dim() == 3:
                dims[f"encoder_outputs.{name}"][1] = symbol if tensor.shape[1] == main.shape[1] else "source"
        return path, kwargs, rebuild(tree, values), dims

    def _decoder_inputs(self, past):
        """What the decoder takes behind `past` places: ids, and those of mask and positions that its forward has."""
        examples, ids = self.examples, self.inputs["decoder_input_ids"]
        found = {"decoder_input_ids": ids}
        if "decoder_attention_mask" in self.defaults:
            found["decoder_attention_mask"] = examples.mask(past + ids.shape[1], first=past > 0)
        if "decoder_position_ids" in self.defaults:
            found["decoder_position_ids"] = examples.positions(ids.shape[1], past)
        return found

    def _cache(self, like, place, length, symbol):
        """A cache of `length` places shaped like one that the model returned, and the dims of its leaves."""
        _, _, tree = leaves(like)
        if any(layer.kind != "tuple" for layer in tree.children):
            raise Refused(f"{place}: some of its layers hold nothing after a call.")
        cache, dims = DynamicCache(), {}
        for index, layer in enumerate(like.layers):
            for name, tensor in (("key", layer.keys), ("value", layer.values)):
                dims[f"{place}.{index}.{name}"] = {0: "batch", 2: symbol} if symbol else {0: "batch"}
            shapes = [(*t.shape[:2], length, t.shape[3]) for t in (layer.keys, layer.values)]
            cache.layers.append(FullLayer(*(self.examples.floats(*shape).to(layer.keys.dtype) for shape in shapes)))
        return cache, dims

    def _dims(self, inputs):
        """Which dimensions are symbols, told from the names of the arguments and the ranks of their values."""
        dims = {}
        tokens = inputs.get("input_ids")
        for name, value in inputs.items():
            if not isinstance(value, torch.Tensor) or value.dim() == 0:
                continue
            lengths = value.shape[1:2] if tokens is None else tokens.shape[1:2]  # some heads give one output for each of their queries
            dims[name] = {0: "batch"}
            if value.dim() < 2:
                continue
            if name.startswith("decoder_") or (name in self.labels and "decoder_input_ids" in inputs):
                dims[name][1] = "target"
            elif name in IDS or (name in self.labels and value.shape[1] in lengths) or name in BESIDE_TOKENS or name == "input_values":
                dims[name][1] = "length"
            elif name == "qformer_input_ids":  # what asks of the image has its own length
                dims[name][1] = f"length of {name}"
        return dims

    def _defaults(self):
        """What leaving an optional input out means, each confirmed by asking the model: name → "ones", "zeros" or "positions"."""
        kinds = {"attention_mask": "ones", "token_type_ids": "zeros", "decoder_attention_mask": "ones"}
        if self.model.can_generate():
            kinds |= {"position_ids": "positions", "decoder_position_ids": "positions"}
        found = {}
        for name, kind in kinds.items():
            decoder = name.startswith("decoder_")
            ids = self.inputs.get("decoder_input_ids" if decoder else "input_ids")
            if name not in self.examples.parameters or ids is None or ids.dim() != 2 or (decoder and self.encoded is None):
                continue
            rest = {"decoder_input_ids": ids, "encoder_outputs": self.encoded[2]} if decoder else self.inputs
            rest = {k: v for k, v in rest.items() if k not in kinds}
            if is_default(self.model, rest, name, self._default(name, kind), aside=(name, name.removeprefix("decoder_"))):
                found[name] = kind
            elif kind == "positions" and not decoder and is_default(self.model, rest, name, self._default(name, kind) + 1, aside=(name,)):
                if self._passes_padding_over(rest, name):
                    found[name] = "unpadded"
                else:
                    found[name], self.first = kind, 1
            elif kind == "positions" and not decoder and self._passes_padding_over(rest, name):
                found[name] = "unpadded"
        return found

    def _passes_padding_over(self, rest, name):
        """Whether positions that are left out count the tokens that are no padding, from the padding token's number on."""
        if self.padding is None or self.padding < 0:
            return False
        ids = rest["input_ids"].clone()
        ids[0, -2:] = self.padding
        return is_default(self.model, rest | {"input_ids": ids}, name, unpadded(ids, self.padding), aside=(name,))

    def _behind_padding(self):
        """With padding on the left, what is left out may mean something else: find out, or leave it to the caller.

        Positions may count what the mask lets through (OPT); types may say who sees whom, and none that nobody is told apart (PaliGemma).
        """
        ids = self.inputs["input_ids"]
        mask = torch.ones_like(ids)
        mask[:, : max(1, ids.shape[1] // 2)] = 0
        padded = {name: value for name, value in self.inputs.items() if name not in self.defaults} | {"attention_mask": mask}
        try:
            arrival(self.model, padded)
        except FAILURES:  # it takes no padding, or takes masks of its own kind alone
            return
        for name in ("token_type_ids", "position_ids"):
            kind = self.defaults.get(name)
            if kind not in ("zeros", "positions") or is_default(self.model, padded, name, self._default(name, kind), aside=(name,)):
                continue
            if kind == "positions" and is_default(self.model, padded, name, mask.cumsum(-1) * mask - 1, aside=(name,)):
                self.counted = (name,)
            else:
                del self.defaults[name]

    def _shifts(self):
        """How the model makes `decoder_input_ids` of the labels, confirmed by asking it."""
        if self.encoded is None or "labels" not in self.labels:
            return None
        labels, config = self.labels["labels"], self.model.config
        function = getattr(inspect.getmodule(type(self.model)), "shift_tokens_right", None)
        for way in ("prepare_decoder_input_ids_from_labels", function):
            if way is None or (isinstance(way, str) and not hasattr(self.model, way)):
                continue
            try:
                shifted = getattr(self.model, way)(labels) if isinstance(way, str) else way(labels, config.pad_token_id, config.decoder_start_token_id)
            except FAILURES:  # a class per row, or no id to start from
                continue
            if is_default(self.model, {"labels": labels, "encoder_outputs": self.encoded[2]}, "decoder_input_ids", shifted):
                return way
        return None

    def _default(self, name, kind):
        ids = self.inputs["decoder_input_ids" if name.startswith("decoder_") else "input_ids"]
        if kind == "unpadded":
            return unpadded(ids, self.padding)
        if kind == "positions":
            return (torch.arange(ids.shape[1], device=ids.device) + self.first).expand(ids.shape).contiguous()
        return torch.full(ids.shape, int(kind == "ones"), dtype=torch.long, device=ids.device)


def _plain(model, example):
    """The one call of a module that is no transformers model: batch first; sequences have a length each."""
    if example is None:
        raise Refused(
            f"{type(model).__name__} is not a transformers model: hand over an example of its inputs, "
            "example={name: tensor} or a tuple in order."
        )
    parameters = inspect.signature(model.forward).parameters
    if any(p.kind is p.VAR_POSITIONAL for p in parameters.values()) and not isinstance(example, dict):
        raise Refused(
            f"{type(model).__name__}.forward takes *{next(n for n, p in parameters.items() if p.kind is p.VAR_POSITIONAL)}, "
            "whose inputs have no names. Hand over a module whose forward names them."
        )
    if isinstance(example, torch.Tensor):
        example = (example,)
    if not isinstance(example, dict):
        if len(example) > len(parameters):
            raise Refused(f"{type(model).__name__}.forward takes {len(parameters)} inputs, the example has {len(example)}.")
        example = dict(zip(parameters, example))
    names, tensors, _ = leaves(example)
    batch = next((tensor.shape[0] for tensor in tensors if tensor.dim() > 0), None)
    dims, lengths = {}, 0
    for name, tensor in zip(names, tensors):
        if tensor.dim() == 0 or tensor.shape[0] != batch:
            continue
        dims[name] = {0: "batch"}
        if (tensor.dim() == 2 and not tensor.is_floating_point()) or (tensor.dim() == 3 and tensor.is_floating_point()):
            dims[name][1] = "length" if lengths == 0 else f"length of {name}"
            lengths += 1
    return Variant("forward", kwargs=example, dims=dims)
