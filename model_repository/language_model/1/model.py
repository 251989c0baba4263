from ensemble.backend import SequenceModel
from ensemble.generation import LanguageModel
from export.runners import open_decoder, open_device


class TritonPythonModel(SequenceModel):
    def open_server(self) -> LanguageModel:
        self.device = open_device(self.settings)
        return LanguageModel(self.config, open_decoder(self.settings, self.folder, self.config))
