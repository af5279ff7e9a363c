"""A hospital: has a table of patients, and answers questions about its columns."""

import numpy as np

from flame.sdk import Config
from flame.sdk.mode.analytics.respondent import Respondent


class Hospital(Respondent):
    def __init__(self, config: Config) -> None:
        self.config = config

    def load_data(self) -> None:
        table = np.genfromtxt(self.config.dataset, delimiter=",", names=True)
        self.table = {name: table[name] for name in table.dtype.names}


hospital = Hospital(Config("config.json"))
hospital.compose()
hospital.run()
