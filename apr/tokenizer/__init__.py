"""Text to token ids and back: tokenizers, their formats and families, training, chat templates."""
