"""The configuration of a run.

Frozen dataclasses (`schema`), how Hydra composes them from `conf/` and the command line (`compose`), and the checks
that report every mistake at once (`validate`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from orchestrator.config.compose import Composed, read_config
    from orchestrator.config.convert import from_dict, to_dict
    from orchestrator.config.data_schema import DataConfig, SourceConfig, TokenizerConfig, TokensConfig
    from orchestrator.config.model_schema import ModelConfig
    from orchestrator.config.optim_schema import (
        AdafactorConfig,
        AdamWConfig,
        MuonConfig,
        OptimConfig,
        ScheduleConfig,
        SGDConfig,
    )
    from orchestrator.config.schema import CheckpointConfig, HardwareConfig, LayoutConfig, LoggerConfig, RunConfig
    from orchestrator.config.train_schema import TrainConfig
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "config.compose": ["Composed", "read_config"],
            "config.convert": ["from_dict", "to_dict"],
            "config.data_schema": ["DataConfig", "SourceConfig", "TokenizerConfig", "TokensConfig"],
            "config.model_schema": ["ModelConfig"],
            "config.optim_schema": [
                "AdafactorConfig",
                "AdamWConfig",
                "MuonConfig",
                "OptimConfig",
                "SGDConfig",
                "ScheduleConfig",
            ],
            "config.schema": ["CheckpointConfig", "HardwareConfig", "LayoutConfig", "LoggerConfig", "RunConfig"],
            "config.train_schema": ["TrainConfig"],
        },
    )

__all__ = [
    "AdafactorConfig",
    "AdamWConfig",
    "CheckpointConfig",
    "Composed",
    "DataConfig",
    "HardwareConfig",
    "LayoutConfig",
    "LoggerConfig",
    "ModelConfig",
    "MuonConfig",
    "OptimConfig",
    "RunConfig",
    "SGDConfig",
    "ScheduleConfig",
    "SourceConfig",
    "TokenizerConfig",
    "TokensConfig",
    "TrainConfig",
    "from_dict",
    "read_config",
    "to_dict",
]
