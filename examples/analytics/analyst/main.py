"""The analyst: asks all hospitals, and sees sums over them."""

from typing import Any

import numpy as np

from flame.sdk import Config
from flame.sdk.mode.analytics.analyst import Analyst


class Study(Analyst):
    def __init__(self, config: Config) -> None:
        self.config = config

    def analyse(self) -> dict[str, Any]:
        summary = self.summary()
        self.update_metrics(
            {"patients": summary["age"].count, **{f"mean {name}": each.mean for name, each in summary.items()}}
        )
        ages = self.histogram("age", np.arange(20, 90, 10))
        quantiles = self.quantiles(["bmi", "progression"], [0.25, 0.5, 0.75], error=0.01)
        self.update_metrics({f"median {name}": each[0.5].value for name, each in quantiles.items()})
        return {"summary": summary, "ages by decade": ages, "quantiles": quantiles}


study = Study(Config("config.json"))
study.compose()
study.run()
