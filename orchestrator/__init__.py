"""Train one language model on whatever accelerators you can get, from one configuration.

Every run is described by one Hydra configuration (`orchestrator.config`), sharded through one strategy interface
(`orchestrator.strategies`) and saved in checkpoints that move between vendors (`orchestrator.checkpoint`).
"""

__version__ = "0.1.0"
