"""Perplexity, divergence and zero-shot tasks of a checkpoint beside its dense model; offline data."""
