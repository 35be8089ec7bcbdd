"""Gated Delta Rule-2: the public functions are in `api`, the definition in `recurrent`."""
