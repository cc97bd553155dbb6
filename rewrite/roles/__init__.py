"""What the nodes of a graph are for: roles found by dataflow alone, and `where`, which picks among them."""
