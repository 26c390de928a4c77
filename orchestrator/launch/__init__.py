"""Starting a run: decide once, start the processes, and bring the run to its end.

`start` settles the configuration, finds the run that is meant and starts its processes; `run` is what each process
does; `worker` is the entry point of a process that was started here.
"""
