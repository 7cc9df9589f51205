"""The laboratory: a small world, its corpus, tokenizer and two models."""
