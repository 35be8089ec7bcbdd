"""Kernels for Hopper GPUs in Pallas Mosaic GPU: arrays in, arrays out."""
