"""Losses: from a batch of outputs to one number."""
