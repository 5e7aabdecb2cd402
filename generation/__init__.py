"""Text from a model: sampling, decoding, chat."""
