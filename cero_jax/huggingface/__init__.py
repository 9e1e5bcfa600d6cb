"""Hugging Face model folders: read the model's shape and weights, write weights back, use its tokenizer."""
