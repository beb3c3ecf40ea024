"""Experiments: ladders of runs, matched to a control, trained and evaluated as processes of their own."""
