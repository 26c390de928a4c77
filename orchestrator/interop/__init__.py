"""Models of other software: Hugging Face directories, `torch.distributed.checkpoint`, and files that are pickle.

`importing` makes a checkpoint from them and reports what became of every tensor and key; `exporting` writes them.
"""
