from ensemble.backend import GraphModel
from export.runners import open_device, open_graphs


class TritonPythonModel(GraphModel):
    open_graphs = staticmethod(open_graphs)
    open_device = staticmethod(open_device)
