"""Into other people's models: flax.nnx modules and PyTorch weights."""
