"""The operators of Mamba-2 and Mamba-3, and what both compute alike."""
