"""Verifiers, text to reward: plain functions `(question, completion, answer) -> float`, standard library only."""
