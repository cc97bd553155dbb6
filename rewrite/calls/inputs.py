"""Example inputs of a Hugging Face model, made from its config: real small tensors that the model accepts.

Sizes that stand for "any" (batch, length, past, target) are primes that occur nowhere in the config, so that no two dimensions
are taken for one another. Values come from a generator of their own: nobody's random state is touched.
"""

import inspect
from dataclasses import dataclass

import torch

from ..errors import Refused

PRIMES = (3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)
MEDIA = {"pixel_values": "image", "input_features": "audio", "input_values": "audio"}
CACHES = ("past_key_values", "cache_params")


@dataclass(frozen=True)
class Sizes:
    """The dimensions that are to become symbols, all different from one another and from every number of the config."""

    batch: int
    length: int
    past: int
    target: int


def sizes(config):
    """Four primes, ascending where it matters little, that are no number of this config or of the configs in it."""
    taken = set(_integers(config.to_dict()))
    batch, past, target, length = [prime for prime in PRIMES if prime not in taken][:4]
    return Sizes(batch, length, past, target)


def sizes_like(sizes, ids):
    """The Sizes of an example handed over: its batch, and lengths that are neither that nor its own."""
    batch, length = ids.shape[0], ids.shape[1] if ids.dim() > 1 else sizes.length
    past, target = [n for n in (sizes.past, sizes.target, sizes.length, *PRIMES) if n not in (batch, length)][:2]
    return Sizes(batch, length, past, target)


def _integers(value):
    if isinstance(value, dict):
        value = value.values()
    if isinstance(value, (list, tuple, type({}.values()))):
        for item in value:
            yield from _integers(item)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value


def _tokens(value):
    """Every token with a meaning of its own that a config, or one in it, names (`pad_token_id`, `image_token_index`)."""
    for name, item in value.items():
        if isinstance(item, dict):
            yield from _tokens(item)
        elif str(name).endswith(("token_id", "token_index", "token_ids")):
            yield from (token for token in (item if isinstance(item, (list, tuple)) else [item]) if isinstance(token, int) and not isinstance(token, bool))


def setting(config, *names, default=None):
    """The first of these settings that the config, or a config inside it, has and that is not None."""
    inner = [getattr(config, name) for name in getattr(config, "sub_configs", {}) if getattr(config, name, None) is not None]
    for name in names:
        for place in (config, *inner):
            value = getattr(place, name, None)
            if value is not None:
                return value
    return default


def takes_use_cache(model):
    """Whether a call says by `use_cache` if it keeps a cache, named in the forward or handed on by it."""
    parameters = inspect.signature(model.forward).parameters
    handed_on = "past_key_values" in parameters and any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return "use_cache" in parameters or (handed_on and setting(model.config, "use_cache") is not None)


def _rows(features):
    """How many vectors a model's `get_…_features` gives, in whatever it wraps them."""
    features = getattr(features, "pooler_output", features)
    if isinstance(features, (list, tuple)):
        return sum(map(_rows, features))
    return features.shape[:-1].numel()


class Examples:
    """Makes example tensors for one model, always the same ones."""

    def __init__(self, model):
        self.model, self.config = model, model.config
        self.sizes = sizes(model.config)
        self.device, self.dtype = model.device, model.dtype
        self.parameters = inspect.signature(model.forward).parameters
        self.takes_use_cache = takes_use_cache(model)
        self.generator = torch.Generator().manual_seed(0)

    def integers(self, low, high, *shape):
        if self.device.type == "meta":
            return torch.zeros(shape, dtype=torch.long, device="meta")
        return torch.randint(low, max(high, low + 1), shape, generator=self.generator).to(self.device)

    def floats(self, *shape):
        if self.device.type == "meta":
            return torch.empty(shape, dtype=self.dtype, device="meta")
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def ids(self, length):
        """Token ids, none of them special but the end of sequence that some heads look for: (batch, length), int64."""
        text = self.config.get_text_config()
        vocab = setting(text, "vocab_size") or setting(self.config, "vocab_size", default=2)
        special = {token for token in _tokens(self.config.to_dict()) if 0 <= token < vocab}
        ids = self.integers(min(len(special) + 1, vocab - 1), vocab, self.sizes.batch, length)
        if self.device.type != "meta":
            end = setting(text, "eos_token_id")
            for token in sorted(special):
                ids[ids == token] = next(i for i in range(vocab) if i not in special)
            if isinstance(end, int) and 0 <= end < vocab:
                ids[:, -1] = end
        return ids

    def mask(self, length, first=False):
        """An attention mask whose last row has its last (or first) place masked: (batch, length), int64."""
        if self.device.type == "meta":
            return torch.ones(self.sizes.batch, length, dtype=torch.long, device="meta")
        mask = torch.ones(self.sizes.batch, length, dtype=torch.long)
        mask[-1, 0 if first else -1] = 0
        return mask.to(self.device)

    def positions(self, length, start=0):
        return torch.arange(start, start + length, device=self.device).expand(self.sizes.batch, length).contiguous()

    def image(self):
        """(batch, channels, height, width)."""
        side = setting(self.config, "image_size", default=64)
        height, width = (side["height"], side["width"]) if isinstance(side, dict) else side if isinstance(side, (list, tuple)) else (side, side)
        return self.floats(self.sizes.batch, setting(self.config, "num_channels", default=3), height, width)

    def patches(self):
        """(batch, length, 2 + features of a patch): patches in any order, the row and the column of each before its features."""
        found = self.floats(self.sizes.batch, self.sizes.length, 2 + setting(self.config, "patch_embed_hidden_size", default=768))
        if self.device.type != "meta":
            found[..., 0], found[..., 1] = 1.0, torch.arange(1.0, self.sizes.length + 1)
        return found

    def frames(self):
        """(batch, mel bins, frames), with as many frames as the positions of the encoder ask for; (batch, frames, features) where they are projected."""
        features = setting(self.config, "feature_projection_input_dim")
        if features is not None:
            return self.floats(self.sizes.batch, self.sizes.length, features)
        bins, positions = setting(self.config, "num_mel_bins"), setting(self.config, "max_source_positions")
        each = setting(self.config, "audio_length_per_tok")
        if bins is not None and each is not None:  # every token has its own frames
            return self.floats(self.sizes.batch, bins, each * self.sizes.length)
        if bins is None or positions is None:
            raise Refused(f"{type(self.model).__name__}: no example for input_features can be made from this config. Hand one over: example={{…}}.")
        strides = [m.stride[0] for m in self.model.get_encoder().modules() if isinstance(m, torch.nn.Conv1d)]
        for stride in strides:
            positions *= stride
        return self.floats(self.sizes.batch, bins, positions)

    def audio(self):
        """(batch, samples), long enough for `length` frames after the strided convolutions; (batch, frames, mel bins) where there are none."""
        bins, frames = setting(self.config, "num_mel_bins"), setting(self.config, "max_length")
        if setting(self.config, "conv_stride") is None and bins is not None and frames is not None:
            return self.floats(self.sizes.batch, frames, bins)
        stride = 1
        for step in setting(self.config, "conv_stride", default=(1,)):
            stride *= step
        return self.floats(self.sizes.batch, stride * (self.sizes.length + 2))

    def candidates(self, refused=None):
        """(inputs, notes) that the model may accept, the fullest first; those without images (or audio) where a call with them was refused."""
        try:
            if refused is not None:
                raise Refused(refused)
            whole = self.inputs()
        except Refused as reason:
            missing = [name for name in MEDIA if name in self.parameters]
            if "input_ids" not in self.parameters or not missing:
                raise
            yield self.inputs(without=missing), (f"captured without {', '.join(missing)}: {str(reason).splitlines()[0]} Hand one over: example={{…}}",)
            return
        yield whole, ()
        yield from ((beside, ()) for beside in self._with_what_it_reads(whole))
        if "input_ids" not in whole:
            return
        if "decoder_input_ids" in whole:  # a head that reads one place of the decoder makes them of input_ids
            yield {name: value for name, value in whole.items() if name != "decoder_input_ids"}, ()
        others = [name for name in whole if name in MEDIA]
        if not others:
            return
        placed = self._placed(whole)
        if placed is not None:
            yield placed, ()
        alone = {name: value for name, value in whole.items() if name not in MEDIA}
        yield alone, (f"captured without {', '.join(others)}: no example that the model accepts can be made from its config. Hand one over: example={{…}}",)

    def _with_what_it_reads(self, whole):
        """The inputs with those beside them that the forward names and some models cannot do without, for each layout of the images that has a name."""
        batch, length = self.sizes.batch, self.sizes.length
        side, latents = 4, setting(self.config, "latent_query_num", default=1)
        image = whole.get("pixel_values")
        pixels = lambda: {"pixel_values": self.floats(batch, side * side, image.shape[1] * setting(self.config, "patch_size", default=16) ** 2)}
        rectangles = lambda: torch.cat((torch.zeros(batch, length, 2), torch.rand(batch, length, 2, generator=self.generator)), 2).to(self.device, self.dtype)
        whole_map = lambda: torch.tensor([[side, side]] * batch, device=self.device)
        places = lambda: (torch.arange(length, device=self.device) < latents).long().expand(batch, length).contiguous()
        noise = lambda: self.floats(batch, setting(self.config, "chunk_size", default=1), setting(self.config, "max_action_dim", default=1))
        cameras = lambda: {"pixel_values": image.unsqueeze(1), "pixel_attention_mask": torch.ones(batch, 1, dtype=torch.bool, device=self.device)}
        readers = (  # (what the forward names, what goes with it)
            ("bbox", lambda: {"bbox": rectangles()}),
            ("image_attention_mask", lambda: {"pixel_values": image.unsqueeze(1), "image_attention_mask": torch.ones(batch, length, 1, dtype=torch.long, device=self.device)}),
            ("image_embeds_position_mask", lambda: {"image_embeds_position_mask": places()}),
            ("spatial_shapes", lambda: {**pixels(), "spatial_shapes": whole_map(), "pixel_attention_mask": torch.ones(batch, side * side, dtype=torch.long, device=self.device)}),
            ("state", lambda: {**cameras(), "noise": noise(), "timestep": self.floats(batch).sigmoid()}),
        )
        for name, make in readers:
            if name in self.parameters and (image is not None or name == "bbox") and (name != "state" or name in whole):
                yield {**whole, **make()}

    def _placed(self, whole):
        """The inputs with the tokens in `input_ids` that an image (or audio) takes the places of; None where the model does not say how many."""
        ids, found = whole["input_ids"], False
        for name, kind in (*MEDIA.items(), ("pixel_values", "video")):
            token, encode = setting(self.config, f"{kind}_token_id", f"{kind}_token_index"), self._encoder(kind)
            if name not in whole or token is None or encode is None or (kind == "video" and found):
                continue
            beside = self._beside(encode, whole)
            for given in (whole[name], whole[name].unsqueeze(1)):  # some take a number of images for each row
                try:
                    with torch.no_grad(), torch.random.fork_rng(devices=[]):
                        rows = _rows(encode(given, **beside))
                    break
                except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError):
                    continue
            else:
                continue
            whole = {**whole, name: given, **beside}
            places = torch.full((ids.shape[0], rows // ids.shape[0]), token, dtype=ids.dtype, device=ids.device)
            ids, found = torch.cat((ids[:, :1], places, ids[:, 1:]), 1), True
        if not found:
            return None
        masks = {"attention_mask": self.mask(ids.shape[1])} if "attention_mask" in whole else {}
        return {**whole, "input_ids": ids, **masks}

    def _encoder(self, kind):
        """What gives the vectors of an image, a video or a sound: the model's own method, or that of the model inside it."""
        name = f"get_{kind}_features"
        return next((getattr(module, name) for module in self.model.modules() if hasattr(module, name)), None)

    def _beside(self, encode, whole):
        """What an encoder asks for beside its images or its frames: the size of each image, a mask of the frames, the text that asks of the image."""
        asked = [name for name, p in inspect.signature(encode).parameters.items() if p.default is p.empty and name in self.parameters]
        makers = {
            "image_sizes": lambda: torch.tensor([whole["pixel_values"].shape[-2:]] * self.sizes.batch, device=self.device),
            "input_features_mask": lambda: torch.ones(self.sizes.batch, whole["input_features"].shape[-1], dtype=torch.long, device=self.device),
            "qformer_input_ids": lambda: whole["qformer_input_ids"],
        }
        return {name: makers[name]() for name in asked if name in makers}

    def inputs(self, without=()):
        """The main inputs by name: what the model needs, masks, and `decoder_input_ids`; no labels, no cache, nothing of `without`."""
        makers = {
            "input_ids": lambda: self.ids(self.sizes.length),
            "pixel_values": self.image,
            "input_features": self.frames,
            "input_values": self.audio,
            "flattened_patches": self.patches,
            "decoder_input_ids": lambda: self.ids(self.sizes.target),
            "qformer_input_ids": lambda: self.ids(self.sizes.target),
        }
        robot = setting(self.config, "max_state_dim")  # elsewhere a state is what a recurrence keeps
        if robot is not None:
            makers["state"] = lambda: self.floats(self.sizes.batch, robot)
        found = {name: make() for name, make in makers.items() if name in self.parameters and name not in without}
        if self.model.main_input_name not in found and not (self.model.main_input_name == "inputs" and {"pixel_values", "input_ids"} & found.keys()):  # its other names
            raise Refused(
                f"{type(self.model).__name__}: no example for {self.model.main_input_name!r} can be made from its config.\n"
                "Hand one over: example={…}."
            )
        if "input_ids" in found and self.config.is_encoder_decoder is False:
            found.pop("decoder_input_ids", None)
        if "attention_mask" in self.parameters and "input_ids" in found:
            found["attention_mask"] = self.mask(self.sizes.length)
        missing = [
            name
            for name, p in self.parameters.items()
            if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and name not in found
        ]
        if missing:
            raise Refused(
                f"{type(self.model).__name__}: its forward asks for {', '.join(missing)}, of which no example can be made.\n"
                "Hand one over: example={…}."
            )
        return found

    def labels(self, names, output):
        """Labels that fit an output without labels, by name; {} where it cannot be told how they look.

        Logits of (batch, length, classes) ask for one class per place, logits of (batch, classes) for one class or float per row.
        """
        if set(names) == {"start_positions", "end_positions"} and "start_logits" in output:
            return {name: self.integers(0, output["start_logits"].shape[1], self.sizes.batch) for name in names}
        logits = output.get("logits")
        if names != ["labels"] or logits is None:
            return {}
        if logits.dim() == 3:
            return {"labels": self.integers(0, logits.shape[-1], *logits.shape[:2])}
        if logits.dim() != 2:
            return {}
        kind = getattr(self.config, "problem_type", None)
        if kind == "multi_label_classification":
            return {"labels": self.floats(*logits.shape)}
        if kind == "regression" or (kind is None and logits.shape[-1] == 1):
            return {"labels": self.floats(*logits.shape).squeeze(-1)}
        return {"labels": self.integers(0, logits.shape[-1], logits.shape[0])}
