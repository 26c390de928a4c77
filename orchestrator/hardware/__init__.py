"""Hardware targets: CPU, CUDA, ROCm, TPU, Trainium.

One module per target finds its devices and sets precision and process environment. `world` recognises the engine that
started the processes, `mesh` orders devices by their links.
"""
