"""Training: a snapshot in, a release out; the only package that imports torch."""
