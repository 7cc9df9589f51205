"""Text in, token ids out: problems, chat, prompts, scoring contexts."""
