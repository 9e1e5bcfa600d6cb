"""Prompts with their verifier."""
