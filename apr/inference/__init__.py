"""A model that speaks: generation, chat, streaming, int8."""
