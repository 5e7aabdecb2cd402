"""Writing with a model: sampling, decoding, chat."""
