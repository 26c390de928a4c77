"""The decoder language model and its layers, written for one device.

No collective and no vendor: parameters carry logical axis names, by which strategies shard them. `hf` and `hf_config`
translate the names and keys of transformers.
"""
