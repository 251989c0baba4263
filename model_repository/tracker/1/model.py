from ensemble.backend import BlsRunner, SequenceModel
from ensemble.tracker import Tracker


class TritonPythonModel(SequenceModel):
    def initialize(self, args: dict[str, str]) -> None:
        super().initialize(args)
        self.server = Tracker(self.config, BlsRunner(self.config))
