"""Readers of text data, one module per file format.

`registry` lists them and recognises a file by its content and name: plain text, JSON Lines, CSV, Parquet, Arrow, MDS,
LitData.
"""
