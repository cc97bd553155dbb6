"""A module that stays one call: its output's shapes, learnt by running it alone."""

import torch

from .trace import CannotTrace


def stand_in(tracer, module, path, args, kwargs):
    raise CannotTrace([path], NotImplementedError("opaque"))
