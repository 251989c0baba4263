from ensemble.backend import GraphModel
from export.runners import open_graph


class TritonPythonModel(GraphModel):
    open_graph = staticmethod(open_graph)
