from ensemble.backend import FunctionModel
from export.resize import open_session_frame


class TritonPythonModel(FunctionModel):
    open_function = staticmethod(open_session_frame)
