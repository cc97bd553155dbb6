"""The graph while a pass works on it: nouns become nodes, new tensors get their places, steps stand side by side."""
