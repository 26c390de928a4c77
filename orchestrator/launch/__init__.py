"""Starting the processes of a job on one machine, and watching over them.

Under an engine (torchrun, Slurm, Kubernetes) the processes exist already, and this package is not used. The TPU
compiler of rehearsals is started here, too.
"""
