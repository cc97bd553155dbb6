"""What the sweep takes beside transformers: modules of plain torch, timm's image models, diffusers' UNet and DiT.

    PLAIN["nn.TransformerEncoder"]()  ->  (model, example, at);  at(model, batch, length) -> inputs of other sizes
"""

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
    import inspect

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


PLAIN = {"nn.TransformerEncoder": _encoder, "nn.MultiheadAttention": lambda: _sequence(Block()), "convolutions": _convolutions, "perceptron": _perceptron}


def entries():
    """What can be imported here, as the sweep's entries."""
    return tuple(Architecture(name, "plain", ("plain torch",)) for name in PLAIN)
