"""Token mixers: parts that move information along the sequence, one file each."""
