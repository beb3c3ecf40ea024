"""Channel mixers: parts that transform each token by itself, one file each."""
