"""From files to packed rows of tokens: documents, tokenizer, shards, packing."""
