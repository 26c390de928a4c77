"""The processes of a job: which one this is, how they are started, and what they decide together.

`world` reads the environment of the engine that started them; `local_processes` starts them on one machine;
`coordinator` votes, broadcasts and exchanges small values between them on their CPUs.
"""
