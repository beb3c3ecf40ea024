"""Tensors only: the contract (base), the language model (lm), its parts, and the zoo of named architectures."""
