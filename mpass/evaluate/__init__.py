"""Accuracy of sparse prefill: retrieval tasks, perplexity and agreement with dense attention."""
