from ensemble.backend import FramesModel
from export.resize import open_preprocessor
from export.runners import open_device, open_graphs


class TritonPythonModel(FramesModel):
    open_graphs = staticmethod(open_graphs)
    open_device = staticmethod(open_device)
    open_preprocessor = staticmethod(open_preprocessor)
