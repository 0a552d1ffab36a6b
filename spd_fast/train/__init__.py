"""Training: configuration, the trainer, checkpoints."""

from spd_fast.train.config import Config, TrainConfig, load_config, parse_config, set_keys
from spd_fast.train.trainer import Trainer

__all__ = ["Config", "TrainConfig", "Trainer", "load_config", "parse_config", "set_keys"]
