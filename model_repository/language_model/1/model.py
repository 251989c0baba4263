from ensemble.backend import SequenceModel
from ensemble.generation import LanguageModel
from export.runners import open_decoder


class TritonPythonModel(SequenceModel):
    def initialize(self, args: dict[str, str]) -> None:
        super().initialize(args)
        self.server = LanguageModel(self.config, open_decoder(self.settings, self.folder, self.config))
