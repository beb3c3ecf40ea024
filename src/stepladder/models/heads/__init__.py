"""Heads: they own the likelihood and never materialise tokens x vocabulary unless logits are asked for."""
