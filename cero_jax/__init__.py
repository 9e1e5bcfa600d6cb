"""CERO in JAX."""
