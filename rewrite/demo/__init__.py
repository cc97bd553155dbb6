"""The main job on a real model, in front of your eyes: `rewrite demo`.

    docstrings -> a pretrained encoder with a new head -> for each spec: rewrite, train, merge, ONNX -> one table

Nothing in it is recorded beforehand.
"""

from .comparison import Result, demo
from .training import Schedule

__all__ = ["Result", "Schedule", "demo"]
