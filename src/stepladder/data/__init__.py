"""Tokens only: synthetic tasks, corpora, tokenizers, packing and streams, in NumPy and never torch."""
