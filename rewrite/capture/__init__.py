"""From a model to its graph: trace each call twice on fake tensors, align the two, tidy, stamp; what cannot be traced stays opaque."""
