"""A module whose code asserts something of values; apart from the tests, in which pytest writes asserts anew."""

import torch
from torch import nn


class Asserting(nn.Module):
    """An `assert` on values that checks the inputs alone, in the forms that Python writes it in."""

    def __init__(self, form):
        super().__init__()
        self.form = form

    def forward(self, x, lengths):
        longest = lengths.max().item()
        if self.form == "plain":
            assert longest <= x.shape[1], "too long"
        elif self.form == "not":
            assert not longest > x.shape[1]
        elif self.form == "or":
            assert longest <= x.shape[1] or x.shape[2] == 8
        else:
            x = x if longest <= x.shape[1] else x * 2  # no assert: it decides what is computed
        return x * (torch.arange(x.shape[1]) < lengths[:, None])[..., None]
