"""Foundations that know neither torch nor language models: configuration, files, names, randomness."""
