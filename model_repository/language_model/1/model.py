from ensemble.backend import SequenceModel
from ensemble.generation import LanguageModel
from ensemble.tokenizer import Tokenizer
from export.runners import open_decoder


class TritonPythonModel(SequenceModel):
    def initialize(self, args: dict[str, str]) -> None:
        super().initialize(args)
        decoder = open_decoder(self.settings["engine_kind"], self.folder, self.config)
        self.server = LanguageModel(self.config, Tokenizer(self.folder), decoder)
