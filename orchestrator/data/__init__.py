"""From files to batches.

Files are read and tokenized into memory-mapped token stores, and a stream draws batches from them: the batch of a
step is a function of stores, seed and step alone.
"""
