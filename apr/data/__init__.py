"""From text to batches: tokenizer, corpus, token shards, windows of tokens."""
