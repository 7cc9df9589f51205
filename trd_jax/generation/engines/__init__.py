"""Engines: what turns prompts into completions."""
