"""GPU kernels of gdn2-jax: arrays in, arrays out. No kernel exists yet."""
