from ensemble.backend import FunctionModel
from ensemble.frames import session_frame


class TritonPythonModel(FunctionModel):
    function = staticmethod(session_frame)
