"""Builds what Triton serves: checkpoint to torch module to ONNX graph to model repository; then starts it."""
