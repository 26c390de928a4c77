"""A training step without its hardware: compiled by Google's TPU compiler, or traced on fake tensors for its memory."""
