"""Portable checkpoints: directories of safetensors and JSON.

Writing, reading, verifying, converting and signing them. Any layout on any backend reads what another one wrote;
docs/checkpoint-format.md specifies the format.
"""
