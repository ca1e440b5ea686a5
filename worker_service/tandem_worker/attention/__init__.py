"""Attention over the paged KV cache: one interface (backend.py), its implementations, and the choice among them."""
