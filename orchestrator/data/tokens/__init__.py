"""Readers of data that other software has tokenized already.

`registry` lists them: Megatron, nanoGPT, llm.c, OLMo, MDS, LitData, and columns of ids in tables.
"""
