"""Hugging Face model folders: which model one holds, its weights in and out, its tokenizer."""
