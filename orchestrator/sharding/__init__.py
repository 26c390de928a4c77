"""How tensors are divided over devices, independent of any framework.

Mesh axes and their degrees (`layout`), the logical axes of a model (`axes`), and the strict rules that map one to the
other (`rules`).
"""
