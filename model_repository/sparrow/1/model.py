from ensemble.backend import StreamModel as TritonPythonModel  # noqa: F401 (the class that Triton looks for)
