"""The recommender: a small LLaMA-style decoder over a user's item sequence.

``model.config`` needs no torch, so that a command line can be checked without loading it.
"""
