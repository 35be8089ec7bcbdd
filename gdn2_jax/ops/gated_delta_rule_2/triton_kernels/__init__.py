"""The operator as Triton kernels, launched by jax-triton; only what runs them imports triton."""
