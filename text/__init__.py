"""Text and what becomes of it: readers, tokenizer, templates, token files."""
