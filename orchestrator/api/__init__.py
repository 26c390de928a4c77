"""What Python programs call: `orchestrator.train(...)` and its like, each in a module of this package.

Errors are exceptions of `orchestrator.errors`; lines for a person go to the logger `orchestrator`.
"""
