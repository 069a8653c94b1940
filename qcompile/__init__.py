"""qcompile: from a float ONNX model to a verified integer-only program."""
