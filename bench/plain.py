"""What the sweep takes beside transformers: modules of plain torch, timm's image models, diffusers' UNet and DiT.

    PLAIN["nn.TransformerEncoder"]()  ->  (model, example, at);  at(model, batch, length) -> inputs of other sizes
"""

import inspect
from importlib.util import find_spec

import torch
from torch import nn

from .tiny import Architecture


class Block(nn.Module):
    """`nn.MultiheadAttention` on itself, and what stands around it."""

    def __init__(self):
        super().__init__()
        self.norm, self.attention, self.out = nn.LayerNorm(24), nn.MultiheadAttention(24, 4, dropout=0.1, batch_first=True), nn.Linear(24, 5)

    def forward(self, x):
        h = self.norm(x)
        return self.out(x + self.attention(h, h, h, need_weights=False)[0])


def _sequence(model):
    torch.backends.mha.set_fastpath_enabled(False)  # torch's modules run another kernel where nobody asks for gradients
    at = lambda model, batch, length: {_names(model)[0]: torch.randn(batch, length, 24, generator=torch.Generator().manual_seed(batch))}
    return model.eval(), at(model, 3, 7), at


def _names(model):
    return list(inspect.signature(model.forward).parameters)


def _images(model, side=16, channels=3):
    at = lambda model, batch, length: {_names(model)[0]: torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(batch))}
    return model.eval(), at(model, 3, 7), at


def _encoder():
    return _sequence(nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 4, 56, batch_first=True), 2, enable_nested_tensor=False))


def _convolutions():
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return _images(nn.Sequential(*layers, nn.Linear(12, 5)))


def _perceptron():
    model = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Dropout(0.1), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 5))
    return _sequence(model)


def _timm(name, side=32, **sizes):
    def made():
        import timm

        return _images(timm.create_model(name, pretrained=False, num_classes=5, **sizes), side)

    return made


def _mixer():
    from timm.models.mlp_mixer import MlpMixer

    return _images(MlpMixer(num_classes=5, img_size=32, patch_size=8, num_blocks=2, embed_dim=32), 32)


def _called(model, inputs):
    """A model that takes several tensors: inputs(batch, length, floats) gives them by name."""

    def at(model, batch, length):
        generator = torch.Generator().manual_seed(batch)
        return inputs(batch, length, lambda *shape: torch.randn(*shape, generator=generator))

    return model.eval(), at(model, 3, 7), at


def _unet():
    from diffusers import UNet2DConditionModel

    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    model = UNet2DConditionModel(8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=24, attention_head_dim=4,
                                 down_block_types=down, up_block_types=up)  # fmt: skip
    given = lambda batch, length, floats: {"sample": floats(batch, 4, 8, 8), "timestep": torch.arange(batch) * 7 + 3, "encoder_hidden_states": floats(batch, length, 24)}
    return _called(model, given)


def _dit():
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(num_attention_heads=4, attention_head_dim=8, num_layers=2, sample_size=8, num_embeds_ada_norm=10)
    return _called(model, lambda batch, length, floats: {"hidden_states": floats(batch, 4, 8, 8), "timestep": torch.arange(batch) * 7 + 3, "class_labels": torch.arange(batch)})


def _sd3():
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
                                  joint_attention_dim=24, caption_projection_dim=32, pooled_projection_dim=20, pos_embed_max_size=8)  # fmt: skip
    given = lambda batch, length, floats: {
        "hidden_states": floats(batch, 4, 8, 8),
        "encoder_hidden_states": floats(batch, length, 24),
        "pooled_projections": floats(batch, 20),
        "timestep": torch.arange(batch) * 7 + 3,
    }
    return _called(model, given)


def _flux():
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(in_channels=12, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=4,
                                   joint_attention_dim=24, pooled_projection_dim=20, axes_dims_rope=(2, 2, 4))  # fmt: skip
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
    given = lambda batch, length, floats: {
        "hidden_states": floats(batch, 16, 12),
        "encoder_hidden_states": floats(batch, length, 24),
        "pooled_projections": floats(batch, 20),
        "timestep": (torch.arange(batch) + 1) / 8,
        "img_ids": places,
        "txt_ids": torch.zeros(length, 3),
    }
    return _called(model, given)


_PATCHES = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4)
TIMM = {
    "vit_tiny_patch16_224": _PATCHES,
    "deit_tiny_distilled_patch16_224": _PATCHES,
    "beit_base_patch16_224": _PATCHES,
    "cait_xxs24_224": _PATCHES,
    "eva02_tiny_patch14_224": _PATCHES | dict(embed_dim=48),
    "swin_tiny_patch4_window7_224": dict(img_size=32, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4)),
    "maxvit_rmlp_pico_rw_256": dict(side=64, img_size=64),
    "xcit_nano_12_p16_224": dict(side=64, img_size=64, embed_dim=32, depth=2, num_heads=4),
    "convnext_tiny": dict(depths=(1, 1, 1, 1), dims=(8, 12, 16, 24)),
    "resnet18": dict(layers=(1, 1, 1, 1), channels=(8, 12, 16, 24)),
    "densenet121": dict(growth_rate=8, block_config=(1, 1, 2, 1)),
    "regnetx_002": {},
    "mobilenetv3_small_050": {},
    "test_efficientnet": {},
    "test_nfnet": {},
    "test_mambaout": {},
}
MADE = {
    "plain torch": {"nn.TransformerEncoder": _encoder, "nn.MultiheadAttention": lambda: _sequence(Block()), "convolutions": _convolutions, "perceptron": _perceptron},
    "timm": {f"timm {name}": _timm(name, **sizes) for name, sizes in TIMM.items()} | {"timm mixer": _mixer},
    "diffusers": {"UNet2DConditionModel": _unet, "DiTTransformer2DModel": _dit, "SD3Transformer2DModel": _sd3, "FluxTransformer2DModel": _flux},
}
PLAIN = {name: make for group in MADE.values() for name, make in group.items()}


def entries():
    """What can be made here, as the sweep's entries: without timm or diffusers, none of theirs."""
    found = {group: group == "plain torch" or find_spec(group) is not None for group in MADE}
    return tuple(Architecture(name, "plain", (group,)) for group, made in MADE.items() if found[group] for name in made)
