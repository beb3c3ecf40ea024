"""Evaluation: one decoder, and suites that turn a trained model into records and results without changing it."""

# Importing a suite registers it.
from stepladder.eval import depth, exact, likelihood, self_test

__all__ = ["depth", "exact", "likelihood", "self_test"]
