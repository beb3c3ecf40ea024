"""Recurrences: how often, and with what state, a core is applied. One file each."""
