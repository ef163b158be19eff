"""Algorithms as strangers to this library write them: one file each, importing public names only."""
