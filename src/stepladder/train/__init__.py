"""Training: from a frozen Run to weights, metrics and a summary, exactly repeatable and resumable."""
