"""Models for others to run: files that need no Stepladder."""
