from ensemble.backend import SequenceModel
from ensemble.generation import LanguageModel
from export.runners import open_decoder


class TritonPythonModel(SequenceModel):
    def open_server(self) -> LanguageModel:
        return LanguageModel(self.config, open_decoder(self.settings, self.folder, self.config))
