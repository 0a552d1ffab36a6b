"""Other methods, to compare with: Attribution-based Parameter Decomposition (APD)."""

from spd_fast.baselines.apd import APDModel
from spd_fast.baselines.config import APDConfig, parse_apd_config
from spd_fast.baselines.trainer import APDTrainer

__all__ = ["APDConfig", "APDModel", "APDTrainer", "parse_apd_config"]
